// Sort them yourself: the emoji of a page are put into eight boxes by hand, and the model computes what becomes of that.
// Its one block reads the mean over the emoji, each computed by its own expert; what every expert makes of every emoji
// was measured, so that the mean, the norm and the classifier give the model's answer to any way of sorting.

import { cutout, emojiIn, paintCutouts, table } from "./lesson_figures.js";
import { random } from "./lesson_toy.js";
import { unpack } from "../../moevision/demo/assets/core_numbers.js";
import { fillBox, fixed, html, inkOn, percent, pictureSource, present } from "../../moevision/demo/assets/core_util.js";
import { PALETTE } from "../../moevision/demo/assets/palette.js";
/** @import { LessonNumbers, LessonSorting } from "./types.js" */

const DRAWS = 200;
const LETTERS = "ABCDEFGH";

/**
 * What a way of sorting costs: probability of each group; load of the fullest box over a fair share; emoji in the box
 * that the model gives them.
 * @typedef {{ answer: number[], busiest: number, alike: number }} Cost
 */

/**
 * What the model says of the page if these experts compute its emoji: probability of each group.
 * @param {LessonSorting} sorting @param {number[]} choice [P] the expert of each emoji
 */
export function answerOfChoice({ parts, head, bias, eps }, choice) {
  const [rows, width] = parts.shape;
  const experts = rows / choice.length;
  const numbers = unpack(parts);
  const channels = Array.from({ length: width }, (_, channel) => channel);
  const of = (emoji, channel) => numbers[(emoji * experts + choice[emoji]) * width + channel];
  const mean = channels.map((channel) => choice.reduce((sum, _, emoji) => sum + of(emoji, channel), 0) / choice.length);

  // The norm before the classifier; its weight and bias are in the classifier's.
  const middle = mean.reduce((sum, value) => sum + value, 0) / width;
  const spread = Math.sqrt(mean.reduce((sum, value) => sum + (value - middle) ** 2, 0) / width + eps);
  const normed = mean.map((value) => (value - middle) / spread);

  const weights = unpack(head);
  const scores = unpack(bias).map((start, group) => channels.reduce((sum, channel) => sum + weights[group * width + channel] * normed[channel], start));
  const powers = scores.map((score) => Math.exp(score - Math.max(...scores)));
  const sum = powers.reduce((left, right) => left + right);
  return powers.map((power) => power / sum);
}

/**
 * @param {LessonSorting} sorting @param {number[]} choice [P] @param {number} experts
 * @returns {Cost}
 */
export function costOfSorting(sorting, choice, experts) {
  const fullest = Math.max(...Array.from({ length: experts }, (_, expert) => emojiIn(choice, expert)));
  const alike = choice.filter((expert, emoji) => expert === sorting.own[emoji]).length;
  return { answer: answerOfChoice(sorting, choice), busiest: (fullest * experts) / choice.length, alike };
}

/**
 * Letters mean nothing until experts are told apart: of all ways to give each box an expert of its own, the one with
 * most emoji where the model has them. Found box by box: the best for every set of experts that are taken already.
 * @param {number[]} boxes [P] @param {number[]} own [P] @param {number} experts @returns {number[]} [P] the experts
 */
export function kindestExperts(boxes, own, experts) {
  const shared = (box, expert) => boxes.filter((mine, emoji) => mine === box && own[emoji] === expert).length;
  /** @type {Map<number, { alike: number, way: number[] }>} by the set of experts taken, as bits */
  let best = new Map([[0, { alike: 0, way: [] }]]);
  for (let box = 0; box < experts; box += 1) {
    /** @type {typeof best} */
    const next = new Map();
    best.forEach(({ alike, way }, taken) => {
      for (let expert = 0; expert < experts; expert += 1) {
        if (taken & (1 << expert)) continue;
        const set = taken | (1 << expert);
        const total = alike + shared(box, expert);
        if (total > (next.get(set)?.alike ?? -1)) next.set(set, { alike: total, way: [...way, expert] });
      }
    });
    best = next;
  }
  const [{ way }] = [...best.values()];
  return boxes.map((box) => way[box]);
}

/**
 * Means over sortings at random, to which the letters are as kind, and in what share of them the answer is the group.
 * @param {LessonSorting} sorting @param {number} experts @param {number} group
 */
export function randomSorting(sorting, experts, group) {
  const draw = random(1);
  const sum = { answer: 0, says: 0, busiest: 0, alike: 0 };
  for (let time = 0; time < DRAWS; time += 1) {
    const boxes = sorting.own.map(() => Math.floor(draw() * experts));
    const cost = costOfSorting(sorting, kindestExperts(boxes, sorting.own, experts), experts);
    sum.answer += cost.answer[group] / DRAWS;
    sum.says += Number(cost.answer[group] === Math.max(...cost.answer)) / DRAWS;
    sum.busiest += cost.busiest / DRAWS;
    sum.alike += cost.alike / DRAWS;
  }
  return sum;
}

/** @param {LessonNumbers} lesson */
export const sortingBox = ({ page, model: { grid: [, columns], experts }, views }) => html`<div class="ls-game" data-game>
  <div class="ls-page" style="--columns:${columns}"><img src="${pictureSource(views.all.picture.src)}" alt="A page of emoji: ${page.names.join(", ")}">
    <div class="ls-cells">${page.names.map((_, emoji) => html`<button type="button" data-emoji="${emoji}"></button>`)}</div></div>
  <div class="ls-boxes" role="group" aria-label="Boxes">${Array.from({ length: experts }, (_, box) => html`<button type="button" data-pick="${box}" aria-pressed="${box === 0}"
    style="--own:${PALETTE[box]}">${cutout(box, [])}<span><b style="background:${PALETTE[box]};color:${inkOn(PALETTE[box])}">${LETTERS[box]}</b> <span data-count></span></span></button>`)}</div>
  <div class="ls-deal"><p class="ls-facts" role="status" data-game-said></p>
    <p class="ls-row"><button type="button" class="mv-button" data-deal="random">Sort at random</button><button type="button" class="mv-quiet" data-deal="none">Start again</button></p></div>
  <div class="ls-costs" data-game-costs></div></div>`;

export class SortingGame {
  /** @param {HTMLElement} root holds `sortingBox()` @param {LessonNumbers} lesson */
  constructor(root, lesson) {
    this.box = /** @type {HTMLElement} */ (present(root.querySelector("[data-game]")));
    this.image = /** @type {HTMLImageElement} */ (present(this.box.querySelector("img")));
    this.lesson = lesson;
    this.hand = 0; // the box that the next emoji goes into
    this.who = "Your";
    this.dice = random(7);
    /** @type {ReturnType<typeof randomSorting> | null} */
    this.chance = null;
    /** @type {(number | null)[]} the box of each emoji */
    this.given = lesson.page.names.map(() => null);
    this.box.addEventListener("click", (event) => this.onClick(/** @type {HTMLElement} */ (event.target)));
    this.image.addEventListener("load", () => this.draw());
    this.draw();
  }

  get experts() { return this.lesson.model.experts; }

  /** @param {HTMLElement} target */
  onClick(target) {
    const { emoji, pick, deal } = target.closest("button")?.dataset ?? {};
    if (pick !== undefined) this.hand = Number(pick);
    if (emoji !== undefined) {
      const place = Number(emoji);
      this.given[place] = this.given[place] === this.hand ? null : this.hand;
      this.who = "Your";
    }
    if (deal === "random") [this.given, this.who] = [this.given.map(() => Math.floor(this.dice() * this.experts)), "This random"];
    if (deal === "none") this.given = this.given.map(() => null);
    this.draw();
  }

  draw() {
    const { given, lesson: { page, model } } = this;
    this.box.querySelectorAll("[data-emoji]").forEach((button, emoji) => {
      const box = given[emoji];
      const [letter, colour] = box === null ? ["", ""] : [LETTERS[box], PALETTE[box]];
      button.setAttribute("aria-label", `${page.names[emoji]}: ${letter ? `box ${letter}` : "in no box"}`);
      fillBox(button, letter && html`<b style="background:${colour};color:${inkOn(colour)}">${letter}</b>`);
      /** @type {HTMLElement} */ (button).style.boxShadow = colour && `inset 0 0 0 4px ${colour}`;
    });
    this.box.querySelectorAll("[data-pick]").forEach((button, box) => {
      button.setAttribute("aria-pressed", String(box === this.hand));
      button.setAttribute("aria-label", `Box ${LETTERS[box]}: ${emojiIn(given, box)} emoji`);
      present(button.querySelector("[data-count]")).textContent = String(emojiIn(given, box) || "");
      /** @type {HTMLElement} */ (present(button.querySelector("canvas"))).dataset.choice = given.join();
    });
    paintCutouts(this.box, this.image, model.grid);
    const left = given.filter((box) => box === null).length;
    const said = left ? `Box ${LETTERS[this.hand]} in hand. Click the emoji that belong together: ${left} of ${given.length} left.` : this.said();
    present(this.box.querySelector("[data-game-said]")).textContent = said;
    fillBox(this.box.querySelector("[data-game-costs]"), left ? null : this.costs());
  }

  /** The experts that compute the emoji as they are sorted. */
  choice() { return kindestExperts(/** @type {number[]} */ (this.given), this.lesson.sorting.own, this.experts); }

  said() {
    const { answer } = costOfSorting(this.lesson.sorting, this.choice(), this.experts);
    const best = answer.indexOf(Math.max(...answer));
    return `${this.who} sorting, computed by the model’s experts: “${this.lesson.model.groups[best]}”, ${percent(answer[best])}.`;
  }

  costs() {
    const { sorting, page, model: { groups } } = this.lesson;
    const group = groups.indexOf(page.group);
    this.chance ??= randomSorting(sorting, this.experts, group);
    /** @param {string} name @param {Cost} cost */
    const row = (name, { answer, busiest, alike }) => [name, percent(answer[group]), `${fixed(busiest, 1)}×`, `${alike} of ${page.names.length}`];
    return table(["sorted by", page.group, "fullest box", "where the router has them"], [
      row(this.who === "Your" ? "you" : "this draw", costOfSorting(sorting, this.choice(), this.experts)),
      row("the router", costOfSorting(sorting, sorting.own, this.experts)),
      [`chance, mean of ${DRAWS}`, percent(this.chance.answer), `${fixed(this.chance.busiest, 1)}×`, `${fixed(this.chance.alike, 1)} of ${page.names.length}`],
    ]);
  }
}

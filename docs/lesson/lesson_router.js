// You are the router: pieces of a photo are given to four experts by hand. The experts' layer is the model's last and the
// classifier reads the mean over patches, so that the score of the answer is a sum over pieces: the numbers of 16 pieces
// by 4 experts, each measured with the intervention `force`, give what the model says for any way of sharing them out.

import { random } from "./lesson_toy.js";
import { mosaicPlaces, table } from "./lesson_figures.js";
import { patchOf } from "../../moevision/demo/assets/core_mosaic.js";
import { brush, fillBox, fixed, html, inkOn, percent, present } from "../../moevision/demo/assets/core_util.js";
import { PALETTE } from "../../moevision/demo/assets/palette.js";
/** @import { LessonGame } from "./types.js" */

const DRAWS = 1000;
const BOXES = "ABCD";
const BOX_SIZE = [150, 104]; // px of a box's canvas

/** @typedef {{ answer: number, busiest: number, alike: number }} Cost probability of the label; load of the fullest box over a fair share; pieces grouped as the model does */

/**
 * What a way of sharing out costs.
 * @param {LessonGame} game @param {number[]} choice [16] which of the four experts
 * @returns {Cost}
 */
export function costOfChoice({ parts, bias, own }, choice) {
  const experts = parts[0].length;
  const counts = Array(experts).fill(0);
  choice.forEach((expert) => { counts[expert] += 1; });
  const score = choice.reduce((sum, expert, piece) => sum + parts[piece][expert], bias);
  return { answer: 1 / (1 + Math.exp(-score)), busiest: (Math.max(...counts) * experts) / choice.length, alike: choice.filter((expert, piece) => expert === own.choice[piece]).length };
}

/**
 * Numbers mean nothing until experts are told apart: of all ways to name the boxes, the one with most pieces as the
 * model has them.
 * @param {number[]} boxes [16] @param {number[]} own [16] @returns {number[]} [16] the same with the experts' places
 */
export function bestNames(boxes, own) {
  const ways = [0, 1, 2, 3].flatMap((a) => [0, 1, 2, 3].flatMap((b) => [0, 1, 2, 3].map((c) => [a, b, c, 6 - a - b - c]))).filter((way) => new Set(way).size === 4);
  const alike = (way) => boxes.filter((box, piece) => way[box] === own[piece]).length;
  const best = ways.reduce((left, right) => (alike(right) > alike(left) ? right : left));
  return boxes.map((box) => best[box]);
}

/** Mean cost of pieces given at random, named as kindly as a reader's. @param {LessonGame} game @returns {Cost} */
export function randomCost(game) {
  const draw = random(1);
  const sum = { answer: 0, busiest: 0, alike: 0 };
  for (let time = 0; time < DRAWS; time += 1) {
    const cost = costOfChoice(game, bestNames(game.parts.map(() => Math.floor(draw() * 4)), game.own.choice));
    for (const name of Object.keys(sum)) sum[name] += cost[name] / DRAWS;
  }
  return sum;
}

/** @param {LessonGame} game @param {string} source */
export const routerBox = ({ label, side }, source) => html`<div class="ls-game" data-game>
  <div class="ls-photo ls-pieces" style="--columns:${side}"><img src="${source}" alt="Photo of a ${label}, in ${side * side} pieces">
    <div class="ls-cells">${Array.from({ length: side * side }, (_, piece) => html`<button type="button" data-piece="${piece}"></button>`)}</div></div>
  <div class="ls-boxes" role="group" aria-label="Experts">${[...BOXES].map((letter, box) => html`<button type="button" data-box="${box}" aria-pressed="${box === 0}"><b style="background:${PALETTE[box]};color:${inkOn(PALETTE[box])}">${letter}</b> <span data-count></span>
    <canvas width="${BOX_SIZE[0] * 2}" height="${BOX_SIZE[1] * 2}" aria-hidden="true"></canvas></button>`)}</div>
  <div class="ls-deal"><p class="ls-row"><button type="button" class="mv-button" data-deal="own">The model’s choice</button><button type="button" class="mv-button" data-deal="random">At random</button><button type="button" class="mv-quiet" data-deal="none">Start again</button></p>
  <p class="ls-facts" role="status" data-game-said></p></div></div><div data-game-costs></div>`;

export class RouterGame {
  /** @param {HTMLElement} root holds `routerBox()` @param {LessonGame} game */
  constructor(root, game) {
    this.box = /** @type {HTMLElement} */ (present(root.querySelector("[data-game]")));
    this.costs = present(root.querySelector("[data-game-costs]"));
    this.game = game;
    this.photo = /** @type {HTMLImageElement} */ (present(this.box.querySelector("img")));
    this.brush = 0;
    this.who = "Yours";
    this.dice = random(7);
    /** @type {Cost | null} */
    this.random = null;
    /** @type {(number | null)[]} the box of each piece */
    this.given = game.parts.map(() => null);
    this.box.addEventListener("click", (event) => this.onClick(/** @type {HTMLElement} */ (event.target)));
    this.photo.addEventListener("load", () => this.draw());
    this.draw();
  }

  /** @param {HTMLElement} target */
  onClick(target) {
    const { piece, box, deal } = target.closest("button")?.dataset ?? {};
    if (box !== undefined) this.brush = Number(box);
    if (piece !== undefined) {
      const place = Number(piece);
      this.given[place] = this.given[place] === this.brush ? null : this.brush;
      this.who = "Yours";
    }
    if (deal === "own") [this.given, this.who] = [[...this.game.own.choice], "The model’s"];
    if (deal === "random") [this.given, this.who] = [this.given.map(() => Math.floor(this.dice() * 4)), "Random"];
    if (deal === "none") this.given = this.given.map(() => null);
    this.draw();
  }

  draw() {
    const { given, game } = this;
    this.box.querySelectorAll("[data-piece]").forEach((button, piece) => {
      const box = given[piece];
      const [letter, colour] = box === null ? ["", ""] : [BOXES[box], PALETTE[box]];
      button.setAttribute("aria-label", `Row ${Math.floor(piece / game.side) + 1}, column ${(piece % game.side) + 1}: ${letter || "not given"}`);
      fillBox(button, letter && html`<b style="background:${colour};color:${inkOn(colour)}">${letter}</b>`);
      /** @type {HTMLElement} */ (button).style.boxShadow = colour && `inset 0 0 0 4px ${colour}`;
    });
    this.box.querySelectorAll("[data-box]").forEach((button, box) => {
      button.setAttribute("aria-pressed", String(box === this.brush));
      const mine = given.flatMap((one, piece) => (one === box ? [piece] : []));
      present(button.querySelector("[data-count]")).textContent = mine.length === 1 ? "1 piece" : `${mine.length} pieces`;
      const canvas = present(button.querySelector("canvas"));
      const pen = brush(canvas);
      pen.clearRect(0, 0, canvas.width, canvas.height);
      if (!this.photo.naturalWidth) return;
      mosaicPlaces(mine.length, canvas.height / canvas.width).forEach(([x, y, side], place) => {
        pen.drawImage(this.photo, ...patchOf(this.photo, mine[place], [game.side, game.side]), x * canvas.width, y * canvas.width, side * canvas.width - 3, side * canvas.width - 3);
      });
    });
    const left = given.filter((box) => box === null).length;
    present(this.box.querySelector("[data-game-said]")).textContent = left ? `Expert ${BOXES[this.brush]} in hand: ${left} of ${given.length} pieces are not given.` : this.said();
    fillBox(this.costs, left ? null : this.table());
  }

  said() {
    const { answer, busiest } = this.cost();
    return `${this.who} choice: ${this.game.label} ${percent(answer, 1)}; the fullest expert has ${fixed(busiest, 1)} times its fair share.`;
  }

  cost() { return costOfChoice(this.game, bestNames(/** @type {number[]} */ (this.given), this.game.own.choice)); }

  table() {
    const { game } = this;
    this.random ??= randomCost(game);
    /** @param {string} name @param {Cost} cost */
    const row = (name, { answer, busiest, alike }) => [name, percent(answer, 1), `${fixed(busiest, 2)}×`, `${fixed(alike, alike % 1 ? 1 : 0)} of ${game.parts.length}`];
    const rows = [row("the model’s choice", costOfChoice(game, game.own.choice)), row(`at random, mean of ${DRAWS}`, this.random)];
    if (this.who !== "The model’s") rows.unshift(row(this.who === "Yours" ? "your choice" : "this random one", this.cost()));
    return table(["shared out by", game.label, "fullest expert", "grouped as the model, whatever the letters"], rows);
  }
}

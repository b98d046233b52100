// The toy of the lesson on a canvas: background and number say which expert a place goes to, points are told right or
// wrong, and a slider sets the weight of the balance loss while the router trains.

import { expertMark, table } from "./lesson_figures.js";
import { fresh, lossOf, route, sharing, spiral, train } from "./lesson_toy.js";
import { brush, clamp, fillBox, fixed, html, percent, present, rgba } from "../../moevision/demo/assets/core_util.js";
import { PALETTE } from "../../moevision/demo/assets/palette.js";
/** @import { Fill } from "../../moevision/demo/assets/types.js" */

const EXPERTS = 4;
const BALANCES = [0, 0.01, 0.03, 0.1, 0.3];
const SIDE = 480; // px of the canvas
const SPAN = 1.15; // the plane is shown from -SPAN to SPAN
const TILES = 60; // in which the plane is coloured
const STEPS_PER_FRAME = 4;
const LAST_STEP = 800;
const STARTS = 8;

export const playgroundBox = () => html`<div class="ls-play" data-playground>
  <div class="ls-plane"><canvas width="${SIDE}" height="${SIDE}" role="img" data-plane></canvas></div>
  <div class="ls-knobs">
    <div class="ls-row"><button type="button" class="mv-primary" data-play="run">Train</button><button type="button" class="mv-button" data-play="again">New start</button>
      <span class="mv-soft mv-num" data-play-box="steps"></span></div>
    <label class="ls-slider"><span>Weight of the balance loss: <output data-play-box="balance"></output></span>
      <input type="range" min="0" max="${BALANCES.length - 1}" step="1" value="0" data-play="balance"></label>
    <div class="ls-row"><span id="ls-experts-per-point">Experts per point</span><div class="mv-switch" role="group" aria-labelledby="ls-experts-per-point">
      ${[1, 2].map((number) => html`<button type="button" data-play="top-k" data-number="${number}" aria-pressed="${number === 1}">${number}</button>`)}</div></div>
    <div data-play-box="loads"></div><p class="ls-facts" data-play-box="facts"></p><p class="mv-hidden" role="status" data-play-box="said"></p></div></div>`;

/** Where the eight-starts table appears, in the answer. */
export const startsBox = () => html`<div data-starts><button type="button" class="mv-button" data-play="starts">Train ${STARTS} fresh starts each</button><div data-play-box="starts"></div></div>`;

export class Playground {
  /** @param {HTMLElement} root holds `playgroundBox()` and `startsBox()` */
  constructor(root) {
    this.root = root;
    this.points = spiral(240, 1);
    this.rules = { experts: EXPERTS, topK: 1, balance: 0 };
    this.seed = 1;
    this.running = false;
    this.net = fresh(EXPERTS, this.seed);
    root.addEventListener("click", (event) => this.onClick(/** @type {HTMLElement} */ (event.target)));
    this.find("[data-play=balance]").addEventListener("input", (event) => {
      this.rules.balance = BALANCES[Number(/** @type {HTMLInputElement} */ (event.target).value)];
      this.draw();
    });
    this.draw();
  }

  /** @param {string} selector @returns {HTMLElement} */
  find(selector) { return present(this.root.querySelector(selector)); }

  /** @param {string} name @param {Fill} markup */
  fill(name, markup) { fillBox(this.find(`[data-play-box=${name}]`), markup); }

  /** @param {HTMLElement} target */
  onClick(target) {
    const button = /** @type {HTMLButtonElement | null} */ (target.closest("button[data-play]"));
    if (!button) return;
    if (button.dataset.play === "run") this.toggle();
    if (button.dataset.play === "again") this.start(this.seed + 1);
    if (button.dataset.play === "top-k") {
      this.rules.topK = Number(button.dataset.number);
      this.root.querySelectorAll("[data-play=top-k]").forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
      this.start(this.seed);
    }
    if (button.dataset.play === "starts") void this.manyStarts(button);
  }

  /** @param {number} seed */
  start(seed) {
    this.seed = seed;
    this.net = fresh(EXPERTS, seed);
    this.draw();
  }

  toggle() {
    if (!this.running && this.net.steps >= LAST_STEP) this.start(this.seed);
    this.running = !this.running;
    // Where motion is unwanted, all steps are made before anything is drawn again.
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) this.advance(LAST_STEP);
    else if (this.running) requestAnimationFrame(() => this.frame());
    this.settle();
  }

  frame() {
    if (!this.running) return;
    this.advance(STEPS_PER_FRAME);
    if (this.running) requestAnimationFrame(() => this.frame());
    else this.settle();
  }

  /** @param {number} steps */
  advance(steps) {
    for (let step = 0; step < steps && this.net.steps < LAST_STEP; step += 1) train(this.net, this.points, this.rules);
    if (this.net.steps >= LAST_STEP) this.running = false;
    this.draw();
  }

  /** What a button and a screen reader say when training begins or ends. */
  settle() {
    this.find("[data-play=run]").textContent = this.running ? "Pause" : "Train";
    this.fill("said", this.running ? "" : `${this.net.steps} steps. ${this.words()}`);
  }

  words() {
    const { right, load } = lossOf(this.net.weights, this.points, this.rules);
    const { busiest, atWork } = sharing(load);
    return `${atWork} of ${EXPERTS} experts at work; busiest: ${fixed(busiest, 1)}× its fair share; ${percent(right)} of points right.`;
  }

  draw() {
    const { load } = lossOf(this.net.weights, this.points, this.rules);
    this.drawPlane();
    this.fill("balance", String(this.rules.balance));
    this.fill("steps", `${this.net.steps} of ${LAST_STEP} steps`);
    this.fill("loads", html`<ul class="ls-bars ls-fair" style="--fair:${100 / EXPERTS}%">${load.map((share, expert) => html`<li><span>${expertMark(expert)}</span>
      <span class="mv-bar mv-accent"><i style="width:${(share * 100).toFixed(1)}%;background:${PALETTE[expert]}"></i></span><span class="mv-num">${percent(share)}</span></li>`)}</ul>`);
    this.fill("facts", this.words());
  }

  drawPlane() {
    const canvas = /** @type {HTMLCanvasElement} */ (this.find("[data-plane]"));
    const pen = brush(canvas);
    const tile = SIDE / TILES;
    const middles = Array.from({ length: EXPERTS }, () => [0, 0, 0]);
    const place = (pixel) => (pixel / SIDE) * 2 * SPAN - SPAN;
    const pixel = (value) => ((clamp(value, -SPAN, SPAN) + SPAN) / (2 * SPAN)) * SIDE;
    pen.fillStyle = "#ffffff";
    pen.fillRect(0, 0, SIDE, SIDE);
    for (let index = 0; index < TILES * TILES; index += 1) {
      const [left, top] = [(index % TILES) * tile, Math.floor(index / TILES) * tile];
      const expert = route(this.net.weights, this.rules, { x: place(left + tile / 2), y: place(top + tile / 2) }).chosen[0];
      pen.fillStyle = rgba(PALETTE[expert], 0.6);
      pen.fillRect(left, top, tile, tile);
      const sum = middles[expert];
      sum[0] += left + tile / 2;
      sum[1] += top + tile / 2;
      sum[2] += 1;
    }
    for (const { x, y, label } of this.points) {
      const right = route(this.net.weights, this.rules, { x, y }).score > 0 === (label === 1);
      pen.beginPath();
      pen.arc(pixel(x), pixel(y), 5, 0, 2 * Math.PI);
      pen.fillStyle = label ? "#111111" : "#ffffff";
      pen.fill();
      pen.lineWidth = right ? 1.5 : 3;
      pen.strokeStyle = right ? "#111111" : "#d0021b";
      pen.stroke();
    }
    pen.font = "700 26px system-ui, sans-serif";
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    middles.forEach(([x, y, tiles], expert) => {
      if (tiles < 12) return;
      pen.lineWidth = 6;
      pen.strokeStyle = "#ffffff";
      pen.strokeText(String(expert), x / tiles, y / tiles);
      pen.fillStyle = "#111111";
      pen.fillText(String(expert), x / tiles, y / tiles);
    });
    canvas.setAttribute("aria-label", `240 points in two spiral arms, and which of ${EXPERTS} experts each place goes to. ${this.words()}`);
  }

  /**
   * Without and with balance from the same fresh starts; the page stays alive between two of them.
   * @param {HTMLButtonElement} button
   */
  async manyStarts(button) {
    button.disabled = true;
    const rows = [];
    for (const balance of [0, 0.1]) {
      const ends = [];
      for (let seed = 1; seed <= STARTS; seed += 1) {
        const net = fresh(EXPERTS, seed);
        const rules = { experts: EXPERTS, topK: 1, balance };
        for (let step = 0; step < LAST_STEP; step += 1) train(net, this.points, rules);
        const { load, right } = lossOf(net.weights, this.points, rules);
        ends.push({ ...sharing(load), right });
        await new Promise((resume) => { setTimeout(resume); });
        this.fill("starts", html`<p class="mv-soft">${rows.length * STARTS + ends.length} of ${2 * STARTS} trained</p>`);
      }
      /** @param {(end: { busiest: number, atWork: number, right: number }) => number} of */
      const mean = (of) => ends.reduce((total, end) => total + of(end), 0) / STARTS;
      rows.push([`weight ${balance}`, fixed(mean((end) => end.atWork), 1), `${fixed(mean((end) => end.busiest), 1)}×`, percent(mean((end) => end.right), 1)]);
    }
    this.fill("starts", table(["mean of 8 starts", "experts at work", "busiest", "points right"], rows));
    button.disabled = false;
  }
}

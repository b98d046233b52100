// The toy of the lesson on two canvases: which expert each place goes to, and each expert's load over time. A slider
// sets the weight of the balance loss, also while the router trains.

import { fresh, lossOf, route, sharing, spiral, train } from "./lesson_toy.js";
import { brush, clamp, fillBox, fixed, html, percent, present, rgba } from "../../moevision/demo/assets/core_util.js";
import { PALETTE } from "../../moevision/demo/assets/palette.js";
/** @import { Fill } from "../../moevision/demo/assets/types.js" */

const EXPERTS = 4;
const BALANCES = [0, 0.01, 0.03, 0.1, 0.3];
const SIDE = 480; // px of the canvas
const HIGH = 150; // px of the curve
const SPAN = 1.15; // the plane is shown from -SPAN to SPAN
const TILES = 48; // in which the plane is coloured
// The training goes by the clock, not by the frames that a busy machine can draw: a frame is worth the ticks since the last.
const TICK_MS = 1000 / 60;
const MOST_MS = 500; // that a frame makes up for: training takes time itself, and a page that slept doesn't run ahead
// Most happens in the first steps, and in those after the slider was moved: these are shown slowly.
const PACES = [[40, 1 / 4], [160, 1], [Infinity, 5]]; // until so many steps since then: steps per tick
const TICKS = 288; // that have a step, up to 800 steps: the width of the curve
// After a press of Train and after a move of the slider: what the answer counts after; made at once where motion is unwanted.
const SOME_STEPS = 800;

export const playgroundBox = () => html`<div class="ls-play" data-playground>
  <figure class="ls-plane"><canvas width="${SIDE}" height="${SIDE}" role="img" data-plane></canvas><figcaption>Background and number: the expert. Red ring: wrong.</figcaption></figure>
  <div class="ls-knobs">
    <div class="ls-row"><button type="button" class="mv-primary" data-play="run">Train</button><button type="button" class="mv-button" data-play="again">New start</button>
      <span class="mv-soft mv-num" data-play-box="steps"></span></div>
    <label class="ls-slider"><span>Weight of the balance loss: <output data-play-box="balance"></output></span>
      <input type="range" min="0" max="${BALANCES.length - 1}" step="1" value="0" data-play="balance"></label>
    <p class="ls-facts" data-play-box="facts"></p><p class="mv-hidden" role="status" data-play-box="said"></p></div>
  <figure class="ls-curve"><canvas width="${SIDE}" height="${HIGH}" role="img" aria-label="Share of the points that each expert gets, step by step" data-curve></canvas>
      <figcaption>Bands: each expert’s share of the points, from left to right. Dashed: a move of the slider, after which steps are drawn wider, as at the start. Black line: points right.</figcaption></figure></div>`;

const stillWanted = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

export class Playground {
  /** @param {HTMLElement} root holds `playgroundBox()` */
  constructor(root) {
    this.root = root;
    this.points = spiral(240, 1);
    this.rules = { experts: EXPERTS, topK: 1, balance: 0 };
    this.running = false;
    this.seed = 1;
    this.net = fresh(EXPERTS, this.seed);
    /** @type {{ load: number[], right: number, balance: number }[]} at each tick that had a step */
    this.past = [];
    this.moved = 0; // the step at which the slider was moved last
    this.last = 0; // the step at which the training stops
    this.due = 0; // part of a step that is waiting for its tick
    this.drawn = 0; // when the last frame was, in ms
    this.waiting = 0; // ms that are no tick yet
    root.addEventListener("click", (event) => this.onClick(/** @type {HTMLElement} */ (event.target)));
    this.find("[data-play=balance]").addEventListener("input", (event) => {
      this.rules.balance = BALANCES[Number(/** @type {HTMLInputElement} */ (event.target).value)];
      this.moved = this.net.steps;
      this.draw();
      if (this.last && !stillWanted()) this.run();
    });
    this.draw();
  }

  /** @param {string} selector @returns {HTMLElement} */
  find(selector) { return present(this.root.querySelector(selector)); }

  /** @param {string} name @param {Fill} markup */
  fill(name, markup) { fillBox(this.find(`[data-play-box=${name}]`), markup); }

  /** @param {HTMLElement} target */
  onClick(target) {
    const { play } = target.closest("button")?.dataset ?? {};
    if (play === "run" && !this.running) this.run();
    else if (play === "run") this.running = false;
    if (play === "again") this.start(this.seed + 1);
  }

  /** @param {number} seed */
  start(seed) {
    this.seed = seed;
    this.net = fresh(EXPERTS, seed);
    this.past = [];
    [this.moved, this.last] = [0, this.running ? SOME_STEPS : 0];
    this.draw();
  }

  /** Train for some steps from here, or go on for as many. */
  run() {
    const asleep = !this.running;
    this.last = this.net.steps + SOME_STEPS;
    this.running = true;
    if (stillWanted()) {
      while (this.running) this.tick();
      this.draw();
    } else if (asleep) {
      [this.drawn, this.waiting] = [performance.now(), 0];
      requestAnimationFrame(() => this.frame());
    }
    this.settle();
  }

  frame() {
    const now = performance.now();
    this.waiting += Math.min(now - this.drawn, MOST_MS);
    this.drawn = now;
    for (; this.running && this.waiting >= TICK_MS; this.waiting -= TICK_MS) this.tick();
    this.draw();
    if (this.running) requestAnimationFrame(() => this.frame());
    else this.settle();
  }

  /** What one tick is worth. */
  tick() {
    const since = this.net.steps - this.moved;
    this.due += present(PACES.find(([until]) => since < until))[1];
    for (; this.due >= 1; this.due -= 1) {
      const { load, right } = train(this.net, this.points, this.rules);
      if (this.due < 2) this.past.push({ load, right, balance: this.rules.balance });
    }
    if (this.net.steps >= this.last) this.running = false;
  }

  /** What a button and a screen reader say when training begins or ends. */
  settle() {
    this.find("[data-play=run]").textContent = this.running ? "Pause" : "Train";
    this.fill("said", this.running ? "" : `${this.net.steps} steps. ${this.find("[data-play-box=facts]").textContent}`);
  }

  draw() {
    const { load, right } = lossOf(this.net.weights, this.points, this.rules);
    const { busiest, atWork } = sharing(load);
    const words = `${atWork} of ${EXPERTS} experts at work; busiest: ${fixed(busiest, 1)}× its fair share; ${percent(Math.floor(right * 100) / 100)} of points right.`;
    this.drawPlane(words);
    this.drawCurve();
    this.fill("balance", String(this.rules.balance));
    this.fill("steps", `${this.net.steps} steps`);
    this.fill("facts", words);
  }

  /** The loads so far as bands that fill the height, and the share of points that are told right. */
  drawCurve() {
    const pen = brush(/** @type {HTMLCanvasElement} */ (this.find("[data-curve]")));
    const wide = SIDE / Math.max(TICKS, this.past.length);
    pen.fillStyle = "#ffffff";
    pen.fillRect(0, 0, SIDE, HIGH);
    this.past.forEach(({ load }, tick) => {
      let top = 0;
      load.forEach((share, expert) => {
        pen.fillStyle = PALETTE[expert];
        pen.fillRect(Math.floor(tick * wide), top * HIGH, Math.ceil(wide), share * HIGH + 0.5);
        top += share;
      });
    });
    pen.strokeStyle = "#111111";
    pen.lineWidth = 2.5;
    pen.beginPath();
    this.past.forEach(({ right }, tick) => pen.lineTo((tick + 0.5) * wide, (1 - right) * HIGH + 1));
    pen.stroke();
    pen.lineWidth = 1.5;
    pen.setLineDash([5, 4]);
    this.past.forEach(({ balance }, tick) => {
      if (balance === (this.past[tick - 1]?.balance ?? balance)) return;
      pen.beginPath();
      pen.moveTo(tick * wide, 0);
      pen.lineTo(tick * wide, HIGH);
      pen.stroke();
    });
    pen.setLineDash([]);
  }

  /** @param {string} words */
  drawPlane(words) {
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
    canvas.setAttribute("aria-label", `240 points in two spiral arms, and which of ${EXPERTS} experts each place goes to. ${words}`);
  }
}

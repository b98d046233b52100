// The opening: the patches of a photo fly to the experts that compute them. And beside it the other picture of the
// idea: a row of experts that grows, of which two are lit, whatever the number.

import { mosaicPlaces } from "./lesson_figures.js";
import { patchOf } from "../../moevision/demo/assets/core_mosaic.js";
import { brush, clamp, fillBox, html, inkOn, present } from "../../moevision/demo/assets/core_util.js";
import { PALETTE } from "../../moevision/demo/assets/palette.js";
/** @import { LessonNumbers } from "./types.js" */

const FLIGHT_MS = 900;
const SPREAD_MS = 1300; // from the first patch that leaves to the last one
const smooth = (share) => share * share * (3 - 2 * share);

/** @param {string} about @param {string} caption */
export const heroBox = (about, caption) => html`<figure class="ls-hero"><canvas role="img" aria-label="${about}" data-hero></canvas>
  <figcaption>${caption} <button type="button" class="mv-quiet" data-fly>Play again</button></figcaption></figure>`;

/** The layers in a row, those with experts in their colours. @param {LessonNumbers["model"]} model @param {string} answer */
export const layersStrip = ({ depth, layers, experts }, answer) => html`<p class="ls-strip" role="img" aria-label="${depth} layers in a row; L${layers.join(" and L")} have ${experts} experts each">patches →
  ${Array.from({ length: depth }, (_, layer) => html`<b>L${layer}<span>${Array.from({ length: layers.includes(layer) ? experts : 1 }, (__, expert) => html`<i style="background:${layers.includes(layer) ? PALETTE[expert] : "var(--soft)"}"></i>`)}</span></b>`)} → ${answer}</p>`;

/**
 * Draw the patches on their way, and again whenever the page is asked to.
 * @param {HTMLElement} root holds `heroBox()` @param {string} source @param {string} first one digit per patch
 * @param {[number, number]} grid
 */
export function startHero(root, source, first, grid) {
  const canvas = /** @type {HTMLCanvasElement} */ (present(root.querySelector("[data-hero]")));
  const photo = new Image();
  let started = -Infinity;
  const still = () => matchMedia("(prefers-reduced-motion: reduce)").matches;
  const paint = (now) => {
    drawSorting(canvas, photo, first, grid, now - started);
    if (now - started < FLIGHT_MS + SPREAD_MS) requestAnimationFrame(paint);
  };
  const fly = () => { started = still() ? -Infinity : performance.now(); requestAnimationFrame(paint); };
  photo.addEventListener("load", fly);
  photo.src = source;
  present(root.querySelector("[data-fly]")).addEventListener("click", fly);
  addEventListener("resize", () => photo.complete && paint(performance.now()));
}

/**
 * @param {HTMLCanvasElement} canvas @param {HTMLImageElement} photo @param {string} first @param {[number, number]} grid
 * @param {number} ms since the first patch left
 */
function drawSorting(canvas, photo, first, grid, ms) {
  const width = canvas.clientWidth;
  const narrow = width < 480;
  const [columns, rows] = [4, 2];
  const gap = 12;
  const photoSide = narrow ? width : Math.round(width * 0.42);
  const [left, top] = narrow ? [0, photoSide + gap] : [photoSide + 3 * gap, 0];
  const across = (width - left - gap * (columns - 1)) / columns;
  const high = narrow ? across * 1.25 : (photoSide - gap) / rows;
  const height = top + rows * high + gap * (rows - 1);
  const scale = devicePixelRatio || 1;
  canvas.width = width * scale;
  canvas.height = height * scale;
  canvas.style.height = `${height}px`;
  const pen = brush(canvas);
  pen.scale(scale, scale);
  pen.drawImage(photo, ...patchOf(photo, 0, [1, 1]), 0, 0, photoSide, photoSide);
  const name = 24;
  const targets = new Map();
  const flown = (patch) => smooth(clamp((ms - (patch / first.length) * SPREAD_MS) / FLIGHT_MS, 0, 1));
  PALETTE.forEach((colour, expert) => {
    const [x, y] = [left + (expert % columns) * (across + gap), top + Math.floor(expert / columns) * (high + gap)];
    const mine = [...first].flatMap((digit, patch) => (Number(digit) === expert ? [patch] : []));
    pen.strokeStyle = colour;
    pen.lineWidth = 2;
    pen.strokeRect(x + 1, y + 1, across - 2, high - 2);
    pen.fillStyle = colour;
    pen.fillRect(x, y, across, name);
    pen.fillStyle = inkOn(colour);
    pen.font = "700 14px Arial, sans-serif";
    pen.textBaseline = "middle";
    pen.textAlign = "left";
    pen.fillText(String(expert), x + 8, y + name / 2 + 1);
    pen.textAlign = "right";
    pen.fillText(String(mine.filter((patch) => flown(patch) === 1).length || (ms < FLIGHT_MS + SPREAD_MS ? "" : "none")), x + across - 8, y + name / 2 + 1);
    const inner = across - 8;
    mosaicPlaces(mine.length, (high - name - 8) / inner).forEach(([mx, my, side], place) => {
      targets.set(mine[place], [x + 4 + mx * inner, y + name + 4 + my * inner, side * inner - 1]);
    });
  });
  const cell = photoSide / grid[1];
  targets.forEach(([x, y, side], patch) => {
    const share = flown(patch);
    const [fromX, fromY] = [(patch % grid[1]) * cell, Math.floor(patch / grid[1]) * cell];
    if (share > 0) { pen.fillStyle = "rgba(255,255,255,.62)"; pen.fillRect(fromX, fromY, cell - 1, cell - 1); }
    const size = cell + (side - cell) * share;
    pen.drawImage(photo, ...patchOf(photo, patch, grid), fromX + (x - fromX) * share, fromY + (y - fromY) * share - 40 * Math.sin(Math.PI * share), size, size);
  });
}

/** Numbers of experts that the row can have. */
const SIZES = [1, 2, 4, 8, 16, 32, 64];
/** @param {number} count */
export const millions = (count) => `${(count / 1e6).toFixed(count < 1e7 ? 2 : 1)} M`;

/**
 * Parameters and multiply-adds for one patch: of experts of which `kept` run, and of one dense network as large.
 * @param {number} experts @param {LessonNumbers["model"]} model
 */
export function costOf(experts, { width, hidden, top_k: kept }) {
  const one = 2 * width * hidden; // multiply-adds; as many weights, and a constant per output
  const scores = experts > 1 ? width * experts : 0;
  return { parameters: experts * (one + hidden + width) + scores, sparse: Math.min(kept, experts) * one + scores, dense: experts * one };
}

/** One expert, drawn: every number of a layer is joined with every number of the next. @param {LessonNumbers["model"]} model */
export function expertDrawing({ width, hidden }) {
  const layers = [[40, 9, width], [150, 14, hidden], [260, 9, width]];
  const at = (count, place) => 100 + (place - (count - 1) / 2) * 12;
  const lines = layers.slice(1).flatMap(([x, count], before) => Array.from({ length: layers[before][1] }, (_, from) => Array.from({ length: count }, (__, to) => `M${layers[before][0]} ${at(layers[before][1], from)}L${x} ${at(count, to)}`)).flat());
  return html`<svg class="ls-expert" viewBox="0 0 300 222" role="img" aria-label="An expert: ${width} numbers in, ${hidden} in the middle, ${width} out">
    <path d="${lines.join("")}" fill="none" stroke="${PALETTE[0]}" stroke-width=".5" opacity=".55"></path>
    ${layers.map(([x, count]) => Array.from({ length: count }, (_, place) => html`<circle cx="${x}" cy="${at(count, place)}" r="4" fill="${PALETTE[0]}"></circle>`))}
    ${layers.map(([x, , real], place) => html`<text x="${x}" y="212" text-anchor="middle">${real} ${["in", "middle", "out"][place]}</text>`)}</svg>`;
}

/** @param {LessonNumbers["model"]} model */
export const sizesBox = (model) => html`<figure class="ls-one" data-sizes>${expertDrawing(model)}<figcaption>One expert: an MLP of ${millions(costOf(1, model).parameters)} parameters. A few of its numbers are drawn.</figcaption></figure>
  <label class="ls-slider"><span>Experts in the layer: <output data-sizes-box="count"></output></span>
    <input type="range" min="1" max="${SIZES.length - 1}" step="1" value="3" data-size></label>
  <div data-sizes-box="rows"></div>`;

/** @param {HTMLElement} root holds `sizesBox()` @param {LessonNumbers["model"]} model */
export function startSizes(root, model) {
  const slider = /** @type {HTMLInputElement} */ (present(root.querySelector("[data-size]")));
  const most = costOf(SIZES[SIZES.length - 1], model).dense;
  const draw = () => {
    const experts = SIZES[Number(slider.value)];
    const cost = costOf(experts, model);
    const row = (title, lit, work) => html`<p class="ls-sizes-title">${title}</p><div class="ls-columns" aria-hidden="true">${Array.from({ length: experts }, (_, expert) => html`<i class="${lit(expert) ? "ls-lit" : ""}"></i>`)}</div>
      <ul class="ls-bars">${[["parameters", cost.parameters], ["work per patch", work]].map(([name, count]) => html`<li><span>${name}</span><span class="mv-bar mv-accent"><i style="width:${Math.max(0.6, (Number(count) / most) * 100).toFixed(1)}%"></i></span><span class="mv-num">${millions(count)}</span></li>`)}</ul>`;
    fillBox(root.querySelector("[data-sizes-box=count]"), String(experts));
    // The two that are lit stand apart, as a router may choose them.
    const two = [Math.floor(experts / 3), Math.floor((experts * 3) / 4)];
    fillBox(root.querySelector("[data-sizes-box=rows]"), html`<div class="ls-sizes">${row(`Mixture of experts: ${Math.min(model.top_k, experts)} of ${experts} run`, (expert) => two.includes(expert), cost.sparse)}
      ${row("Dense network as large: all of it runs", () => true, cost.dense)}</div>`);
  };
  slider.addEventListener("input", draw);
  draw();
}

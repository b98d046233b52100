// A row of experts that grows, of which one is lit, whatever the number; below it the dense network that is as large.

import { millions } from "../../moevision/demo/assets/core_kinds.js";
import { fillBox, html, present } from "../../moevision/demo/assets/core_util.js";
import { PALETTE } from "../../moevision/demo/assets/palette.js";
/** @import { LessonNumbers } from "./types.js" */

/** Numbers of experts that the row can have. */
const SIZES = [1, 2, 4, 8, 16, 32, 64];

/**
 * Parameters and multiply-adds for one emoji: of experts of which `kept` run, and of one dense network as large.
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
    const row = (title, isLit, work) => html`<p class="ls-sizes-title">${title}</p><div class="ls-columns" aria-hidden="true">${Array.from({ length: experts }, (_, expert) => html`<i class="${isLit(expert) ? "ls-lit" : ""}"></i>`)}</div>
      <ul class="ls-bars">${[["parameters", cost.parameters], ["work per emoji", work]].map(([name, count]) => html`<li><span>${name}</span><span class="mv-bar mv-accent"><i style="width:${Math.max(0.6, (Number(count) / most) * 100).toFixed(1)}%"></i></span><span class="mv-num">${millions(count)}</span></li>`)}</ul>`;
    fillBox(root.querySelector("[data-sizes-box=count]"), String(experts));
    const lit = Math.floor(experts / 3); // any of them, as a router may choose
    fillBox(root.querySelector("[data-sizes-box=rows]"), html`<div class="ls-sizes">${row(`Mixture of experts: ${model.top_k} of ${experts} runs`, (expert) => expert === lit, cost.sparse)}
      ${row("Dense network as large: all of it runs", () => true, cost.dense)}</div>`);
  };
  slider.addEventListener("input", draw);
  draw();
}

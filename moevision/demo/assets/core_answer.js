// Beside the image: the prediction with that of the dense twin, the work of the experts, and what each block would say.

import { expertShares, loadNote, sharedWords } from "./core_kinds.js";
import { chip, expertColour, fillBox, fixed, html, layerExpert, percent, term } from "./core_util.js";
/** @import { ViewState } from "./core_state.js" */
/** @import { Fill, Guess, View } from "./types.js" */

/** @param {Fill} title @param {Guess[]} top @param {string | null} label */
export function predictionColumn(title, top, label) {
  const row = ({ class: name, p }) => html`<li><span class="mv-class">${name}${name === label && html` <small>label</small>`}</span>
    <span class="mv-num">${percent(p)}</span><span class="mv-bar mv-accent"><i style="width:${p * 100}%"></i></span></li>`;
  return html`<div><h3>${title}</h3><ol class="mv-top">${top.map(row)}</ol></div>`;
}

/** @param {HTMLElement} box @param {View} view */
export function drawPrediction(box, view) {
  const { moe, dense } = view.prediction;
  fillBox(box, (dense || moe.length > 2) && html`<h2>Prediction</h2><div class="mv-two">
    ${predictionColumn("with experts", moe, view.picture.label)}
    ${dense && predictionColumn(term("dense", "dense twin"), dense, view.picture.label)}</div>
    ${view.picture.credit && html`<details class="mv-note"><summary data-key="credit">Photo credit</summary>${view.picture.credit}</details>`}`);
}

/**
 * Work of the experts; for Soft MoE, where all slots are alike, the part of the output that comes from them.
 * @param {HTMLElement} box @param {ViewState} state
 */
export function drawLoads(box, state) {
  const { view, currentLayer: layer } = state;
  const experts = layer.num_experts;
  const soft = layer.kind === "soft";
  const [done, asked] = soft ? [expertShares(layer), expertShares(layer)] : [layer.counts, layer.requested];
  const mean = done.reduce((sum, count) => sum + count, 0) / experts;
  const top = Math.max(...asked, ...done, soft ? 1e-6 : 1);
  const number = (count) => (soft ? fixed(count * 100, 1) : count);
  const bar = (count, expert) => html`<button type="button" class="mv-loadbar" data-action="highlight" data-expert="${expert}"
      data-key="load-${expert}" aria-pressed="${state.highlight === expert}"
      aria-label="${layerExpert(layer, expert)} ${soft ? `gives ${number(count)} % of the output` : `computes ${number(count)} choices`}. Highlight its patches">
    <span class="mv-loadtrack"><i class="mv-lost" style="height:${(asked[expert] / top) * 100}%"></i>
      <i style="height:${(count / top) * 100}%;background:${expertColour(expert, experts)}"></i></span>
    <span class="mv-loadcount">${number(count)}</span>${chip(expert, experts)}</button>`;
  fillBox(box, html`<div class="mv-strip-head"><h2>${soft ? term("part", "Parts of the output") : term("load", "Load")} in ${layer.name}${soft && ", %"}</h2>
      ${!soft && html`<span class="mv-soft">${term("slowest", "max/mean load")} <b class="mv-num">${fixed(layer.slowest)}</b></span>`}</div>
    <div class="mv-loads ${experts > 12 ? "mv-many" : ""}" style="--ideal:${mean / top}">${done.map(bar)}
      <div class="mv-ideal" aria-hidden="true"></div></div>
    <p class="mv-note">${loadNote(view, layer)} ${sharedWords(layer)} Click a bar to highlight its patches.</p>`);
}

/**
 * What the classifier would say after each block (the logit lens, demo/lens.py).
 * @param {HTMLElement} box @param {View} view
 */
export function drawLens(box, view) {
  const { lens } = view;
  const experts = new Map(view.layers.map(({ layer, name }) => [layer, name]));
  const row = (top, block) => html`<li><span class="${experts.has(block) ? "mv-strong" : ""}">${experts.get(block) ?? `block ${block}`}</span>
    <span class="mv-class">${top[0].class}</span><span class="mv-bar mv-accent"><i style="width:${top[0].p * 100}%"></i></span>
    <span class="mv-num">${percent(top[0].p)}</span></li>`;
  fillBox(box, lens && lens.length > 0 && html`<h2>After each block</h2><ol class="mv-lens">${lens.map(row)}</ol>
    <p class="mv-note">An untrained readout (logit lens): the last norm and the classifier are put on each block's output, though
      they were trained for the last one only.</p>`);
}

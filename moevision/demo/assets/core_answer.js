// The answer beside the image: prediction, what makes it less than the model's own, and the work of the experts.

import { capital, expertShares, loadNote, sharedWords } from "./core_kinds.js";
import { momentWords } from "./core_time.js";
import { chip, expertColour, fillBox, fixed, html, layerExpert, percent, term } from "./core_util.js";
/** @import { ViewState } from "./core_state.js" */
/** @import { Fill, Guess, Intervention, Router, View } from "./types.js" */

/** @param {Fill} title @param {Guess[]} top @param {string | null} label */
export function predictionColumn(title, top, label) {
  const row = ({ class: name, p }) => html`<li><span class="mv-class">${name}${name === label && html` <small>label</small>`}</span>
    <span class="mv-num">${percent(p)}</span><span class="mv-bar mv-accent"><i style="width:${p * 100}%"></i></span></li>`;
  return html`<div><h3>${title}</h3><ol class="mv-top">${top.map(row)}</ol></div>`;
}

/** @param {HTMLElement} box @param {View} view */
export function drawPrediction(box, view) {
  const { moe, dense } = view.prediction;
  fillBox(box, html`<h2>Prediction</h2><div class="mv-two">
    ${predictionColumn("with experts", moe, view.picture.label)}
    ${dense && predictionColumn(term("dense", "dense twin"), dense, view.picture.label)}</div>
    ${view.picture.credit && html`<details class="mv-note"><summary data-key="credit">Photo credit</summary>${view.picture.credit}</details>`}`);
}

/**
 * The answer in a line, and what makes it less than the model's own.
 * @param {HTMLElement} box @param {View} view @param {boolean} elsewhere whether another part of the page says how the model was changed
 */
export const drawVerdict = (box, view, elsewhere) => fillBox(box, html`${verdictLine(view)}${verdictNotes(view, elsewhere)}`);

/** @param {View} view */
function verdictLine(view) {
  const best = view.prediction.moe[0];
  const twin = view.prediction.dense?.[0];
  const { label } = view.picture;
  const tag = label === best.class ? html`<span class="mv-tag mv-right">✓<span> matches the label</span></span>`
    : label && html`<span class="mv-tag mv-wrong">✗ the label is ${label}</span>`;
  return html`<p class="mv-verdict"><span>${view.moment ? `${capital(momentWords(view.moment))}:` : "The model sees"}</span> <b>${best.class}</b> <span class="mv-num">${percent(best.p)}</span>
    ${tag}${changedWords(view) && html`<span class="mv-tag mv-changed">changed model</span>`}${twin && html`<span class="mv-soft">${term("dense", "dense twin")}: ${twin.class} ${percent(twin.p)}</span>`}</p>`;
}

/**
 * What makes this view less than the model on its own kind of image.
 * @param {View} view @param {boolean} elsewhere
 */
function verdictNotes(view, elsewhere) {
  const { unlike } = view.picture;
  const { noise } = view.settings;
  const off = view.settings.off_reason;
  return [
    unlike && html`<p class="mv-warn" role="note">${unlike}</p>`,
    off && html`<p class="mv-warn" role="note"><b>Off the training distribution.</b> ${off}</p>`,
    typeof noise === "number" && html`<p class="mv-warn" role="note"><b>Noise of training is on.</b> The routers drew it once (draw ${noise}); predictions are made without.
      <button type="button" class="mv-quiet" data-action="calm" data-key="calm">Turn it off</button></p>`,
    !elsewhere && changedWords(view) && html`<p class="mv-warn" role="note"><b>Changed model.</b> ${changedWords(view)}</p>`,
  ];
}

/** What was changed about the model; empty where nothing was. @param {View} view */
export function changedWords({ settings: { intervention, away = [] }, model: { routers } }) {
  if (intervention) return interventionWords(intervention, routers);
  return away.length ? `Without ${away.map(([layer, expert]) => `L${layer}·E${expert}`).join(", ")}.` : "";
}

/** @param {Intervention} given @param {Router[]} routers */
function interventionWords({ kind, layer, expert, other, fill }, routers) {
  const where = layer === null || layer === undefined ? "in every layer" : `in L${layer}`;
  const way = routers.find((router) => router.layer === layer)?.kind ?? "token_choice";
  if (kind === "random" && way !== "token_choice") return `${RANDOM_WORDS[way]}, ${where}.`;
  if (kind === "random") return `Patches go to random experts ${where}.`;
  if (kind === "swap") return `L${layer}·E${expert} and E${other} compute each other's ${way === "soft" ? "slots" : "patches"}.`;
  if (kind === "force") return `Every patch ${where} goes to L${layer}·E${expert}.`;
  return `Without L${layer}·E${expert}: its patches ${FILL_WORDS[fill][way]}.`;
}

/** A random routing, and what becomes of an absent expert's patches, by the way in which the layer routes. */
export const RANDOM_WORDS = { token_choice: "Send patches to random experts", expert_choice: "Let experts take random patches", soft: "Deal the slots out to random experts" };
export const FILL_WORDS = {
  next_best: { token_choice: "go to their next-best expert", expert_choice: "keep the other experts that took them", soft: "take more from the other slots" },
  zero: { token_choice: "get nothing in its place", expert_choice: "get nothing in its place", soft: "get nothing in its place" },
};

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

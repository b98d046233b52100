// The inspector: what the computation card leaves to be said about one patch.

import { capital, describePatch } from "./core_kinds.js";
import { slotFacts } from "./core_slots.js";
import { chip, expertColour, fillBox, fixed, html, inkOn, layerExpert, pickButton, rowColumn, term } from "./core_util.js";
/** @import { ViewState } from "./core_state.js" */

/**
 * The way of a patch through the MoE layers: first choice as a dot, second choice thin. Drawn by hand in SVG.
 * @param {ViewState} state @param {number} patch
 */
function drawPath(state, patch) {
  const { view } = state;
  const step = Math.min(96, 272 / view.layers.length);
  const width = step * view.layers.length;
  const y = (layer, expert) => 12 + (expert * 108) / Math.max(1, layer.num_experts - 1);
  const x = (index) => step * (index + 0.5);
  const line = (rank, index) => {
    const [from, to] = [view.layers[index], view.layers[index + 1]];
    const [start, end] = [from.experts[patch][rank], to.experts[patch][rank] ?? to.experts[patch][0]];
    if (start === undefined || end === undefined) return "";
    return html`<line class="${rank ? "mv-thin" : ""}" x1="${x(index)}" y1="${y(from, start)}" x2="${x(index + 1)}" y2="${y(to, end)}"/>`;
  };
  const dot = (layer, index, rank) => {
    const expert = layer.experts[patch][rank];
    if (expert === undefined) return rank ? "" : html`<circle class="mv-nobody" cx="${x(index)}" cy="66" r="9"/><text x="${x(index)}" y="70">–</text>`;
    const colour = expertColour(expert, layer.num_experts);
    return rank
      ? html`<circle class="mv-second" cx="${x(index)}" cy="${y(layer, expert)}" r="5" stroke="${colour}"/>`
      : html`<circle cx="${x(index)}" cy="${y(layer, expert)}" r="10" fill="${colour}"/>
          <text x="${x(index)}" y="${y(layer, expert) + 4}" fill="${inkOn(colour)}">${expert}</text>`;
  };
  const links = [...Array(Math.max(0, view.layers.length - 1)).keys()];
  const spoken = view.layers.map((layer) => `${layer.name} ${layer.experts[patch].length ? `expert ${layer.experts[patch][0]}` : "no expert"}`).join(", then ");
  return html`<h3>Path</h3>
    <div class="mv-path" style="width:${width}px">
      <svg viewBox="0 0 ${width} 132" width="${width}" height="132" role="img" aria-label="Path: ${spoken}">
        ${links.map((index) => [1, 0].map((rank) => line(rank, index)))}
        ${view.layers.map((layer, index) => [1, 0].map((rank) => dot(layer, index, rank)))}</svg>
      <div class="mv-path-names">${view.layers.map((layer, index) => html`<button type="button" data-action="layer"
        data-index="${index}" data-key="path-${index}" aria-pressed="${index === state.layer}">${layer.name}</button>`)}</div>
    </div>`;
}

/**
 * Which patch it is, and its first expert.
 * @param {HTMLElement} box @param {ViewState} state
 */
export function drawWhere(box, state) {
  const { view, currentLayer: layer, shown: patch } = state;
  if (patch === null) return fillBox(box, "");
  const [row, column] = rowColumn(patch, view.model.grid[1]);
  const [first] = layer.experts[patch];
  const nobody = first === undefined;
  return fillBox(box, html`<p class="mv-where">${nobody ? html`<span class="mv-chip mv-big mv-none">–</span>` : pickButton(layer, first, state.highlight, chip(first, layer.num_experts, "mv-big"), "where")}
      <span><b>${nobody ? `${layer.name}: no expert` : layerExpert(layer, first)}</b><br><span class="mv-soft">row ${row}, column ${column}${view === state.views[1] ? " · second image" : ""}</span></span>
      ${state.hover === null && html`<button type="button" class="mv-quiet" data-action="unpin" data-key="unpin" aria-label="Unpin">×</button>`}</p>`);
}

/** @param {HTMLElement} box @param {ViewState} state */
export function drawInspector(box, state) {
  const patch = state.shown;
  if (patch === null) {
    fillBox(box, html`<div class="mv-empty"><p><b>Point at a patch.</b> Its experts, their weights and its path appear here.</p>
      <p class="mv-note">Click to pin it. Arrow keys move, <kbd>+</kbd> <kbd>−</kbd> change the layer, <kbd>Esc</kbd> lets go.</p></div>`);
    return;
  }
  const { view, currentLayer: layer } = state;
  const facts = [...(layer.learned && !layer.past ? [[term("margin", "margin"), html`${fixed(layer.margin[patch], layer.kind === "soft" ? 3 : 2)}`],
    [term("entropy", "entropy"), html`${fixed(layer.entropy[patch])} <small>of ${fixed(Math.log2(layer.num_experts), Number.isInteger(Math.log2(layer.num_experts)) ? 0 : 1)} bits</small>`]] : []),
    ...slotFacts(state, layer, patch)];
  fillBox(box, html`
    ${!layer.computation && !layer.past && html`<p class="mv-note mv-older">${capital(describePatch(view, layer, patch))}. This view was saved before views carried how a patch was computed.</p>`}
    ${facts.length > 0 && html`<dl class="mv-facts">${facts.map(([name, value]) => html`<div><dt>${name}</dt><dd>${value}</dd></div>`)}</dl>`}
    ${drawPath(state, patch)}
    <p class="mv-note">${contextSentence(state)}</p>`);
}

/**
 * Attention comes before the experts within a block, so block n has had n + 1 rounds of it.
 * @param {ViewState} state
 */
function contextSentence(state) {
  const { layer, name } = state.currentLayer;
  const rounds = layer === 0 ? "one round of attention" : `${layer + 1} rounds of attention`;
  return `By ${name} this patch has been through ${rounds}: it carries context from the whole image, so the expert
    doesn't answer to these pixels alone.`;
}

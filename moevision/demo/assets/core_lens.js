// What an image leaves idle, and what the classifier would say after each block (the logit lens, demo/lens.py).

import { awayExpert } from "./core_kinds.js";
import { fillBox, html, percent } from "./core_util.js";
/** @import { View } from "./types.js" */

/**
 * The experts of each layer that no patch of the image goes to; empty where every layer is soft, and all run.
 * @param {View} view
 */
export function silentWords(view) {
  const layers = view.layers.filter(({ kind }) => kind !== "soft").map((layer) => {
    const silent = layer.counts.flatMap((count, expert) => (count === 0 && expert !== awayExpert(view, layer) ? [`E${expert}`] : []));
    return `${layer.name} ${silent.join(", ") || "none"}`;
  });
  return layers.length ? `Silent in this image: ${layers.join(" · ")}.` : "";
}

/** @param {HTMLElement} box @param {View} view */
export function drawLens(box, view) {
  const { lens } = view;
  const experts = new Map(view.layers.map(({ layer, name }) => [layer, name]));
  const row = (top, block) => html`<li><span class="${experts.has(block) ? "mv-strong" : ""}">${experts.get(block) ?? `block ${block}`}</span>
    <span class="mv-class">${top[0].class}</span><span class="mv-bar mv-accent"><i style="width:${top[0].p * 100}%"></i></span><span class="mv-num">${percent(top[0].p)}</span></li>`;
  fillBox(box, lens && lens.length > 0 && html`<h2>After each block</h2><ol class="mv-lens">${lens.map(row)}</ol>
    <p class="mv-note">An untrained readout (logit lens): the last norm and the classifier are put on each block's output, though they were trained for the last one only.</p>`);
}

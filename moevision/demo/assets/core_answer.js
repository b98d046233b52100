// Beside the image: the prediction with that of the dense twin.

import { fillBox, html, percent, term } from "./core_util.js";
/** @import { Fill, Guess, View } from "./types.js" */

/** @param {Fill} title @param {Guess[]} top @param {string | null} label */
function predictionColumn(title, top, label) {
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

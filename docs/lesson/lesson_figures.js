// Figures of the lesson: what boxes hold of a page of emoji, and tables. All of it is markup made from the lesson's numbers.

import { paintBox } from "../../moevision/demo/assets/core_mosaic.js";
import { brush, chip, html } from "../../moevision/demo/assets/core_util.js";
import { PALETTE } from "../../moevision/demo/assets/palette.js";
/** @import { Fill } from "../../moevision/demo/assets/types.js" */

/**
 * A number stays with its unit.
 * @param {Fill} cell
 */
const joined = (cell) => (typeof cell === "string" ? cell.replace(/(?<=\d) (?=%|points)/g, "\u00a0") : cell);

/** @param {Fill[]} heads @param {Fill[][]} rows */
export const table = (heads, rows) => html`<div class="ls-wide"><table class="ls-table"><thead><tr>${heads.map((name) => html`<th scope="col">${name}</th>`)}</tr></thead>
  <tbody>${rows.map(([first, ...rest]) => html`<tr><th scope="row">${first}</th>${rest.map((cell) => html`<td>${joined(cell)}</td>`)}</tr>`)}</tbody></table></div>`;

/** @param {number} expert */
export const expertMark = (expert) => chip(expert, PALETTE.length);

const CUTOUT = 240; // px of a canvas

/**
 * What one box holds of the page: its emoji at their places.
 * @param {number} box @param {(number | null)[]} choice the box of each emoji
 */
export const cutout = (box, choice) =>
  html`<canvas width="${CUTOUT}" height="${CUTOUT}" data-cutout="${box}" data-choice="${choice.join()}" aria-hidden="true"></canvas>`;

/**
 * All boxes, as small copies of the page.
 * @param {number[]} choice the box of each emoji @param {number} boxes @param {string} caption
 */
export const boxesFigure = (choice, boxes, caption) => html`<figure class="ls-sorted"><figcaption>${caption}</figcaption><ul class="ls-cutouts">${Array.from({ length: boxes }, (_, box) => html`<li
  style="--own:${PALETTE[box]}" aria-label="Box ${box}: ${emojiIn(choice, box)} emoji">${cutout(box, choice)}<span>${emojiIn(choice, box) || "none"}</span></li>`)}</ul></figure>`;

/** @param {(number | null)[]} choice @param {number} box */
export const emojiIn = (choice, box) => choice.filter((one) => one === box).length;

/**
 * Paint the cut-outs of a part of the page.
 * @param {Element} root @param {HTMLImageElement} image the page @param {[number, number]} grid
 */
export function paintCutouts(root, image, grid) {
  if (!image.naturalWidth) return;
  const paper = getComputedStyle(root).getPropertyValue("--bg").trim();
  root.querySelectorAll("canvas[data-cutout]").forEach((one) => {
    const canvas = /** @type {HTMLCanvasElement} */ (one);
    const { cutout: box, choice = "" } = canvas.dataset;
    paintBox(brush(canvas), image, choice.split(",").map((mine) => Number(mine === box)), grid, paper);
  });
}

// Figures of the lesson: a photo with its routing, tables. All of it is markup made from the lesson's numbers.

import { chip, html, inkOn, rgba } from "../../moevision/demo/assets/core_util.js";
import { PALETTE } from "../../moevision/demo/assets/palette.js";
/** @import { Fill } from "../../moevision/demo/assets/types.js" */

const VEIL = 0.66; // of the expert's colour over the photo

/**
 * A photo and its patches. The photo is cut to its central square, as the model does.
 * @param {{ src: string, grid: number[], about: string, caption: Fill }} photo
 * @param {{ first?: string, only?: number, marks?: Record<number, string> }} [over] the expert that each patch goes to
 *   first, one digit per patch; the one expert to show; letters on patches
 */
export function photoFigure({ src, grid, about, caption }, { first, only, marks = {} } = {}) {
  const cells = Array.from({ length: grid[0] * grid[1] }, (_, patch) => {
    const letter = marks[patch] && html`<b>${marks[patch]}</b>`;
    const expert = first === undefined ? undefined : Number(first[patch]);
    if (expert === undefined || (only !== undefined && expert !== only)) return html`<i>${letter}</i>`;
    const colour = PALETTE[expert];
    return html`<i style="background:${rgba(colour, VEIL)};color:${inkOn(colour)}">${letter || expert}</i>`;
  });
  return html`<figure class="ls-figure"><div class="ls-photo" style="--columns:${grid[1]};aspect-ratio:${grid[1]}/${grid[0]}">
    <img src="${src}" alt="${about}"><div class="ls-cells" aria-hidden="true">${cells}</div></div><figcaption>${caption}</figcaption></figure>`;
}

/**
 * A number stays with its unit.
 * @param {Fill} cell
 */
const joined = (cell) => (typeof cell === "string" ? cell.replace(/(?<=\d) (?=%|points)/g, "\u00a0") : cell);

/** @param {Fill[]} heads @param {Fill[][]} rows */
export const table = (heads, rows) => html`<div class="ls-wide"><table class="ls-table"><thead><tr>${heads.map((head) => html`<th scope="col">${head}</th>`)}</tr></thead>
  <tbody>${rows.map(([first, ...rest]) => html`<tr><th scope="row">${first}</th>${rest.map((cell) => html`<td>${joined(cell)}</td>`)}</tr>`)}</tbody></table></div>`;

/** @param {number} expert */
export const expertMark = (expert) => chip(expert, PALETTE.length);

/**
 * How many patches of a photo go to an expert first.
 * @param {string} first @param {number} expert
 */
export const patchesOf = (first, expert) => [...first].filter((digit) => Number(digit) === expert).length;

/**
 * Patches that have the same number in two layers, and how many that would be if the numbers had nothing in common.
 * @param {string} one @param {string} other @param {number} experts
 */
export function sameNumber(one, other, experts) {
  const same = [...one].filter((digit, patch) => digit === other[patch]).length;
  const both = Array.from({ length: experts }, (_, expert) => (patchesOf(one, expert) * patchesOf(other, expert)) / one.length);
  return { same, chance: both.reduce((left, right) => left + right) };
}

/**
 * Where the patches of a mosaic lie: [x, y, side] of the patch at each place, in parts of the mosaic's width.
 * @param {number} count @param {number} height of the mosaic, over its width
 */
export function mosaicPlaces(count, height) {
  let columns = 4;
  while (height > 0 && Math.ceil(count / columns) > columns * height) columns += 1; // in a box without room none fits
  const side = 1 / columns;
  return [...Array(count).keys()].map((place) => [(place % columns) * side, Math.floor(place / columns) * side, side]);
}

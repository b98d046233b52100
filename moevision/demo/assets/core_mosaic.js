// Regions of an image whose patches went to one expert: contours and one label each, and what each got.

import { expertColour, inkOn, rgba } from "./core_util.js";
/** @import { Layer } from "./types.js" */

/** Of how many patches a region has a label; of each expert the largest region always has one. */
const LABELLED = 4;
/** How much of the photo is faded where a box has no patch. */
const FADED = 0.88;

/**
 * [P] the expert that does most of each patch; null where none computes it.
 * @param {Layer} layer @returns {(number | null)[]}
 */
export const firstExperts = ({ experts, kept }) =>
  experts.map((chosen, patch) => chosen.find((_, rank) => kept[patch][rank]) ?? null);

/**
 * Neighbours that went to the same expert, and the patch of each region that lies deepest inside.
 * @param {(number | null)[]} first @param {[number, number]} grid
 * @returns {{ expert: number, cells: number[], label: number }[]} largest first
 */
export function regionsOf(first, [rows, columns]) {
  const around = (cell) => {
    const [row, column] = [Math.floor(cell / columns), cell % columns];
    return [
      row > 0 && cell - columns,
      row < rows - 1 && cell + columns,
      column > 0 && cell - 1,
      column < columns - 1 && cell + 1,
    ].map((near) => (near === false ? -1 : near));
  };
  const seen = new Set();
  const regions = [];
  first.forEach((expert, start) => {
    if (expert === null || seen.has(start)) return;
    const cells = [start];
    seen.add(start);
    for (const cell of cells) {
      // grows while it is walked
      around(cell).forEach((near) => {
        if (near >= 0 && first[near] === expert && !seen.has(near)) {
          seen.add(near);
          cells.push(near);
        }
      });
    }
    regions.push({ expert, cells, label: deepest(cells, around) });
  });
  return regions.sort((one, other) => other.cells.length - one.cells.length);
}

/**
 * The cell that is farthest from the edge of its region; of several the middle one in their order.
 * @param {number[]} cells @param {(cell: number) => number[]} around
 */
function deepest(cells, around) {
  let inside = new Set(cells);
  let last = cells;
  while (inside.size) {
    last = [...inside];
    const rest = inside;
    inside = new Set(last.filter((cell) => around(cell).every((near) => rest.has(near))));
  }
  return last[Math.floor(last.length / 2)];
}

/**
 * Contours and labels over an image, or one expert's part with the rest faded to paper.
 * @param {CanvasRenderingContext2D} context @param {Layer} layer @param {(number | null)[]} first @param {[number, number]} grid
 * @param {{ side: number, unit: number, lit: number | null, paper: string }} look side of a patch and of one CSS pixel, both in canvas pixels
 */
export function paintRegions(context, layer, first, grid, { side, unit, lit, paper }) {
  const columns = grid[1];
  const edge = (place) => Math.round(place * side); // whole pixels: two faded neighbours leave no seam
  const inner = 3 * unit;
  const tint = first.length > 16 ? 0.28 : 0.12; // a few large patches are to be recognized
  first.forEach((expert, cell) => {
    const [column, row] = [cell % columns, Math.floor(cell / columns)];
    const [x, y, width, height] = [edge(column), edge(row), edge(column + 1) - edge(column), edge(row + 1) - edge(row)];
    const away = lit !== null && expert !== lit;
    if (away || expert === null) {
      context.fillStyle = paper;
      context.globalAlpha = away ? 0.82 : 0.45;
      context.fillRect(x, y, width, height);
      context.globalAlpha = 1;
      return;
    }
    const colour = expertColour(expert, layer.num_experts, lit === expert);
    if (lit === null) {
      context.fillStyle = rgba(colour, tint);
      context.fillRect(x, y, width, height);
    }
    context.fillStyle = colour;
    const other = (near, inGrid) => !inGrid || first[near] !== expert;
    if (other(cell - columns, cell >= columns)) context.fillRect(x, y, width, inner);
    if (other(cell + columns, cell + columns < first.length)) context.fillRect(x, y + height - inner, width, inner);
    if (other(cell - 1, column > 0)) context.fillRect(x, y, inner, height);
    if (other(cell + 1, column < columns - 1)) context.fillRect(x + width - inner, y, inner, height);
  });
  const labelled = new Set();
  regionsOf(first, grid).forEach(({ expert, cells, label }) => {
    if (cells.length < LABELLED && labelled.has(expert)) return;
    if (lit !== null && lit !== expert) return;
    labelled.add(expert);
    paintLabel(
      context,
      layer,
      expert,
      ((label % columns) + 0.5) * side,
      (Math.floor(label / columns) + 0.5) * side,
      24 * unit,
    );
  });
}

/** @param {CanvasRenderingContext2D} context @param {Layer} layer @param {number} expert @param {number} x @param {number} y @param {number} size */
export function paintLabel(context, layer, expert, x, y, size) {
  const colour = expertColour(expert, layer.num_experts);
  context.font = `700 ${size * 0.66}px Arial, sans-serif`;
  context.textAlign = "center";
  context.textBaseline = "middle";
  const width = Math.max(size, context.measureText(String(expert)).width + size * 0.4);
  context.fillStyle = colour;
  context.beginPath();
  context.roundRect(x - width / 2, y - size / 2, width, size, size * 0.22);
  context.fill();
  context.fillStyle = inkOn(colour);
  context.fillText(String(expert), x, y + size * 0.03);
}

/**
 * Where a patch lies in the small copy of the photo that a box is: [x, y, side], the copy being `width` wide.
 * @param {number} patch @param {[number, number]} grid @param {number} width
 */
export function boxPlaces(patch, [, columns], width) {
  const side = width / columns;
  return [(patch % columns) * side, Math.floor(patch / columns) * side, side];
}

/**
 * What an expert gets of a photo: its patches at their places, and the rest faint.
 * @param {CanvasRenderingContext2D} context of a canvas of the photo's proportions
 * @param {HTMLImageElement} image @param {number[]} opacity of each patch @param {[number, number]} grid @param {string} paper
 */
export function paintBox(context, image, opacity, grid, paper) {
  const { width, height } = context.canvas;
  context.fillStyle = paper;
  context.fillRect(0, 0, width, height);
  opacity.forEach((part, patch) => {
    const [x, y, side] = boxPlaces(patch, grid, width);
    const [left, top, right, bottom] = [x, y, x + side, y + side].map(Math.round); // neighbours leave no seam
    context.globalAlpha = 1 - FADED * (1 - part);
    context.drawImage(image, ...patchOf(image, patch, grid), left, top, right - left, bottom - top);
  });
  context.globalAlpha = 1;
}

/**
 * The central square of a picture, where a patch of the grid lies in it: [x, y, width, height].
 * @param {HTMLImageElement} picture @param {number} patch @param {[number, number]} grid
 */
export function patchOf({ naturalWidth: width, naturalHeight: height }, patch, [rows, columns]) {
  const square = Math.min(width, height);
  const [w, h] = [square / columns, square / rows];
  return /** @type {[number, number, number, number]} */ ([
    (width - square) / 2 + (patch % columns) * w,
    (height - square) / 2 + Math.floor(patch / columns) * h,
    w,
    h,
  ]);
}

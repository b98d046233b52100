// A picture to share, 1200 × 630 as posts show it: the photo's regions, the networks' mosaics, and one sentence.

import { headlineOf } from "./app_flow.js";
import { firstExperts, mosaicPlaces, paintLabel, paintRegions, patchOf } from "./core_mosaic.js";
import { underlay } from "./core_stage.js";
import { brush, percent } from "./core_util.js";
/** @import { ViewState } from "./core_state.js" */

const [WIDE, TALL, MARGIN] = [1200, 630, 36];
const [BOX, BETWEEN, COLUMNS] = [106, 18, 4]; // px of a network's mosaic, between two, and in a row
const SHOWN = 8;

/** @param {string} source */
export async function loadPicture(source) {
  const picture = new Image();
  picture.src = source;
  await picture.decode();
  return picture;
}

/** @param {HTMLCanvasElement} canvas @returns {Promise<Blob>} */
export const canvasPng = (canvas) => new Promise((resolve, reject) => canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("no PNG")))));

/** @param {ViewState} state */
export async function sharePng(state) {
  const { view, currentLayer: layer } = state;
  const { grid } = view.model;
  const canvas = Object.assign(document.createElement("canvas"), { width: WIDE, height: TALL });
  const context = brush(canvas);
  context.fillStyle = "#fbfbf9";
  context.fillRect(0, 0, WIDE, TALL);
  const { source, sharp } = underlay(state, view);
  const picture = await loadPicture(source);
  const first = firstExperts(layer);
  const side = TALL / Math.max(...grid);
  context.imageSmoothingEnabled = sharp;
  first.forEach((_, patch) => context.drawImage(picture, ...patchOf(picture, patch, grid), (patch % grid[1]) * side, Math.floor(patch / grid[1]) * side, side, side));
  paintRegions(context, layer, first, grid, { side, unit: 1.4, lit: null, paper: "#fbfbf9" });
  const left = TALL + MARGIN;
  let top = paragraph(context, headlineOf(view, layer), left, MARGIN + 38, 43, "700", "#1d1d1b");
  const [best] = view.prediction.moe;
  const away = (view.settings.away ?? []).map(([number, expert]) => `L${number}·E${expert}`);
  top = paragraph(context, `${away.length ? `Without ${away.join(", ")} the` : "The"} model says ${best.class}, ${percent(best.p)}.`, left, top + 16, 26, "400", "#5c5c57") - 6;
  const counts = [...Array(layer.num_experts).keys()].map((expert) => first.filter((mine) => mine === expert).length);
  const busy = counts.map((count, expert) => ({ count, expert })).sort((one, other) => other.count - one.count).slice(0, SHOWN).sort((one, other) => one.expert - other.expert);
  busy.forEach(({ expert }, place) => {
    const [x, y] = [left + (place % COLUMNS) * (BOX + BETWEEN), top + Math.floor(place / COLUMNS) * (BOX + 32 + BETWEEN)];
    paintLabel(context, layer, expert, x + 13, y + 13, 26);
    const patches = first.flatMap((mine, patch) => (mine === expert ? [patch] : []));
    mosaicPlaces(patches.length, 1).forEach(([dx, dy, part], at) => {
      context.drawImage(picture, ...patchOf(picture, patches[at], grid), x + dx * BOX, y + 32 + dy * BOX, part * BOX - 1, part * BOX - 1);
    });
  });
  context.textAlign = "left";
  context.textBaseline = "alphabetic";
  context.font = "600 20px Arial, sans-serif";
  context.fillStyle = "#1d1d1b";
  context.fillText("moevision", left, TALL - MARGIN + 8);
  if (view.picture.credit) paragraph(context, `photo: ${view.picture.credit}`, left + 120, TALL - MARGIN - 2, 12, "400", "#5c5c57");
  return canvasPng(canvas);
}

/**
 * Text in lines as wide as the card; where the next line would stand.
 * @param {CanvasRenderingContext2D} context @param {string} text @param {number} left @param {number} top @param {number} size @param {string} weight @param {string} colour
 */
export function paragraph(context, text, left, top, size, weight, colour) {
  Object.assign(context, { font: `${weight} ${size}px Arial, sans-serif`, fillStyle: colour, textAlign: "left", textBaseline: "alphabetic" });
  const lines = [""];
  text.split(" ").forEach((word) => {
    const longer = `${lines.at(-1)} ${word}`.trim();
    if (context.measureText(longer).width <= WIDE - left - MARGIN) lines[lines.length - 1] = longer;
    else lines.push(word);
  });
  lines.forEach((line, number) => context.fillText(line, left, top + number * size * 1.15));
  return top + lines.length * size * 1.15;
}

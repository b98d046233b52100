// A picture to share, 1200 × 630 as posts show it: the photo's regions, what each expert got, and what came of it.

import { opacityIn } from "./core_flow.js";
import { boxPlaces, firstExperts, paintBox, paintLabel, paintRegions, patchOf } from "./core_mosaic.js";
import { underlay } from "./core_stage.js";
import { brush, expertColour, percent } from "./core_util.js";
import { headlineOf } from "./core_words.js";
/** @import { ViewState } from "./core_state.js" */
/** @import { Layer, View } from "./types.js" */

const [WIDE, TALL, MARGIN] = [1200, 630, 36];
const [BOX, BETWEEN, COLUMNS] = [112, 16, 4]; // px of an expert's box, between two, and in a row
const SHOWN = 8;
const [PAPER, INK, SOFT] = ["#fbfbf9", "#1d1d1b", "#5c5c57"];

/** @param {string} source */
export async function loadPicture(source) {
  const picture = new Image();
  picture.src = source;
  await picture.decode();
  return picture;
}

/** @param {HTMLCanvasElement} canvas @returns {Promise<Blob>} */
export const canvasPng = (canvas) =>
  new Promise((resolve, reject) => canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("no PNG")))));

/**
 * The card of what is shown.
 * @param {ViewState} state
 * @param {{ usual?: import("./types.js").Guess | null, thing?: string, control?: string, address?: string }} [more]
 *   what was said before, what as much at random did, and where the page is
 */
export async function sharePng(state, { usual = null, thing, control = "", address = "" } = {}) {
  const { view, currentLayer: layer } = state;
  const context = brush(Object.assign(document.createElement("canvas"), { width: WIDE, height: TALL }));
  context.fillStyle = PAPER;
  context.fillRect(0, 0, WIDE, TALL);
  const { source, sharp } = underlay(state, view);
  const picture = await loadPicture(source);
  context.imageSmoothingEnabled = sharp;
  paintPhoto(context, picture, view, layer);

  const left = TALL + MARGIN;
  let top = paragraph(context, headlineOf(view, layer, usual, thing), left, MARGIN + 34, 38, "700", INK);
  const [best] = view.prediction.moe;
  const before = view.settings.away?.length && usual ? `${usual.class} ${percent(usual.p)} → ` : "";
  top = paragraph(context, `${before}${best.class} ${percent(best.p)}`, left, top + 12, 30, "600", INK);
  if (control) top = paragraph(context, `${control}.`, left, top + 2, 21, "400", SOFT);
  paintBoxes(context, picture, view, layer, left, top - 8);

  paragraph(context, ["moevision", address].filter(Boolean).join(" · "), left, TALL - MARGIN + 12, 19, "600", INK);
  if (view.picture.credit)
    paragraph(context, `photo: ${view.picture.credit}`, left, TALL - MARGIN - 10, 12, "400", SOFT);
  return canvasPng(context.canvas);
}

/** @param {CanvasRenderingContext2D} context @param {HTMLImageElement} picture @param {View} view @param {Layer} layer */
function paintPhoto(context, picture, { model: { grid } }, layer) {
  const first = firstExperts(layer);
  const side = TALL / Math.max(...grid);
  first.forEach((_, patch) => {
    const [x, y] = boxPlaces(patch, grid, side * grid[1]);
    context.drawImage(picture, ...patchOf(picture, patch, grid), x, y, side, side);
  });
  paintRegions(context, layer, first, grid, { side, unit: 1.4, lit: null, paper: PAPER });
}

/**
 * The busiest experts' boxes, and those that are away.
 * @param {CanvasRenderingContext2D} context @param {HTMLImageElement} picture @param {View} view @param {Layer} layer @param {number} left @param {number} top
 */
function paintBoxes(context, picture, { model: { grid }, settings: { away = [] } }, layer, left, top) {
  const gone = away.filter(([where]) => where === layer.layer).map(([, expert]) => expert);
  const busy = (expert) => (gone.includes(expert) ? Infinity : layer.counts[expert]);
  const shown = [...Array(layer.num_experts).keys()]
    .sort((one, other) => busy(other) - busy(one))
    .slice(0, SHOWN)
    .sort((one, other) => one - other);
  shown.forEach((expert, place) => {
    const [x, y] = [left + (place % COLUMNS) * (BOX + BETWEEN), top + Math.floor(place / COLUMNS) * (BOX + BETWEEN)];
    const small = brush(
      Object.assign(document.createElement("canvas"), { width: BOX, height: Math.round((BOX * grid[0]) / grid[1]) }),
    );
    paintBox(small, picture, opacityIn(layer, expert), grid, PAPER);
    context.drawImage(small.canvas, x, y, BOX, BOX);
    context.setLineDash(gone.includes(expert) ? [7, 5] : []);
    Object.assign(context, { strokeStyle: expertColour(expert, layer.num_experts), lineWidth: 2.5 });
    context.strokeRect(x, y, BOX, BOX);
    context.setLineDash([]);
    paintLabel(context, layer, expert, x + 15, y + 15, 26);
    if (gone.includes(expert)) paragraph(context, "away", x + 38, y + 22, 19, "600", SOFT);
  });
}

/**
 * Text in lines as wide as the card; where the next line would stand.
 * @param {CanvasRenderingContext2D} context @param {string} text @param {number} left @param {number} top @param {number} size @param {string} weight @param {string} colour
 */
export function paragraph(context, text, left, top, size, weight, colour) {
  Object.assign(context, {
    font: `${weight} ${size}px Arial, sans-serif`,
    fillStyle: colour,
    textAlign: "left",
    textBaseline: "alphabetic",
  });
  const lines = [""];
  text.split(" ").forEach((word) => {
    const longer = `${lines.at(-1)} ${word}`.trim();
    if (context.measureText(longer).width <= WIDE - left - MARGIN) lines[lines.length - 1] = longer;
    else lines.push(word);
  });
  lines.forEach((line, number) => context.fillText(line, left, top + number * size * 1.15));
  return top + lines.length * size * 1.15;
}

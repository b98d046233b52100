// An expert as one PNG with its legend: name, load, and its heaviest beside its random patches.

import { canvasPng, loadPicture, paragraph } from "./app_card.js";
import { download } from "./app_share.js";
import { brush, expertColour, inkOn, percent, pictureSource } from "./core_util.js";
/** @import { ExpertCard, ExpertsAnswer, GalleryPatch, Model } from "./types.js" */

const [WIDTH, CELL, GAP] = [1200, 139, 8];
const CREDITS = 100; // px of room for whose photos they are

/**
 * "whisker: 45 %, its share of everything: 13 %"; empty where nothing stands out beyond chance.
 * @param {Pick<ExpertCard, "called">} card
 */
export const calledWords = ({ called }) =>
  (called ? `${called.name}: ${percent(called.share)}, its share of everything: ${percent(called.overall)}` : "");

/**
 * @param {Model} model @param {ExpertCard} card @param {ExpertsAnswer} layer
 */
export async function saveExpert(model, card, layer) {
  const credits = [...new Set([...card.top, ...card.random].flatMap(({ credit }) => credit ?? []))].join("; ");
  const canvas = document.createElement("canvas");
  canvas.width = WIDTH;
  canvas.height = 600 + (credits ? CREDITS : 0);
  const context = brush(canvas);
  const write = (text, x, y, font, colour = "#1d1d1b") => {
    context.font = `${font} Arial, sans-serif`;
    context.fillStyle = colour;
    context.fillText(text, x, y, WIDTH - x - 24);
  };
  context.fillStyle = "#ffffff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  const experts = layer.experts.length;
  const colour = expertColour(card.expert, experts);
  context.fillStyle = colour;
  context.fillRect(24, 24, 72, 72);
  context.textAlign = "center";
  write(String(card.expert), 60, 75, "700 40px", inkOn(colour));
  context.textAlign = "left";
  write(`${card.name} · ${model.title}, ${model.variant}`, 116, 56, "600 30px");
  write([calledWords(card), `${percent(card.load_share, 1)} of all choices`].filter(Boolean).join(" · "), 116, 90, "22px", "#5c5c57");
  const rows = /** @type {[string, GalleryPatch[]][]} */ ([["Highest weight: the best of all, so they flatter", card.top], ["Picked at random: what it usually gets", card.random]]);
  for (const [index, [title, patches]] of rows.entries()) {
    const top = 128 + index * 210;
    write(title, 24, top + 22, "600 22px");
    await Promise.all(patches.map((patch, place) => paint(context, patch, 24 + place * (CELL + GAP), top + 38)));
  }
  write(layer.note, 24, 570, "18px", "#5c5c57");
  write("moevision", 24, 592, "18px", "#5c5c57");
  if (credits) paragraph(context, `Photos: ${credits}`, 24, 616, credits.length > 600 ? 12 : 16, "400", "#5c5c57");
  download(await canvasPng(canvas), `moevision_${model.id}_L${layer.layer}-E${card.expert}.png`);
}

/**
 * A patch in its surroundings, framed.
 * @param {CanvasRenderingContext2D} context @param {GalleryPatch} patch @param {number} x @param {number} y
 */
async function paint(context, { crop, box: [left, top, width, height] }, x, y) {
  const picture = await loadPicture(pictureSource(crop));
  context.imageSmoothingEnabled = false;
  context.drawImage(picture, x, y, CELL, CELL);
  const frame = (grow, colour) => {
    context.strokeStyle = colour;
    context.strokeRect(x + left * CELL - grow, y + top * CELL - grow, width * CELL + 2 * grow, height * CELL + 2 * grow);
  };
  context.lineWidth = 2;
  frame(1, "#ffffff");
  frame(3, "#111111");
}

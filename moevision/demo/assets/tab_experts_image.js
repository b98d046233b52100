// An expert as one PNG with its legend: name, load, and its heaviest beside its random patches.

import { loadPicture } from "./app_card.js";
import { download } from "./app_share.js";
import { brush, expertColour, inkOn, percent, pictureSource } from "./core_util.js";
import { calledWords } from "./tab_experts_words.js";
/** @import { ExpertCard, ExpertsAnswer, GalleryPatch, Model } from "./types.js" */

const [WIDTH, CELL, GAP] = [1200, 139, 8];
const LINES = 4; // of credits at most

/**
 * @param {Model} model @param {ExpertCard} card @param {ExpertsAnswer} layer
 */
export async function saveExpert(model, card, layer) {
  const credits = [...new Set([...card.top, ...card.random].flatMap(({ credit }) => credit ?? []))].join("; ");
  const canvas = document.createElement("canvas");
  canvas.width = WIDTH;
  canvas.height = 600 + (credits ? 24 * LINES : 0);
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
  if (credits) wrapped(context, `Photos: ${credits}`, 600 + 14);
  const blob = await new Promise((resolve, reject) => canvas.toBlob((made) => (made ? resolve(made) : reject(new Error("no PNG")))));
  download(blob, `moevision_${model.id}_L${layer.layer}-E${card.expert}.png`);
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

/**
 * Whose photos they are, in as many lines as there is room for.
 * @param {CanvasRenderingContext2D} context @param {string} text @param {number} y
 */
function wrapped(context, text, y) {
  context.font = "16px Arial, sans-serif";
  context.fillStyle = "#5c5c57";
  const lines = [""];
  for (const word of text.split(" ")) {
    const longer = `${lines[lines.length - 1]} ${word}`.trim();
    if (context.measureText(longer).width <= WIDTH - 48) lines[lines.length - 1] = longer;
    else lines.push(word);
  }
  // More than that is squeezed into the last line: no name is left out.
  const shown = [...lines.slice(0, LINES - 1), lines.slice(LINES - 1).join(" ")];
  shown.forEach((line, index) => context.fillText(line, 24, y + 22 * index, WIDTH - 48));
}

// A visitor's file becomes an image that is small enough to send: in the browser, before anything leaves it.

import { AskError } from "./app_server.js";
import { brush } from "./core_util.js";
/** @import { Limits } from "./types.js" */

const LONGEST_SIDE = 512;

/**
 * The image as the model sees it, square, as a data address of at most 512 px; and the share that is cut off.
 * @param {File} file @param {Limits} given
 */
export async function shrinkPicture(file, { min_side: side, max_aspect: aspect, fit, fill }) {
  const bitmap = await createImageBitmap(file);
  const [short, long] = [bitmap.width, bitmap.height].sort((a, b) => a - b);
  // Asked here, where the image has its own size still; the server asks the same of what it gets.
  if (short < side || long > aspect * short) {
    throw new AskError(`This image has ${bitmap.width} × ${bitmap.height} px, and the model would see too little in it. Its shorter side must have
      at least ${side} px, and its longer side at most ${aspect} times as many.`);
  }
  const canvas = document.createElement("canvas");
  const square = fit === "pad" ? long : short;
  canvas.width = Math.min(square, LONGEST_SIDE);
  canvas.height = canvas.width;
  const context = brush(canvas);
  context.imageSmoothingQuality = "high";
  // Transparent parts become white, as on paper, and not black.
  context.fillStyle = "#ffffff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  const scale = canvas.width / square;
  const [[left, width], [top, height]] = [bitmap.width, bitmap.height].map((length) =>
    fit === "squash" ? [0, canvas.width] : [Math.trunc((square - length) / 2) * scale, length * scale]);
  context.drawImage(bitmap, left, top, width, height); // what lies outside is cut off, as the server does it
  context.fillStyle = fill; // and the borders of `pad`
  if (top > 0) [top - canvas.width, top + height].forEach((y) => context.fillRect(0, y, canvas.width, canvas.width));
  if (left > 0) [left - canvas.width, left + width].forEach((x) => context.fillRect(x, 0, canvas.width, canvas.width));
  bitmap.close();
  // PNG adds no traces of compression; a photo is sent as JPEG, of which a dozen fit into the browser's session.
  const exact = canvas.toDataURL("image/png");
  const data = exact.length < 150000 ? exact : canvas.toDataURL("image/jpeg", 0.92);
  return { data, cut: fit === "crop" ? 1 - short / long : 0 };
}

// Who answers a page without a server: what was recorded of the examples, and for all else the model itself, run here
// in the browser (worker.js). An own image goes to that worker and nowhere else. It stands in for the explorer's own
// app_fetch.js, and answers as demo/service.py does; the views are those of demo/view.py.

import { softmax } from "../../moevision/demo/assets/core_numbers.js";
import { pictureSource } from "../../moevision/demo/assets/core_util.js";
import { drawPage, readPage } from "./pages.js";
import { normalized, squarePixels } from "./pixels.js";
/** @import { Layer, Server, View } from "../../moevision/demo/assets/types.js" */

/* global BOOT -- what the page began with (build.py) */
const boot = BOOT;
const TOP = 5;
const SMALL = 6e6; // bytes of a model that is opened at the first sign of a visitor
const UNANSWERED = { error: "That takes the server that moevision demo starts, and this page has none.", code: "bad_request" };
const FAILED = { error: "The model could not be opened in this browser. Reload the page to try again.", code: "offline" };
const round = (value) => Math.round(value * 1e4) / 1e4;
const sum = (values) => values.reduce((total, value) => total + value, 0);

// ---- the worker

/** @type {Worker | undefined} */
let worker;
/** @type {Map<number, (answer: any) => void>} */
const waiting = new Map();
let asked = 0;

/**
 * Run a model, or only open it where there are no pixels.
 * @param {object} question @param {Transferable[]} [given]
 */
function run(question, given = []) {
  if (!worker) {
    worker = new Worker("worker.js", { type: "module" });
    worker.onmessage = ({ data }) => { waiting.get(data.ticket)?.(data); waiting.delete(data.ticket); };
    worker.onerror = () => { waiting.forEach((answer) => answer({ problem: "the worker did not start" })); waiting.clear(); worker = undefined; };
  }
  const ticket = (asked += 1);
  return new Promise((resolve) => { waiting.set(ticket, resolve); worker?.postMessage({ ...question, ticket }, given); });
}

/** Open the model that is shown ahead of the first question: a small one soon, a large one where it is about to be asked. */
let shown = boot.default.model;
const opened = new Set();
["pointerover", "focusin"].forEach((sign) => addEventListener(sign, ({ target }) => {
  const needed = boot.models.find(({ id }) => id === shown).device.bytes < SMALL || /** @type {Element} */ (target).closest?.(".mv-flow-box");
  if (!needed || opened.has(shown)) return;
  opened.add(shown);
  run({ model: shown });
}));

/** Models that have answered. */
const ready = new Set();

/** What a visitor waits for. @param {string} words */
function tell(words) {
  const toast = /** @type {HTMLElement} */ (document.querySelector("[data-box=toast]"));
  toast.textContent = words;
  toast.hidden = !words;
}

// ---- images

/** @param {string} source */
async function pixelsOf(source) {
  const image = new Image();
  image.src = pictureSource(source);
  await image.decode();
  const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
  const brush = /** @type {OffscreenCanvasRenderingContext2D} */ (canvas.getContext("2d"));
  brush.drawImage(image, 0, 0);
  return brush.getImageData(0, 0, canvas.width, canvas.height);
}

/** @param {Uint8ClampedArray} pixels RGB @param {number} side */
function sourceOf(pixels, side) {
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width: side, height: side });
  const all = new ImageData(side, side);
  all.data.forEach((_, place) => { all.data[place] = place % 4 === 3 ? 255 : pixels[Math.floor(place / 4) * 3 + (place % 4)]; });
  /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d")).putImageData(all, 0, 0);
  return canvas.toDataURL("image/png");
}

// ---- views

/** Rows of a tensor [1, P, K]. @param {{ data: number[], dims: number[] }} found */
const tensorRows = ({ data, dims: [, rows, width] }) => Array.from({ length: rows }, (_, row) => data.slice(row * width, (row + 1) * width));

/** @param {Layer} facts @param {Record<string, { data: number[], dims: number[] }>} outputs @returns {Layer} */
function layerOf(facts, outputs) {
  const [experts, weights, probs] = ["experts", "weights", "probs"].map((name) => tensorRows(outputs[`${name}.${facts.layer}`]));
  const kept = weights.map((row) => row.map((weight) => weight > 0));
  const count = (counted) => [...Array(facts.num_experts).keys()].map((expert) => sum(experts.map((row, patch) => row.filter((one, rank) => one === expert && counted(patch, rank)).length)));
  const counts = count((patch, rank) => kept[patch][rank]);
  const margin = probs.map((row) => { const [best, second = 0] = [...row].sort((a, b) => b - a); return round(best - second); });
  const entropy = probs.map((row) => round(Math.max(0, -sum(row.map((p) => (p > 0 ? p * Math.log2(p) : 0))))));
  const slowest = round((Math.max(...counts) * counts.length) / (sum(counts) || 1));
  return { ...facts, experts, weights: weights.map((row) => row.map(round)), kept, probs: probs.map((row) => row.map(round)), margin, entropy, counts,
    requested: count(() => true), slowest };
}

/** @param {string[]} names @param {number[]} logits */
function guesses(names, logits) {
  const probability = softmax(logits);
  return names.map((name, place) => ({ class: name, p: probability[place] })).sort((a, b) => b.p - a.p).slice(0, TOP).map((one) => ({ ...one, p: round(one.p) }));
}

/** @param {any} question */
async function route(question) {
  const { model: id, picture, away = [] } = question;
  shown = id;
  const known = picture.kind === "example" ? await example(id, picture.id) : null;
  if (known && (known.error || (known.schema && !away.length))) return known;
  const model = boot.models.find((one) => one.id === id);
  const { mean, std, unlike, view } = model.device;
  const settings = { ...view.settings, away, off_distribution: away.length > 0 };
  if (away.length === 1 && boot.recorded.includes(keyOf("without", id, picture.id))) {
    const { layers, moe, shares } = (await recall("without", id, picture.id))[away[0].join(".")];
    return { ...known, layers: layers.map((own, place) => ({ ...view.layers[place], ...own })), lens: null, shares, prediction: { ...known.prediction, moe }, settings };
  }
  const typed = picture.kind === "page" ? await typedPage(id, picture.text) : null;
  if (typed?.error) return typed;
  const image = typed?.image ?? await pixelsOf(known ? known.picture.src : picture.data);
  const pixels = squarePixels(image, model.image_size);
  const large = model.device.bytes > SMALL && !ready.has(id);
  if (large) tell(`Fetching the model, ${Math.round(model.device.bytes / 1e6)} MB, once.`);
  const { outputs, problem } = await computed(model, normalized(pixels, mean, std), away);
  if (large) tell("");
  ready.add(id);
  if (problem) { console.warn(`moevision: ${id} did not run`, problem); return FAILED; }
  const far = outputs.distance && outputs.distance.data[0] > 1;
  return /** @type {View} */ ({ ...view, layers: view.layers.map((facts) => layerOf(facts, outputs)), lens: null,
    shares: outputs.shares?.data.map(round) ?? null,
    picture: known?.picture ?? { id: null, name: typed?.name ?? "your image", label: typed?.label ?? null, src: sourceOf(pixels, model.image_size), unlike: far ? unlike : null, credit: null },
    prediction: { moe: guesses(model.class_names, outputs.logits.data), dense: known?.prediction?.dense ?? null },
    settings });
}

/** What a model says without some experts. @param {any} model @param {Float32Array} pixels @param {number[][]} away */
function computed(model, pixels, away) {
  const experts = Math.max(...model.routers.map(({ num_experts: count }) => count));
  const gone = new Uint8Array(experts * model.layers.length);
  away.forEach(([layer, expert]) => { gone[model.layers.indexOf(layer) * experts + expert] = 1; });
  return run({ model: model.id, pixels, side: model.image_size, away: gone, experts });
}

/**
 * By how few experts of the only layer the answer for a typed page falls, as demo/service.py searches it.
 * @param {any} question
 */
async function fewest({ model: id, picture }) {
  if (picture.kind !== "page") return UNANSWERED;
  const model = boot.models.find((one) => one.id === id);
  const typed = await typedPage(id, picture.text);
  if (typed.error) return typed;
  const pixels = normalized(squarePixels(typed.image, model.image_size), model.device.mean, model.device.std);
  const logits = async (away) => (await computed(model, pixels, away)).outputs?.logits.data ?? [];
  const before = await logits([]);
  const own = before.indexOf(Math.max(...before));
  const [{ layer, num_experts: experts }] = model.routers;
  for (const sets of setsOf(experts)) {
    const answers = await Promise.all(sets.map(async (chosen) => {
      const away = chosen.map((expert) => [layer, expert]);
      return { away, probability: softmax(await logits(away)) };
    }));
    const changed = answers.filter(({ probability: p }) => p.indexOf(Math.max(...p)) !== own);
    changed.sort((one, other) => one.probability[own] - other.probability[own]);
    if (changed.length) return { away: changed[0].away };
  }
  return { away: null };
}

/** All sets of one, of two, and of three experts. @param {number} experts @returns {number[][][]} */
export function setsOf(experts) {
  const larger = (sets) => sets.flatMap((chosen) =>
    [...Array(experts).keys()].filter((expert) => expert > (chosen.at(-1) ?? -1)).map((expert) => [...chosen, expert]));
  const one = larger([[]]);
  const two = larger(one);
  return [one, two, larger(two)];
}

/** @param {string} model @param {string} text */
async function typedPage(model, text) {
  const sheet = await recall("sheet", model);
  if (sheet.error) return sheet;
  const page = readPage(text, sheet);
  return "error" in page ? { ...page, code: "bad_request" } : { ...page, image: drawPage(page.numbers, sheet, await pixelsOf(sheet.src)) };
}

/**
 * The view of an example, or of an image in the galleries its `picture` only.
 * @param {string} model @param {string} id
 */
async function example(model, id) {
  if (boot.recorded.includes(keyOf("route", model, id)) || !boot.recorded.includes(keyOf("pictures", model))) return recall("route", model, id);
  const picture = (await recall("pictures", model))[id];
  return picture ? { picture } : UNANSWERED;
}

// ---- what was recorded

/** The name of a recorded answer, as `key` in build.py. @param {...unknown} words */
export const keyOf = (...words) => words.join("-").replace(/[^A-Za-z0-9_.-]/g, "_");

/** @param {...unknown} words */
async function recall(...words) {
  const name = keyOf(...words);
  if (!boot.recorded.includes(name)) return UNANSWERED;
  const answer = await fetch(`${name}.bin`);
  return answer.ok && answer.body ? new Response(answer.body.pipeThrough(new DecompressionStream("gzip"))).json() : FAILED;
}

/** @type {Server} */
export const server = {
  boot: async () => boot,
  route,
  sharp: async (/** @type {any} */ { model, picture }) => (boot.recorded.includes(keyOf("sharp", model, picture)) ? recall("sharp", model, picture) : { src: null }),
  history: async (/** @type {any} */ { model, picture }) => recall("history", model, picture),
  experts: async (/** @type {any} */ { model, layer }) => recall("experts", model, layer),
  emoji: async (/** @type {any} */ { model }) => recall("emoji", model),
  fewest,
  what_if: async (/** @type {any} */ { model, picture, away, intervention: one }) =>
    recall("effect", model, picture.id, ...(one ? [one.layer, one.expert] : away.flat())),
};

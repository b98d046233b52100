// Photo and boxes: regions, headlines, and what a link takes away, by hand.
import assert from "node:assert/strict";
import { test } from "node:test";

import { awayWord, opensDoor, readAway } from "../../../moevision/demo/assets/app_opening.js";
import { amountOf, opacityIn } from "../../../moevision/demo/assets/core_flow.js";
import { boxPlaces, firstExperts, paintRegions, patchOf, regionsOf } from "../../../moevision/demo/assets/core_mosaic.js";
import { goneWords, headlineOf } from "../../../moevision/demo/assets/core_words.js";

test("a patch belongs to the first expert that computed it, or to none", () => {
  const layer = { experts: [[2, 0], [1, 3], [0, 1], []], kept: [[true, true], [false, true], [false, false], []] };
  assert.deepEqual(firstExperts(layer), [2, 3, null, null]);
});

test("an expert that is nobody's first choice but somebody's second isn't called idle", () => {
  const layer = { kind: "token_choice", top_k: 2, counts: [2, 3, 1, 0], experts: [[0, 1], [0, 1], [1, 2]], kept: [[true, true], [true, true], [true, true]] };
  const words = [0, 1, 2, 3].map((expert) => amountOf(layer, expert, ["patch", "patches"]));
  assert.deepEqual(words, [["2 patches", false], ["1 patch", "second choice for 2"], ["second choice for 1", ""], ["none", ""]]);
});

test("sixteen large patches keep their own colours under a paler tint than many small ones", () => {
  /** How opaque is what lies on the whole of the first of `count` patches, which all went to one expert. */
  const tintOf = (count) => {
    /** @type {string[]} */
    const colours = [];
    const context = {
      set fillStyle(colour) { colours.push(colour); },
      fillRect() {}, beginPath() {}, roundRect() {}, fill() {}, fillText() {},
      measureText: () => ({ width: 1 }),
    };
    const columns = Math.sqrt(count);
    paintRegions(context, { num_experts: 8 }, Array(count).fill(0), [columns, columns], { side: 8, unit: 1, lit: null, paper: "white" });
    return Number(colours[0].split(",")[3].replace(")", ""));
  };
  assert.deepEqual([16, 64].map(tintOf), [0.12, 0.28]);
});

const LAYERS = [{ layer: 0, name: "L0", num_experts: 8 }, { layer: 3, name: "L3", num_experts: 4 }];

/** A view of an image with a label, of which the model says `now`. */
const viewOf = (label, now = label, away = []) => ({ picture: { label }, layers: LAYERS, prediction: { moe: [{ class: now, p: 0.4 }] }, settings: { away } });

test("an image that goes to one expert as a whole is not shared", () => {
  const [tokens, images] = [{ layer: 0, num_experts: 8, route_by: "token", top_k: 2 }, { num_experts: 2, route_by: "image", top_k: 1 }];
  assert.equal(headlineOf(viewOf("cat"), tokens), "Eight experts share this cat.");
  assert.equal(headlineOf(viewOf("cat"), images), "One of two experts gets this cat.");
  assert.equal(headlineOf(viewOf("cat"), { ...images, num_experts: 8, top_k: 2 }), "Two of eight experts get this cat.");
  assert.equal(headlineOf(viewOf(null, "cat"), images), "One of two experts gets this photo.");
  assert.equal(headlineOf(viewOf("smileys"), tokens, null, "page"), "Eight experts share this page.");
  assert.equal(headlineOf(viewOf("people"), tokens, null, "page"), "Eight experts share this page.");
  assert.equal(headlineOf(viewOf(null, "food"), tokens, null, "page"), "Eight experts share this page."); // a tie
});

test("once an expert is away the headline is what came of it", () => {
  const tokens = { layer: 0, num_experts: 8, route_by: "token", top_k: 2 };
  const headline = (label, was, now, away = [[0, 2]]) => headlineOf(viewOf(label, now, away), tokens, was && { class: was, p: 0.8 });
  assert.equal(headline("dog", "dog", "deer"), "Without expert 2 this dog becomes a deer.");
  assert.equal(headline("dog", "dog", "airplane"), "Without expert 2 this dog becomes an airplane.");
  assert.equal(headline("dog", "dog", "dog"), "Without expert 2 this dog stays a dog.");
  assert.equal(headline("smileys", "smileys", "food", [[0, 6]]), "Without expert 6 the smileys become food.");
  assert.equal(headline("people", "people", "travel"), "Without expert 2 the people become travel.");
  assert.equal(headline("food", "food", "food"), "Without expert 2 the food stays food.");
  assert.equal(headline("dog", "cat", "deer"), "Without expert 2 the answer becomes deer."); // it wasn't right before
  assert.equal(headline(null, "cat", "cat"), "Without expert 2 the answer stays cat.");
  assert.equal(headline("dog", null, "deer"), "Without expert 2 the answer is deer."); // not yet known what it was
});

test("experts that are away are named as long as they are few and of one layer", () => {
  const all = (layer, count) => [...Array(count).keys()].map((expert) => [layer, expert]);
  assert.equal(goneWords([[0, 5], [0, 2]], LAYERS, 0), "experts 2 and 5");
  assert.equal(goneWords([[3, 1]], LAYERS, 0), "expert 1 of L3"); // another layer is shown
  assert.equal(goneWords(all(0, 3), LAYERS, 0), "experts 0, 1 and 2");
  assert.equal(goneWords(all(0, 4), LAYERS, 0), "four experts");
  assert.equal(goneWords(all(3, 4), LAYERS, 3), "all four experts");
  assert.equal(goneWords([[0, 2], [3, 1]], LAYERS), "two experts");
});

test("a box shows first choices fully, later ones fainter, and of soft routers as much as a patch takes", () => {
  const layer = { kind: "token_choice", num_experts: 3, experts: [[0, 1], [1, 0], [2, 1]], weights: [[0.9, 0.1], [0.6, 0.4], [0.5, 0.5]], kept: [[true, true], [true, true], [true, false]] };
  assert.deepEqual(opacityIn(layer, 0).map((part) => (part > 0 && part < 1 ? "faint" : part)), [1, "faint", 0]);
  assert.deepEqual(opacityIn(layer, 1).map((part) => (part > 0 && part < 1 ? "faint" : part)), ["faint", 1, 0]); // the last one was dropped
  const soft = { ...layer, kind: "soft", experts: [[0, 1, 2], [1, 0, 2], [2, 0, 1]], weights: [[0.5, 0.3, 0.2], [0.4, 0.35, 0.25], [0.4, 0.3, 0.3]], kept: Array(3).fill([true, true, true]) };
  assert.deepEqual(opacityIn(soft, 1), [0.6, 0.8, 0.6]); // of the largest weight, .5
});

test("a patch lies in its box where it lies in the photo", () => {
  assert.deepEqual(boxPlaces(6, [2, 4], 100), [50, 25, 25]);
});

test("neighbours of one expert are a region, labelled where it is deepest", () => {
  const first = [
    1, 1, 1, 0,
    1, 1, 1, 1,
    1, 1, 1, null,
    0, 0, 2, 0,
  ];
  const regions = regionsOf(first, [4, 4]);
  assert.deepEqual(regions.map(({ expert, cells }) => [expert, cells.length]), [[1, 10], [0, 2], [0, 1], [2, 1], [0, 1]]);
  assert.equal(regions[0].label, 6); // 5 and 6 have four neighbours of their own
  assert.deepEqual(regions[1].cells, [12, 13]); // a corner is no neighbour
});

test("a patch is cut from the central square of a picture", () => {
  assert.deepEqual(patchOf({ naturalWidth: 300, naturalHeight: 100 }, 5, [4, 4]), [125, 25, 25, 25]);
});

test("a link takes away what the model has, each once", () => {
  const model = { routers: [{ layer: 7, num_experts: 8 }, { layer: 9, num_experts: 2 }] };
  assert.deepEqual(readAway("7.0_9.1_7.0", model), [[7, 0], [9, 1]]);
  for (const word of [undefined, "", "7.8", "9.2", "8.0", "7.-1", "7.0.5x", "7.1.5", "x_y"]) {
    assert.deepEqual(readAway(word, model).filter(([, expert]) => expert > 1 || expert < 0), []);
  }
  assert.deepEqual(readAway("8.0_7.8_7", model), []);
  assert.equal(awayWord([[7, 0], [9, 1]]), "7.0_9.1");
  assert.equal(awayWord([]), null);
});

test("a link to what stands behind the door opens it", () => {
  for (const key of ["patch", "mode", "k", "capacity", "tab", "do", "level"]) assert.equal(opensDoor({ [key]: "1" }), true);
  assert.equal(opensDoor({ model: "pets", picture: "pets/test/1", layer: "3", away: "3.1" }), false);
});

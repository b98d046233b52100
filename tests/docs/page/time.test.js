// Moments of the training: half-precision numbers, what a view of a moment keeps and leaves out, and Play.
import assert from "node:assert/strict";
import { test } from "node:test";

import { modesOf } from "../../../moevision/demo/assets/core_kinds.js";
import { halfNumber, momentWords, pastChoices, pastView, Time, trainedView } from "../../../moevision/demo/assets/core_time.js";

const HALF = { 0: 0x0000, 1: 0x3c00, 0.5: 0x3800, 0.25: 0x3400, 0.75: 0x3a00 };
const packed = (shape, values) => {
  const bytes = Buffer.alloc(2 * values.length);
  values.forEach((value, place) => bytes.writeUInt16LE(HALF[value], 2 * place));
  return { shape, data: bytes.toString("base64") };
};

// Two moments of two patches and three experts.
const LAYER = { layer: 3, weights: packed([2, 2, 3], [0.25, 0, 0.75, 0, 0, 0, 1, 0, 0, 0.25, 0.5, 0.25]) };
const MOMENTS = { picture: "a", steps: [0, 30], total_steps: 90, predictions: [[{ class: "cat", p: 0.5 }], [{ class: "dog", p: 0.9 }]], layers: [LAYER] };
const VIEW = {
  picture: { id: "a" }, prediction: { moe: [{ class: "dog", p: 0.9 }], dense: [{ class: "dog", p: 0.8 }] },
  layers: [{ layer: 3, name: "L3", kind: "token_choice", learned: true, num_experts: 3, experts: [[0], [1]], weights: [[1], [0.5]], kept: [[true], [true]],
    probs: [[1, 0, 0], [0, 1, 0]], margin: [1, 1], entropy: [0, 0], counts: [1, 1, 0], requested: [1, 1, 0], slowest: 1.5, computation: {}, reads: null }],
};

test("half-precision numbers", () => {
  assert.deepEqual([0, 0x3c00, 0x3800, 0x3555, 1, 0x7bff].map(halfNumber), [0, 1, 0.5, 1365 * 2 ** -12, 2 ** -24, 65504]);
});

test("experts of a patch, best first; none where nobody got weight", () => {
  assert.deepEqual(pastChoices(LAYER, 0, 0), [[2, 0.75], [0, 0.25]]);
  assert.deepEqual(pastChoices(LAYER, 0, 1), []);
  assert.deepEqual(pastChoices(LAYER, 1, 1), [[1, 0.5], [0, 0.25], [2, 0.25]]);
});

test("a view of a moment has the recorded numbers and no others", () => {
  const past = pastView(VIEW, MOMENTS, 0);
  const [layer] = past.layers;
  assert.deepEqual(past.moment, { step: 0, total_steps: 90 });
  assert.deepEqual(past.prediction, { moe: [{ class: "cat", p: 0.5 }], dense: null });
  assert.deepEqual([layer.experts, layer.weights, layer.kept], [[[2, 0], []], [[0.75, 0.25], []], [[true, true], []]]);
  assert.deepEqual([layer.counts, layer.requested], [[1, 0, 1], [1, 0, 1]]);
  assert.equal(layer.slowest, 1.5);
  assert.deepEqual([layer.probs, layer.margin, layer.entropy, layer.computation], [[], [], [], null]);
  assert.deepEqual(modesOf(layer), ["regions", "expert"]);
  assert.equal(past.picture, VIEW.picture);
  assert.equal(trainedView(past), VIEW);
  assert.equal(trainedView(VIEW), VIEW);
  assert.equal(VIEW.layers[0].experts[0][0], 0);
});

test("moments in words", () => {
  assert.deepEqual([0, 30].map((step) => momentWords({ step, total_steps: 90 })), ["before training", "after 30 of 90 steps"]);
});

/** A film of three places that is drawn nowhere. */
function played(t) {
  t.mock.timers.enable({ apis: ["setTimeout"] });
  const seen = [];
  const player = { playing: null, last: 2, get at() { return seen.at(-1) ?? 2; }, go: (place) => seen.push(place), mark() {}, play: Time.prototype.play };
  const settle = async () => { for (let i = 0; i < 5; i += 1) await Promise.resolve(); };
  const turn = async () => { await settle(); t.mock.timers.tick(1000); await settle(); };
  return { seen, player, turn };
}

test("play goes from the first place to the last", async (t) => {
  const { seen, player, turn } = played(t);
  const done = player.play();
  for (let i = 0; i < 4; i += 1) await turn();
  await done;
  assert.deepEqual(seen, [0, 1, 2]);
  assert.equal(player.playing, null);
});

test("pause stops, and play goes on from there", async (t) => {
  const { seen, player, turn } = played(t);
  player.play();
  await turn();
  player.play();
  await turn();
  assert.deepEqual([seen, player.playing], [[0, 1], null]);
  player.play();
  await turn();
  assert.deepEqual(seen, [0, 1, 2]);
});

test("who chooses another place meanwhile has it", async (t) => {
  const { seen, player, turn } = played(t);
  player.play();
  await turn();
  seen.push(0);
  await turn();
  await turn();
  assert.deepEqual([seen, player.playing], [[0, 1, 0], null]);
});

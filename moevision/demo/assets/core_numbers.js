// The numbers of one patch's computation, read from a view: what the server packed, and what follows from it.

import { lostWords, millions } from "./core_kinds.js";
import { fixed, layerExpert } from "./core_util.js";
import { numberWord } from "./core_words.js";
/** @import { Channels, Choice, Computed, Layer, Packed, PackedChannels, View } from "./types.js" */

const unpacked = new WeakMap();

/**
 * Numbers that the server packed (demo/wire.py): base64 of little-endian int16, times a unit.
 * @param {Packed} packed @returns {number[]}
 */
export function unpack(packed) {
  if (!unpacked.has(packed)) {
    const bytes = atob(packed.data);
    const whole = (index) => ((bytes.charCodeAt(index + 1) << 24) >> 16) | bytes.charCodeAt(index);
    unpacked.set(packed, Array.from({ length: bytes.length / 2 }, (_, index) => whole(2 * index) * packed.unit));
  }
  return unpacked.get(packed);
}

/**
 * One row of a packed table; null where there is none.
 * @param {Packed | null} packed @param {number} row @returns {any}
 */
const rowOf = (packed, row) => packed && unpack(packed).slice(row * packed.shape[1], (row + 1) * packed.shape[1]);

/**
 * How a layer computed a patch; null if the view doesn't say (an older export).
 * @param {View} view @param {Layer} layer @param {number} patch @returns {Computed | null}
 */
export function computedPatch(view, layer, patch) {
  const { computation } = layer;
  if (!computation?.channels) return null;
  const at = (name) => rowOf(computation[name], patch);
  /** @type {Choice[]} */
  const choices = layer.experts[patch].map((expert, rank) => ({
    expert, weight: layer.weights[patch][rank], kept: layer.kept[patch][rank],
  }));
  const scores = at("scores");
  const bias = computation.bias && unpack(computation.bias);
  const noise = at("noise");
  const sigmoid = ["sigmoid", "bias_balanced"].includes(layer.router);
  const shares = sigmoid ? scores.map((score) => 1 / (1 + Math.exp(-score)))
    : noise ? softmax(scores.map((score, expert) => score + noise[expert])) : layer.probs[patch];
  return { scores, noise, shares, sigmoid, bias, choices, kept: choices.filter(({ kept }) => kept), channels: channelsOf(computation.channels, patch),
    missing: missingWeight(view, layer, choices) };
}

/** The shown numbers of a patch's vectors. @param {PackedChannels} given @param {number} patch @returns {Channels} */
function channelsOf({ of, hidden, index, scale, outputs, ...vectors }, patch) {
  const rows = Object.fromEntries(Object.entries(vectors).map(([name, value]) => [name, rowOf(value, patch)]));
  const [, choices, width] = outputs.shape;
  const given = unpack(outputs).slice(patch * choices * width, (patch + 1) * choices * width);
  const each = Array.from({ length: choices }, (_, rank) => given.slice(rank * width, (rank + 1) * width));
  return /** @type {any} */ ({ of, hidden, index, scale: scale && unpack(scale), outputs: each, ...rows });
}

/** @param {number[]} scores */
export function softmax(scores) {
  const top = Math.max(...scores);
  const parts = scores.map((score) => Math.exp(score - top));
  const sum = parts.reduce((total, part) => total + part, 0);
  return parts.map((part) => part / sum);
}

/**
 * Where weight went that no expert's output got: nothing, or a sentence for each way. Below half a hundredth there is
 * nothing to see.
 * @param {View} view @param {Layer} layer @param {Choice[]} choices
 */
function missingWeight(view, layer, choices) {
  const sum = (some) => some.reduce((total, { weight }) => total + weight, 0);
  const sentences = choices.filter(({ kept, weight }) => !kept && weight >= 0.005).map(({ expert, weight }) => {
    const why = lostWords(view, layer, expert) === "taken away" ? "it was taken away" : "it was full";
    return `${fixed(weight)} was ${layerExpert(layer, expert)}'s: ${why}, and nobody else gets it.`;
  });
  const rest = 1 - sum(choices);
  if (rest >= 0.005 && choices.length && layer.steps.weights.endsWith("left out.")) {
    const others = layer.kind === "expert_choice" ? "experts that didn't take the patch" : "experts that weren't kept";
    sentences.push(`The other ${fixed(rest)} belongs to ${others}, and is left out.`);
  }
  return sentences;
}

/** How many experts of a layer ran for a patch. Of Soft MoE all do. @param {Layer} layer @param {number} patch */
export const expertsRun = (layer, patch) => layer.kept[patch].filter(Boolean).length;

/**
 * Parameters that computed a patch, of all that the model has: experts that didn't run are left out in every layer.
 * @param {View} view @param {number} patch
 */
export function parametersRun({ model, layers }, patch) {
  const idle = layers.reduce((sum, layer) => sum + (layer.num_experts - expertsRun(layer, patch)) * layer.expert_parameters, 0);
  return { run: model.parameters - idle, all: model.parameters };
}

/**
 * What sparsity means for a patch: said where it happens.
 * @param {View} view @param {Layer} layer @param {number} patch
 */
export function sparsityWords(view, layer, patch) {
  const { num_experts: experts } = layer;
  if (layer.kind === "soft") return `All ${experts} experts ran, each on its slots: means of all patches, not patch by patch.`;
  const ran = expertsRun(layer, patch);
  const { run, all } = parametersRun(view, patch);
  const idle = experts - ran;
  const share = `${ran || "None"} of ${experts} experts ran for this patch`;
  const cost = `: ${millions(run)} of ${millions(all)} parameters`;
  if (!idle) return `${share}${cost}.`;
  return `${share}${cost}; the other ${numberWord(idle)} cost memory, no time.`;
}

// How a layer routes, in words and numbers. The layers of one model may differ in router, experts and k, so everything
// here asks a layer: patches choose experts, experts choose patches, or slots mix all patches (Soft MoE).

import { fixed, present, rowColumn } from "./core_util.js";
/** @import { Layer, Mode, Router, View, Worded } from "./types.js" */

export const MODES = {
  regions: { label: "Regions" },
  expert: { label: "Each patch" },
  reads: { label: "Reads" },
  entropy: { label: "Entropy" },
  rests: { label: "What the answer rests on" },
};

/**
 * The colourings that mean something in a layer; gates by a rule have no probabilities, so no entropy either.
 * @param {Router | Layer} given
 */
export function modesOf({ kind, learned, ...layer }) {
  const experts = ["regions", "expert"];
  if ("past" in layer) return experts;
  if (kind === "soft") return [...experts, "reads", "entropy"];
  if (kind === "expert_choice") return [...experts, "entropy"];
  return learned ? [...experts, "entropy"] : experts;
}

/**
 * The same of a layer in its view, and what the answer rests on where the classifier says it.
 * @param {View} view @param {Layer} layer @returns {string[]}
 */
export const modesIn = ({ shares }, layer) => (shares && !layer.past ? [...modesOf(layer), "rests"] : modesOf(layer));

/** @param {string} text */
export const capital = (text) => text[0].toUpperCase() + text.slice(1);
/** @param {number} number @param {string} word @param {string} [words] */
export const plural = (number, word, words = `${word}s`) => `${number} ${number === 1 ? word : words}`;

/**
 * [E] the weight of every expert in a patch, 0 where it doesn't compute it.
 * @param {Layer} layer @param {number} patch
 */
export function patchWeights(layer, patch) {
  const weights = Array(layer.num_experts).fill(0);
  layer.experts[patch].forEach((expert, rank) => { if (layer.kept[patch][rank]) weights[expert] = layer.weights[patch][rank]; });
  return weights;
}

/**
 * [E] parts of the image that experts compute: of its choices, or for Soft MoE of what its patches take.
 * @param {Layer} layer
 */
export function expertShares(layer) {
  const parts = layer.kind !== "soft" ? layer.counts
    : layer.experts.reduce((sum, _, patch) => patchWeights(layer, patch).map((weight, expert) => weight + sum[expert]), Array(layer.num_experts).fill(0));
  const total = parts.reduce((sum, part) => sum + part, 0);
  return parts.map((part) => (total > 0 ? part / total : 0));
}

/** What shares of experts are shares of. @param {(Router | Layer)[]} layers */
export const shareOf = (layers) => (layers.every(({ kind }) => kind === "token_choice") ? "patch choices" : "what patches take from the experts");

/**
 * [P] of Soft MoE: what an expert reads of each patch, the mean over its slots, in even shares; null: of its first expert.
 * @param {Layer} layer @param {number | null} expert
 */
export function readShares({ reads, experts }, expert) {
  const rows = present(reads);
  const means = rows.map((row) => row.reduce((sum, value) => sum + value, 0) / row.length);
  return experts.map(([first], patch) => rows[expert ?? first][patch] / means[expert ?? first]);
}

/** Smallest and largest weight of the strongest expert, over the patches that have one. @param {Layer} layer */
export function strongest(layer) {
  const first = layer.experts.flatMap((experts, patch) => (experts.length ? [layer.weights[patch][0]] : []));
  return { low: Math.min(...first, 1), high: Math.max(...first, 0) };
}

/**
 * Whether an expert is among those that are away.
 * @param {[number, number][] | undefined} away layer and number of each @param {number} layer @param {number} expert
 */
export const isAway = (away, layer, expert) => Boolean(away?.some(([where, which]) => where === layer && which === expert));

/** The experts of a layer that are taken away. @param {View} given @param {Layer} given @returns {number[]} */
export function goneFrom({ settings: { intervention, away = [] } }, { layer }) {
  const gone = away.flatMap(([where, expert]) => (where === layer ? [expert] : []));
  return intervention?.kind === "ablate" && intervention.layer === layer ? [...gone, Number(intervention.expert)] : gone;
}

/**
 * How many choices aren't computed, leaving out those of experts that are taken away.
 * @param {View} view @param {Layer} layer
 */
function droppedChoices(view, layer) {
  const gone = goneFrom(view, layer);
  return layer.kept.flatMap((row, patch) => row.filter((kept, rank) => !kept && !gone.includes(layer.experts[patch][rank]))).length;
}

// ---- sentences ----------------------------------------------------------------------------------------------

/**
 * How layers route, those alike together: [["L1, L3", "top-2 of 8 experts"], ...]. `layers` have `name` and `words`.
 * @param {Worded[]} layers
 */
export function routingWords(layers) {
  const ways = [...new Set(layers.map(({ words }) => words))];
  return ways.map((words) => [layers.filter((layer) => layer.words === words).map(({ name }) => name).join(", "), words]);
}

/** @param {number} number as in "7.7 M" */
export const millions = (number) => (number >= 1e6 ? `${fixed(number / 1e6, number >= 1e7 ? 0 : 1)}\u00a0M` : `${Math.max(1, Math.round(number / 1e3))}\u00a0K`);

/** What a screen reader says about a patch. @param {View} view @param {Layer} layer @param {number} patch */
export function describePatch(view, layer, patch) {
  const [row, column] = rowColumn(patch, view.model.grid[1]);
  return `row ${row}, column ${column}: ${describeExperts(view, layer, patch)}`;
}

/** @param {View} view @param {Layer} layer @param {number} patch */
function describeExperts(view, layer, patch) {
  const { kind } = layer;
  const [experts, weights, kept] = [layer.experts[patch], layer.weights[patch], layer.kept[patch]];
  if (!experts.length) return "no expert took it";
  const first = `expert ${experts[0]}, weight ${fixed(weights[0])}`;
  if (kind === "soft") return `mostly ${first}`;
  if (kind === "expert_choice") return experts.length > 1 ? `${first}, and ${experts.length - 1} more` : first;
  return kept[0] ? first : `${first}, ${lostWords(view, layer, experts[0])}`;
}

/**
 * Why an expert that was chosen doesn't compute a patch.
 * @param {View} view @param {Layer} layer @param {number} expert
 */
export const lostWords = (view, layer, expert) => (goneFrom(view, layer).includes(expert) ? "taken away" : "dropped by capacity");

/**
 * What colour and number of a patch say in the present colouring.
 * @param {View} view @param {Layer} layer @param {Mode} mode
 */
export function modeHint(view, layer, mode) {
  return {
    regions: () => `regions whose patches have one ${layer.kind === "soft" ? "expert that gives them most" : "first expert"}`,
    expert: () => expertHint(view, layer),
    reads: () => "how much of what the expert in the hand, else the patch's first, reads comes from the patch, in even shares",
    entropy: () => "bits: how evenly the router shares the patch out",
    rests: () => restHint(view),
  }[mode]();
}

/** @param {View} view */
function restHint({ prediction: { moe: [first, second] } }) {
  return `blue speaks for ${first.class}, brown for ${second?.class ?? "nothing"} · number: a patch's share
    in their logits' difference, in hundredths · not what these pixels did alone: attention has mixed the patches before`;
}

/** @param {View} view @param {Layer} layer */
function expertHint(view, layer) {
  const { kind, learned, num_experts: experts, slots } = layer;
  if (kind === "soft") return `every patch takes from all ${experts * (slots ?? 0)} slots · colour and number: the expert with the largest share`;
  if (kind === "expert_choice") return "colour and number: the expert with the largest weight · +1: one more took the patch · –: none did";
  const dropped = droppedChoices(view, layer) ? " · hatched: dropped by capacity" : "";
  return `colour and number: first-choice expert${learned ? " · stronger colour: higher gate weight" : ", by a rule that nobody learned"}${dropped}`;
}

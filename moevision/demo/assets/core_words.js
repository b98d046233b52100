// What the page says of a view: its headline, which becomes the result once an expert is away, and what was changed.

import { capital } from "./core_kinds.js";
import { html, present } from "./core_util.js";
/** @import { Guess, Intervention, Layer, Router, View } from "./types.js" */

const NUMBERS = "no one two three four five six seven eight nine ten eleven twelve".split(" ");
/** @param {number} count */
export const numberWord = (count) => NUMBERS[count] ?? String(count);

/** @param {string} word */
const article = (word) => `${/^[aeiou]/i.test(word) ? "an" : "a"} ${word}`;

const MASSES = ["food", "travel"];
/** Whether a class names many things, as "smileys" and "people" do. @param {string} name */
const isPlural = (name) => name === "people" || (/s$/.test(name) && name.length > 4);
/** Whether it names one thing, as "dog" does; "food" names no thing at all. @param {string} name */
const isSingle = (name) => !isPlural(name) && !MASSES.includes(name);

/** "2", "2 and 5", "2, 3 and 5". @param {(number | string)[]} list */
const listed = (list) =>
  list.length < 2 ? String(list[0] ?? "") : `${list.slice(0, -1).join(", ")} and ${list.at(-1)}`;

/**
 * "expert 2", "experts 2 and 5 of L9", "all eight experts", "five experts": those that are away.
 * @param {[number, number][]} away @param {{ layer: number, name: string, num_experts: number }[]} layers
 * @param {number} [shown] the layer that needn't be named
 */
export function goneWords(away, layers, shown) {
  const [[where]] = away;
  const count = numberWord(away.length);
  if (away.some(([layer]) => layer !== where)) return `${count} experts`;
  const one = present(layers.find(({ layer }) => layer === where));
  const of = where === shown || layers.length === 1 ? "" : ` of ${one.name}`;
  if (away.length === one.num_experts) return `all ${count} experts${of}`;
  if (away.length > 3) return `${count} experts${of}`;
  return `expert${away.length > 1 ? "s" : ""} ${listed(away.map(([, expert]) => expert).sort((a, b) => a - b))}${of}`;
}

/**
 * "Eight experts share this dog."; with some away what came of that: "Without expert 2 this dog becomes a deer."
 * @param {Pick<View, "picture" | "layers" | "prediction" | "settings">} view @param {Pick<Layer, "layer" | "num_experts" | "route_by" | "top_k">} layer
 * @param {Guess | null} [usual] what the model says with all experts; null where it isn't known
 * @param {string} [thing] what an image of several things is called
 */
export function headlineOf(
  { picture: { label }, layers, prediction, settings: { away = [] } },
  { layer, num_experts: experts, route_by: unit, top_k: k },
  usual = null,
  thing = "image",
) {
  const named = label === null || isSingle(label) ? label : thing;
  const what = named ?? (thing === "page" ? thing : "photo");
  if (away.length)
    return `Without ${goneWords(away, layers, layer)} ${outcome(prediction.moe[0].class, label, usual)}.`;
  if (unit !== "image") return `${capital(numberWord(experts))} experts share this ${what}.`;
  return `${capital(numberWord(k))} of ${numberWord(experts)} experts ${k === 1 ? "gets" : "get"} this ${what}.`;
}

/** @param {string} now @param {string | null} label @param {Guess | null} usual */
function outcome(now, label, usual) {
  if (!usual) return `the answer is ${now}`;
  const was = usual.class;
  if (label !== was) return `the answer ${was === now ? `stays ${was}` : `becomes ${now}`}`;
  const verb = `${was === now ? "stay" : "become"}${isPlural(was) ? "" : "s"}`;
  return `${isSingle(was) ? "this" : "the"} ${was} ${verb} ${isSingle(now) ? article(now) : now}`;
}

/** What became of the patches of experts that are away, by the way in which the layer routes. */
const WENT = {
  token_choice: "went to the next-best experts.",
  expert_choice: "keep the other experts that took them.",
  soft: "take more from the other experts.",
};
const NOTHING_ELSE = "Nothing else changed.";

/** What a patch of a photo is called, one and several. @type {[string, string]} */
export const PATCH = ["patch", "patches"];

/**
 * The line below the headline.
 * @param {View} view @param {Layer} layer @param {[string, string]} [unit] what a patch is called, one and several
 */
export function sentenceOf(view, layer, [one, several] = PATCH) {
  const { kind, top_k: k, route_by: routed, num_experts: experts, learned } = layer;
  const { away = [] } = view.settings;
  const count = layer.experts.length;
  const here = away.filter(([where]) => where === layer.layer).length;
  const went = `${away.length === 1 ? "Its" : "Their"} ${several} ${WENT[kind]}`;
  const gone = here === experts ? `Every ${one} skips this layer's experts.` : went;
  if (away.length) return html`${gone} <span>${NOTHING_ELSE}</span>`;
  const few = `${numberWord(k)} expert${k === 1 ? "" : "s"}`;
  if (routed === "image") return `A router looks at the whole image and sends it to ${few}.`;
  if (kind === "soft") return `Each of ${count} ${several} takes something from all of them.`;
  if (kind === "expert_choice") return `Each expert picks some of ${count} ${several}.`;
  const untold = learned ? " Nobody told it which goes where." : "";
  return `A ${learned ? "router" : "fixed rule"} sends each of ${count} ${several} to ${few}.${untold}`;
}

/** What a link or the details made of the trained model, but for experts that are away. @param {View} view */
export function otherModel(view) {
  const { variant, accuracy_text: known } = view.model;
  const { intervention, noise, off_reason: off } = view.settings;
  const words = [
    variant !== "trained" && `${capital(known)}.`,
    intervention && changedWords(view),
    off,
    typeof noise === "number" && `The routers draw noise, as in training (draw ${noise}).`,
  ];
  return words.filter(Boolean).join(" ");
}

/** What was changed about the model; empty where nothing was. @param {View} view */
export function changedWords({ settings: { intervention, away = [] }, model: { routers } }) {
  if (intervention) return interventionWords(intervention, routers);
  return away.length ? `Without ${away.map(([layer, expert]) => `L${layer}·E${expert}`).join(", ")}.` : "";
}

/** @param {Intervention} given @param {Router[]} routers */
function interventionWords({ kind, layer, expert, other, fill }, routers) {
  const where = layer === null || layer === undefined ? "in every layer" : `in L${layer}`;
  const way = routers.find((router) => router.layer === layer)?.kind ?? "token_choice";
  if (kind === "random") return `${way === "soft" ? "Slots" : "Patches"} go to random experts ${where}.`;
  if (kind === "swap")
    return `L${layer}·E${expert} and E${other} compute each other's ${way === "soft" ? "slots" : "patches"}.`;
  if (kind === "force") return `Every patch ${where} goes to L${layer}·E${expert}.`;
  const went = fill === "zero" ? "get nothing in its place." : `${WENT[way]} ${NOTHING_ELSE}`;
  return `Without L${layer}·E${expert}: its patches ${went}`;
}

// What one change did to a view's answer, beside as many random changes: measured by the server after the view is there.

import { percent } from "./core_util.js";
import { PATCH } from "./core_words.js";
/** @import { Effect, View } from "./types.js" */

/** @type {WeakMap<View, Effect | Error | null>} null while it is measured */
export const effects = new WeakMap();

/** What the change of a view did to its answer; null where none was measured, or not yet. @param {View} view */
export function effectOf(view) {
  const found = effects.get(view) ?? null;
  return found instanceof Error ? null : found;
}

/** What stands where a control would be the change itself. */
const NO_CONTROL = "No control: an image has one expert, so a random one would be the same";

/** @param {Effect} effect */
const moves = ({ moved, moved_prefix: prefix }) => moved + prefix > 0;

/**
 * Mean and standard deviation of the control's probability of the class, and the digits that the spread leaves.
 * @param {NonNullable<Effect["control"]>} control @param {Effect["before"]} before
 */
function controlled({ delta_ps: deltas }, before) {
  const mean = deltas.reduce((sum, delta) => sum + delta, 0) / deltas.length;
  const spread = Math.sqrt(deltas.reduce((sum, delta) => sum + (delta - mean) ** 2, 0) / (deltas.length - 1));
  return { mean: before[0].p + mean, spread, digits: spread < 0.0095 ? 1 : 0 };
}

/**
 * "cat 92 % → 31 %, now dog", or that it stays: what becomes of the class that was predicted before.
 * @param {Effect} effect
 */
export function answerWords(effect) {
  const { before, after, target, delta_p: delta, control } = effect;
  const digits = control ? controlled(control, before).digits : 0;
  const [old, now] = [before[0].p, before[0].p + delta].map((p) => percent(p, digits));
  const other = after[0].class === target ? "" : `, now ${after[0].class}`;
  return old === now ? `${target} stays ${now}${other}` : `${target} ${old} → ${now}${other}`;
}

/** @param {Effect} effect @param {[string, string]} [unit] what a patch is called, one and several */
export function controlWords(effect, [one, several] = PATCH) {
  if (!moves(effect)) return `No ${one} changes its experts, so there is nothing to compare with`;
  if (!effect.control) return NO_CONTROL;
  const { mean, spread, digits } = controlled(effect.control, effect.before);
  return `As many ${several} moved at random: ${effect.target} ${percent(mean, digits)} ± ${percent(spread, digits)}`;
}

// What a change did to the answer, in words; numbers that a reader can recompute.
import assert from "node:assert/strict";
import { test } from "node:test";

import { readIntervention } from "../../../moevision/demo/assets/app_address.js";
import { answerWords, controlWords } from "../../../moevision/demo/assets/core_effect.js";

const effect = (given) => ({
  before: [{ class: "cat", p: 0.9 }, { class: "dog", p: 0.1 }], after: [{ class: "cat", p: 0.6 }, { class: "dog", p: 0.4 }],
  target: "cat", delta_p: -0.3, moved: 5, moved_prefix: 0, control: { delta_ps: [-0.02, 0.02] }, ...given,
});

test("the class that was predicted before is followed, and another answer is named", () => {
  assert.equal(answerWords(effect({})), "cat 90 % → 60 %");
  const lost = effect({ delta_p: -0.6, after: [{ class: "dog", p: 0.7 }, { class: "cat", p: 0.3 }] });
  assert.equal(answerWords(lost), "cat 90 % → 30 %, now dog");
  assert.equal(answerWords(effect({ delta_p: 0.001 })), "cat stays 90 %");
});

test("the control has mean and standard deviation, with the digits that the spread leaves", () => {
  // Deviations of 0.02 from the mean, two draws: the root of 2 · 0.0004 / 1 is 0.028.
  assert.equal(controlWords(effect({})), "As many patches moved at random: cat 90 % ± 3 %");
  // 0.001 each: the root of 0.000002 is 0.0014.
  const close = effect({ control: { delta_ps: [0.009, 0.011] } });
  assert.equal(controlWords(close), "As many patches moved at random: cat 91.0 % ± 0.1 %");
  assert.equal(answerWords(close), "cat 90.0 % → 60.0 %");
  assert.match(controlWords(effect({ control: null })), /^No control/);
  assert.equal(answerWords(effect({ control: null })), "cat 90 % → 60 %");
  assert.match(controlWords(effect({ moved: 0 })), /^No patch changes its experts/);
});

test("a swap in a link names two different experts of the layer", () => {
  const model = /** @type {any} */ ({ layers: [3], routers: [{ layer: 3, num_experts: 4 }] });
  assert.deepEqual(readIntervention("swap.3.1-2.next_best.0", model), { kind: "swap", layer: 3, expert: 1, other: 2, fill: "next_best", seed: 0 });
  for (const word of ["swap.3.1-1.next_best.0", "swap.3.1-4.next_best.0", "swap.3.1.next_best.0", "swap.3.-.next_best.0", "ablate.3.x.next_best.0"]) {
    assert.equal(readIntervention(word, model), null);
  }
});

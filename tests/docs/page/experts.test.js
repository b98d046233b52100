// What a page says about an expert and about an image as a whole.
import assert from "node:assert/strict";
import { test } from "node:test";

import { silentWords } from "../../../moevision/demo/assets/core_lens.js";
import { calledWords, withoutWords } from "../../../moevision/demo/assets/tab_experts_words.js";

test("a name gives its counts, and nothing gives no name", () => {
  const called = { kind: /** @type {const} */ ("part"), name: "whisker", share: 0.4459, overall: 0.1287 };
  assert.equal(calledWords({ called }), "whisker: 45 %, its share of everything: 13 %");
  assert.equal(calledWords({ called: null }), "");
});

test("an effect over test images stands beside its control, and is left out where nobody measured it", () => {
  const without = { images_per_class: 40, delta_logit: -0.5, control_delta_logit: 0.04, strongest_class: "cat", strongest_delta_logit: -1.25 };
  assert.equal(withoutWords({ without }), "Taken away, over 40 test images of each class: logit of the true class \u22120.50, as much at random +0.04; most for cat, \u22121.25.");
  assert.equal(withoutWords({ without: { ...without, control_delta_logit: null } }), "Taken away, over 40 test images of each class: logit of the true class \u22120.50; most for cat, \u22121.25.");
  assert.equal(withoutWords({ without: null }), "");
});

test("silent experts are told for each layer, without one that was taken away", () => {
  const layer = (number, counts, kind = "token_choice") => ({ layer: number, name: `L${number}`, kind, counts });
  const view = (layers, intervention = null) => /** @type {any} */ ({ layers, settings: { intervention } });
  assert.equal(silentWords(view([layer(1, [3, 0, 0]), layer(3, [1, 1, 1])])), "Silent in this image: L1 E1, E2 · L3 none.");
  assert.equal(silentWords(view([layer(1, [3, 0, 0])], { kind: "ablate", layer: 1, expert: 2 })), "Silent in this image: L1 E1.");
  assert.equal(silentWords(view([layer(1, [4, 4], "soft")])), "");
});

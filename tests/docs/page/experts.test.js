// What a page says about an expert and about an image as a whole.
import assert from "node:assert/strict";
import { test } from "node:test";

import { classWords, withoutWords } from "../../../moevision/demo/assets/app_hand.js";
import { exampleName } from "../../../moevision/demo/assets/app_models.js";
import { goneFrom } from "../../../moevision/demo/assets/core_kinds.js";
import { calledWords } from "../../../moevision/demo/assets/tab_experts.js";

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

test("an effect over images of a class has the spread between them, and chance beside it", () => {
  const found = { n: 50, class: "cat", delta_p: -0.0412, delta_logit: -0.25, sd_logit: 0.5, control_delta_logit: -0.01 };
  const start = "Over 50 images of cat: \u22124.1 points of probability, logit \u22120.250";
  assert.equal(classWords(found), `${start} ± 0.500 between images; with random choices instead \u22120.010.`);
  assert.equal(classWords({ ...found, sd_logit: null, control_delta_logit: null }), `${start}.`);
});

test("experts that are away are those of both kinds, of one layer", () => {
  const several = { settings: { intervention: { kind: "ablate", layer: 1, expert: 2 }, away: [[1, 0], [3, 2]] } };
  assert.deepEqual(goneFrom(several, { layer: 1 }), [0, 2]);
  assert.deepEqual(goneFrom({ settings: { intervention: null } }, { layer: 1 }), []);
});

test("an example is called by its label once, and by its file without the folders", () => {
  assert.equal(exampleName("cat", "cat, cat/chelsea.jpg"), "cat, chelsea.jpg");
  assert.equal(exampleName("fox", "fox 5"), "fox, fox 5");
  assert.equal(exampleName(null, "beach.jpg"), "beach.jpg");
});

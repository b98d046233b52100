// The visitor's own images: which expert they share most, by hand.
import assert from "node:assert/strict";
import { test } from "node:test";

import { mostShared } from "../../../moevision/demo/assets/app_own.js";

test("the expert with the largest mean share, and in how many images it is the busiest", () => {
  const [expert, share, first] = mostShared([[0.5, 0.25, 0.25], [0.1, 0.6, 0.3], [0.3, 0.4, 0.3]]);
  assert.deepEqual([expert, first], [1, 2]);
  assert.ok(Math.abs(share - 1.25 / 3) < 1e-12);
  assert.deepEqual(mostShared([[0.2, 0.8]]), [1, 0.8, 1]);
});

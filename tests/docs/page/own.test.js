// The visitor's own images: which routes their patches take, by hand.
import assert from "node:assert/strict";
import { test } from "node:test";

import { routesOf } from "../../../moevision/demo/assets/app_own.js";

test("routes through the layers are counted in the middle half, the most frequent first", () => {
  // 4 x 4 patches, of which 5, 6, 9 and 10 lie in the middle; the first layer is all expert 1 but for patch 10.
  const layer = (experts) => ({ experts: experts.map((expert) => (expert === null ? [] : [expert])), kept: experts.map(() => [true]) });
  const first = layer(Array.from({ length: 16 }, (_, patch) => (patch === 10 ? 3 : 1)));
  const second = layer(Array.from({ length: 16 }, (_, patch) => ({ 5: 2, 6: 0, 9: 2, 10: 2 })[patch] ?? 7));
  const view = { layers: [first, second], model: { grid: [4, 4] } };
  assert.deepEqual(routesOf(view)[0], { path: [1, 2], count: 2 });
  assert.deepEqual(routesOf(view).map(({ count }) => count), [2, 1, 1]);
  // A patch that no expert computes is on no route.
  assert.deepEqual(routesOf({ ...view, layers: [first, layer(Array(16).fill(null))] }), []);
});

// The visitor's own images: which expert they share most, by hand.
import assert from "node:assert/strict";
import { test } from "node:test";

import { countShared, mostShared } from "../../../moevision/demo/assets/app_own.js";
import { Asker } from "../../../moevision/demo/assets/app_server.js";

test("the expert with the largest mean share, and in how many images it is the busiest", () => {
  const [expert, share, first] = mostShared([[0.5, 0.25, 0.25], [0.1, 0.6, 0.3], [0.3, 0.4, 0.3]]);
  assert.deepEqual([expert, first], [1, 2]);
  assert.ok(Math.abs(share - 1.25 / 3) < 1e-12);
  assert.deepEqual(mostShared([[0.2, 0.8]]), [1, 0.8, 1]);
});

test("an answer is asked for once under each setting, and no image is kept with it", async () => {
  let asked = 0;
  const asker = new Asker({ shares: async () => { asked += 1; return { layers: [] }; } });
  const data = (letter) => `data:image/png;base64,${letter.repeat(100_000)}`;
  const app = { own: [{ id: 1, name: "a", data: data("A") }, { id: 2, name: "b", data: data("B") }], asker, topK: null, settings() { return { top_k: this.topK }; },
    core: { box: () => null }, state: null, counted: "", shared: null };
  for (const topK of [1, 2, 3, 1]) {
    app.topK = topK;
    await countShared(app);
    assert.equal(app.shared.length, 2);
  }
  assert.equal(asked, 6);
  assert.deepEqual([...asker.answers.keys()].filter((key) => key.length > 1000), []);
});

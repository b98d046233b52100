// The page of `moevision data score`: decisions, undone one by one, as a CSV; and the cells of its map.
import assert from "node:assert/strict";
import { test } from "node:test";

import { Decisions, HEAD, cellsOf } from "../../../moevision/analysis/good_data/page.js";

test("an image has its last decision, and undo takes back one change", () => {
  const decisions = new Decisions();
  decisions.take({ id: "a", label: "cat", decision: "drop", newLabel: "" });
  decisions.take({ id: 'b,"c"', label: "cat", decision: "relabel", newLabel: "dog, large" });
  decisions.take({ id: "a", label: "cat", decision: "keep", newLabel: "" });
  assert.equal(decisions.csv(), `${HEAD}\na,cat,keep,\n"b,""c""",cat,relabel,"dog, large"\n`);
  assert.equal(decisions.undo(), "a");
  assert.equal(decisions.now().get("a")?.decision, "drop");
  decisions.take({ id: "a", decision: null });
  assert.equal(decisions.now().has("a"), false);
  for (const id of ["a", 'b,"c"', "a", null]) assert.equal(decisions.undo(), id);
  assert.equal(decisions.csv(), `${HEAD}\n`);
});

test("the map of all classes adds up theirs", () => {
  const cells = [[0, 3, 1, 5], [1, 3, 1, 2], [1, 0, 0, 4]];
  assert.deepEqual(cellsOf(cells, -1), [[3, 1, 7], [0, 0, 4]]);
  assert.deepEqual(cellsOf(cells, 1), [[3, 1, 2], [0, 0, 4]]);
});

// The page of `moevision data score`: decisions, undone one by one, as a CSV; and the cells of its map.
import assert from "node:assert/strict";
import { test } from "node:test";

import { Decisions, HEAD, cellsOf, decisionsIn } from "../../../moevision/analysis/templates/good_data.js";

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

test("a saved file is read again, whatever the names", () => {
  const decisions = new Decisions();
  for (const id of ["a", 'b,"c"', "two\nlines", "", "=1+1", '"']) {
    decisions.take({ id, label: 'cat, "big"', decision: "relabel", newLabel: id });
  }
  decisions.take({ id: "d", label: "", decision: "drop", newLabel: "" });
  assert.deepEqual(decisionsIn(decisions.csv()), [...decisions.now().values()]);
  assert.deepEqual(decisionsIn(`${HEAD}\r\na,cat,keep,\r\n`), [{ id: "a", label: "cat", decision: "keep", newLabel: "" }]);
  assert.deepEqual(decisionsIn(HEAD), []);
  assert.throws(() => decisionsIn("image,label\na,cat\n"), /does not begin with image,label,decision,new_label/);
  assert.throws(() => decisionsIn(`${HEAD}\na,cat,keep,\nb,cat,burn,\n`), /row 2 is not a decision/);
});

test("the map of all classes adds up theirs", () => {
  const cells = [[0, 3, 1, 5], [1, 3, 1, 2], [1, 0, 0, 4]];
  assert.deepEqual(cellsOf(cells, -1), [[3, 1, 7], [0, 0, 4]]);
  assert.deepEqual(cellsOf(cells, 1), [[3, 1, 2], [0, 0, 4]]);
});

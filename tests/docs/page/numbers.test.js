// The numbers of the picture of the computation: unpacked as the server packed them, and where missing weight went.
import assert from "node:assert/strict";
import { test } from "node:test";

import { computedPatch, expertsRun, parametersRun, sparsityWords, unpack } from "../../../moevision/demo/assets/core_numbers.js";

/** Packs as demo/wire.py does. */
function packed(rows) {
  const values = rows.flat();
  const unit = Math.max(...values.map(Math.abs)) / 32767 || 1;
  const bytes = Buffer.alloc(2 * values.length);
  values.forEach((value, index) => bytes.writeInt16LE(Math.round(value / unit), 2 * index));
  return { unit, shape: Array.isArray(rows[0]) ? [rows.length, rows[0].length] : [rows.length], data: bytes.toString("base64") };
}

const near = (actual, expected) => actual.forEach((value, index) => assert.ok(Math.abs(value - expected[index]) < 1e-3, `${actual} is not ${expected}`));

const LEFT_OUT = "Each kept share is the weight. The rest belonged to the other experts, and is left out.";

function view(change = {}) {
  const layer = {
    layer: 3, name: "L3", kind: "token_choice", router: "vmoe_top_k", learned: true, num_experts: 4, expert_parameters: 1_000_000,
    experts: [[2, 0], [1, 3]], weights: [[0.86, 0.11], [0.5, 0.2]], kept: [[true, true], [false, true]],
    probs: [[0.11, 0.02, 0.86, 0.01], [0.2, 0.5, 0.1, 0.2]], steps: { weights: LEFT_OUT },
    computation: { scores: packed([[1, -2, 3, -4], [0.5, 1.5, -0.25, 0]]), noise: null, bias: null, 
      channels: { of: 6, hidden: 12, index: [1, 4], scale: packed([2, 0.5]), read: packed([[1, 2], [3, 4]]), shared: null, total: packed([[5, -6], [7, 8]]),
        before: packed([[1, 1], [2, 2]]), after: packed([[11, -2], [16, 6]]), outputs: { ...packed([[7, 2, 3, 4], [5, 6, -7, 8]]), shape: [2, 2, 2] } } },
    ...change,
  };
  return { model: { parameters: 9_000_000 }, layers: [layer], settings: { intervention: null } };
}

test("negative and large numbers come back as they were", () => {
  assert.deepEqual(unpack({ unit: 0.5, shape: [5], data: Buffer.from(Int16Array.of(0, 1, -1, 32767, -32767).buffer).toString("base64") }), [0, 0.5, -0.5, 16383.5, -16383.5]);
});

test("a patch has its own row of every number", () => {
  const one = view();
  const first = computedPatch(one, one.layers[0], 0);
  near(first.scores, [1, -2, 3, -4]);
  const { total, before, after, scale, outputs, shared, index, of } = first.channels;
  near([...total, ...before, ...after, ...scale], [5, -6, 1, 1, 11, -2, 2, 0.5]);
  near(outputs.flat(), [7, 2, 3, 4]);
  assert.deepEqual([shared, index, of, first.bias, first.shares], [null, [1, 4], 6, null, one.layers[0].probs[0]]);
  const second = computedPatch(one, one.layers[0], 1);
  near(second.scores, [0.5, 1.5, -0.25, 0]);
  near(second.channels.outputs[1], [-7, 8]);
  near(second.channels.read, [3, 4]);
});

test("sigmoids are taken one by one", () => {
  const one = view({ router: "sigmoid" });
  near(computedPatch(one, one.layers[0], 0).shares, [0.7311, 0.1192, 0.9526, 0.018]);
});

test("with noise the shares are those of the noisy scores", () => {
  const one = view();
  one.layers[0].computation.noise = packed([[0.5, 2, -1, 0], [0, 0, 0, 0]]);
  const { scores, noise, shares } = computedPatch(one, one.layers[0], 0);
  near(scores, [1, -2, 3, -4]);
  near(noise, [0.5, 2, -1, 0]);
  const parts = [1.5, 0, 2, -4].map(Math.exp);
  near(shares, parts.map((part) => part / parts.reduce((sum, each) => sum + each)));
});

test("missing weight is accounted for", () => {
  const told = (one, patch) => computedPatch(one, one.layers[0], patch).missing;
  assert.deepEqual(told(view(), 0), ["The other 0.03 belongs to experts that weren't kept, and is left out."]);
  assert.deepEqual(told(view(), 1), ["0.50 was L3·E1's: it was full, and nobody else gets it.", "The other 0.30 belongs to experts that weren't kept, and is left out."]);
  assert.deepEqual(told(view({ steps: { weights: "The weights add up to 1." } }), 0), []);
  const away = view();
  away.settings.intervention = { kind: "ablate", layer: 3, expert: 1 };
  assert.match(told(away, 1)[0], /^0\.50 was L3·E1's: it was taken away/);
});

test("sparsity: experts and parameters that a patch used", () => {
  const one = view();
  assert.deepEqual([0, 1].map((patch) => expertsRun(one.layers[0], patch)), [2, 1]);
  assert.deepEqual(parametersRun(one, 0), { run: 7_000_000, all: 9_000_000 });
  assert.equal(sparsityWords(one, one.layers[0], 0), "2 of 4 experts ran for this patch: 7.0\u00a0M of 9.0\u00a0M parameters; the other two cost memory, no time.");
  assert.match(sparsityWords(one, { ...one.layers[0], kind: "soft" }, 0), /^All 4 experts ran/);
});

test("a view of an older version has no card", () => {
  const one = view({ computation: undefined });
  assert.equal(computedPatch(one, one.layers[0], 0), null);
});

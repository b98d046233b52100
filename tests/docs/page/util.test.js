// What every other script of the page builds on: escaping, numbers, colours, and the state's range.
import assert from "node:assert/strict";
import { test } from "node:test";

import { modeHint, modesIn, patchWeights, plural, readShares } from "../../../moevision/demo/assets/core_kinds.js";
import { readExpert, readPlace, ViewState } from "../../../moevision/demo/assets/core_state.js";
import { patchLooks } from "../../../moevision/demo/assets/core_stage.js";
import { fixed, html, inkOn, luminance, percent, pictureSource, rowColumn, signed } from "../../../moevision/demo/assets/core_util.js";
import { PALETTE } from "../../../moevision/demo/assets/palette.js";

test("what is put into markup is text, unless it is markup", () => {
  const name = `<img src=x onerror="alert('1')">&`;
  const escaped = "&lt;img src=x onerror=&quot;alert(&#39;1&#39;)&quot;&gt;&amp;";
  assert.equal(String(html`<b title="${name}">${name}</b>`), `<b title="${escaped}">${escaped}</b>`);
  assert.equal(String(html`<b aria-pressed="${false}" title="${false}">${false}</b>`), `<b aria-pressed="false" title=""></b>`);
  assert.equal(String(html`<p>${html`<b>${1}</b>`}${[html`<i></i>`, "<"]}${null}${undefined}${false}${0}</p>`), "<p><b>1</b><i></i>&lt;0</p>");
});

test("only inline images are shown", () => {
  assert.equal(pictureSource("data:image/png;base64,AA=="), "data:image/png;base64,AA==");
  for (const source of ["https://example.org/a.png", "data:text/html;base64,AA==", "data:image/svg+xml;base64,AA==", "", undefined]) {
    assert.equal(pictureSource(source), "");
  }
});

test("numbers have a true minus, and what rounds to nothing has no sign", () => {
  assert.deepEqual([fixed(-1.255, 1), fixed(-0.004), fixed(NaN), percent(0.123), percent(0.123, 1)], ["\u22121.3", "0.00", "–", "12 %", "12.3 %"]);
  assert.deepEqual([signed(0.5), signed(-0.5), signed(0.001), signed(-0.001)], ["+0.50", "\u22120.50", "0.00", "0.00"]);
});

test("the ink on every expert's colour has a contrast of at least 4.5", () => {
  for (const colour of PALETTE) {
    const [low, high] = [luminance(colour), luminance(inkOn(colour))].sort((a, b) => a - b);
    assert.ok((high + 0.05) / (low + 0.05) >= 4.5, colour);
  }
});

test("places and plurals", () => {
  assert.deepEqual([rowColumn(0, 4), rowColumn(7, 4), rowColumn(8, 4)], [[1, 1], [2, 4], [3, 1]]);
  assert.deepEqual([plural(1, "slot"), plural(2, "slot")], ["1 slot", "2 slots"]);
});

const LAYER = { kind: "token_choice", learned: true, num_experts: 4, slots: null, experts: [[2, 0], [1, 3], [], [0]],
  weights: [[0.7, 0.2], [0.6, 0.3], [], [1]], kept: [[true, false], [true, true], [], [true]] };
const view = () => ({ model: { grid: [2, 2] }, layers: [LAYER, LAYER] });

test("a choice that was dropped has no weight", () => {
  assert.deepEqual(patchWeights(LAYER, 0), [0, 0, 0.7, 0]);
  assert.deepEqual(patchWeights(LAYER, 1), [0, 0.6, 0, 0.3]);
});

test("what the answer rests on is offered where the classifier says it, and of no moment of the training", () => {
  assert.ok(modesIn({ shares: [1] }, LAYER).includes("rests"));
  for (const shares of [undefined, null]) assert.ok(!modesIn({ shares }, LAYER).includes("rests"));
  assert.ok(!modesIn({ shares: [1] }, { ...LAYER, past: true }).includes("rests"));
  const state = new ViewState({ ...view(), shares: [1, -2, 0, 0.5] }, { mode: "rests" });
  assert.equal(state.mode, "rests");
  state.set({ view: view() });
  assert.equal(state.mode, "regions");
});

test("a patch is blue by its share for the answer, brown against it, and clear at 0", () => {
  const shares = [1, -2, 0, 0.5];
  const prediction = { moe: [{ class: "<cat>", p: 1 }, { class: "dog", p: 0 }] };
  const looks = patchLooks({ mode: "rests", strength: 0.65 }, { shares }, LAYER);
  assert.deepEqual(looks.map(({ colour }) => colour === looks[0].colour), [true, false, true, true]);
  assert.deepEqual(looks.map(({ alpha }) => fixed(alpha)), ["0.42", "0.85", "0.00", "0.21"]);
  assert.deepEqual(looks.map(({ text }) => text), ["+100", "\u2212200", "0", "+50"]);
  assert.ok(patchLooks({ mode: "rests", strength: 0.65 }, { shares: [0, 0] }, LAYER).every(({ alpha }) => alpha === 0));
  assert.match(modeHint({ prediction }, LAYER, "rests"), /blue speaks for <cat>, brown for dog/);
  assert.match(modeHint({ prediction: { moe: prediction.moe.slice(0, 1) } }, LAYER, "rests"), /attention has mixed/);
});

test("a state keeps every field in the range of its views, and tells what changed", () => {
  const state = new ViewState(view(), { layer: 7, patch: 99, mode: "slots" });
  assert.deepEqual([state.layer, state.patch, state.mode], [1, null, "regions"]);
  const heard = [];
  state.subscribe((changed) => heard.push([...changed]));
  state.set({ patch: 3, layer: 1 });
  state.set({ patch: 3 });
  state.set({ hover: -1, highlight: 4 });
  assert.deepEqual(heard, [["patch"]]);
  assert.equal(state.shown, 3);
});

test("what an expert reads is told in even shares, of each patch's first expert where none is chosen", () => {
  const layer = { reads: [[0.1, 0.3], [0.4, 0.4]], experts: [[1, 0], [0, 1]] };
  assert.deepEqual(readShares(layer, 0).map((share) => share.toFixed(3)), ["0.500", "1.500"]);
  assert.deepEqual(readShares(layer, null).map((share) => share.toFixed(3)), ["1.000", "1.500"]);
});

test("a link to a slot, of an earlier version, opens what its expert reads", () => {
  const two = { layers: [{ name: "L1", layer: 1 }, { name: "L3", layer: 3 }] };
  assert.deepEqual(readPlace({ layer: "3", patch: "5", mode: "slots", slot: "6.3.reads" }, two), { layer: 1, patch: 5, mode: "reads", highlight: 6 });
});

test("a link to dropped choices, of an earlier version, opens each patch, where they are hatched", () => {
  const one = { layers: [{ name: "L1", layer: 1 }] };
  assert.equal(readPlace({ mode: "drops" }, one).mode, "expert");
});

test("a link names an expert by its layer", () => {
  const two = { layers: [{ name: "L1" }, { name: "L3" }] };
  assert.deepEqual(readExpert("L3.E1", two), { layer: 1, highlight: 1 });
  for (const word of [undefined, "L2.E1", "L3.E", "3.1", "L3.E1<b>"]) assert.deepEqual(readExpert(word, two), { highlight: null });
});

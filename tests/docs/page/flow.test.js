// The opening: regions, mosaics, and what a link takes away, by hand.
import assert from "node:assert/strict";
import { test } from "node:test";

import { awayWord, headlineOf, opensDoor, readAway } from "../../../moevision/demo/assets/app_flow.js";
import { firstExperts, mosaicPlaces, patchOf, regionsOf } from "../../../moevision/demo/assets/core_mosaic.js";

test("a patch belongs to the first expert that computed it, or to none", () => {
  const layer = { experts: [[2, 0], [1, 3], [0, 1], []], kept: [[true, true], [false, true], [false, false], []] };
  assert.deepEqual(firstExperts(layer), [2, 3, null, null]);
});

test("an image that goes to one network as a whole is not shared", () => {
  const view = { picture: { label: "cat" } };
  assert.equal(headlineOf(view, { num_experts: 8, route_by: "token" }), "Eight small networks share this cat.");
  assert.equal(headlineOf(view, { num_experts: 2, route_by: "image" }), "One of two small networks gets this cat.");
  assert.equal(headlineOf({ picture: { label: null } }, { num_experts: 2, route_by: "image" }), "One of two small networks gets this photo.");
  assert.equal(headlineOf({ picture: { label: "smileys" } }, { num_experts: 8, route_by: "token" }), "Eight small networks share this image.");
});

test("neighbours of one expert are a region, labelled where it is deepest", () => {
  const first = [
    1, 1, 1, 0,
    1, 1, 1, 1,
    1, 1, 1, null,
    0, 0, 2, 0,
  ];
  const regions = regionsOf(first, [4, 4]);
  assert.deepEqual(regions.map(({ expert, cells }) => [expert, cells.length]), [[1, 10], [0, 2], [0, 1], [2, 1], [0, 1]]);
  assert.equal(regions[0].label, 6); // 5 and 6 have four neighbours of their own
  assert.deepEqual(regions[1].cells, [12, 13]); // a corner is no neighbour
});

test("a mosaic has at least four columns and fits into its box", () => {
  assert.deepEqual(mosaicPlaces(2, 1), [[0, 0, 0.25], [0.25, 0, 0.25]]);
  for (const [count, height] of [[1, 1], [16, 1], [17, 1], [69, 1.4], [144, 0.8], [400, 1.4]]) {
    const places = mosaicPlaces(count, height);
    assert.equal(places.length, count);
    assert.ok(places.every(([x, y, side]) => x + side <= 1 + 1e-9 && y + side <= height + 1e-9));
  }
  assert.equal(mosaicPlaces(9, 0).length, 9); // a box without room ends, too
  assert.equal(mosaicPlaces(16, 1)[0][2], 1 / 4);
  assert.equal(mosaicPlaces(17, 1)[0][2], 1 / 5);
});

test("a patch is cut from the central square of a picture", () => {
  assert.deepEqual(patchOf({ naturalWidth: 300, naturalHeight: 100 }, 5, [4, 4]), [125, 25, 25, 25]);
});

test("a link takes away what the model has, each once", () => {
  const model = { routers: [{ layer: 7, num_experts: 8 }, { layer: 9, num_experts: 2 }] };
  assert.deepEqual(readAway("7.0_9.1_7.0", model), [[7, 0], [9, 1]]);
  for (const word of [undefined, "", "7.8", "9.2", "8.0", "7.-1", "7.0.5x", "7.1.5", "x_y"]) {
    assert.deepEqual(readAway(word, model).filter(([, expert]) => expert > 1 || expert < 0), []);
  }
  assert.deepEqual(readAway("8.0_7.8_7", model), []);
  assert.equal(awayWord([[7, 0], [9, 1]]), "7.0_9.1");
  assert.equal(awayWord([]), null);
});

test("a link to what stands behind the door opens it", () => {
  for (const key of ["patch", "mode", "k", "capacity", "noise", "tab", "do", "level"]) assert.equal(opensDoor({ [key]: "1" }), true);
  assert.equal(opensDoor({ model: "pets", picture: "pets/test/1", layer: "3", away: "3.1" }), false);
});

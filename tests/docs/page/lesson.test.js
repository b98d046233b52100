// The lesson's toy: its gradients, and that balancing does what the lesson says it does.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

import { fresh, lossOf, route, sharing, spiral, train } from "../../../docs/lesson/lesson_toy.js";

test("the gate is a softmax of which the top k are kept", () => {
  // Scores 0, ln 2 and ln 5 at the origin: shares 1/8, 2/8, 5/8. Experts say 1, 2 and 3 there.
  const weights = Float64Array.from([[0, 0, 0], [0, 0, Math.log(2)], [0, 0, Math.log(5)], [0, 0, 1], [0, 0, 2], [0, 0, 3]].flat());
  const at = { x: 0, y: 0 };
  const two = route(weights, { experts: 3, topK: 2, balance: 0 }, at);
  two.shares.forEach((share, expert) => assert.ok(Math.abs(share - [1, 2, 5][expert] / 8) < 1e-12));
  assert.deepEqual(two.chosen, [2, 1]);
  assert.ok(Math.abs(two.score - (3 * 5 + 2 * 2) / 8) < 1e-12);
  assert.ok(Math.abs(route(weights, { experts: 3, topK: 1, balance: 0 }, at).score - (3 * 5) / 8) < 1e-12);
});

test("the balance loss is 1 where shares are even, and E where one expert has everything", () => {
  const at = /** @type {const} */ ([{ x: 0, y: 0, label: 1 }]);
  const loss = (bias) => {
    const weights = new Float64Array(12);
    weights[2] = bias;
    return lossOf(weights, [...at], { experts: 2, topK: 2, balance: 1 }).loss - lossOf(weights, [...at], { experts: 2, topK: 2, balance: 0 }).loss;
  };
  assert.ok(Math.abs(loss(0) - 1) < 1e-12);
  const alone = new Float64Array(12);
  alone[2] = 50;
  const [full, none] = [1, 0].map((balance) => lossOf(alone, [...at], { experts: 2, topK: 1, balance }).loss);
  assert.ok(Math.abs(full - none - 2) < 1e-9);
});

for (const topK of [1, 2]) {
  test(`gradients equal finite differences (k = ${topK})`, () => {
    const points = spiral(40, 7);
    const rules = { experts: 4, topK, balance: 0.3 };
    const { weights } = fresh(4, 5);
    const { gradient } = lossOf(weights, points, rules);
    const step = 1e-6;
    gradient.forEach((slope, place) => {
      const [up, down] = [step, -step].map((change) => {
        const moved = Float64Array.from(weights);
        moved[place] += change;
        return lossOf(moved, points, rules).loss;
      });
      assert.ok(Math.abs((up - down) / (2 * step) - slope) < 1e-7, `weight ${place}`);
    });
  });
}

test("with the balance loss more experts work, and more points are told right", () => {
  const points = spiral(160, 1);
  const [without, balanced] = [0, 0.1].map((balance) => {
    const ends = [1, 2, 3, 4].map((seed) => {
      const net = fresh(4, seed);
      const rules = { experts: 4, topK: 1, balance };
      for (let step = 0; step < 500; step += 1) train(net, points, rules);
      const { load, right } = lossOf(net.weights, points, rules);
      return { ...sharing(load), right };
    });
    const mean = (of) => ends.reduce((total, end) => total + of(end), 0) / ends.length;
    return { atWork: mean((end) => end.atWork), busiest: mean((end) => end.busiest), right: mean((end) => end.right) };
  });
  assert.ok(without.atWork < 3 && balanced.atWork === 4, JSON.stringify([without, balanced]));
  assert.ok(without.busiest > 2 && balanced.busiest < 1.7, JSON.stringify([without, balanced]));
  assert.ok(balanced.right > without.right, JSON.stringify([without, balanced]));
});

test("the answer of step 4 counts what the toy does", () => {
  // The playground's points, its last step, and one expert per point without a balance loss.
  const points = spiral(240, 1);
  const ends = [0, 0, 0, 0];
  for (let seed = 1; seed <= 30; seed += 1) {
    const net = fresh(4, seed);
    const rules = { experts: 4, topK: 1, balance: 0 };
    for (let step = 0; step < 800; step += 1) train(net, points, rules);
    ends[sharing(lossOf(net.weights, points, rules).load).atWork - 1] += 1;
  }
  const [one, two, three, four] = ends;
  const steps = readFileSync(new URL("../../../docs/lesson/lesson_steps.js", import.meta.url), "utf8");
  assert.ok(steps.includes(`Of the starts 1 to 30, ${one} end with one expert at work, ${two} with two, ${three} with three and ${four} with all four.`), String(ends));
});

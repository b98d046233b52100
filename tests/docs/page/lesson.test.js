// The lesson's toy: its gradients, and that balancing does what the lesson says it does; and a page sorted by hand.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

import { costOf } from "../../../docs/lesson/lesson_sizes.js";
import { answerOfChoice, costOfSorting, kindestExperts, randomSorting } from "../../../docs/lesson/lesson_sorting.js";
import { lessonSteps, TOY } from "../../../docs/lesson/lesson_steps.js";
import { COMMON, fresh, lossOf, route, sharing, spiral, train } from "../../../docs/lesson/lesson_toy.js";

test("the gate is a softmax of which the top k are kept", () => {
  // Scores 0, ln 2 and ln 5 at the origin: shares 1/8, 2/8, 5/8. Experts say 1, 2 and 3 there.
  const weights = Float64Array.from([[0, 0, 0], [0, 0, Math.log(2) / COMMON], [0, 0, Math.log(5) / COMMON], [0, 0, 1], [0, 0, 2], [0, 0, 3]].flat());
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

test("the answer of step 4 counts what the toy does: it starts even, collapses, and recovers", () => {
  const points = spiral(240, 1);
  const found = ["start", "without", "balanced"].map((name) => ({ name, atWork: [0, 0, 0, 0], right: 0, busiest: 0 }));
  for (let seed = 1; seed <= 30; seed += 1) {
    const net = fresh(4, seed);
    const rules = { experts: 4, topK: 1, balance: 0 };
    const look = (at) => {
      const { load, right } = lossOf(net.weights, points, rules);
      const { atWork, busiest } = sharing(load);
      found[at].atWork[atWork - 1] += 1;
      found[at].right += right / 30;
      found[at].busiest = Math.max(found[at].busiest, busiest);
    };
    look(0);
    for (let step = 0; step < 800; step += 1) train(net, points, rules);
    look(1);
    const late = { ...net, weights: net.weights.slice(), mean: net.mean.slice(), square: net.square.slice() };
    const recover = (one) => { for (let step = 0; step < 800; step += 1) train(one, points, { ...rules, balance: 0.3 }); }; // the slider's last place
    recover(net);
    look(2);
    if (seed > 5) continue; // moved after 2,400 steps, it helps as well
    for (let step = 800; step < 2400; step += 1) train(late, points, rules);
    recover(late);
    assert.equal(sharing(lossOf(late.weights, points, rules).load).atWork, 4, `start ${seed}, late`);
  }
  for (const { name, atWork, right } of found) {
    assert.deepEqual(atWork, TOY[name].atWork, name);
    assert.ok(Math.abs(right - TOY[name].right) < 0.005, `${name}: ${right}`);
  }
  assert.ok(found[0].busiest < 4 / 3 && found[1].atWork[3] === 0, JSON.stringify(found));
});

const read = () => JSON.parse(readFileSync(new URL("../../../docs/lesson/lesson_numbers.json", import.meta.url), "utf8"));

/** Numbers as the server packs them, in thousandths. @param {number[]} numbers @param {number[]} shape */
const packed = (numbers, shape) => ({ unit: 0.001, shape, data: Buffer.from(Int16Array.from(numbers.map((one) => Math.round(one * 1000))).buffer).toString("base64") });

test("a sorting by hand is a mean over emoji, normed and read", () => {
  // Two emoji, two experts, two channels. Emoji 0 by expert 1 is [1, 3], emoji 1 by expert 0 [3, 9]: mean [2, 6], normed
  // [-1, 1]. The first group reads the second channel times ln 3 / 2, the other one less the same: 3 to 1/3 is 9 to 1.
  const parts = packed([[9, 9], [1, 3], [3, 9], [0, 0]].flat(), [4, 2]);
  const half = Math.log(3) / 2;
  const sorting = { parts, head: packed([-half, half, half, -half], [2, 2]), bias: packed([0, 0], [2]), eps: 0, own: [0, 0] };
  const [first, second] = answerOfChoice(sorting, [1, 0]);
  assert.ok(Math.abs(first - 0.9) < 1e-3 && Math.abs(first + second - 1) < 1e-12, String(first));
  const cost = costOfSorting(sorting, [1, 0], 2);
  assert.deepEqual([cost.busiest, cost.alike], [1, 1]);
});

test("letters are matched with experts as kindly as possible, each expert once", () => {
  assert.deepEqual(kindestExperts([3, 3, 1, 0], [0, 0, 2, 1], 4), [0, 0, 2, 1]); // the same groups by other letters
  // Box 0 shares two emoji with expert 5 and one with 2; box 1 shares two with 5, too, and none with another: 0 gives way.
  const found = kindestExperts([0, 0, 0, 1, 1], [5, 5, 2, 5, 5], 8);
  assert.deepEqual([found[2], found[3], found[4]], [2, 5, 5]);
  assert.equal(new Set([found[0], found[3]]).size, 2);
});

test("the page of the lesson: the router's sorting gives the model's answer, and chance doesn't", () => {
  const { sorting, model, page, views } = read();
  const group = model.groups.indexOf(page.group);
  const own = costOfSorting(sorting, sorting.own, model.experts);
  const [best] = views.all.prediction.moe;
  assert.equal(best.class, page.group);
  assert.ok(Math.abs(own.answer[group] - best.p) < 0.01, String(own.answer[group]));
  assert.equal(own.alike, sorting.own.length);
  const chance = randomSorting(sorting, model.experts, group);
  assert.ok(chance.answer < own.answer[group] - 0.2 && chance.alike < own.alike / 2, JSON.stringify(chance));
});

test("every question has choices that differ, and its right one among them", () => {
  const steps = lessonSteps(read());
  assert.equal(steps.length, 8);
  steps.forEach(({ title, choices, right }) => {
    assert.equal(new Set(choices).size, choices.length, title);
    assert.ok(choices.length ? choices[right] : right === -1, title);
  });
});

test("of 64 experts one or two run: 8 times the parameters of 8, and little more work", () => {
  const model = /** @type {any} */ ({ width: 384, hidden: 768, top_k: 2 });
  const [few, many] = [8, 64].map((count) => costOf(count, model));
  assert.equal(few.parameters, 8 * (384 * 768 * 2 + 768 + 384) + 384 * 8);
  assert.equal(many.parameters / few.parameters, 8);
  assert.equal(many.sparse - few.sparse, 56 * 384);
  assert.equal(Math.round((many.sparse / few.sparse - 1) * 1000), 18);
  assert.equal(many.dense, 64 * 2 * 384 * 768);
});

test("of the experts' parameters those of one run", () => {
  const { model } = read();
  const idle = model.parameters - model.active_parameters;
  assert.equal(idle, (model.experts - model.top_k) * (2 * model.width * model.hidden + model.width + model.hidden));
});

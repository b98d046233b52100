// The toy of the lesson: points in a plane, a router, and experts that can only draw one straight line each. A softmax
// gate keeps the top k experts of every point (arXiv:2106.05974), the load-balancing loss is that of Switch
// (arXiv:2101.03961, eq. 4-6), and gradients are written out by hand; tests/docs/page/lesson.test.js compares them with
// finite differences. Axes: N points, E experts, K choices.

/** @typedef {{ x: number, y: number, label: 0 | 1 }} Point */
/** @typedef {{ experts: number, topK: number, balance: number }} Rules `balance` is the weight of the balance loss. */
/** @typedef {{ weights: Float64Array, mean: Float64Array, square: Float64Array, steps: number }} Net */

const PER_EXPERT = 3; // weight of x, weight of y, constant
/** Of what a router compares, a large part is the same in all inputs: what it learns from one moves its scores for all. */
export const COMMON = 8;
const RATE = 0.005;

/**
 * Random numbers from 0 to 1 that start the same way for the same seed (mulberry32).
 * @param {number} seed
 */
export function random(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** @param {() => number} draw */
const normal = (draw) => Math.sqrt(-2 * Math.log(1 - draw())) * Math.cos(2 * Math.PI * draw());

/**
 * Two arms of a spiral, which one straight line can't tell apart.
 * @param {number} count @param {number} seed @returns {Point[]}
 */
export function spiral(count, seed) {
  const draw = random(seed);
  return Array.from({ length: count }, (_, index) => {
    const label = /** @type {0 | 1} */ (index % 2);
    const out = 0.15 + 0.85 * draw();
    const angle = 6.5 * out + label * Math.PI;
    return { x: 0.95 * out * Math.cos(angle) + 0.03 * normal(draw), y: 0.95 * out * Math.sin(angle) + 0.03 * normal(draw), label };
  });
}

/**
 * A fresh network: `weights` has the router's [E, 3], then the experts' [E, 3]. The router's directions stand at equal
 * angles, so that all experts get nearly the same number of points; where the first stands, and the experts, are drawn.
 * @param {number} experts @param {number} seed @returns {Net}
 */
export function fresh(experts, seed) {
  const draw = random(seed);
  const size = 2 * experts * PER_EXPERT;
  const first = draw();
  const weights = Float64Array.from({ length: size }, (_, place) => {
    if (place >= size / 2) return 0.1 * normal(draw);
    const angle = 2 * Math.PI * (first + Math.floor(place / PER_EXPERT) / experts);
    return 0.5 * [Math.cos(angle), Math.sin(angle), 0][place % PER_EXPERT];
  });
  return { weights, mean: new Float64Array(size), square: new Float64Array(size), steps: 0 };
}

/**
 * One point through the layer.
 * @param {Float64Array} weights @param {Rules} rules @param {{ x: number, y: number }} point
 * @returns {{ shares: number[], chosen: number[], outputs: number[], score: number }} softmax over all experts [E],
 *   chosen experts [K], best first, what each expert says [E], and the sum of the chosen, weighted by their shares.
 */
export function route(weights, { experts, topK }, { x, y }) {
  const line = (row, constant) => weights[row] * x + weights[row + 1] * y + weights[row + 2] * constant;
  const all = Array.from({ length: experts }, (_, expert) => expert);
  const scores = all.map((expert) => line(expert * PER_EXPERT, COMMON));
  const top = Math.max(...scores);
  const powers = scores.map((score) => Math.exp(score - top));
  const sum = powers.reduce((left, right) => left + right);
  const shares = powers.map((power) => power / sum);
  const chosen = all.sort((left, right) => shares[right] - shares[left] || left - right).slice(0, topK);
  const outputs = shares.map((_, expert) => line((experts + expert) * PER_EXPERT, 1));
  return { shares, chosen, outputs, score: chosen.reduce((total, expert) => total + shares[expert] * outputs[expert], 0) };
}

/**
 * Loss over all points, and its gradient.
 * @param {Float64Array} weights @param {Point[]} points @param {Rules} rules
 * @returns {{ loss: number, right: number, load: number[], gradient: Float64Array }} mean cross-entropy plus
 *   balance · E · Σ f·P; share of points that are told right; f, the share of all choices that each expert got [E]
 */
export function lossOf(weights, points, rules) {
  const { experts, topK, balance } = rules;
  const passes = points.map((point) => route(weights, rules, point));
  const load = Array(experts).fill(0); // f: counts, so no gradient goes through it
  const mean = Array(experts).fill(0); // P: mean share
  for (const { chosen, shares } of passes) {
    for (const expert of chosen) load[expert] += 1 / (points.length * topK);
    for (let expert = 0; expert < experts; expert += 1) mean[expert] += shares[expert] / points.length;
  }
  let [entropy, right] = [0, 0];
  const gradient = new Float64Array(weights.length);
  /** @param {number} row @param {number} slope @param {Point} point @param {number} constant */
  const add = (row, slope, { x, y }, constant) => {
    gradient[row] += slope * x;
    gradient[row + 1] += slope * y;
    gradient[row + 2] += slope * constant;
  };
  points.forEach((point, index) => {
    const { shares, chosen, outputs, score } = passes[index];
    entropy += Math.max(score, 0) - score * point.label + Math.log1p(Math.exp(-Math.abs(score)));
    right += Number(score > 0 === (point.label === 1));
    const slope = (1 / (1 + Math.exp(-score)) - point.label) / points.length; // d loss / d score
    const byShare = load.map((share) => (balance * experts * share) / points.length); // d loss / d shares
    for (const expert of chosen) {
      byShare[expert] += slope * outputs[expert];
      add((experts + expert) * PER_EXPERT, slope * shares[expert], point, 1);
    }
    // Through the softmax: share · (own slope - mean slope).
    const middle = shares.reduce((total, share, expert) => total + share * byShare[expert], 0);
    shares.forEach((share, expert) => add(expert * PER_EXPERT, share * (byShare[expert] - middle), point, COMMON));
  });
  const uneven = experts * load.reduce((total, share, expert) => total + share * mean[expert], 0);
  return { loss: entropy / points.length + balance * uneven, right: right / points.length, load, gradient };
}

/**
 * One step of Adam (arXiv:1412.6980) on all points, in place.
 * @param {Net} net @param {Point[]} points @param {Rules} rules
 */
export function train(net, points, rules) {
  const found = lossOf(net.weights, points, rules);
  net.steps += 1;
  found.gradient.forEach((slope, place) => {
    net.mean[place] = 0.9 * net.mean[place] + 0.1 * slope;
    net.square[place] = 0.999 * net.square[place] + 0.001 * slope ** 2;
    const mean = net.mean[place] / (1 - 0.9 ** net.steps);
    const square = net.square[place] / (1 - 0.999 ** net.steps);
    net.weights[place] -= (RATE * mean) / (Math.sqrt(square) + 1e-8);
  });
  return found;
}

/**
 * How evenly the work is shared: load of the busiest expert over the mean load, and experts that have any work.
 * @param {number[]} load
 */
export const sharing = (load) => ({ busiest: Math.max(...load) * load.length, atWork: load.filter((share) => share > 0.03).length });

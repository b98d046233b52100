// What the lesson says: ten steps, some of which make ten minutes alone. Each asks for a prediction, and its answer is made
// from the numbers that `python docs/lesson/build.py docs/lesson.html --measure` wrote (lesson_numbers.json); no number of a
// model is typed in here.

import { expertMark, patchesOf, photoFigure, sameNumber, table } from "./lesson_figures.js";
import { costOf, heroBox, layersStrip, millions, sizesBox } from "./lesson_hero.js";
import { playgroundBox } from "./lesson_playground.js";
import { costOfChoice, randomCost, routerBox } from "./lesson_router.js";
import { fixed, html, layerExpert, percent, rowColumn, signed } from "../../moevision/demo/assets/core_util.js";
/** @import { LessonNumbers, LessonStep } from "./types.js" */

const LETTERS = { 52: "A", 18: "B", 103: "C", 98: "D" }; // patches of the first photo: eye, forehead, nose, cheek
const MARKED = 52;
const DEEPSEEK = { active: 37, total: 671, layers: 61, sparse: 58, experts: 256, kept: 8 }; // arXiv:2412.19437, section 4.2

/**
 * What the toy does from 30 fresh starts: starts that have 1, 2, 3 and 4 experts at work, and the mean share of points that
 * are classified correctly. tests/docs/page/lesson.test.js counts them.
 */
export const TOY = {
  start: { atWork: [0, 0, 0, 30], right: 0.5 },
  without: { atWork: [4, 21, 5, 0], right: 0.71 },
  balanced: { atWork: [0, 0, 0, 30], right: 0.94 },
};

/**
 * @param {LessonNumbers} lesson @param {Record<string, string>} sources data address of each picture, by name
 * @returns {LessonStep[]}
 */
export function lessonSteps(lesson, sources) {
  const { model, photos, gate, classes, neighbours, without, game, sparsity } = lesson;
  const [cat, kitten, dog] = photos;
  const { layer, grid, experts } = model;
  const [earlier] = model.layers;
  const patches = grid[0] * grid[1];
  /** @param {typeof cat} photo @param {string} caption @param {Parameters<typeof photoFigure>[1]} [over] */
  const figure = (photo, caption, over) => photoFigure({ src: sources[photo.name], grid, about: `Photo of a ${photo.label}`, caption }, over);
  const map = cat.first[layer];
  const same = Object.entries(LETTERS).filter(([patch, letter]) => letter !== "A" && map[Number(patch)] === map[MARKED]).map(([, letter]) => letter);
  const face = Number(map[gate.patch]);
  const [row, column] = rowColumn(gate.patch, grid[1]);
  const shares = classes.names.map((name, index) => ({ name, share: classes.share[index][face] }));
  const numbers = sameNumber(cat.first[earlier], map, experts);
  const idle = model.parameters - model.active_parameters;
  const inExperts = idle / (1 - model.top_k / experts);
  const name = (expert) => layerExpert({ name: `L${layer}` }, expert);
  const { telling, quiet, shown } = without;
  const rowOf = (which) => /** @type {typeof without.experts[0]} */ (without.experts.find((expert) => expert.name === which.name));
  const others = Math.max(...without.experts.filter((one) => one.name !== telling.name).map((one) => one.changed_test));
  const pair = [telling, quiet].sort((left, right) => left.name.localeCompare(right.name));

  const [few, many] = [8, 64].map((count) => costOf(count, model));
  const extreme = (most) => 1 / (1 + Math.exp(-game.parts.reduce((sum, piece) => sum + most(...piece), game.bias)));
  const [ownLoad, randomLoad] = [costOfChoice(game, game.own.choice), randomCost(game)].map(({ busiest }) => fixed(busiest, 2));
  const aboveChance = (after) => fixed((after ? neighbours.after - neighbours.shuffled_after : neighbours.before - neighbours.shuffled_before) * 100, 0);
  const { right: accuracy, equal_time: atEqualTime } = sparsity;

  return [
    {
      title: "Few of many",
      minutes: 4,
      alone: 3,
      stays: true,
      note: "Two minutes for photo, patches and layers before the question. “A quarter” is a good mistake: it is right inside the two layers that have experts.",
      text: html`<p>The language model DeepSeek-V3 computes each word with ${DEEPSEEK.active} of its ${DEEPSEEK.total} billion parameters (arXiv:2412.19437). Which ones, and who decides?</p>
        <p>A smaller model, for photos: it cuts a photo into ${grid[0]} × ${grid[1]} <b>patches</b>, each described by ${model.width} numbers. Its ${model.depth} <b>layers</b> change these in turn: in each, <b>attention</b> lets patches read from one another, then a network works on every patch alone. L${earlier} and L${layer} have ${experts} such networks, the <b>experts</b>; a <b>router</b> sends each patch to ${model.top_k} of them.</p>`,
      figure: html`${layersStrip(model, cat.answer)}${heroBox(`The ${patches} patches of a cat’s photo, in the boxes of the ${experts} experts of L${layer} that they go to first`, `Each patch flies to its first expert of L${layer}.`)}
        <figure class="ls-block"><img src="${sources["moe-block.svg"]}" alt="Dense block: one MLP that every token uses. Mixture-of-Experts block: a router gives eight scores, two experts run, their outputs are added with weights."><figcaption>The network (MLP) of one layer and one patch (token x). Left: most layers. Right: L${earlier} and L${layer}.</figcaption></figure>`,
      question: `The model has ${millions(model.parameters)} parameters. How many of them compute one patch?`,
      choices: ["All of them", `A quarter: ${model.top_k} of ${experts}`, "About 70 %"],
      right: 2,
      answer: html`<p><b>${millions(model.active_parameters)} of ${millions(model.parameters)}, ${percent(model.active_parameters / model.parameters)}.</b> Only L${earlier} and L${layer} have experts. Of these experts’ ${millions(inExperts)} a quarter, ${millions(inExperts - idle)}, runs for a patch; the other ${millions(model.parameters - inExperts)} run for every patch.</p>
        <p>DeepSeek-V3 has experts in ${DEEPSEEK.sparse} of ${DEEPSEEK.layers} layers and picks ${DEEPSEEK.kept} of ${DEEPSEEK.experts}: hence ${percent(DEEPSEEK.active / DEEPSEEK.total)}. Experts that don’t run take up memory, but no computation.</p>`,
    },
    {
      title: "More parameters, the same work",
      minutes: 3,
      stays: true,
      note: "Draw one column of the row as the network above it. Ask what the other columns cost: memory, and the traffic to fetch them.",
      text: html`<p>An expert is a small network of its own: a patch’s ${model.width} numbers go in, ${model.width} come out. A layer can have as many as memory holds.</p>
        <p>A <b>dense</b> network with as many parameters uses all of them for every patch. Move the slider.</p>`,
      figure: sizesBox(model),
      question: `From 8 to 64 experts, with ${model.top_k} per patch: how does the work for one patch grow?`,
      choices: ["8 times, as the parameters", "It doubles", `By about ${Math.round((many.sparse / few.sparse - 1) * 100)} %`],
      right: 2,
      answer: html`<p><b>By ${percent(many.sparse / few.sparse - 1, 1)}.</b> Still ${model.top_k} experts run; only the router has more scores to compute.</p>
        ${table(["layer", "parameters", "multiply-adds per patch"], [["8 experts", millions(few.parameters), millions(few.sparse)], ["64 experts", millions(many.parameters), millions(many.sparse)], ["dense, as large as 64", millions(many.parameters), millions(many.dense)]])}
        <p>Equal arithmetic is not equal time: patches have to be sorted to their experts.</p>`,
    },
    {
      title: "You are the router",
      minutes: 5,
      alone: 2,
      stays: true,
      note: "In groups, on paper or at the board: most sort by what the pieces show. Compare two groups’ ways before you show the model’s. The answer hardly depends on the way: say so, it is the honest surprise.",
      text: html`<p>Four experts share this photo: choose one and click the pieces that it should compute. What should go together? Nobody told the router either.</p>`,
      figure: routerBox(game, sources[game.photo]),
      question: "First guess: what does sharing out at random cost?",
      choices: ["The answer: the model no longer says dog", "Hardly anything for this answer", "Half the certainty"],
      right: 1,
      answer: html`<p><b>Hardly anything, on this photo.</b> However you share out, the model says ${game.label}: ${percent(extreme(Math.min))} at the worst, ${percent(extreme(Math.max))} at the best. One photo is no count.</p>
        <p>What it can cost is <b>time</b>: experts run side by side, and all wait for the fullest. Random is well balanced, with ${randomLoad} times a fair share in the fullest, better here than the model’s ${ownLoad}. Everything to one expert is ${game.experts.length} times.</p>`,
    },
    {
      title: "Which patches go together?",
      minutes: 3,
      stays: true,
      note: "Ask for reasons before the answer: fur, brightness, place? The map rules out some of them.",
      text: html`<p>The router was trained together with the rest, to get cats and dogs right and to keep all experts busy.</p><p>Four patches are marked. Patch A goes to one expert of L${layer}.</p>`,
      figure: html`<div class="ls-closed">${figure(cat, "Four of its patches.", { marks: LETTERS })}</div><div class="ls-opened">${figure(cat, `Expert of first choice in L${layer}, for every patch.`, { first: map, marks: LETTERS })}</div>`,
      question: "Which patch goes to the same expert as A?",
      choices: ["B", "C", "D"],
      right: ["B", "C", "D"].findIndex((letter) => same.includes(letter)),
      answer: html`<p><b>${same.join(" and ")}.</b> Patches go together when their ${model.width} numbers are alike as they reach the router. After ${layer + 1} rounds of attention these tell more than fur or no fur.</p>`,
    },
    {
      title: "One choice, by hand",
      minutes: 5,
      stays: true,
      note: "Pocket calculators. e to the score for the largest three is enough; the others hardly count.",
      text: html`<p>The patch in row ${row}, column ${column} of that photo. Each expert has a <b>direction</b>, ${model.width} learned numbers. Its <b>score</b> is their dot product with the patch’s ${model.width}: multiply in pairs, add up. Then:</p>
        <ol class="ls-list"><li>softmax turns scores into shares: e to the score, divided by the sum of all;</li><li>the ${model.top_k} largest are kept;</li><li>this model divides them by their sum: the weights. (Others, as the toy of the next step, use the shares as they are.)</li></ol>`,
      figure: html`<div class="ls-closed">${table(["expert", "score"], gate.scores.map((score, expert) => [expertMark(expert), fixed(score, 2)]))}</div>
        <div class="ls-opened">${table(["expert", "score", "share", "weight"], gate.scores.map((score, expert) => [expertMark(expert), fixed(score, 2), percent(gate.shares[expert], 1), gate.experts.includes(expert) ? html`<b>${fixed(gate.weights[gate.experts.indexOf(expert)], 2)}</b>` : "does not run"]))}</div>`,
      question: "Which two experts run, and how is the work weighted?",
      choices: weightChoices(gate),
      right: 1,
      answer: html`<p>${fixed(gate.weights[0], 2)} times what E${gate.experts[0]} says plus ${fixed(gate.weights[1], 2)} times what E${gate.experts[1]} says is added to what the patch was before.</p>`,
    },
    {
      title: "Train a router",
      minutes: 8,
      alone: 3,
      stays: true,
      note: "Press Train, wait for the bands to close, then move the slider to the right. New start for each group, and collect what they see.",
      text: html`<p>Black and white points lie in two arms. Each of four experts can draw <b>one straight line</b>; the router decides who is responsible where. Both learn at once, in this page.</p>
        <p>At first each gets about a quarter. Press Train. When the bands stand still, move the slider to the right: training goes on.</p>`,
      figure: playgroundBox(),
      question: "Train with balance 0. How many of the four experts have work after 800 steps?",
      choices: ["All four, as at the start", "One or two, mostly", "Always exactly one"],
      right: 1,
      answer: html`<p><b>One or two, mostly.</b> Of the starts 1 to 30:</p>
        ${table(["experts at work", "1", "2", "3", "4", "points right"], [["at the start", ...TOY.start.atWork.map(String), "–"], ["800 steps, weight 0", ...TOY.without.atWork.map(String), percent(TOY.without.right)], ["800 more, weight 0.3", ...TOY.balanced.atWork.map(String), percent(TOY.balanced.right)]])}
        <p>An expert that is chosen learns, answers better, and is chosen more; as inputs have much in common, it wins nearly all of them. One that gets none learns nothing: the <b>collapse</b>. The <b>balance loss</b> punishes unequal shares.</p>`,
    },
    {
      title: "Misconception 1: experts are object detectors",
      minutes: 4,
      alone: 1,
      stays: true,
      note: "Let somebody defend the claim first: the photo is convincing.",
      text: html`<p>Here are only the patches of expert ${face} of L${layer}, ${name(face)}. It looks like the expert for cat faces.</p>`,
      figure: html`<div class="ls-closed">${figure(cat, `Patches that go first to ${name(face)}: ${patchesOf(map, face)} of ${patches}.`, { first: map, only: face })}</div>
        <div class="ls-opened"><div class="ls-three">${[cat, kitten, dog].map((photo) => figure(photo, `${patchesOf(photo.first[layer], face)} of ${patches}`, { first: photo.first[layer], only: face }))}</div></div>`,
      question: `In ${classes.images} test photos, what does ${name(face)} get?`,
      choices: ["Nearly all cats' patches and no dog's", "Somewhat more of cats than of dogs", "The same of both"],
      right: 1,
      answer: html`<p><b>${percent(shares[0].share)} of the patches of ${shares[0].name}s and ${percent(shares[1].share)} of those of ${shares[1].name}s.</b> A fair share is ${percent(1 / experts, 1)}. One striking photo is a question, never an answer: count over many.</p>
        <p>And always say the layer: ${layerExpert({ name: `L${earlier}` }, face)} is another expert. Of the first photo’s patches ${numbers.same} have the same number in L${earlier} and L${layer}; by chance it would be ${fixed(numbers.chance, 1)}.</p>`,
    },
    {
      title: "Misconception 2: tidy maps come from training",
      minutes: 3,
      note: "Vote by hands. Many take A for trained or can’t tell, which is the point.",
      text: html`<p>Two maps of L${layer}: one router was trained, the other has random directions. The layers before it are pretrained for both.</p>`,
      figure: html`<div class="ls-two">${figure(dog, "A", { first: dog.before })}${figure(dog, "B", { first: dog.first[layer] })}</div>`,
      question: "Which router was trained?",
      choices: ["A", "B"],
      right: 1,
      answer: html`<p><b>B.</b> Random directions sort, too: what is alike gets alike scores. The last column shuffles the patches: a map of few colours has equal neighbours even then.</p>
        ${table([`neighbours with the same expert, mean of ${neighbours.photos} photos`, "share", "shuffled"], [["before the training", percent(neighbours.before), percent(neighbours.shuffled_before)], ["after it", percent(neighbours.after), percent(neighbours.shuffled_after)]])}
        <p>Tidiness alone proves nothing. Measured against chance, training added some: from ${aboveChance(false)} to ${aboveChance(true)} points above it.</p>`,
    },
    {
      title: "Take one away",
      minutes: 3,
      stays: true,
      note: "Ask what the column of random choices is for before you explain it.",
      text: html`<p>A smaller model, for drawn pets, has two layers of ${without.experts.length / 2} experts. It says <b>${shown.label}</b>, ${percent(telling.before)}. Take an expert away, here ${pair.map((one) => one.name).join(" or ")}, and its patches go to their next-best.</p>`,
      figure: html`<figure class="ls-figure"><img class="ls-pet" src="${shown.src}" alt="Drawn ${shown.label}"><figcaption>Of its layer’s choices, on ${without.images} such images: ${pair.map((one) => `${one.name} ${percent(rowOf(one).work)}`).join(", ")}.</figcaption></figure>`,
      question: "Without which of the two does the model change its mind?",
      choices: [...pair.map((one) => `${one.name} alone`), "Both", "Neither"],
      right: pair.indexOf(telling),
      answer: html`${table(["without", "it says", `${shown.label}`, "taking as many random choices away"], [telling, quiet].map((one) => [one.name, one.answer, `${percent(one.before)} → ${percent(one.after)}`, `${signed(one.random_mean * 100, 1)} ± ${fixed(one.random_sd * 100, 1)} points`]))}
        <p>On ${without.images} test images <b>${rowOf(telling).changed_test}</b> answers change without ${telling.name}, <b>${rowOf(quiet).changed_test}</b> without ${quiet.name}, at most ${others} without any other: one expert less is rarely missed. The two were chosen on other images; this one is the first whose right answer is lost.</p>
        <p>${rowOf(quiet).work > rowOf(telling).work && "Being busy isn’t being needed. "}In the photo model, one expert less changes ${lesson.photos_without.changed || "none"} of ${lesson.photos_without.removals} answers.</p>`,
    },
    {
      title: "What can you say now?",
      minutes: 2,
      alone: 1,
      note: "Exit ticket: each writes one of the three questions in own words.",
      text: html`<p>Somebody shows you one photo, coloured by experts, and makes a claim.</p>`,
      figure: html`<blockquote class="ls-quote">“Expert 3 recognises the cat.”</blockquote>`,
      question: "Which three questions do you ask? Say them aloud first.",
      choices: [],
      right: -1,
      answer: html`<ol class="ls-list"><li><b>Which layer, and over how many images?</b></li><li><b>What does an untrained router show?</b></li>
        <li><b>Does the answer change without it,</b> more than without as many random choices, on images that had no part in choosing it?</li></ol>
        <p>And still: attention carries information past the experts, so where a patch goes is not why the model answers as it does. Try your own photos in the <a data-explore>explorer</a>.</p>
        <p><b>Why experts at all?</b> More parameters for the same work. In the toy, four at work get ${percent(TOY.balanced.right)} of the points right, one or two ${percent(TOY.without.right)}. A small image model with experts, trained for one epoch of CIFAR-10, gets ${percent(accuracy.moe, 1)} of test images right, its dense twin of the same work ${percent(accuracy.twin, 1)} (${sparsity.seeds.moe} trainings each), if the classifier averages the patches; if it reads each in its place, no difference is shown. At equal <i>time</i> none is shown: ${signed(atEqualTime.mean, 1)} points (${signed(atEqualTime.low, 1)} to ${signed(atEqualTime.high, 1)}).</p>`,
    },
  ];
}

/**
 * Three ways to weigh: all experts alike, as it is (second), and the shares of the kept as they are.
 * @param {LessonNumbers["gate"]} gate
 */
function weightChoices({ experts, weights, shares }) {
  const [first, second] = experts;
  const last = shares.indexOf(Math.min(...shares));
  return [
    `E${first} and E${second}, each 0.50`,
    `E${first} with ${fixed(weights[0], 2)}, E${second} with ${fixed(weights[1], 2)}`,
    `E${first} with ${fixed(shares[first], 2)}, E${last} with ${fixed(1 - shares[first], 2)}`,
  ];
}

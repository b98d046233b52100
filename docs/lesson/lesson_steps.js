// What the lesson says: eight steps, some of which make ten minutes alone. Each asks for a prediction, and its answer is
// made from the numbers that `python docs/lesson/build.py docs/lesson.html --measure` wrote (lesson_numbers.json); no
// number of a model is typed in here.

import { boxesFigure, cutout, emojiIn, expertMark, table } from "./lesson_figures.js";
import { flowBox, nameOfExpert } from "./lesson_flow.js";
import { playgroundBox } from "./lesson_playground.js";
import { costOf, sizesBox } from "./lesson_sizes.js";
import { sortingBox } from "./lesson_sorting.js";
import { answerWords, controlWords } from "../../moevision/demo/assets/core_effect.js";
import { capital, millions } from "../../moevision/demo/assets/core_kinds.js";
import { fixed, html, percent, pictureSource, present, rowColumn } from "../../moevision/demo/assets/core_util.js";
import { numberWord } from "../../moevision/demo/assets/core_words.js";
/** @import { Effect } from "../../moevision/demo/assets/types.js" */
/** @import { LessonNumbers, LessonStep, LessonTaken } from "./types.js" */

const DEEPSEEK = { active: 37, total: 671, experts: 256, kept: 8 }; // arXiv:2412.19437, section 4.2

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
 * Of the emoji of the page's own group, how many the expert has that has most of them, and where the others went.
 * @param {LessonNumbers} lesson
 */
export function ofGroup({ page, sorting: { own }, model }) {
  const counts = Array(model.experts).fill(0);
  page.of_group.forEach((emoji) => { counts[own[emoji]] += 1; });
  const most = Math.max(...counts);
  const expert = counts.indexOf(most);
  const others = page.of_group.filter((emoji) => own[emoji] !== expert).map((emoji) => ({ name: page.names[emoji], expert: own[emoji] }));
  return { all: page.of_group.length, most, expert, others };
}

/**
 * The expert without which the page becomes another, and the busiest of those without which it stays.
 * @param {LessonNumbers} lesson
 */
export function tellingAndQuiet({ effects, sorting: { own } }) {
  const changes = effects.map(({ before, after }) => before[0].class !== after[0].class);
  const telling = changes.indexOf(true);
  const stays = effects.map((_, expert) => (changes[expert] ? -1 : emojiIn(own, expert)));
  return { telling, quiet: stays.indexOf(Math.max(...stays)) };
}

/** @param {[number, number]} shares */
const change = ([before, after]) => `${percent(before)} → ${percent(after)}`;

/** @param {LessonNumbers} lesson @returns {LessonStep[]} */
export const lessonSteps = (lesson) => [
  sortYourself(lesson),
  moreParameters(lesson),
  oneChoice(lesson),
  trainARouter(),
  notOnePage(lesson),
  notTheRouter(lesson),
  takeOneAway(lesson),
  sayNow(lesson),
];

/** @param {LessonNumbers} lesson @returns {LessonStep} */
function sortYourself(lesson) {
  const { model, page, right } = lesson;
  const { all, most, expert, others } = ofGroup(lesson);
  const where = others.map(({ name, expert: other }) => html` The ${name} is with expert ${other}.`);
  return {
    title: "Sort them yourself",
    minutes: 6,
    alone: 3,
    note: "In pairs: each defends one emoji’s box. Compare two pairs’ ways before you show the router’s. What goes together for people isn’t always what goes together here.",
    text: html`<p>A small model looks at a page of ${page.names.length} emoji and says what most of them are: smileys, people, animals, food …, ${numberWord(model.groups.length)} groups.</p>
      <p>Each emoji is computed by <b>one of ${numberWord(model.experts)}</b> small networks, the <b>experts</b>; a <b>router</b> decides which. Be the router: choose a box and click the emoji that one expert should compute. No need to fill all boxes.</p>`,
    figure: html`${flowBox("router")}<p class="ls-yours">Your boxes</p>${sortingBox(lesson)}`,
    question: `${capital(numberWord(all))} of these emoji are ${page.group}. How many of them does the router send to one and the same expert?`,
    choices: [`All ${numberWord(all)}`, capital(numberWord(most)), "Two, as chance would"],
    right: 1,
    answer: html`<p><b>${capital(numberWord(most))} of ${numberWord(all)}, to expert ${expert}.</b>${where}</p>
      <p><b>Nobody told the router.</b> While the model learned, it was told what most emoji of a page are: never what one emoji is, nor who should compute it.</p>
      <p>And it matters who computes what. With experts drawn at random ${percent(right.random)} of ${right.pages.toLocaleString("en")} new pages are right, in place of ${percent(right.all)}; with one expert for all emoji ${percent(Math.min(...right.one))} to ${percent(Math.max(...right.one))}.</p>`,
  };
}

/** @param {LessonNumbers} lesson @returns {LessonStep} */
function moreParameters({ model }) {
  const { experts, width, grid: [rows, columns] } = model;
  const [few, many] = [8, 64].map((count) => costOf(count, model));
  const idle = model.parameters - model.active_parameters;
  return {
    title: "More parameters, the same work",
    minutes: 5,
    alone: 1,
    stays: true,
    note: "“An eighth of the model runs” is a good mistake: it is right inside the layer that has experts. Draw one column of the row as the network above it, and ask what the other columns cost.",
    text: html`<p>The model cuts a page into ${rows} × ${columns} <b>patches</b>, an emoji each, and describes each by ${width} numbers. <b>Attention</b> lets patches read from one another; then an expert works on each alone: ${width} numbers go in, ${width} come out. The mean over all is the answer.</p>
      <p>A layer can have as many experts as memory holds. A <b>dense</b> network with as many parameters uses all of them for every emoji. Move the slider.</p>`,
    figure: sizesBox(model),
    question: "From 8 to 64 experts, one of which runs: how does the work for one emoji grow?",
    choices: ["8 times, as the parameters", "It doubles", `By about ${percent(many.sparse / few.sparse - 1)}`],
    right: 2,
    answer: html`<p><b>By ${percent(many.sparse / few.sparse - 1)}.</b> Still one expert runs; only the router has more scores to compute.</p>
      ${table(["layer", "parameters", "multiply-adds per emoji"], [["8 experts", millions(few.parameters), millions(few.sparse)], ["64 experts", millions(many.parameters), millions(many.sparse)], ["dense, as large as 64", millions(many.parameters), millions(many.dense)]])}
      <p>This model has ${millions(model.parameters)} parameters; ${millions(model.active_parameters)} of them, ${percent(model.active_parameters / model.parameters)}, compute an emoji: ${experts - 1} of ${experts} experts, ${millions(idle)}, don’t run. They take up memory, but no computation. The language model DeepSeek-V3 runs ${DEEPSEEK.active} of its ${DEEPSEEK.total} billion for a word, ${DEEPSEEK.kept} of ${DEEPSEEK.experts} experts a layer (arXiv:2412.19437).</p>
      <p>Equal arithmetic is not equal time: patches have to be sorted to their experts, and all wait for the fullest box.</p>`,
  };
}

/** @param {LessonNumbers} lesson @returns {LessonStep} */
function oneChoice({ model, page, gate }) {
  const [row, column] = rowColumn(gate.patch, model.grid[1]);
  const first = gate.shares.indexOf(Math.max(...gate.shares));
  const second = gate.shares.indexOf([...gate.shares].sort((left, right) => right - left)[1]);
  return {
    title: "One choice, by hand",
    minutes: 6,
    note: "Pocket calculators. Let everybody compute e to the score for all eight: the small ones together count more than the second.",
    text: html`<p>The ${page.names[gate.patch]}, in row ${row}, column ${column}. Each expert has a <b>direction</b>, ${model.width} learned numbers. Its <b>score</b> is their dot product with the emoji’s ${model.width}: multiply in pairs, add up. Then:</p>
      <ol class="ls-list"><li>softmax turns scores into shares: e to the score, divided by the sum of all;</li><li>the largest share is kept: that expert runs;</li><li>its share is its <b>weight</b>. (With two or more experts, many models divide the kept shares by their sum.)</li></ol>`,
    figure: html`<div class="ls-closed">${table(["expert", "score"], gate.scores.map((score, expert) => [expertMark(expert), fixed(score, 2)]))}</div>
      <div class="ls-opened">${table(["expert", "score", "share", "weight"], gate.scores.map((score, expert) => [expertMark(expert), fixed(score, 2), percent(gate.shares[expert], 1), expert === gate.expert ? html`<b>${fixed(gate.weight, 2)}</b>` : "does not run"]))}</div>`,
    question: "Which expert runs, and what is its weight?",
    choices: [`Expert ${first}, with 1`, `Expert ${first}, with ${fixed(gate.weight, 2)}`, `Experts ${first} and ${second}, with ${fixed(gate.shares[first], 2)} and ${fixed(gate.shares[second], 2)}`],
    right: 1,
    answer: html`<p class="ls-all">${fixed(gate.weight, 2)} times what expert ${gate.expert} says is added to what the emoji was before (“the stream”). Below with the model’s own numbers: point at one to follow it.</p>${flowBox("card")}`,
  };
}

/** @returns {LessonStep} */
const trainARouter = () => ({
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
});

/** @param {LessonNumbers} lesson @returns {LessonStep} */
function notOnePage(lesson) {
  const { taken, sorting: { own } } = lesson;
  const { expert } = ofGroup(lesson);
  const claimed = taken.experts[expert];
  const named = taken.experts.filter((one) => one.named).length;
  return {
    title: "Misconception 1: one page shows what an expert is for",
    minutes: 5,
    alone: 1,
    note: "Let somebody defend the claim first: the page is convincing.",
    text: html`<p>Here are only the emoji of expert ${expert}. It looks like the expert for ${claimed.group}, and for nothing else.</p>`,
    figure: html`<figure class="ls-closed ls-alone">${cutout(expert, own)}<figcaption>Of the page, what expert ${expert} computes: ${emojiIn(own, expert)} emoji.</figcaption></figure>
      <div class="ls-opened"><ul class="ls-samples">${taken.experts.map((one) => sampleOf(lesson, one))}</ul></div>`,
    question: `On ${taken.pages.toLocaleString("en")} new pages: how many of the emoji that expert ${expert} computes are ${claimed.group}?`,
    choices: ["All, or nearly all", `About ${percent(claimed.share)}`, "One of nine, as everywhere"],
    right: 1,
    answer: html`<p><b>${percent(claimed.share)}</b>; and it gets ${percent(claimed.of_group)} of all ${claimed.group}. Above: sixteen emoji of each expert, drawn at random.</p>
      <p>An expert has a name here where more than half of what it computes is of one group: ${numberWord(named)} of ${numberWord(taken.experts.length)} have. The others are <b>mixed</b>, and compute as much. One striking image is a question, never an answer: count over many.</p>`,
  };
}

/** @param {LessonNumbers} lesson @param {LessonTaken} taken */
function sampleOf({ taken, model }, { expert, sample, sample_groups: groups, load }) {
  const counts = model.groups.flatMap((group) => {
    const count = groups.filter((one) => one === group).length;
    return count ? [`${count} ${group}`] : [];
  });
  return html`<li><img src="${pictureSource(sample)}" alt="Sixteen emoji of expert ${expert}: ${counts.join(", ")}">
    <span>${expertMark(expert)} <b>${nameOfExpert(taken, expert)}</b></span><small>${percent(load)} of all emoji</small></li>`;
}

/** @param {LessonNumbers} lesson @returns {LessonStep} */
function notTheRouter({ model, sorting: { own }, guessed }) {
  return {
    title: "Misconception 2: the router did it",
    minutes: 4,
    note: "Vote by hands. Then ask what is left for the router to learn: not to find what is alike, but to share it out so that nobody is idle and the answer gets better.",
    text: html`<p>Two routers sort the page. One was trained, the other has <b>random directions</b>; the layers below them are the same, and trained.</p>`,
    figure: html`<div class="ls-pair">${boxesFigure(guessed.random_page, model.experts, "A")}${boxesFigure(own, model.experts, "B")}</div>`,
    question: "From an emoji’s box one guesses its group. How often is that right for the router with random directions?",
    choices: [`${percent(guessed.chance)}, as without boxes`, `About ${percent(guessed.random)}`, "As often as for the trained one"],
    right: 1,
    answer: html`<p><b>${percent(guessed.random)}; the trained router (B) reaches ${percent(guessed.trained)}.</b> Random directions sort, too: what is alike in front of them stays together.</p>
      ${table([`group guessed from the box, ${guessed.pages} new pages`, "right"], [["without boxes", percent(guessed.chance)], [`random directions, mean of ${guessed.draws}`, percent(guessed.random)], ["the trained router", percent(guessed.trained)], ["clusters of what the router reads", percent(guessed.clusters)]])}
      <p>Plain clusters (k-means, ${numberWord(model.experts)} of them) do even better: <b>the layers below had sorted the emoji already</b>. Tidy boxes alone prove nothing about the router.</p>`,
  };
}

/** @param {LessonNumbers} lesson @returns {LessonStep} */
function takeOneAway(lesson) {
  const { effects, page, sorting: { own }, without, chosen } = lesson;
  const { telling, quiet } = tellingAndQuiet(lesson);
  const pair = [telling, quiet].sort((left, right) => left - right);
  const row = (expert) => {
    const effect = /** @type {Effect} */ (effects[expert]);
    return [html`expert ${expertMark(expert)}`, answerWords(effect), controlWords(effect).replace(/^.*: /, "")];
  };
  const group = present(Object.entries(without).find(([, { experts }]) => experts.includes(telling)));
  const [name, found] = group;
  const lost = ([, { own: [before, after] }]) => before - after;
  const [other, spared] = present(Object.entries(without).sort((one, next) => lost(one) - lost(next))[0]);
  return {
    title: "Take one away",
    minutes: 4,
    alone: 1,
    note: "Ask what the column of random choices is for before you explain it. With the answer shown, everybody may take other experts away.",
    text: html`<p>The model says <b>${page.group}</b>, ${percent(effects[telling].before[0].p)}. Take an expert away, and its emoji go to their next-best experts. Nothing else changes.</p>
      <p>Expert ${pair[0]} has ${emojiIn(own, pair[0])} emoji of the page, expert ${pair[1]} has ${emojiIn(own, pair[1])}.</p>`,
    figure: flowBox("away"),
    question: "Without which of the two does the model change its mind?",
    choices: [...pair.map((expert) => `Expert ${expert} alone`), "Both", "Neither"],
    right: pair.indexOf(telling),
    answer: html`${table(["without", "the answer", "as many emoji moved at random"], [telling, quiet].map(row))}
      <p>One page is no count, and this one was <b>chosen</b>: of ${chosen.named.toLocaleString("en")} such pages named right, ${chosen.change} fall by one expert. Over ${found.pages.toLocaleString("en")} new pages, without expert ${telling}: ${name} ${change(found.own)} right, all others ${change(found.others)}.</p>
      <p>A name doesn’t say how much an expert is missed: without that of ${other}, their pages go ${change(spared.own)}.</p>`,
  };
}

/** @param {LessonNumbers} lesson @returns {LessonStep} */
function sayNow({ model, pays }) {
  const { accuracy, accuracy_interval: interval } = model;
  const range = ([low, high]) => `${percent(low, 1)} to ${percent(high, 1)}`;
  return {
    title: "What can you say now?",
    minutes: 2,
    alone: 1,
    note: "Exit ticket: each writes one of the three questions in own words.",
    text: html`<p>Somebody shows you one image, coloured by experts, and makes a claim.</p>`,
    figure: html`<blockquote class="ls-quote">“Expert 3 recognises the cat.”</blockquote>`,
    question: "Which three questions do you ask? Say them aloud first.",
    choices: [],
    right: -1,
    answer: html`<ol class="ls-list"><li><b>Over how many images?</b></li><li><b>What do random directions show, and plain clusters?</b></li>
      <li><b>Does the answer change without it,</b> more than without as many random choices, on images that had no part in choosing it?</li></ol>
      <p>And still: attention carries information past the experts, so where a patch goes is not why the model answers as it does. Look further in the <a data-explore>explorer</a>.</p>
      <p><b>Do experts pay?</b> Where much must be remembered. At equal training time and ${pays.seeds} trainings each, the best arm with experts is ${pays.kinds} points from the strongest dense model if <b>55 kinds</b> of emoji are the classes, ${pays.groups} if the nine groups are. Behind convolutions, as in the model of this lesson, experts are ${pays.named} points from it.</p>
      <p>After the same number of steps, one training each, this model names ${percent(accuracy.moe, 1)} of ${model.test_images.toLocaleString("en")} pages right (${range(interval.moe)}), its dense twin ${percent(accuracy.dense, 1)} (${range(interval.dense)}): the intervals overlap.</p>`,
  };
}

// What the lesson says: nine steps of 45 minutes. Each asks for a prediction, and its answer is made from the numbers
// that `python docs/lesson/build.py docs/lesson.html --measure` wrote (lesson_numbers.json); no number of a model is typed in here.

import { bars, expertMark, patchesOf, photoFigure, sameNumber, table } from "./lesson_figures.js";
import { playgroundBox, startsBox } from "./lesson_playground.js";
import { fixed, html, layerExpert, percent, rowColumn, signed } from "../../moevision/demo/assets/core_util.js";
/** @import { LessonNumbers, LessonStep } from "./types.js" */

const LETTERS = { 52: "A", 18: "B", 103: "C", 98: "D" }; // patches of the first photo: eye, forehead, nose, cheek
const MARKED = 52;

/** @param {number} count */
const millions = (count) => `${(count / 1e6).toFixed(1)} M`;

/**
 * @param {LessonNumbers} lesson @param {Record<string, string>} sources data address of each photo, by name
 * @returns {LessonStep[]}
 */
export function lessonSteps(lesson, sources) {
  const { model, photos, gate, classes, neighbours, without } = lesson;
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
  const share = model.active_parameters / model.parameters;
  const name = (expert) => layerExpert({ name: `L${layer}` }, expert);
  const { telling, quiet, shown } = without;
  const rowOf = (which) => without.experts.find((expert) => expert.name === which.name);
  const mostChanged = Math.max(...without.experts.map((expert) => expert.changed_test));

  return [
    {
      title: "Eight networks, one photo",
      minutes: 4,
      text: html`<p>A vision transformer cuts a photo into ${grid[0]} × ${grid[1]} patches. In two layers of this one, L${earlier} and L${layer}, stand ${experts} small networks, the <b>experts</b>, and a <b>router</b> that sends each patch to ${model.top_k} of them.</p>
        <p>All ${millions(model.parameters)} parameters lie in memory.</p>`,
      figure: figure(cat, `${patches} patches; the model says ${cat.answer}, ${percent(cat.probability)}.`, { first: " ".repeat(patches), only: -1 }),
      question: "How many of the parameters compute one patch?",
      choices: ["All of them", `A quarter: ${model.top_k} of ${experts}`, "About 70 %"],
      right: 2,
      answer: html`<p><b>${millions(model.active_parameters)} of ${millions(model.parameters)}, ${percent(share)}.</b> In L${earlier} and L${layer} only ${model.top_k} of ${experts} experts run for a patch. Everything else (attention, the other layers) runs for every patch.</p>
        <p>The other ${experts - model.top_k} take up memory but no computation. That is the idea: more parameters at the same cost.</p>`,
    },
    {
      title: "Which patches go together?",
      minutes: 5,
      text: html`<p>Nobody told the router what to look for. It was trained together with the rest, to get cats and dogs right and to keep all experts busy.</p><p>Four patches are marked. Patch A goes to one expert of L${layer}.</p>`,
      figure: figure(cat, "Four of its patches.", { marks: LETTERS }),
      question: "Which patch goes to the same expert as A?",
      choices: ["B", "C", "D"],
      right: ["B", "C", "D"].findIndex((letter) => same.includes(letter)),
      answer: html`<div class="ls-beside">${figure(cat, `Expert of first choice in L${layer}, for every patch.`, { first: map, marks: LETTERS })}
        <p><b>${same.join(" and ")}.</b> Number and colour are the expert of first choice. Patches go together when they <i>look alike to the layer</i>, and after ${layer + 1} rounds of attention that is more than fur or no fur.</p></div>`,
    },
    {
      title: "One choice, by hand",
      minutes: 6,
      text: html`<p>The patch in row ${row}, column ${column} of the same photo. The router compares it with one learned direction per expert and gets ${experts} scores. Then:</p>
        <ol class="ls-list"><li>softmax turns scores into shares: e to the score, divided by the sum of all;</li><li>the ${model.top_k} largest are kept;</li><li>they are divided by their sum: the weights.</li></ol>`,
      figure: table(["expert", "score"], gate.scores.map((score, expert) => [expertMark(expert), fixed(score, 2)])),
      question: "Which two experts run, and how is the work weighted?",
      choices: weightChoices(gate),
      right: 1,
      answer: html`<div class="ls-beside">${table(["expert", "score", "share", "weight"], gate.scores.map((score, expert) => [expertMark(expert), fixed(score, 2), percent(gate.shares[expert], 1), gate.experts.includes(expert) ? html`<b>${fixed(gate.weights[gate.experts.indexOf(expert)], 2)}</b>` : "does not run"]))}
        <p>The patch gets ${fixed(gate.weights[0], 2)} times what E${gate.experts[0]} says plus ${fixed(gate.weights[1], 2)} times what E${gate.experts[1]} says, added to what it was before.</p></div>`,
    },
    {
      title: "Train a router",
      minutes: 10,
      text: html`<p>Black and white points lie in two arms. Each of four experts can draw <b>one straight line</b>; the router decides who is responsible where. Both learn at once, here in the page.</p>
        <p>Background and number: the expert. Red ring: misclassified. The thin line in the bars is an equal share.</p>`,
      figure: playgroundBox(),
      question: "Train with balance 0. How many of the four experts will have work in the end?",
      choices: ["Always all four", "Often one, but it depends on the start", "Always exactly one"],
      right: 1,
      answer: html`<p><b>It depends on the start.</b> Of the starts 1 to 30, 17 end with one expert at work, 5 with two, 5 with three and 3 with all four. Scores are uneven from the start here, as they may be by chance, so most begin with nearly all points at one expert. An expert that is never chosen learns nothing about its line. The <b>balance loss</b> adds <i>weight × E × Σ f·P</i>: f is the share of points that an expert gets, P its mean share by softmax. It is smallest when all get the same.</p>
        <p>Set it to 0.1 and train again. Does balance help the answers, or only the bars? One start proves nothing:</p>${startsBox()}
        <p class="mv-note">Here a kept share is not divided by the sum: with one expert per point its weight would always be 1, and the router would learn nothing from the answers.</p>`,
    },
    {
      title: "Misconception 1: experts are object detectors",
      minutes: 4,
      text: html`<p>Here are only the patches of ${name(face)}. It looks like the expert for cat faces.</p>`,
      figure: figure(cat, `Patches that go first to ${name(face)}: ${patchesOf(map, face)} of ${patches}.`, { first: map, only: face }),
      question: `In ${classes.images} test photos, what does ${name(face)} get?`,
      choices: ["Nearly all cats' patches and no dog's", "Somewhat more of cats than of dogs", "The same of both"],
      right: 1,
      answer: html`<p><b>${percent(shares[0].share)} of the patches of ${shares[0].name}s and ${percent(shares[1].share)} of those of ${shares[1].name}s.</b> A fair share is ${percent(1 / experts, 1)}. Every expert sees both.</p>
        <div class="ls-beside">${table(["L" + layer, ...classes.names.map((each) => `of ${each}s' patches`)], Array.from({ length: experts }, (_, expert) => [expertMark(expert), ...classes.share.map((ofClass) => percent(ofClass[expert]))]))}
        <div class="ls-two">${figure(kitten, `The same expert: ${patchesOf(kitten.first[layer], face)} patches.`, { first: kitten.first[layer], only: face })}
        ${figure(dog, `And here: ${patchesOf(dog.first[layer], face)}.`, { first: dog.first[layer], only: face })}</div></div>
        <p>One striking photo is a question, never an answer. Count over many.</p>`,
    },
    {
      title: "Misconception 2: the same colour is the same expert",
      minutes: 4,
      text: html`<p>The same photo in both layers. Both use the numbers 0 to ${experts - 1} and the same colours.</p>`,
      figure: html`<div class="ls-two">${figure(cat, `L${earlier}`, { first: cat.first[earlier] })}${figure(cat, `L${layer}`, { first: map })}</div>`,
      question: `How many of the ${patches} patches have the same number in L${earlier} and L${layer}?`,
      choices: ["Nearly all", "About half", "About as many as by chance"],
      right: 2,
      answer: html`<p><b>${numbers.same}. By chance it would be ${fixed(numbers.chance, 1)}.</b> L${earlier}·E3 and L${layer}·E3 are two networks that happen to share a number. Numbers are dealt at the start and mean nothing; always say the layer.</p>`,
    },
    {
      title: "Misconception 3: tidy maps come from training",
      minutes: 4,
      text: html`<p>Two maps of L${layer}: one router was trained, the other has random weights. The layers before it are pretrained for both.</p>`,
      figure: html`<div class="ls-two">${figure(cat, "A", { first: cat.before })}${figure(cat, "B", { first: map })}</div>`,
      question: "Which router was trained?",
      choices: ["A", "B"],
      right: 1,
      answer: html`<p><b>B.</b> A is the same layer before the training. Random directions sort, too: what looks alike gets alike scores.</p>
        ${table([`neighbours with the same expert, mean of ${neighbours.photos} photos`, "share", "if patches were shuffled"], [["before the training", percent(neighbours.before), percent(neighbours.shuffled_before)], ["after it", percent(neighbours.after), percent(neighbours.shuffled_after)]])}
        <p>So a tidy map shows what the layers <i>before</i> the router have learned. To say that training the router added something, put it beside an untrained one: in the explorer, the switch <b>What did training change?</b></p>`,
    },
    {
      title: "Take one away",
      minutes: 6,
      text: html`<p>A smaller model, ${without.data}, two layers of eight experts. It says <b>${shown.label}</b>, ${percent(telling.before)}. Take an expert away, and its patches go to their next-best.</p>
        <p>Two experts. <b>${telling.name}</b>: of all ${without.experts.length}, the one without which most answers changed on ${without.images} <i>validation</i> images. <b>${quiet.name}</b>: the busiest of those without which none changed there.</p>`,
      figure: html`<figure class="ls-figure"><img class="ls-pet" src="${shown.src}" alt="Drawn ${shown.label}"><figcaption>A test image. ${telling.name} gets ${telling.patches} of its patches, ${quiet.name} ${quiet.patches}.</figcaption></figure>`,
      question: "Without which of them does the model change its mind?",
      choices: [`${telling.name} alone`, `${quiet.name} alone`, "Both", "Neither"],
      right: 0,
      answer: html`${table(["without", "it says", `${shown.label}`, "as many at random"], [telling, quiet].map((one) => [one.name, `${one.answer}, ${percent(one.answer_probability)}`, `${percent(one.before)} → ${percent(one.after)}`, `${signed(one.random_mean * 100, 1)} ± ${fixed(one.random_sd * 100, 1)} points`]))}
        <p>This image is the first test image whose right answer is lost, so it flatters ${telling.name}. Counted on ${without.images} <i>test</i> images, which had no part in the choice: without ${telling.name} <b>${rowOf(telling)?.changed_test}</b> answers change, without ${quiet.name} <b>${rowOf(quiet)?.changed_test}</b>.</p>
        <div class="ls-two ls-compact">${[0, 1].map((half) => bars(without.experts.slice(half * experts, (half + 1) * experts).map(({ name: label, changed_test }) => ({ name: label, value: changed_test, text: changed_test })), mostChanged))}</div>
        <p>In the photo model, one expert less changes ${lesson.photos_without.changed || "none"} of ${lesson.photos_without.removals} answers (${lesson.photos_without.photos} photos, each without each expert). Being busy isn't being needed.</p>`,
    },
    {
      title: "What can you say now?",
      minutes: 2,
      text: html`<p>Somebody shows you one photo, coloured by experts, and makes a claim.</p>`,
      figure: html`<blockquote class="ls-quote">“Expert 3 recognises the cat.”</blockquote>`,
      question: "Which three questions do you ask? Say them aloud first.",
      choices: [],
      right: -1,
      answer: html`<ol class="ls-list"><li><b>Which layer, and over how many images?</b> One photo is no count, and E3 is another network in every layer.</li>
        <li><b>What does an untrained router show?</b> And plain clusters of the same input?</li><li><b>Does the answer change without it,</b> more than without as much at random, on images that had no part in choosing it?</li></ol>
        <p>And still: attention and the residual path carry information past the experts, so where a patch goes is not why the model answers as it does. Try it on your own photos: <code>moevision demo</code>.</p>`,
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

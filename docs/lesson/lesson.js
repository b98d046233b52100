// The lesson as a page: steps with a prediction and an answer that waits, and a projector mode that shows one step at a
// time in large type. Nothing is asked of a server, and nothing is kept.

import { paintCutouts } from "./lesson_figures.js";
import { LessonFlow } from "./lesson_flow.js";
import { Playground } from "./lesson_playground.js";
import { startSizes } from "./lesson_sizes.js";
import { SortingGame } from "./lesson_sorting.js";
import { lessonSteps, tellingAndQuiet } from "./lesson_steps.js";
import { clamp, html, pictureSource, present } from "../../moevision/demo/assets/core_util.js";
/** @import { LessonNumbers, LessonStep } from "./types.js" */

/** @param {HTMLElement} root @param {LessonNumbers} numbers */
export function startLesson(root, numbers) {
  const steps = lessonSteps(numbers);
  root.innerHTML = String(html`${head(steps, numbers)}${steps.map(section)}${foot(numbers)}
    <nav class="ls-bar" aria-label="Projector"><button type="button" class="mv-button" data-go="back">Back</button><span class="mv-num" data-place></span>
      <button type="button" class="mv-primary" data-go="on">Next</button><button type="button" class="mv-quiet" data-projector>Leave the projector</button></nav>`).replace(/(?<=\d) (?=[%M])/g, "\u00a0"); // a number stays with its unit
  linkExplorer(root);
  startSizes(root, numbers.model);
  new Playground(root);
  new SortingGame(root, numbers);
  startCutouts(root, numbers);
  new Lesson(root, new Flows(root, numbers));
}

/** @param {HTMLElement} root @param {LessonNumbers} numbers */
function startCutouts(root, { views, model }) {
  const image = new Image();
  image.addEventListener("load", () => paintCutouts(root, image, model.grid));
  image.src = pictureSource(views.all.picture.src);
}

/** The explorer's views, each made when its step is first seen: then the emoji fly. */
class Flows {
  /** @param {HTMLElement} root @param {LessonNumbers} numbers */
  constructor(root, numbers) {
    this.numbers = numbers;
    /** @type {Map<Element, LessonFlow>} */
    this.flows = new Map();
    // That of the step where experts are taken away is a part of the question.
    const seen = new IntersectionObserver((entries) => entries.forEach(({ isIntersecting, target }) => isIntersecting && this.at(target)));
    seen.observe(present(root.querySelector("[data-flow=away]")));
    addEventListener("beforeprint", () => root.querySelectorAll("[data-flow=away]").forEach((box) => this.at(box)));
  }

  /** @param {Element} box */
  at(box) {
    const { flow: name } = /** @type {HTMLElement} */ (box).dataset;
    const known = this.flows.get(box);
    if (known) return known;
    const flow = new LessonFlow(/** @type {HTMLElement} */ (box), this.numbers, name === "card" ? { patch: this.numbers.gate.patch } : {});
    this.flows.set(box, flow);
    return flow;
  }

  /** What an answer shows: the flight, or what an expert's absence changes. @param {Element} step @param {boolean} open */
  reveal(step, open) {
    step.querySelectorAll("[data-flow]").forEach((box) => {
      const { flow: name } = /** @type {HTMLElement} */ (box).dataset;
      const known = this.flows.get(box);
      if (name !== "away") return void (open && (known ? known.fly() : this.at(box)));
      const flow = this.at(box);
      flow.allow(open);
      const { telling } = tellingAndQuiet(this.numbers);
      if (open ? flow.away === null : flow.away !== null) flow.take(open ? telling : flow.away);
    });
  }
}

/** Of the site; the explorer, where it serves this page, puts its own address in the place. */
const EXPLORER = "explorer/cat.html";

/** A file alone can only name the command. @param {HTMLElement} root */
function linkExplorer(root) {
  root.querySelectorAll("a[data-explore]").forEach((link) => {
    if (location.protocol === "file:") link.outerHTML = String(html`<span>${link.textContent} (<code>moevision demo</code>)</span>`);
    else link.setAttribute("href", EXPLORER);
  });
}

/** @param {LessonStep[]} steps @param {(step: LessonStep) => number} of */
const total = (steps, of) => steps.reduce((sum, step) => sum + of(step), 0);

const QUESTIONS = 5; // minutes

/** @param {LessonStep[]} steps @param {LessonNumbers} numbers */
const head = (steps, { model }) => html`<nav class="mv-site" aria-label="Pages"><a data-explore>Explorer</a><a aria-current="page" href="#step-1">Lesson</a></nav>
  <header class="ls-head"><h1>Mixture of Experts in ${total(steps, ({ minutes }) => minutes) + QUESTIONS} minutes</h1>
  <p>Predict first, then look. The numbers are those of a model that moevision carries, “${model.title}”, and of a toy that trains in this page; others name their source. No network is needed.</p>
  <ol class="ls-plan">${steps.map(({ title, minutes, alone }, index) => html`<li data-number="${index + 1}" class="${alone ? "" : "ls-class"}"><a href="#step-${index + 1}">${title}</a> <span class="mv-soft mv-num">${minutes} min</span></li>`)}
    <li class="ls-class" data-number=""><span>Questions</span> <span class="mv-soft mv-num">${QUESTIONS} min</span></li></ol>
  <p class="ls-row"><button type="button" class="mv-button" data-alone aria-pressed="false">Alone, in ${total(steps, ({ alone = 0 }) => alone)} minutes</button>
    <button type="button" class="mv-button" data-projector>Projector</button><span class="mv-soft"><kbd>→</kbd> answer, then next step; <kbd>Esc</kbd> leaves</span></p>${teacher(steps)}</header>`;

/** @param {LessonStep[]} steps */
const teacher = (steps) => html`<details class="ls-teacher"><summary>For teachers</summary>
  <p><b>Goals.</b> Say why a model has more parameters than it uses. Compute one choice of a router by hand. Explain collapse and the balance loss. Know what to ask when somebody shows a coloured photo.</p>
  <p><b>Needed.</b> Weighted means, e to a power, dot products, and that a network has weights which are trained; no programming.</p>
  <p><b>Printed</b>, this page is a worksheet: answers closed, lines to write on. With this box open the key comes first.</p>
  <div class="ls-wide"><table class="ls-table"><thead><tr><th scope="col">step</th><th scope="col">min</th><th scope="col">answer</th><th scope="col">in class</th></tr></thead>
    <tbody>${steps.map(({ title, minutes, choices, right, note }, index) => html`<tr><th scope="row">${index + 1}. ${title}</th><td>${minutes}</td><td>${choices[right] ?? "open"}</td><td>${note}</td></tr>`)}</tbody></table></div></details>`;

/** @param {LessonStep} step @param {number} index */
const ask = ({ question, choices, right }, index) => html`<div class="ls-ask" role="group" aria-labelledby="question-${index + 1}"><p class="ls-question" id="question-${index + 1}">${question}</p>
  ${choices.map((choice, place) => html`<button type="button" class="ls-choice" data-choice="${place}" aria-pressed="false"><span>${choice}</span>${place === right && html`<em data-right hidden>✓ right</em>`}</button>`)}
  <button type="button" class="mv-primary" data-reveal aria-expanded="false" aria-controls="answer-${index + 1}">Show the answer</button><div class="ls-lines" aria-hidden="true">${choices.length ? "Because" : ""}</div></div>`;

/** @param {LessonStep} step @param {number} index */
const section = (step, index) => html`<section class="ls-step ${step.alone ? "" : "ls-class"} ${step.stays ? "ls-stays" : ""}" id="step-${index + 1}" aria-labelledby="title-${index + 1}">
  <p class="ls-kicker">Step ${index + 1} · ${step.minutes} min</p><h2 id="title-${index + 1}" tabindex="-1">${step.title}</h2>
  <div class="ls-body"><div class="ls-text">${step.text}${ask(step, index)}</div><div class="ls-look">${step.figure}</div>
    <div class="ls-answer" id="answer-${index + 1}" hidden>${step.answer}</div></div></section>`;

/** @param {LessonNumbers} numbers */
const foot = ({ model, taken, guessed }) => html`<footer class="ls-foot mv-note"><h2>Where this comes from</h2>
  <p>${model.title}: ${model.data}; ${model.licence}. The page of steps 1, 3, 5 and 7 is the one that the explorer opens with this model: step 7 says how it was chosen. Steps 1, 5 and 6 count on ${taken.pages.toLocaleString("en")} test pages, step 6 on ${guessed.pages} of them. One training: another one deals other boxes.</p>
  <p>Step 8, “Do experts pay?”: <code>benchmarks/experts_pay</code> of moevision. DeepSeek-V3: its report.</p></footer>`;

class Lesson {
  /** @param {HTMLElement} root @param {Flows} flows */
  constructor(root, flows) {
    this.root = root;
    this.flows = flows;
    this.sections = [...root.querySelectorAll(".ls-step")];
    this.all = this.sections;
    this.place = 0;
    this.projecting = false;
    root.addEventListener("click", (event) => this.onClick(/** @type {HTMLElement} */ (event.target)));
    document.addEventListener("keydown", (event) => this.onKey(event));
    if (location.hash === "#alone") this.shorten(true);
    const wish = /^#(step|projector)-(\d+)$/.exec(location.hash);
    if (!wish) return;
    this.place = clamp(Number(wish[2]) - 1, 0, this.sections.length - 1);
    if (wish[1] === "projector") this.project(true);
    else this.sections[this.place].scrollIntoView();
  }

  /** @param {HTMLElement} target */
  onClick(target) {
    const button = target.closest("button");
    if (!button) return;
    const { choice, reveal, go, projector, alone } = button.dataset;
    if (alone !== undefined) this.shorten(button.getAttribute("aria-pressed") !== "true");
    if (projector !== undefined) this.project(!this.projecting);
    if (go) this.go(go === "on" ? 1 : -1);
    const step = present(button.closest(".ls-step") ?? this.sections[this.place]);
    if (choice !== undefined) step.querySelectorAll("[data-choice]").forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
    if (reveal !== undefined) this.reveal(step, button.getAttribute("aria-expanded") !== "true");
  }

  /** The steps of ten minutes alone, or all of them. @param {boolean} on */
  shorten(on) {
    this.root.classList.toggle("ls-short", on);
    present(this.root.querySelector("[data-alone]")).setAttribute("aria-pressed", String(on));
    this.sections = this.all.filter((step) => !on || !step.classList.contains("ls-class"));
    this.place = 0;
    history.replaceState(null, "", on ? "#alone" : "#");
  }

  /** @param {KeyboardEvent} event */
  onKey(event) {
    if (!this.projecting || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape") return this.project(false);
    // A slider keeps its arrows. A presenter's remote sends page keys.
    if (/** @type {HTMLElement} */ (event.target).matches("input")) return;
    const step = { ArrowRight: 1, PageDown: 1, ArrowLeft: -1, PageUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    this.go(step);
  }

  /** @param {Element} step @param {boolean} open */
  reveal(step, open) {
    const button = /** @type {HTMLElement} */ (present(step.querySelector("[data-reveal]")));
    button.setAttribute("aria-expanded", String(open));
    button.textContent = open ? "Hide the answer" : "Show the answer";
    /** @type {HTMLElement} */ (present(step.querySelector(".ls-answer"))).hidden = !open;
    step.querySelectorAll("[data-right]").forEach((sign) => sign.toggleAttribute("hidden", !open));
    step.classList.toggle("ls-open", open);
    this.flows.reveal(step, open);
  }

  /** On: the answer of this step, then the next step. Back: the step before. @param {number} by */
  go(by) {
    const step = this.sections[this.place];
    if (by > 0 && !step.classList.contains("ls-open")) {
      this.reveal(step, true);
      present(step.querySelector(".ls-answer")).scrollIntoView({ block: "nearest" });
      return;
    }
    const place = clamp(this.place + by, 0, this.sections.length - 1);
    if (place === this.place) return;
    this.place = place;
    this.show();
  }

  /** @param {boolean} on */
  project(on) {
    if (on && !location.hash.startsWith("#projector")) this.place = this.nearest();
    this.projecting = on;
    document.documentElement.classList.toggle("ls-projecting", on);
    this.root.classList.toggle("ls-projector", on);
    this.show();
  }

  /** The step that is in sight. */
  nearest() {
    const place = this.sections.findIndex((step) => step.getBoundingClientRect().bottom > innerHeight / 3);
    return place < 0 ? this.sections.length - 1 : place;
  }

  show() {
    this.sections.forEach((step, place) => step.classList.toggle("ls-now", place === this.place));
    present(this.root.querySelector("[data-place]")).textContent = `${this.place + 1} of ${this.sections.length}`;
    history.replaceState(null, "", `#${this.projecting ? "projector" : "step"}-${this.all.indexOf(this.sections[this.place]) + 1}`);
    const step = this.sections[this.place];
    /** @type {HTMLElement} */ (present(step.querySelector("h2"))).focus({ preventScroll: true });
    if (this.projecting) scrollTo(0, 0);
    else step.scrollIntoView();
  }
}

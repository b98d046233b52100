// The lesson as a page: steps with a prediction and an answer that waits, and a projector mode that shows one step at a
// time in large type. Nothing is asked of a server, and nothing is kept.

import { Playground } from "./lesson_playground.js";
import { lessonSteps } from "./lesson_steps.js";
import { clamp, html, present } from "../../moevision/demo/assets/core_util.js";
/** @import { LessonNumbers, LessonStep } from "./types.js" */

/**
 * @param {HTMLElement} root @param {LessonNumbers} numbers @param {Record<string, string>} photos data address by name
 */
export function startLesson(root, numbers, photos) {
  const steps = lessonSteps(numbers, photos);
  root.innerHTML = String(html`${head(steps)}${steps.map(section)}${foot(numbers)}
    <nav class="ls-bar" aria-label="Projector"><button type="button" class="mv-button" data-go="back">Back</button><span class="mv-num" data-place></span>
      <button type="button" class="mv-primary" data-go="on">Next</button><button type="button" class="mv-quiet" data-projector>Leave the projector</button></nav>`);
  new Playground(root);
  new Lesson(root);
}

/** @param {LessonStep[]} steps */
const head = (steps) => html`<header class="ls-head"><h1>Mixture of Experts in ${steps.reduce((sum, step) => sum + step.minutes, 0)} minutes</h1>
  <p>Predict first, then look. Every number on this page is counted from the two models that moevision carries; no network is needed.</p>
  <p><button type="button" class="mv-primary" data-projector>Projector</button> <span class="mv-soft">large type, one step at a time; <kbd>→</kbd> shows the answer, then the next step, <kbd>Esc</kbd> leaves</span></p>
  <ol class="ls-plan">${steps.map(({ title, minutes }, index) => html`<li><a href="#step-${index + 1}">${title}</a> <span class="mv-soft mv-num">${minutes} min</span></li>`)}</ol></header>`;

/** @param {LessonStep} step @param {number} index */
const section = ({ title, minutes, text, figure, question, choices, right, answer }, index) => html`<section class="ls-step" id="step-${index + 1}" aria-labelledby="title-${index + 1}">
  <p class="ls-kicker">Step ${index + 1} · ${minutes} min</p><h2 id="title-${index + 1}" tabindex="-1">${title}</h2>
  <div class="ls-body"><div class="ls-text">${text}
    <div class="ls-ask" role="group" aria-labelledby="question-${index + 1}"><p class="ls-question" id="question-${index + 1}">${question}</p>
      ${choices.map((choice, place) => html`<button type="button" class="ls-choice" data-choice="${place}" aria-pressed="false"><span>${choice}</span>${place === right && html`<em data-right hidden>✓ right</em>`}</button>`)}
      <button type="button" class="mv-primary" data-reveal aria-expanded="false" aria-controls="answer-${index + 1}">Show the answer</button></div></div>
    <div class="ls-look">${figure}</div></div>
  <div class="ls-answer" id="answer-${index + 1}" hidden>${answer}</div></section>`;

/** @param {LessonNumbers} numbers */
const foot = ({ photos, model, classes, without }) => html`<footer class="ls-foot mv-note"><h2>Where this comes from</h2>
  <p>Photos: ${photos.map(({ name, credit }) => `${name} (${credit})`).join("; ")}.</p>
  <p>Model of photos: ${model.data}; ${classes.images} of the test photos are counted in step 5. Model of step 8: ${without.data} of moevision, drawn by code. One training each: another one deals other numbers.</p></footer>`;

class Lesson {
  /** @param {HTMLElement} root */
  constructor(root) {
    this.root = root;
    this.sections = [...root.querySelectorAll(".ls-step")];
    this.place = 0;
    this.projecting = false;
    root.addEventListener("click", (event) => this.onClick(/** @type {HTMLElement} */ (event.target)));
    document.addEventListener("keydown", (event) => this.onKey(event));
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
    const { choice, reveal, go, projector } = button.dataset;
    if (projector !== undefined) this.project(!this.projecting);
    if (go) this.go(go === "on" ? 1 : -1);
    const step = present(button.closest(".ls-step") ?? this.sections[this.place]);
    if (choice !== undefined) step.querySelectorAll("[data-choice]").forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
    if (reveal !== undefined) this.reveal(step, button.getAttribute("aria-expanded") !== "true");
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
    history.replaceState(null, "", `#${this.projecting ? "projector" : "step"}-${this.place + 1}`);
    const step = this.sections[this.place];
    /** @type {HTMLElement} */ (present(step.querySelector("h2"))).focus({ preventScroll: true });
    if (this.projecting) scrollTo(0, 0);
    else step.scrollIntoView();
  }
}

// The explorer's own view inside a step: the page, the flight of its emoji, the experts' boxes, and how one emoji is
// computed. What an expert's absence changes was computed beforehand, so that a click needs no server.

import { cardLayout, Core, coreLayout } from "../../moevision/demo/assets/core.js";
import { answerWords, controlWords, effectOf, effects } from "../../moevision/demo/assets/core_effect.js";
import { ViewState } from "../../moevision/demo/assets/core_state.js";
import { html, percent, present } from "../../moevision/demo/assets/core_util.js";
/** @import { Effect, Fields, Opening, View } from "../../moevision/demo/assets/types.js" */
/** @import { LessonNumbers } from "./types.js" */

/** The place of a view. @param {string} name */
export const flowBox = (name) => html`<div class="ls-flow ls-flow-${name}" data-flow="${name}"></div>`;

/**
 * "72 % smileys"; "mixed" where no group has more than half.
 * @param {LessonNumbers["taken"]} taken @param {number} expert
 */
export function nameOfExpert({ experts }, expert) {
  const { named, share, group } = experts[expert];
  return named ? `${percent(share)} ${group}` : "mixed";
}

export class LessonFlow {
  /** @param {HTMLElement} box holds a `flowBox()` @param {LessonNumbers} lesson @param {Fields} [start] */
  constructor(box, lesson, start = {}) {
    this.lesson = lesson;
    this.whole = lesson.views.all;
    /** @type {View[]} by the expert that is away; the picture is the same */
    this.without = lesson.views.without.map((changed) => ({ ...this.whole, ...changed }));
    this.without.forEach((view, expert) => effects.set(view, /** @type {Effect} */ (lesson.effects[expert])));
    /** @type {number | null} the expert that is away */
    this.away = null;
    this.opening = this.openingOf();
    box.innerHTML = String(html`${coreLayout()}<div data-box="layer" hidden></div><div data-box="time" class="mv-box-time"></div>${cardLayout()}
      <div class="mv-hidden" aria-live="polite" data-live></div>`);
    // Several views are on one page: a screen reader's list of parts tells them apart.
    present(box.querySelector(".mv-flow")).setAttribute("aria-label", `Where the emoji go: ${box.dataset.flow}`);
    this.core = new Core(box, this.opening);
    this.core.actions.take = (button) => this.opening.take(0, Number(button.dataset.expert));
    this.core.attach(new ViewState(this.whole, start));
  }

  /** @returns {Opening} */
  openingOf() {
    return {
      able: false,
      usual: this.whole.prediction.moe[0],
      thing: "page",
      unit: ["emoji", "emoji"],
      take: (_, expert) => this.opening.able && this.take(expert),
      choices: () => "",
      said: (view) => this.said(view),
      nameOf: (_, expert) => nameOfExpert(this.lesson.taken, expert),
    };
  }

  fly() { this.core.flow.play(); }

  /** From now on a click takes an expert away. @param {boolean} able */
  allow(able) {
    this.opening.able = able;
    this.core.flow.draw();
  }

  /** Take an expert away, or put it back; one at a time. @param {number | null} expert */
  take(expert) {
    this.away = this.away === expert ? null : expert;
    this.core.state.set({ view: this.away === null ? this.whole : this.without[this.away] });
  }

  /** What came of it, beside as much at random. @param {View} view */
  said(view) {
    if (!this.opening.able) return "";
    const effect = effectOf(view);
    if (this.away === null || !effect) return html`<p>Click an expert to take it away.</p>`;
    return html`<p><b>${answerWords(effect)}.</b> <span class="mv-soft">${controlWords(effect).replace("patches", "emoji")}.</span> Click it again to put it back.</p>`;
  }
}

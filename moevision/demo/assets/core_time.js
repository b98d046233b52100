// Time: where the patches of a recorded image went at moments of the training. The last moment is the trained model, whose
// view has all numbers; of the others weights and predictions were recorded, so everything else is left out there.

import { playButton } from "./core_play.js";
import { chip, expertColour, fillBox, fixed, html, present } from "./core_util.js";
/** @import { ViewState } from "./core_state.js" */
/** @import { Layer, Moments, PastLayer, TimeSource, View } from "./types.js" */

const MOST = 3; // experts of a patch that a row has room for

/**
 * When a moment was, as in "after 40 of 640 steps".
 * @param {{ step: number, total_steps: number }} given
 */
export const momentWords = ({ step, total_steps: total }) => (step === 0 ? "before training" : `after ${step} of ${total} steps`);

/** What a view of a moment comes from: { view, moments }. */
const origins = new WeakMap();
/** @param {View} view @returns {View} of the trained model */
export const trainedView = (view) => origins.get(view)?.view ?? view;

/**
 * A half-precision number that isn't negative, from its 16 bits.
 * @param {number} bits
 */
export function halfNumber(bits) {
  const [exponent, fraction] = [bits >> 10, bits & 1023];
  return exponent ? 2 ** (exponent - 25) * (1024 + fraction) : 2 ** -24 * fraction;
}

const decoded = new WeakMap();
/** @param {PastLayer} layer @returns {string} */
function bytesOf(layer) {
  if (!decoded.has(layer)) decoded.set(layer, atob(layer.weights.data));
  return decoded.get(layer);
}

/**
 * The experts that gave a patch weight at a moment as [expert, weight], best first. A weight below 3e-8 was rounded to none.
 * @param {PastLayer} layer @param {number} moment @param {number} patch @returns {[number, number][]}
 */
export function pastChoices(layer, moment, patch) {
  const bytes = bytesOf(layer);
  const [, patches, experts] = layer.weights.shape;
  const weight = (place) => halfNumber(bytes.charCodeAt(2 * place) | (bytes.charCodeAt(2 * place + 1) << 8));
  const row = Array.from({ length: experts }, (_, expert) => /** @type {[number, number]} */ (
    [expert, weight((moment * patches + patch) * experts + expert)]));
  return row.filter(([, given]) => given > 0).sort(([, a], [, b]) => b - a);
}

/**
 * A layer at a moment, and nothing of the trained model in it but what the layer is.
 * @param {Layer} layer @param {PastLayer} past @param {number} moment @returns {Layer}
 */
function pastLayer(layer, past, moment) {
  const choices = layer.experts.map((_, patch) => pastChoices(past, moment, patch));
  const counts = Array(layer.num_experts).fill(0);
  choices.flat().forEach(([expert]) => { counts[expert] += 1; });
  const mean = counts.reduce((sum, count) => sum + count, 0) / counts.length;
  return { ...layer, past: true, probs: [], margin: [], entropy: [], computation: null, reads: null, counts, requested: counts,
    experts: choices.map((row) => row.map(([expert]) => expert)), weights: choices.map((row) => row.map(([, weight]) => weight)),
    kept: choices.map((row) => row.map(() => true)), slowest: mean ? Math.max(...counts) / mean : 0 };
}

/**
 * What the stage shows of a moment.
 * @param {View} view of the trained model @param {Moments} moments @param {number} index @returns {View}
 */
export function pastView(view, moments, index) {
  const layer = (one) => pastLayer(one, recorded(moments, one), index);
  const past = { ...view, moment: { step: moments.steps[index], total_steps: moments.total_steps },
    layers: view.layers.map(layer), prediction: { moe: moments.predictions[index], dense: null } };
  origins.set(past, { view, moments });
  return past;
}

/** @param {Moments} moments @param {Layer} layer */
const recorded = (moments, { layer }) => present(moments.layers.find((past) => past.layer === layer));

/**
 * A patch at all moments, in the place of its computation, which is known of the trained model only.
 * @param {View} past @param {Layer} layer @param {number} patch
 */
export function patchMoments(past, layer, patch) {
  const { moments } = origins.get(past);
  const experts = layer.num_experts;
  const part = ([expert, weight]) => html`<i style="width:${100 * weight}%;background:${expertColour(expert, experts)}"></i>`;
  const row = (step, place) => {
    const choices = pastChoices(recorded(moments, layer), place, patch).slice(0, MOST);
    const words = choices.map(([expert, weight]) => `expert ${expert}, weight ${fixed(weight)}`).join("; ") || "no expert";
    return html`<li><button type="button" data-action="to-moment" data-place="${place}" data-key="moment-${place}" aria-pressed="${step === past.moment?.step}"
      aria-label="Step ${step}: ${words}"><span class="mv-num">${step}</span><span class="mv-parts">${choices.map(part)}</span>
      <span>${choices.map(([expert]) => chip(expert, experts))}</span></button></li>`;
  };
  return html`<h2>This patch at each step</h2><ol class="mv-patch-moments">${moments.steps.map(row)}</ol>
    <p class="mv-note">How it was computed is known of the trained model.
      <button type="button" class="mv-quiet" data-action="to-trained" data-key="to-trained">Show that</button></p>`;
}

export class Time {
  /** @param {HTMLElement} box @param {ViewState} state @param {TimeSource} source */
  constructor(box, state, source) {
    this.box = box;
    this.state = state;
    this.source = source;
    this.built = "";
    /** @type {number[]} */
    this.steps = [];
    this.total = 0;
    this.turn = Symbol("now");
  }

  /** The place on the scrubber. */
  get at() { return this.steps.indexOf(this.state.view.moment?.step ?? this.steps[this.last]); }
  get last() { return this.steps.length - 1; }

  /** The control stays while only the moment changes: a slider in somebody's hand must not go away. */
  draw() {
    const about = this.source.about(this.state.views.map(trainedView));
    const built = JSON.stringify(about);
    if (this.built !== built) {
      this.built = built;
      this.steps = typeof about === "object" && about ? about.steps : [];
      this.total = typeof about === "object" && about ? about.total_steps : 0;
      fillBox(this.box, typeof about === "string" ? html`<p class="mv-note">${about}</p>` : about && this.control());
    }
    this.mark();
  }

  control() {
    const stop = (_, place) => html`<i style="left:${(100 * place) / this.last}%"></i>`;
    return html`<div class="mv-strip-head"><h2>Training</h2><output class="mv-soft" data-part="when"></output>${playButton("training", "the training")}</div>
      <div class="mv-moments"><span class="mv-stops" aria-hidden="true">${this.steps.map(stop)}</span>
        <input type="range" min="0" max="${this.last}" step="1" value="${this.last}" data-change="moment" data-key="moment" aria-label="Moment of the training"></div>
      <p class="mv-ends"><span>before</span><span>after</span></p>`;
  }

  /** @param {string} [words] in place of when it is */
  mark(words) {
    const slider = /** @type {HTMLInputElement | null} */ (this.box.querySelector("input"));
    if (!slider) return;
    const when = words ?? (this.at === this.last ? "trained" : momentWords({ step: this.steps[this.at], total_steps: this.total }));
    slider.value = String(this.at);
    slider.setAttribute("aria-valuetext", when);
    present(this.box.querySelector("[data-part=when]")).textContent = when;
  }

  /**
   * Show what was recorded at a place of the scrubber; it is asked for once per image.
   * @param {number} place
   */
  async go(place) {
    const turn = (this.turn = Symbol("moment"));
    const { state } = this;
    const now = state.views.map(trainedView);
    if (place === this.last) return state.set({ views: now });
    const late = setTimeout(() => turn === this.turn && this.mark("loading…"), 300);
    try {
      const moments = await Promise.all(now.map((view) => this.source.get(view)));
      // Another moment, or other images, may have been chosen meanwhile.
      if (turn !== this.turn || state.views.length !== now.length || state.views.some((view, slot) => trainedView(view) !== now[slot])) return undefined;
      state.set({ views: now.map((view, slot) => pastView(view, moments[slot], place)) });
    } catch (error) {
      if (turn === this.turn) this.mark(error instanceof Error ? error.message : String(error));
    } finally {
      clearTimeout(late);
    }
    return undefined;
  }

  /**
   * The moment that a link names, if it was recorded.
   * @param {number} step
   */
  open(step) {
    const place = this.steps.indexOf(step);
    return place >= 0 && place !== this.at ? this.go(place) : undefined;
  }
}

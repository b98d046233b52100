// The training as a film: where the patches of a recorded image went at moments of it, on a true axis of steps, with loads
// and right answers over all recorded images. The last moment is the trained model, whose view has all numbers; of the
// others weights and predictions were recorded: all else is left out.

import { clamp, expertColour, fillBox, html, percent, present } from "./core_util.js";
/** @import { ViewState } from "./core_state.js" */
/** @import { Layer, Moments, PastLayer, Recorded, TimeSource, Track, View } from "./types.js" */

const PLAY_MS = 500; // for each moment

/** When a moment was, as in "after 40 of 640 steps". @param {{ step: number, total_steps: number }} given */
export const momentWords = ({ step, total_steps: total }) => (step === 0 ? "before training" : `after ${step} of ${total} steps`);

/** What a view of a moment comes from: { view, moments }. */
const origins = new WeakMap();
/** @param {View} view @returns {View} of the trained model */
export const trainedView = (view) => origins.get(view)?.view ?? view;

/** A half-precision number that isn't negative, from its 16 bits. @param {number} bits */
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
 * Loads of a layer as bands that add up to all, over the steps, and the share of right answers as a line.
 * @param {Track} track @param {number} layer
 */
function chart({ steps, right, of, loads: layers }, layer) {
  const loads = layers[layer];
  const experts = loads[0].length;
  const point = (place, share) => `${(1000 * steps[place]) / present(steps.at(-1))},${100 - 100 * share}`;
  /** @type {number[][]} the top of each band */
  const tops = [];
  loads[0].forEach((_, expert) => { tops.push(loads.map((row, place) => row[expert] + (tops[expert - 1]?.[place] ?? 0))); });
  const band = (top, expert) => {
    const under = tops[expert - 1] ?? top.map(() => 0);
    const points = [...top.map((share, place) => point(place, share)), ...under.map((share, place) => point(place, share)).reverse()];
    return html`<polygon points="${points.join(" ")}" fill="${expertColour(expert, experts)}"/>`;
  };
  const line = of ? right.map((count, place) => point(place, count / of)).join(" ") : "";
  return html`<div class="mv-chart"><svg viewBox="0 0 1000 100" preserveAspectRatio="none" aria-hidden="true">${tops.map(band)}
    <polyline class="mv-halo" points="${line}"/><polyline points="${line}"/></svg><i data-part="now"></i></div>`;
}

export class Time {
  /** @param {HTMLElement} box @param {ViewState} state @param {TimeSource} source */
  constructor(box, state, source) {
    this.box = box;
    this.state = state;
    this.source = source;
    this.built = "";
    /** @type {Recorded | null} */
    this.known = null;
    this.turn = Symbol("now");
    /** @type {symbol | null} */
    this.playing = null;
  }

  /** The place in the film. */
  get at() { return this.steps.indexOf(this.state.view.moment?.step ?? this.steps[this.last]); }
  get last() { return this.steps.length - 1; }
  get steps() { return this.known?.track.steps ?? []; }

  /** The control stays while only the moment changes: a slider in somebody's hand must not go away. */
  draw() {
    const { state } = this;
    const about = this.source.about(trainedView(state.view));
    const built = JSON.stringify([about, state.layer]);
    if (this.built !== built) {
      this.built = built;
      this.known = typeof about === "object" ? about : null;
      fillBox(this.box, typeof about === "string" ? html`<p class="mv-note">${about}</p>` : this.known && this.film(this.known.track));
    }
    this.mark();
  }

  /** @param {Track} track */
  film(track) {
    const { name, num_experts: experts } = this.state.currentLayer;
    return html`<div class="mv-film-head"><h2>How it learned</h2>
        <button type="button" class="mv-quiet mv-play" data-action="run" data-key="run" aria-label="Play the training">Play</button>
        <output class="mv-soft" data-part="when"></output></div>
      <div class="mv-film">${chart(track, this.state.layer)}<p data-part="told"></p>
        <input type="range" min="0" max="${present(track.steps.at(-1))}" step="1" data-change="moment" data-key="moment" aria-label="Moment of the training"></div>
      <p class="mv-note">Bands: the share that each expert of ${name} takes, ${percent(1 / experts)} if all take alike.
        Line: right answers. Both over ${track.of} images.</p>`;
  }

  /** @param {string} [words] in place of when it is */
  mark(words) {
    const { at, known } = this;
    const slider = this.box.querySelector("input");
    if (!slider || !known) return;
    const { steps, right, of, loads } = known.track;
    const step = steps[at];
    const begins = step === 0 && known.pretrained ? ", from pretrained layers" : "";
    const earlier = momentWords({ step, total_steps: known.total_steps }) + begins;
    const when = words ?? (at === this.last ? "after training" : earlier);
    slider.value = String(step);
    slider.setAttribute("aria-valuetext", when);
    const part = (name) => /** @type {HTMLElement} */ (this.box.querySelector(`[data-part=${name}]`));
    const said = part("when");
    if (said.textContent !== when) said.textContent = when; // said anew only where it changed
    const play = /** @type {HTMLElement} */ (this.box.querySelector(".mv-play"));
    play.textContent = this.playing ? "Pause" : "Play";
    this.box.classList.toggle("mv-playing", this.playing !== null);
    part("now").style.left = `${(100 * step) / steps[this.last]}%`;
    part("told").textContent = `${right[at]} of ${of} right, busiest expert ${percent(Math.max(...loads[this.state.layer][at]))}`;
  }

  /**
   * The recorded moment next to where the slider is; a key goes on to the next one.
   * @param {HTMLInputElement} slider
   */
  slide(slider) {
    const step = Number(slider.value);
    const away = this.steps.map((one) => Math.abs(one - step));
    const near = away.indexOf(Math.min(...away));
    const byKey = near === this.at && !slider.matches(":active");
    const place = byKey ? clamp(near + Math.sign(step - this.steps[near]), 0, this.last) : near;
    if (place === this.at) return this.mark();
    return this.go(place);
  }

  /** Show what was recorded at a place of the film; it is asked for once per image. @param {number} place */
  async go(place) {
    const turn = (this.turn = Symbol("moment"));
    const { state } = this;
    const now = trainedView(state.view);
    if (place === this.last) return state.set({ view: now });
    const late = setTimeout(() => turn === this.turn && this.mark("loading…"), 300);
    try {
      const moments = await this.source.get(now);
      // Another moment, or another image, may have been chosen meanwhile.
      if (turn === this.turn && trainedView(state.view) === now) state.set({ view: pastView(now, moments, place) });
    } catch (error) {
      if (turn === this.turn) this.mark(error instanceof Error ? error.message : String(error));
    } finally {
      clearTimeout(late);
    }
    return undefined;
  }

  /**
   * From the present moment, or from the first one where that is the last, to the last one; once more: pause. Who
   * chooses another one meanwhile has it.
   */
  async play() {
    const turn = this.playing ? null : Symbol("play");
    this.playing = turn;
    this.mark();
    for (let next = this.at === this.last ? 0 : this.at + 1; turn && next <= this.last; next += 1) {
      await this.go(next);
      if (next < this.last) await new Promise((resolve) => setTimeout(resolve, PLAY_MS));
      if (this.playing !== turn) return;
      if (this.at !== next) break;
    }
    this.playing = null;
    this.mark();
  }

  /** The moment that a link names, if it was recorded. @param {number} step */
  open(step) {
    const place = this.steps.indexOf(step);
    return place >= 0 && place !== this.at ? this.go(place) : undefined;
  }
}

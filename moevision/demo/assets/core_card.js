// The computation card: how the layer computed one patch, in five steps that one plays, points at or walks through.
// The rows stay while the step or the patch changes, so that bars grow and fade from what they were.

import { awayExpert } from "./core_kinds.js";
import { computedPatch, LAST_STEP, sparsityWords, STEPS } from "./core_numbers.js";
import { patchMoments } from "./core_time.js";
import { chip, clamp, expertColour, fillBox, fixed, html, Markup, percent, present, signed } from "./core_util.js";
/** @import { ViewState } from "./core_state.js" */
/** @import { Choice, Computed, Handlers, Layer, View } from "./types.js" */

const STEP_MS = 1600;
const MOST_ROWS = 8;
const ROW = 26; // px, the height of a row in the style sheet
const FLOW = 64; // px, the width of the arrows beside the rows

/** @param {number} value a length: three figures are enough */
const long = (value) => fixed(value, value >= 9.995 ? 1 : 2);

export class Card {
  /**
   * @param {HTMLElement} box @param {ViewState} state @param {(text: string) => void} announce
   * @param {Handlers} changes what fields do: "noise" where a server can route the image again
   */
  constructor(box, state, announce, changes) {
    this.box = box;
    this.state = state;
    this.announce = announce;
    this.changes = changes;
    this.built = "";
    /** @type {ReturnType<typeof setTimeout> | undefined} */
    this.playing = undefined;
    box.addEventListener("pointerover", (event) => this.point(event));
    box.addEventListener("keydown", (event) => this.press(event));
  }

  /** @param {PointerEvent} event */
  point(event) {
    const button = /** @type {HTMLElement} */ (event.target).closest?.("[data-step]");
    if (button && event.pointerType !== "touch") this.go(Number(/** @type {HTMLElement} */ (button).dataset.step));
  }

  /** @param {KeyboardEvent} event */
  press(event) {
    const at = this.state.step;
    const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: LAST_STEP }[event.key];
    if (to === undefined || !(/** @type {HTMLElement} */ (event.target).matches("[data-step]"))) return;
    event.preventDefault();
    this.go(clamp(to, 0, LAST_STEP));
    /** @type {HTMLElement} */ (this.box.querySelector(`[data-step="${this.state.step}"]`)).focus();
    this.announce(this.spoken());
  }

  /** @param {number} step */
  go(step) {
    this.stop();
    this.state.set({ step });
  }

  stop() {
    clearTimeout(this.playing);
  }

  play() {
    this.stop();
    const next = (step) => {
      this.state.set({ step });
      this.playing = step < LAST_STEP ? setTimeout(next, STEP_MS, step + 1) : undefined;
    };
    next(0);
  }

  draw() {
    const { state } = this;
    const { view, currentLayer: layer, shown: patch } = state;
    const computed = patch === null ? null : computedPatch(view, layer, patch);
    this.box.hidden = !computed && (!view.moment || patch === null);
    if (!computed) {
      this.stop();
      if (view.moment && patch !== null) this.sayPast(view, layer, patch);
      return;
    }
    const rows = rowsOf(layer, computed);
    // The same experts in the same order keep their rows.
    const wanted = `${view.model.id} ${layer.name} ${rows}`;
    if (this.built !== wanted) this.build(layer, rows);
    this.built = wanted;
    this.fill(view, layer, patch, computed, rows);
  }

  /**
   * At a moment of the training only the gates of a patch are known. The box keeps its height.
   * @param {View} view @param {Layer} layer @param {number} patch
   */
  sayPast(view, layer, patch) {
    if (this.built) this.box.style.minHeight = `${this.box.offsetHeight}px`;
    this.built = "";
    fillBox(this.box, patchMoments(view, layer, patch));
  }

  /** @param {Layer} layer @param {number[]} rows */
  build(layer, rows) {
    this.box.style.minHeight = "";
    const steps = STEPS.map(([, label], step) => html`<button type="button" role="radio" data-step="${step}" data-action="step" data-key="step-${step}">${label}</button>`);
    const row = (expert) => html`<li data-expert="${expert}">${chip(expert, layer.num_experts)}
      <span class="mv-card-bar"><i style="background:${expertColour(expert, layer.num_experts)}"></i></span><span class="mv-num"></span></li>`;
    const flow = (expert) => html`<path data-flow="${expert}" pathLength="1" stroke="${expertColour(expert, layer.num_experts)}"/>`;
    fillBox(this.box, html`<div class="mv-strip-head"><h2>How this patch was computed</h2>
        <button type="button" class="mv-quiet mv-play" data-action="play" data-key="play">Play</button></div>
      <div class="mv-switch mv-steps" role="radiogroup" aria-label="Step">${steps}</div>
      <p class="mv-note mv-card-say" data-part="say"></p>
      <div class="mv-card-body"><ol class="mv-card-rows">${rows.map(row)}</ol>
        <svg class="mv-sum" width="${FLOW}" height="${ROW * rows.length + 38}" aria-hidden="true">${rows.map(flow)}</svg>
        <div class="mv-stream" data-part="stream"><i></i><b></b><span></span></div></div>
      <p class="mv-card-told" data-part="told"></p><div class="mv-card-noise" data-part="noise"></div>`);
  }

  /**
   * The switch of the noise, for routers that have some.
   * @param {View} view @param {Layer} layer
   */
  drawNoise(view, layer) {
    const draw = view.settings.noise ?? null;
    const able = "noise" in this.changes && layer.noise && layer.noise !== "none";
    fillBox(this.box.querySelector("[data-part=noise]"), able && html`<label class="mv-check"><input type="checkbox" data-change="noise" data-key="noise"
        ${new Markup(draw === null ? "" : "checked")}>Noise, as in training</label>
      ${draw !== null && html`<span class="mv-soft">draw ${draw}</span>
        <button type="button" class="mv-quiet" data-action="redraw" data-key="redraw">Draw again</button>`}`);
  }

  /** @param {View} view @param {Layer} layer @param {number} patch @param {Computed} computed @param {number[]} rows */
  fill(view, layer, patch, computed, rows) {
    const [name] = STEPS[this.state.step];
    this.box.dataset.at = name;
    const buttons = /** @type {NodeListOf<HTMLElement>} */ (this.box.querySelectorAll("[data-step]"));
    buttons.forEach((button, step) => {
      button.setAttribute("aria-checked", String(step === this.state.step));
      button.tabIndex = step === this.state.step ? 0 : -1;
    });
    const looks = rowLooks(view, layer, computed, name);
    const running = rows.filter((expert) => computed.kept.some((choice) => choice.expert === expert));
    rows.forEach((expert, index) => {
      const item = /** @type {HTMLElement} */ (this.box.querySelector(`li[data-expert="${expert}"]`));
      const look = looks(expert);
      const bar = /** @type {HTMLElement} */ (item.querySelector("i"));
      bar.style.left = `${look.from * 100}%`;
      bar.style.width = `${look.size * 100}%`;
      item.classList.toggle("mv-away", look.away);
      item.classList.toggle("mv-lost-row", look.lost);
      present(item.querySelector(".mv-num")).textContent = look.text;
      const flow = present(this.box.querySelector(`[data-flow="${expert}"]`));
      // Each arrow has a lane of its own on its way down to the stream; the lowest row takes the one nearest to it.
      const lane = FLOW - 14 - (30 * (running.indexOf(expert) + 0.5)) / Math.max(running.length, 2);
      const y = ROW * (index + 0.5);
      flow.setAttribute("d", `M 10 ${y} C ${lane} ${y} ${lane} ${y} ${lane} ${Math.min(y + 26, ROW * rows.length)} V ${ROW * rows.length + 19}`);
      flow.setAttribute("style", `stroke-width:${look.flow};opacity:${look.flow && name === "sum" ? 1 : 0}`);
    });
    fillBox(this.box.querySelector("[data-part=say]"), this.sentence(layer, name, rows.length));
    fillBox(this.box.querySelector("[data-part=told]"), told(view, layer, patch, computed, name));
    this.drawNoise(view, layer);
    drawStream(/** @type {HTMLElement} */ (this.box.querySelector("[data-part=stream]")), computed, name);
  }

  /** @param {Layer} layer @param {string} name @param {number} rows */
  sentence(layer, name, rows) {
    const hidden = layer.num_experts - rows;
    const more = hidden > 0 ? ` (${hidden} more experts aren't shown.)` : "";
    return `${stepWords(layer, name)}${more}`;
  }

  /** What a screen reader hears of the step. */
  spoken() {
    const [name, label] = STEPS[this.state.step];
    const rows = [...this.box.querySelectorAll("li:not(.mv-away)")].map((item) => `expert ${/** @type {HTMLElement} */ (item).dataset.expert} ${present(item.querySelector(".mv-num")).textContent}`);
    const parts = [`${label}, step ${this.state.step + 1} of ${STEPS.length}`, ...rows];
    return `${parts.join(", ")}. ${name === "sum" || name === "kept" ? present(this.box.querySelector("[data-part=told]")).textContent : ""}`;
  }
}

/** @param {Layer} layer @param {string} name */
function stepWords(layer, name) {
  if (name === "outputs") return layer.kind === "soft" ? "What each expert's slots give this patch, as the length of the vector." : "What each kept expert makes of the patch, as the length of its vector.";
  if (name === "sum") return layer.steps.weights;
  return layer.steps[name];
}

/**
 * The experts that have a row, in order of number; of very many those with the largest shares.
 * @param {Layer} layer @param {Computed} computed
 */
function rowsOf(layer, { shares, choices }) {
  const all = [...Array(layer.num_experts).keys()];
  if (all.length <= MOST_ROWS) return all;
  const chosen = new Set(choices.filter(({ kept }) => kept).map(({ expert }) => expert));
  const first = (expert) => (chosen.has(expert) ? 1 : 0) + shares[expert] / 1e3;
  return all.sort((a, b) => first(b) - first(a)).slice(0, MOST_ROWS).sort((a, b) => a - b);
}

/**
 * For an expert its bar (`from` and `size` in parts of the row), number, width of its arrow, and whether it fades.
 * @param {View} view @param {Layer} layer @param {Computed} computed @param {string} name
 */
function rowLooks(view, layer, computed, name) {
  const { scores, noise, shares, sigmoid, bias, choices } = computed;
  const drawn = noise ? scores.map((score, each) => score + noise[each]) : scores;
  const reach = Math.max(...drawn.map(Math.abs), 1e-6);
  const longest = Math.max(...computed.kept.map(({ length }) => length), 1e-6);
  const pushed = Math.max(...computed.kept.map(({ length, weight }) => length * weight), 1e-6);
  const ruled = !layer.learned;
  return (expert) => {
    const choice = choices.find((one) => one.expert === expert);
    const away = !choice?.kept;
    const base = { from: 0, size: 0, text: "", away: false, lost: false, flow: 0 };
    if (name === "scores") {
      if (ruled) return { ...base, size: choice ? 1 : 0, text: choice ? "the rule" : "–", away };
      const part = Math.abs(drawn[expert]) / reach / 2;
      const text = `${fixed(scores[expert])}${noise ? ` ${signed(noise[expert]).replace(/^(?=\d)/, "+")}` : ""}`;
      return { ...base, from: drawn[expert] < 0 ? 0.5 - part : 0.5, size: part, text };
    }
    if (name === "shares") {
      if (ruled) return { ...base, size: choice ? 1 : 0, text: "–", away };
      const text = sigmoid ? fixed(shares[expert]) : percent(shares[expert], layer.kind === "soft" ? 1 : 0);
      return { ...base, size: shares[expert], text: bias ? `${text} ${fixed(bias[expert], 3).startsWith("\u2212") ? "" : "+"}${fixed(bias[expert], 3)}` : text };
    }
    if (!choice || (away && !(choice.weight >= 0.005))) return { ...base, away: true, size: name === "kept" && !ruled ? shares[expert] : 0 };
    if (away) {
      const lost = awayExpert(view, layer) === expert ? "taken away" : "full";
      return { ...base, away: name !== "kept", lost: true, size: name === "kept" ? choice.weight : 0, text: name === "kept" ? `${fixed(choice.weight)} ${lost}` : "" };
    }
    if (name === "kept") return { ...base, size: clamp(choice.weight, 0, 1), text: fixed(choice.weight) };
    if (name === "outputs") return { ...base, size: choice.length / longest, text: long(choice.length) };
    const push = choice.weight * choice.length;
    return { ...base, size: push / longest, text: `${fixed(choice.weight)} × ${long(choice.length)}`, flow: 1.5 + (6 * push) / pushed };
  };
}

/** @param {HTMLElement} box @param {Computed} computed @param {string} name */
function drawStream(box, { before, after }, name) {
  box.hidden = before === null || after === null;
  if (before === null || after === null) return;
  present(box.querySelector("span")).textContent = name === "sum" ? `stream ${long(before)} → ${long(after)}` : `stream ${long(before)}`;
}

/**
 * What the rows don't say, in this patch's own numbers.
 * @param {View} view @param {Layer} layer @param {number} patch @param {Computed} computed @param {string} name
 */
function told(view, layer, patch, computed, name) {
  const { kept, missing, total, before, added, after, shared } = computed;
  if (name === "kept") {
    if (!kept.length) return nobody(layer, computed);
    const sum = kept.reduce((all, { weight }) => all + weight, 0);
    const terms = layer.kind === "soft" ? "" : `${kept.map(({ weight }) => fixed(weight)).join(" + ")}${kept.length > 1 ? ` = ${fixed(sum)}` : ""}`;
    return html`${terms && html`<b class="mv-num">${terms}</b>`}${terms && missing.length > 0 && ". "}${missing.join(" ")}`;
  }
  if (name === "outputs") return kept.length ? `${shared === null ? "" : `Shared experts give ${long(shared)}, for every patch. `}Nothing ran for the others.` : nobody(layer, computed);
  if (name !== "sum") return "";
  if (!kept.length && shared === null) return nobody(layer, computed);
  const parts = layer.kind === "soft" ? "The sum over all slots" : equation(kept, shared);
  const scaled = added !== null && Math.abs(added - total) > 0.02 * total; // blocks of DINOv2 have one
  const stream = before === null || added === null || after === null ? "" : html` <span>${scaled && `A layer scale, learned for each channel, makes that ${long(added)}. `}Added to the
    residual stream (${long(before)}) that gives ${long(after)}.</span>`;
  return html`<b>${parts}</b><span> has length ${long(total)}</span>.${stream} <span class="mv-sparse">${sparsityWords(view, layer, patch)}</span>`;
}

/** @param {Choice[]} kept @param {number | null} shared */
function equation(kept, shared) {
  const terms = kept.map(({ expert, weight }) => html`<span class="mv-num">${fixed(weight)}·E${expert}(x)</span>`);
  if (shared !== null) terms.push(html`<span class="mv-num">shared(x)</span>`);
  return terms.map((one, index) => html`${index > 0 && " + "}${one}`);
}

/** @param {Layer} layer @param {Computed} computed */
function nobody(layer, { missing, shared }) {
  const onward = shared === null ? "it goes on as it came" : "it gets the shared experts' part only";
  return `${layer.kind === "expert_choice" ? "No expert took this patch" : "No expert computes this patch"}: ${onward}. ${missing.join(" ")}`;
}

// The slots of Soft MoE: what each slot of an expert reads of the image, and what the patches take from it. A view
// carries the mean over an expert's slots; single slots come from the server when somebody looks at them.

import { patchWeights, plural } from "./core_kinds.js";
import {
  brush, chip, clamp, fillBox, fixed, html, layerExpert, percent, present, rgba, SCALE_COLOUR, term,
} from "./core_util.js";
/** @import { ViewState } from "./core_state.js" */
/** @import { Layer, SlotChoice, View } from "./types.js" */

export const SIDES = { reads: "What it reads", takes: "What patches take" };

/** Slot weights that are here already, by view, layer and expert. */
export class SlotMaps {
  constructor() { this.ask = null; this.found = new WeakMap(); }

  /**
   * {unit, reads, takes, ...} or {error}; undefined as long as it isn't here.
   * @param {View} view @param {Layer} layer @param {number} expert
   */
  get(view, layer, expert) { return this.found.get(view)?.get(`${layer.layer}.${expert}`)?.answer; }

  /**
   * Ask once for the slots of an expert.
   * @param {View} view @param {Layer} layer @param {number} expert
   */
  async need(view, layer, expert) {
    if (!this.found.has(view)) this.found.set(view, new Map());
    const known = this.found.get(view);
    const key = `${layer.layer}.${expert}`;
    if (known.has(key)) return known.get(key).promise;
    /** @type {{ answer?: any, promise?: Promise<unknown> }} */
    const entry = {};
    entry.promise = this.ask(view, layer.layer, expert)
      .then((answer) => { entry.answer = answer; })
      .catch((error) => { entry.answer = { error }; });
    known.set(key, entry);
    return entry.promise;
  }

  /** @param {View} view @param {Layer} layer @param {number} expert */
  forget(view, layer, expert) { this.found.get(view)?.delete(`${layer.layer}.${expert}`); }
}

/**
 * [patches] values of the chosen map; null as long as they aren't here.
 * @param {SlotChoice} state @param {View} view @param {Layer} layer
 */
export function slotValues(state, view, layer) {
  const { slotExpert: expert, slot, slotSide: side } = state;
  if (slot === null) return side === "reads" ? present(layer.reads)[expert] : layer.experts.map((_, patch) => patchWeights(layer, patch)[expert]);
  const maps = state.slotMaps.get(view, layer, expert);
  return maps?.[side] ? maps[side][slot].map((value) => value * maps.unit) : null;
}

/**
 * What a patch would have if all were alike.
 * @param {ViewState} state @param {Layer} layer @param {number[]} values
 */
function evenShare(state, layer, values) {
  if (state.slotSide === "reads") return values.reduce((sum, value) => sum + value, 0) / values.length;
  return 1 / (layer.num_experts * (state.slot === null ? 1 : layer.slots ?? 1));
}

/** @param {number[]} values */
export function rangeOf(values) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  return { low, high, place: (value) => (high > low ? (value - low) / (high - low) : 0.5) };
}

/**
 * [patches] looks in the colouring by slots.
 * @param {ViewState} state @param {View} view @param {Layer} layer
 */
export function slotLooks(state, view, layer) {
  const values = slotValues(state, view, layer);
  if (!values) return layer.experts.map(() => ({ colour: SCALE_COLOUR, alpha: 0, text: "", chip: null }));
  const { place } = rangeOf(values);
  const ratio = ratioWords(state, layer, values);
  return values.map((value) => ({
    colour: SCALE_COLOUR, alpha: clamp((0.03 + 0.8 * place(value)) * (state.strength / 0.65), 0, 1), text: ratio(value), chip: null,
  }));
}

/**
 * How a value of a map is written as a multiple of an even share: with more digits where all are nearly alike.
 * @param {ViewState} state @param {Layer} layer @param {number[]} values
 */
export function ratioWords(state, layer, values) {
  const even = evenShare(state, layer, values);
  const { low, high } = rangeOf(values);
  return (value) => fixed(value / even, high - low < even / 2 ? 2 : 1);
}

// ---- the panel ----------------------------------------------------------------------------------------------

/** @param {HTMLElement} box @param {ViewState} state */
export function drawSlots(box, state) {
  const { currentLayer: layer, view } = state;
  box.hidden = state.mode !== "slots";
  if (box.hidden) return fillBox(box, "");
  const { slotExpert: expert, slotSide: side } = state;
  const name = layerExpert(layer, expert);
  const experts = [...Array(layer.num_experts).keys()].map((each) => html`<button type="button" class="mv-pick" data-action="soft-expert" data-expert="${each}"
    data-key="soft-expert-${each}" aria-pressed="${each === expert}" aria-label="Slots of ${layerExpert(layer, each)}">${chip(each, layer.num_experts)}</button>`);
  const sides = Object.entries(SIDES).map(([key, label]) => html`<button type="button" data-action="soft-side" data-side="${key}" data-key="soft-side-${key}"
    aria-pressed="${key === side}">${label}</button>`);
  fillBox(box, html`<div class="mv-strip-head"><h2>${term("slot", "Slots")} of ${name}</h2>
      <div class="mv-switch" role="group" aria-label="Which weights">${sides}</div></div>
    <div class="mv-picks" role="group" aria-label="Expert">${experts}</div>
    ${slotThumbs(state, layer)}
    <p class="mv-note">${slotSentence(state, view, layer)}</p>`);
  box.querySelectorAll("canvas").forEach((canvas) => drawSlotThumb(canvas, state, view, layer));
  return undefined;
}

/** @param {ViewState} state @param {Layer} layer */
function slotThumbs(state, layer) {
  const maps = state.slotMaps.get(state.view, layer, state.slotExpert);
  const pick = (slot, label, spoken) => html`<button type="button" class="mv-slot" data-action="soft-slot" data-pick="${slot ?? "all"}" data-key="soft-slot-${slot ?? "all"}"
    aria-pressed="${slot === state.slot}" aria-label="${spoken}"><canvas aria-hidden="true"></canvas><span>${label}</span></button>`;
  const single = maps?.reads ? maps.reads.map((_, slot) => pick(slot, slot, `Slot ${slot}`)) : [];
  return html`<div class="mv-slots-row" role="group" aria-label="Slot">${pick(null, "all", `All ${layer.slots} slots together`)}${single}</div>
    ${maps?.error && html`<p class="mv-note mv-wrong" role="alert">${maps.error.message} <button type="button" class="mv-quiet" data-action="soft-again">Try again</button></p>`}
    ${!maps && (state.slotMaps.ask ? html`<p class="mv-note" role="status">Asking for its single slots…</p>`
      : html`<p class="mv-note">This page carries the mean over the slots; the explorer shows each of them.</p>`)}`;
}

/** @param {HTMLCanvasElement} canvas @param {ViewState} state @param {View} view @param {Layer} layer */
function drawSlotThumb(canvas, state, view, layer) {
  const [rows, columns] = view.model.grid;
  const { pick } = present(canvas.parentElement).dataset;
  const values = slotValues({ ...state, slot: pick === "all" ? null : Number(pick) }, view, layer);
  const { place } = rangeOf(values);
  canvas.width = columns;
  canvas.height = rows;
  const context = brush(canvas);
  values.forEach((value, patch) => {
    context.fillStyle = rgba(SCALE_COLOUR, 0.06 + 0.9 * place(value));
    context.fillRect(patch % columns, Math.floor(patch / columns), 1, 1);
  });
}

/**
 * The chosen map in numbers.
 * @param {ViewState} state @param {View} view @param {Layer} layer
 */
function slotSentence(state, view, layer) {
  const values = slotValues(state, view, layer);
  if (!values) return "";
  const { low, high } = rangeOf(values);
  const { slot } = state;
  const patches = view.model.grid[0] * view.model.grid[1];
  const span = `${percent(low, 1)} to ${percent(high, 1)}`;
  if (state.slotSide === "takes") {
    const from = slot === null ? `the ${plural(layer.slots ?? 0, "slot")} of this expert together` : `slot ${slot}`;
    return `Patches take ${span} of their output from ${from}; an even share is ${percent(evenShare(state, layer, values), 1)}.`;
  }
  if (slot === null) return `Mean over ${plural(layer.slots ?? 0, "slot")}: ${span} of what the expert reads is one patch; an even share is ${percent(1 / patches, 1)}.`;
  const { reads_patches: spread, reads_prefix: prefix } = state.slotMaps.get(view, layer, state.slotExpert);
  const rest = prefix[slot] >= 0.0005 ? ` ${percent(prefix[slot], 1)} of it are class or register tokens.` : "";
  return `Slot ${slot} is one weighted mean of all patches, ${span} each: as concentrated as an even mean of ${fixed(spread[slot], 0)} of the ${patches}.${rest}`;
}

/**
 * What the chosen map says about one patch, for the inspector: [name, value].
 * @param {ViewState} state @param {Layer} layer @param {number} patch
 */
export function slotFacts(state, layer, patch) {
  if (state.mode !== "slots") return [];
  const which = state.slot === null ? layerExpert(layer, state.slotExpert) : `slot ${state.slot}`;
  return Object.keys(SIDES).flatMap((side) => {
    const values = slotValues({ ...state, slotSide: side }, state.view, layer);
    return values ? [[side === "reads" ? `part of what ${which} reads` : `patch takes from ${which}`, percent(values[patch], 1)]] : [];
  });
}

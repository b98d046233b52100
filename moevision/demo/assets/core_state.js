// What is being looked at. Parts of the page subscribe and draw themselves; nobody else is told.

import { modesOf } from "./core_kinds.js";
import { SIDES, SlotMaps } from "./core_slots.js";
import { clamp } from "./core_util.js";
/** @import { Fields, Mode, View, Wish } from "./types.js" */

/**
 * State of the shared view.
 *
 * views: one or two `moevision.view/2` objects of the same model; active: the one whose patch is inspected;
 * layer: position in `layers` (0 is the first MoE layer); patch: the pinned one; hover: the one under the pointer;
 * asSeen: whether the stage shows the model's input where it has a sharper original;
 * highlight: an expert whose patches stand out; strength: opacity of a patch with gate weight 1.
 * Of Soft MoE: slotExpert, whose slots are shown; slot: one of them, null for their mean; slotSide: "reads" or "takes";
 * slotMaps: what the server said about them, slotsHere: how often it did.
 */
export class ViewState {
  /** @param {View} view @param {Fields} [start] */
  constructor(view, start = {}) {
    this.views = [view];
    this.active = 0;
    this.layer = 0;
    this.patch = null;
    this.hover = null;
    /** @type {Mode} */
    this.mode = "expert";
    this.highlight = null;
    this.asSeen = false;
    this.strength = 0.65;
    this.slotExpert = null;
    this.slot = null;
    this.slotSide = "reads";
    this.slotMaps = new SlotMaps();
    this.slotsHere = 0;
    this.listeners = [];
    Object.assign(this, start);
    this.settle();
  }

  /** @param {(changed: Set<string>, state: ViewState) => unknown} listener */
  subscribe(listener) { this.listeners.push(listener); }

  /**
   * Change some fields and tell the subscribers which ones really changed.
   * @param {Fields} change
   */
  set(change) {
    const before = { ...this };
    Object.assign(this, change);
    this.settle();
    const names = ["views", "active", "layer", "patch", "hover", "mode", "highlight", "strength", "asSeen",
      "slotExpert", "slot", "slotSide", "slotsHere"];
    const changed = new Set(names.filter((name) => before[name] !== this[name]));
    if (changed.size) this.listeners.forEach((listener) => listener(changed, this));
  }

  /** Bring every field into the range of the views: links and other models bring strange values. */
  settle() {
    const { layers, model } = this.views[0];
    const patches = model.grid[0] * model.grid[1];
    const inside = (value, size) => (Number.isInteger(value) && value >= 0 && value < size ? value : null);
    this.layer = inside(this.layer, layers.length) ?? layers.length - 1;
    this.patch = inside(this.patch, patches);
    this.hover = inside(this.hover, patches);
    this.active = this.views.length > 1 ? clamp(this.active, 0, 1) : 0;
    const layer = this.currentLayer;
    this.highlight = inside(this.highlight, layer.num_experts);
    if (!modesOf(layer).includes(this.mode)) this.mode = "expert";
    if (this.mode !== "slots") return;
    const here = this.patch === null ? 0 : layer.experts[this.patch][0];
    this.slotExpert = inside(this.slotExpert, layer.num_experts) ?? here;
    this.slot = inside(this.slot, layer.slots);
    if (!(this.slotSide in SIDES)) this.slotSide = "reads";
  }

  get view() { return this.views[this.active]; }
  get currentLayer() { return this.view.layers[this.layer]; }
  /** The patch to describe: the one under the pointer, else the pinned one. */
  get shown() { return this.hover ?? this.patch; }
}

/**
 * The patch that is pinned when nobody has chosen one, so that the inspector shows what it is for.
 * @param {View} given
 */
export const centrePatch = ({ model: { grid: [rows, columns] } }) => Math.floor(rows / 2) * columns + Math.floor(columns / 2);

// ---- what an address asks for -------------------------------------------------------------------------------
/** @param {string | undefined} word */
function readSlot(word) {
  if (!word) return {};
  const [expert, slot, side] = word.split(".");
  return { slotExpert: Number(expert), slot: slot === "all" ? null : Number(slot), slotSide: side };
}

/**
 * The expert that "L3.E1" names, as fields of the state.
 * @param {string | undefined} word @param {View} view
 */
export function readExpert(word, view) {
  const [, name, number] = /^(L\d+)\.E(\d+)$/.exec(word ?? "") ?? [];
  const layer = view.layers.findIndex((entry) => entry.name === name);
  return layer < 0 ? { highlight: null } : { layer, highlight: Number(number) };
}

/**
 * Layer, expert, patch and colouring that the address asks for, as fields of the state; nonsense becomes null.
 * @param {Wish} wish @param {View} view
 */
export function readPlace(wish, view) {
  const layer = view.layers.findIndex((entry) => String(entry.layer) === wish.layer);
  return { layer: layer < 0 ? null : layer, patch: Number(wish.patch), mode: wish.mode ?? "expert", ...readSlot(wish.slot), ...readExpert(wish.expert, view) };
}

// What is being looked at. Parts of the page subscribe and draw themselves; nobody else is told.

import { modesIn } from "./core_kinds.js";
/** @import { Fields, Mode, View, Wish } from "./types.js" */

/**
 * State of the shared view.
 *
 * view: a `moevision.view/2` object; layer: position in `layers` (0 is the first MoE layer); patch: the pinned one;
 * hover: the one under the pointer; asSeen: whether the stage shows the model's input where it has a sharper original;
 * highlight: an expert whose patches stand out.
 */
export class ViewState {
  /** @param {View} view @param {Fields} [start] */
  constructor(view, start = {}) {
    this.view = view;
    this.layer = 0;
    this.patch = null;
    this.hover = null;
    /** @type {Mode} */
    this.mode = "regions";
    this.highlight = null;
    this.asSeen = false;
    this.listeners = [];
    Object.assign(this, start);
    this.settle();
  }

  /** @param {(changed: Set<string>, state: ViewState) => unknown} listener */
  subscribe(listener) { this.listeners.push(listener); }

  /** Change some fields and tell the subscribers which ones really changed. @param {Fields} change */
  set(change) {
    const before = { ...this };
    Object.assign(this, change);
    this.settle();
    const names = ["view", "layer", "patch", "hover", "mode", "highlight", "asSeen"];
    const changed = new Set(names.filter((name) => before[name] !== this[name]));
    if (changed.size) this.listeners.forEach((listener) => listener(changed, this));
  }

  /** Bring every field into the range of the view: links and other models bring strange values. */
  settle() {
    const { layers, model } = this.view;
    const patches = model.grid[0] * model.grid[1];
    const inside = (value, size) => (Number.isInteger(value) && value >= 0 && value < size ? value : null);
    this.layer = inside(this.layer, layers.length) ?? layers.length - 1;
    this.patch = inside(this.patch, patches);
    this.hover = inside(this.hover, patches);
    const layer = this.currentLayer;
    this.highlight = inside(this.highlight, layer.num_experts);
    if (!modesIn(this.view, layer).includes(this.mode)) this.mode = "regions";
  }

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
/** The expert that "L3.E1" names, as fields of the state. @param {string | undefined} word @param {View} view */
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
  const found = view.layers.findIndex((entry) => String(entry.layer) === wish.layer);
  const layer = found < 0 ? null : found;
  // Earlier versions had a colouring of dropped choices, which are hatched at each patch.
  const mode = wish.mode === "drops" ? "expert" : wish.mode ?? "regions";
  const place = { layer, patch: Number(wish.patch), mode, ...readExpert(wish.expert, view) };
  // Of the single slots that earlier versions showed, what their expert reads.
  return wish.mode === "slots" ? { ...place, mode: "reads", layer, highlight: Number(wish.slot?.split(".")[0]) } : place;
}

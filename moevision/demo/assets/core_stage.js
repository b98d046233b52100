// The stage: an image under a grid of patches, and what is said of the patch that is pointed at.

import { describePatch, goneFrom, modeHint, patchWeights, readShares, strongest } from "./core_kinds.js";
import {
  chip, clamp, expertColour, fillBox, fixed, html, inkOn, layerExpert, pickButton,
  pictureSource, present, rgba, rowColumn, SCALE_COLOUR, signed, term,
} from "./core_util.js";
/** @import { ViewState } from "./core_state.js" */
/** @import { Layer, Look, View } from "./types.js" */

/**
 * [patches] fill and label of every patch in the present colouring: {colour, alpha, text, chip, ...}.
 * @param {ViewState} state @param {View} view @param {Layer} layer @returns {Look[]}
 */
export function patchLooks(state, view, layer) {
  if (state.mode === "reads") return readLooks(state, layer);
  if (state.mode === "rests") return shareLooks(present(view.shares));
  const lit = litExpert(state, view, layer);
  const top = layer.kind === "soft" ? topWeight(layer, lit) : 1;
  return layer.experts.map((_, patch) => patchLook(state, layer, patch, top, lit));
}

/**
 * The expert whose patches stand out. One that was taken away has none: then all show where they went.
 * @param {ViewState} state @param {View} view @param {Layer} layer
 */
const litExpert = ({ highlight }, view, layer) => (highlight !== null && goneFrom(view, layer).includes(highlight) ? null : highlight);

/**
 * The largest weight of the image: of one expert, or of any. In Soft MoE all are small, and opacity is relative to it.
 * @param {Layer} layer @param {number | null} expert
 */
const topWeight = (layer, expert) => (expert === null ? strongest(layer).high
  : Math.max(...layer.experts.map((_, patch) => patchWeights(layer, patch)[expert]), 1e-6));

/** @param {ViewState} state @param {Layer} layer @param {number} patch @param {number} top @param {number | null} lit */
function patchLook(state, layer, patch, top, lit) {
  if (["expert", "regions"].includes(state.mode)) return lit === null ? expertLook(layer, patch, top) : highlightLook(layer, patch, top, lit);
  const bits = layer.entropy[patch];
  const share = clamp(bits / Math.log2(layer.num_experts), 0, 1);
  return { colour: SCALE_COLOUR, alpha: 0.06 + 0.8 * share, text: fixed(bits, 1), chip: null };
}

/** @param {Layer} layer @param {number} patch @param {number} top */
function expertLook(layer, patch, top) {
  const [expert] = layer.experts[patch];
  if (expert === undefined) return { colour: NOBODY_COLOUR, alpha: 0.55 * STRENGTH, text: "–", chip: null };
  const kept = layer.kept[patch][0];
  const others = layer.kind === "expert_choice" ? layer.experts[patch].length - 1 : 0;
  return { colour: expertColour(expert, layer.num_experts), alpha: kept ? (layer.weights[patch][0] / top) * STRENGTH : 0,
    text: others ? `${expert}+${others}` : String(expert), chip: expert, hatched: !kept };
}

/** @param {Layer} layer @param {number} patch @param {number} top @param {number} expert */
function highlightLook(layer, patch, top, expert) {
  const rank = layer.experts[patch].indexOf(expert);
  const uses = rank >= 0;
  return { colour: expertColour(expert, layer.num_experts, uses), alpha: (patchWeights(layer, patch)[expert] / top) * STRENGTH,
    text: String(expert), chip: expert, faint: !uses, hatched: uses && !layer.kept[patch][rank] };
}

/** @param {number[]} shares @returns {[number, number]} */
const readEnds = (shares) => [Math.min(...shares), Math.max(...shares)];

/** @param {ViewState} state @param {Layer} layer */
function readLooks({ highlight }, layer) {
  const shares = readShares(layer, highlight);
  const [low, high] = readEnds(shares);
  const digits = high - low < 0.5 ? 2 : 1; // more where all are nearly alike
  return shares.map((share) => ({
    colour: SCALE_COLOUR, alpha: 0.03 + (0.8 * (share - low)) / (high - low || 1),
    text: fixed(share, digits), chip: null,
  }));
}

const [FOR_COLOUR, AGAINST_COLOUR] = ["#3f84ad", "#bf7134"]; // as `predict --heat` has them

/** @param {number[]} shares */
const shareEnds = (shares) =>
  html`<span>${[Math.min, Math.max].map((end) => signed(100 * end(...shares), 0)).join(" – ")}</span>`;

/** @param {number[]} shares */
function shareLooks(shares) {
  const most = Math.max(...shares.map(Math.abs), 1e-9);
  return shares.map((share) => ({
    colour: share < 0 ? AGAINST_COLOUR : FOR_COLOUR, alpha: (0.85 * Math.abs(share)) / most,
    text: signed(100 * share, 0), chip: null,
  }));
}

/** How opaque a patch with gate weight 1 is. */
const STRENGTH = 0.65;
const NOBODY_COLOUR = "#808080";

const originals = new WeakMap();

/**
 * Keep the same square of a view's image in more pixels, which is shown in place of the model's input.
 * @param {View} view @param {string} source
 */
export const keepOriginal = (view, source) => originals.set(view.picture, source);

/** @param {View} view */
export const hasOriginal = (view) => originals.has(view.picture);

/** What lies under the patches, and whether that is the original. @param {ViewState} state @param {View} view */
export function underlay({ asSeen }, view) {
  const sharp = hasOriginal(view) && !asSeen;
  return { sharp, source: pictureSource(sharp ? originals.get(view.picture) : view.picture.src) };
}

/** The image with its grid. */
export class Stage {
  /** @param {HTMLElement} box @param {ViewState} state */
  constructor(box, state) {
    this.box = box;
    this.state = state;
    this.pictured = this.view.picture;
    this.cells = this.build();
    this.drawAgain();
  }

  drawAgain() {
    this.picture();
    this.colour();
    this.outline();
    return this;
  }

  /**
   * Whether another view is of the same image: then its cells stay, and what has the focus with them.
   * @param {View} view
   */
  shows(view) { return this.pictured === view.picture; }

  get view() { return this.state.view; }

  build() {
    const { view } = this;
    const [rows, columns] = view.model.grid;
    const cell = (row, column) => html`<div role="gridcell" class="mv-cell" tabindex="-1"
      data-patch="${row * columns + column}"><span class="mv-mark" aria-hidden="true"></span></div>`;
    const line = (row) => html`<div role="row" class="mv-row">${[...Array(columns).keys()].map((column) => cell(row, column))}</div>`;
    fillBox(this.box, html`
      <div class="mv-canvas" data-part="photo" style="--columns:${columns};--rows:${rows};--aspect:${columns / rows}">
        <img class="mv-picture" data-part="image" alt="" draggable="false"><canvas data-part="contours" aria-hidden="true"></canvas>
        <div class="mv-grid mv-detail" role="grid" aria-label="Patches of ${pictureTitle(view)}, ${rows} rows and ${columns} columns"
          aria-rowcount="${rows}" aria-colcount="${columns}">${[...Array(rows).keys()].map(line)}</div>
      </div>`);
    const cells = /** @type {NodeListOf<HTMLElement>} */ (this.box.querySelectorAll(".mv-cell"));
    return [...cells];
  }

  /** Colours, numbers and spoken labels of all patches: on a change of layer or colouring. */
  colour() {
    const { state, view } = this;
    const layer = view.layers[state.layer];
    // A scale in one colour is read more easily on a grey image.
    this.box.firstElementChild?.classList.toggle("mv-grey", ["reads", "rests"].includes(state.mode));
    this.box.firstElementChild?.classList.toggle("mv-contoured", state.mode === "regions"); // colours and numbers are there, unseen
    const looks = patchLooks(state, view, layer);
    this.cells.forEach((cell, patch) => {
      const look = looks[patch];
      const mark = /** @type {HTMLElement} */ (cell.firstElementChild);
      cell.style.backgroundColor = rgba(look.colour, look.alpha);
      cell.classList.toggle("mv-hatched", Boolean(look.hatched));
      cell.classList.toggle("mv-faint", Boolean(look.faint));
      mark.textContent = look.text;
      mark.classList.toggle("mv-number", look.chip === null);
      mark.style.background = look.chip === null ? "" : look.colour;
      mark.style.color = look.chip === null ? "" : inkOn(look.colour);
      cell.setAttribute("aria-label", describePatch(view, layer, patch));
    });
  }

  /** The image under the patches: the original if it is here, or the model's input. */
  picture() {
    const { source, sharp } = underlay(this.state, this.view);
    const picture = /** @type {HTMLImageElement} */ (this.box.querySelector(".mv-picture"));
    if (picture.getAttribute("src") !== source) picture.src = source;
    picture.alt = `${pictureTitle(this.view)}${sharp ? "" : ", as the model sees it"}`;
    picture.classList.toggle("mv-sharp", sharp);
  }

  /** Outline of the pinned and the hovered patch, and the one place in the grid that Tab reaches. */
  outline() {
    const { patch: pinned, hover } = this.state;
    this.cells.forEach((cell, patch) => {
      cell.classList.toggle("mv-pinned", patch === pinned);
      cell.classList.toggle("mv-hover", patch === hover);
      cell.setAttribute("aria-selected", String(patch === pinned));
      cell.tabIndex = patch === (pinned ?? 0) ? 0 : -1;
    });
  }

  /** @param {number} patch */
  focusPatch(patch) { this.cells[patch]?.focus({ preventScroll: true }); }
}

/** @param {View} given */
export function pictureTitle({ picture: { label, name } }) {
  return label && !name.startsWith(label) ? `${label}, ${name}` : name;
}

/** The experts of a patch in each layer. @param {View} view @param {number} patch */
const wayOf = ({ layers }, patch) => layers.map(({ name, experts, num_experts: count }) => html`<span class="mv-way">${name}
  ${experts[patch].slice(0, 2).map((expert) => chip(expert, count))}${!experts[patch].length && "–"}</span>`);

/**
 * Which patch it is, its first expert, and how sure the router was.
 * @param {HTMLElement} box @param {ViewState} state
 */
export function drawWhere(box, state) {
  const { view, currentLayer: layer, shown: patch, highlight } = state;
  if (patch === null) {
    return fillBox(box, html`<p class="mv-note">Point at a patch, click to pin it. Arrow keys move, <kbd>Esc</kbd> lets go.</p>`);
  }
  const [row, column] = rowColumn(patch, view.model.grid[1]);
  const [first] = layer.experts[patch];
  const nobody = first === undefined;
  const bits = Math.log2(layer.num_experts);
  const of = fixed(bits, Number.isInteger(bits) ? 0 : 1);
  const mark = nobody ? html`<span class="mv-chip mv-big mv-none">–</span>`
    : pickButton(layer, first, highlight, chip(first, layer.num_experts, "mv-big"), "where");
  return fillBox(box, html`<p class="mv-where">${mark}
    <span><b>${nobody ? `${layer.name}: no expert` : layerExpert(layer, first)}</b><br>
      <span class="mv-soft">row ${row}, column ${column}</span></span>
    ${layer.learned && !layer.past && html`<span class="mv-facts">${term("margin", "margin")}
      <b>${fixed(layer.margin[patch], layer.kind === "soft" ? 3 : 2)}</b> ${term("entropy", "entropy")}
      <b>${fixed(layer.entropy[patch])}</b> of ${of} bits</span>`}</p>
    ${view.layers.length > 1 && html`<p class="mv-note">${wayOf(view, patch)}</p>`}
    <p class="mv-note">Attention has mixed the whole image into it: no expert answers to these pixels alone.</p>`);
}

/** @param {HTMLElement} box @param {ViewState} state */
export function drawLegend(box, state) {
  const { mode, currentLayer: layer } = state;
  const experts = layer.num_experts;
  const ramp = (low, high) => html`<span class="mv-ramp" aria-hidden="true"></span><span>${low} – ${high}</span>`;
  const pick = (_, expert) => pickButton(layer, expert, state.highlight, chip(expert, experts), `chip-${expert}`);
  const chips = () => Array.from({ length: experts }, pick);
  const key = {
    regions: chips,
    expert: chips,
    entropy: () => ramp("0", `${fixed(Math.log2(experts), 1)} bits`),
    rests: () => shareEnds(present(state.view.shares)),
    reads: () => html`${chips()} ${ramp(...readEnds(readShares(layer, state.highlight)).map((share) => `${fixed(share)} ×`))}`,
  }[mode]();
  fillBox(box, html`<div class="mv-legend-key">${key}</div><span class="mv-legend-hint">${legendHint(state)}</span>`);
}

/** @param {ViewState} state */
function legendHint(state) {
  const lit = litExpert(state, state.view, state.currentLayer);
  if (lit !== null && state.mode === "expert") return `only patches of ${layerExpert(state.currentLayer, lit)} are coloured, stronger where its weight is higher`;
  return modeHint(state.view, state.currentLayer, state.mode);
}

// The photo and the experts that share it: patches fly into boxes, one for each expert; a click takes an expert away.

import { effectOf } from "./core_effect.js";
import { expertShares, isAway, patchWeights, plural, strongest } from "./core_kinds.js";
import { boxPlaces, firstExperts, paintBox, paintRegions, patchOf } from "./core_mosaic.js";
import { brush, chip, expertColour, fillBox, html, Markup, percent, present } from "./core_util.js";
import { headlineOf, otherModel, PATCH, sentenceOf } from "./core_words.js";
/** @import { Core } from "./core.js" */
/** @import { Layer, Opening, View } from "./types.js" */

const FLIGHT_MS = 900;
const SPREAD_MS = 1100; // from the first patch that leaves to the last one
const SHORT_MS = 500; // of patches whose expert is taken away
const still = () => matchMedia("(prefers-reduced-motion: reduce)").matches;
const smooth = (share) => share * share * (3 - 2 * share);

/** A patch on its way, in CSS pixels of the section: from and to are [x, y, side]. */
/** @typedef {{ patch: number, from: number[], to: number[], start: number, ms: number }} Flight */

/** The places that `Flow` fills. */
export const flowParts = {
  head: html`<div class="mv-flow-head"><div data-box="head"></div><div data-box="choices"></div></div>`,
  badge: html`<p class="mv-flow-badge" data-box="badge" hidden></p>`,
  bar: html`<div class="mv-flow-bar"><button type="button" class="mv-button" data-action="fly" data-key="fly">Replay</button>
    <div class="mv-flow-answer" data-box="answer"></div></div>`,
  boxes: html`<div data-box="boxes"></div><div class="mv-flow-say" role="status" data-box="said"></div>`,
  air: html`<canvas class="mv-flow-air" data-box="air" data-part="air" aria-hidden="true" hidden></canvas>`,
};

export class Flow {
  /** @param {Core} core @param {Opening} opening what the page around it adds */
  constructor(core, opening) {
    this.core = core;
    this.opening = opening;
    this.drawn = ""; // image, grid and layer that are drawn
    this.box = core.box("flow");
    /** @type {number | null} the expert that is pointed at */
    this.pointed = null;
    /** @type {(number | null)[]} of what is drawn: the first expert of each patch */
    this.first = [];
    /** @type {number[][]} [E][P] how strongly each expert's box shows each patch */
    this.opacity = [];
    /** @type {Set<number>} patches in the air */
    this.flying = new Set();
    this.veil = 1; // how much of the contours is there
    this.turn = Symbol("none");
    this.listen();
  }

  /** @returns {any} */
  get image() { return this.box.querySelector(".mv-picture"); }
  /** @returns {any} */
  get photo() { return this.box.querySelector(".mv-canvas"); }
  get view() { return this.core.state.view; }
  get layer() { return this.core.state.currentLayer; }
  /** The expert whose part stands out: the one that is pointed at, else the one in the hand. */
  get lit() {
    const { highlight } = this.core.state;
    return this.pointed ?? (this.first.includes(highlight) ? highlight : null);
  }

  /** @returns {HTMLElement[]} */
  boxes() { return [...this.box.querySelectorAll(".mv-flow-box")].map((one) => /** @type {HTMLElement} */ (one)); }

  listen() {
    const { box } = this;
    box.addEventListener("pointermove", (event) => this.point(event));
    box.addEventListener("pointerleave", () => this.light(null));
    box.addEventListener("focusin", (event) => this.light(boxOf(event.target)));
    box.addEventListener("focusout", () => this.light(null));
    box.addEventListener("click", (event) => {
      const target = /** @type {HTMLElement} */ (event.target);
      const expert = this.expertAt(event);
      if (expert !== null && !target.closest(".mv-cell")) this.opening.take(this.layer.layer, expert); // a cell is pinned
    });
    new ResizeObserver(() => this.core.state && this.image && this.paint()).observe(box);
  }

  /** @param {PointerEvent} event */
  point(event) { if (event.pointerType !== "touch") this.light(boxOf(event.target) ?? this.expertAt(event)); }

  /** The first expert of the patch under the pointer. @param {MouseEvent} event */
  expertAt(event) {
    const { core } = this;
    const photo = /** @type {HTMLElement} */ (event.target).closest?.(".mv-canvas");
    if (!photo || !core.state || core.state.mode !== "regions") return null;
    const { left, top, width, height } = photo.getBoundingClientRect();
    const [rows, columns] = this.view.model.grid;
    const row = Math.floor(((event.clientY - top) / height) * rows);
    const column = Math.floor(((event.clientX - left) / width) * columns);
    return this.first[row * columns + column] ?? null;
  }

  /** Fade everything but one expert's part, if it has one. @param {number | null} wanted */
  light(wanted) {
    const expert = this.first.includes(wanted) ? wanted : null;
    if (expert === this.pointed) return;
    this.pointed = expert;
    this.boxes().forEach((one) => one.classList.toggle("mv-lit", Number(one.dataset.expert) === expert));
    this.paint();
  }

  // ---- drawing ----------------------------------------------------------------------------------------------------

  /**
   * All of it. Patches fly where the same image is routed anew; at the first sight of the page all of them do.
   * @param {boolean} [first]
   */
  async draw(first = false) {
    const { view, layer, opening, core } = this;
    const turn = (this.turn = Symbol("drawn"));
    core.box("air").hidden = true; // what flew until now flies no more
    const drawn = [view.picture.src, view.model.grid, layer.name].join();
    const before = this.drawn === drawn ? this.places() : null;
    const was = this.first;
    this.first = firstExperts(layer);
    this.opacity = [...Array(layer.num_experts).keys()].map((expert) => opacityIn(layer, expert));
    Object.assign(this, { drawn, pointed: null });
    fillBox(core.box("boxes"), boxesOf(opening, view, layer));
    fillBox(core.box("choices"), opening.choices(view)); // not again in `tell`: somebody may be typing there
    this.tell();
    fillBox(core.box("layer"), layerChoice(view, layer));
    const changed = [...this.first.keys()].filter((patch) => this.first[patch] !== was[patch]);
    const moved = before ? changed.filter((patch) => before[patch]) : [];
    Object.assign(this, { flying: new Set(still() ? [] : moved), veil: 1 });
    if (before) this.paint(); // the same image is there at once: nothing blinks
    await this.load();
    if (this.turn !== turn) return undefined; // drawn anew meanwhile
    if (first && !still()) return this.play();
    if (!before || still()) return undefined;
    const to = this.places();
    const flight = (patch) => ({ patch, from: present(before[patch]), to: present(to[patch]), start: 0, ms: SHORT_MS });
    return this.fly(moved.filter((patch) => to[patch]).map(flight));
  }

  /** The words around the picture, again when more is known: what as much at random did, or what was said before. */
  tell() {
    const { view, layer, opening, core } = this;
    const headline = headlineOf(view, layer, opening.usual, opening.thing);
    const told = html`<h1 style="--letters:${headline.length}">${headline}</h1>`;
    fillBox(core.box("head"), html`${told}<p>${sentenceOf(view, layer, opening.unit)}</p>`);
    const badge = core.box("badge");
    badge.hidden = !view.settings.away?.length;
    fillBox(badge, badgeOf(view, opening.usual));
    fillBox(core.box("answer"), answerOf(view, opening));
    fillBox(core.box("said"), opening.said(view));
    this.dots();
  }

  /** The answers after moves at random, on the bar of the class. */
  dots() {
    const effect = effectOf(this.view);
    if (!effect?.control) return;
    const rows = [...this.core.box("answer").querySelectorAll("li")];
    const bar = rows.find(({ dataset }) => dataset.class === effect.target)?.querySelector(".mv-bar");
    const at = (delta) => html`<em style="left:${100 * (effect.before[0].p + delta)}%"></em>`;
    effect.control.delta_ps.forEach((delta) => bar?.insertAdjacentHTML("beforeend", String(at(delta))));
  }

  /** Paint when the image is there; it may come in more pixels later. */
  async load() {
    await this.image?.decode().catch(() => null); // another image came between
    this.paint();
  }

  /** Where each patch lies in its first expert's box, in CSS pixels of the section: [x, y, side]; null without one. */
  places() {
    const home = this.box.getBoundingClientRect();
    const { grid } = this.view.model;
    const corner = (one) => present(one.querySelector("canvas")).getBoundingClientRect();
    const corners = new Map(this.boxes().map((one) => [Number(one.dataset.expert), corner(one)]));
    return this.first.map((expert, patch) => {
      const box = expert === null ? undefined : corners.get(expert);
      if (!box) return null;
      const [x, y, side] = boxPlaces(patch, grid, box.width);
      return [box.left - home.left + x, box.top - home.top + y, side];
    });
  }

  /** Contours over the photo, and in each box what its expert computes, without the patches that are in the air. */
  paint() {
    const { core, image, layer, flying } = this;
    if (!image?.naturalWidth) return;
    const { grid } = this.view.model;
    const scale = devicePixelRatio || 1;
    const paper = getComputedStyle(this.box).getPropertyValue("--bg").trim();
    const contours = /** @type {HTMLCanvasElement} */ (this.photo.querySelector("canvas"));
    const width = contours.clientWidth * scale;
    Object.assign(contours, { width, height: (width * grid[0]) / grid[1] }); // which also clears it
    contours.style.opacity = String(this.veil);
    if (core.state.mode === "regions") {
      paintRegions(brush(contours), layer, this.first, grid, { side: width / grid[1], unit: scale, lit: this.lit, paper });
    }
    this.boxes().forEach((one) => {
      const canvas = /** @type {HTMLCanvasElement} */ (one.querySelector("canvas"));
      const side = Math.round(canvas.clientWidth * scale);
      Object.assign(canvas, { width: side, height: Math.round((side * grid[0]) / grid[1]) });
      const opacity = this.opacity[Number(one.dataset.expert)].map((part, patch) => (flying.has(patch) ? 0 : part));
      paintBox(brush(canvas), image, opacity, grid, paper);
    });
  }

  // ---- flying -----------------------------------------------------------------------------------------------------

  /** All patches lift off the photo, the top left first. */
  play() {
    const [home, photo] = [this.box, this.photo].map((one) => one.getBoundingClientRect());
    const [rows, columns] = this.view.model.grid;
    const side = photo.width / columns;
    /** @type {Flight[]} */
    const flights = [];
    this.places().forEach((to, patch) => {
      if (!to) return;
      const [row, column] = [Math.floor(patch / columns), patch % columns];
      const start = SPREAD_MS * (0.75 * (row / rows) + 0.25 * (column / columns));
      const from = [photo.left - home.left + column * side, photo.top - home.top + row * side, side];
      flights.push({ patch, from, to, start, ms: FLIGHT_MS });
    });
    this.veil = 0;
    return this.fly(flights);
  }

  /** @param {Flight[]} flights */
  async fly(flights) {
    const turn = (this.turn = Symbol("flight"));
    const { image } = this;
    const air = /** @type {any} */ (this.core.box("air"));
    if (!flights.length || !image.naturalWidth) return this.land();
    const { grid } = this.view.model;
    const scale = Math.min(2, devicePixelRatio || 1);
    Object.assign(air, { width: this.box.clientWidth * scale, height: this.box.clientHeight * scale, hidden: false });
    const context = brush(air);
    const last = Math.max(...flights.map(({ start, ms }) => start + ms));
    const opening = this.veil < 1;
    this.flying = new Set(flights.map(({ patch }) => patch));
    this.paint();
    const begun = performance.now();
    for (let now = 0; now < last; now = performance.now() - begun) {
      context.clearRect(0, 0, air.width, air.height);
      let landed = false;
      flights.forEach(({ patch, from, to, start, ms }) => {
        const share = (now - start) / ms;
        if (share >= 1) { landed = this.flying.delete(patch) || landed; return; }
        if (share < 0) return;
        const part = smooth(share);
        const [x, y, side] = from.map((value, axis) => scale * (value + (to[axis] - value) * part));
        const lift = Math.sin(Math.PI * share) * 26 * scale;
        context.drawImage(image, ...patchOf(image, patch, grid), x, y - lift, side, side);
      });
      if (opening) {
        this.veil = Math.max(0, (now / last - 0.55) / 0.45);
        this.photo.querySelector("canvas").style.opacity = String(this.veil);
      }
      if (landed) this.paint();
      await new Promise(requestAnimationFrame);
      if (this.turn !== turn) return undefined;
    }
    return this.land();
  }

  land() {
    Object.assign(this, { flying: new Set(), veil: 1 });
    this.core.box("air").hidden = true;
    this.paint();
  }
}

/** @param {EventTarget | null} target */
function boxOf(target) {
  const one = /** @type {HTMLElement | null} */ (/** @type {HTMLElement} */ (target).closest?.(".mv-flow-box"));
  return one ? Number(one.dataset.expert) : null;
}

// ---- the answer -----------------------------------------------------------------------------------------------------

/** Before and after, on the photo. @param {View} view @param {Opening["usual"]} usual */
function badgeOf({ prediction: { moe: [best] } }, usual) {
  const words = (guess) => html`${guess.class} <span class="mv-num">${percent(guess.p)}</span>`;
  return html`${usual && html`<s>${words(usual)}</s> `}<b>${words(best)}</b>`;
}

/**
 * The likeliest class, and what the model said with all experts, else the next; outside frames all of an own image.
 * @param {View} view @param {Opening} opening
 */
function answerOf(view, { usual, able, thing }) {
  const { picture: { label }, prediction: { moe } } = view;
  const [best, ...others] = moe;
  const second = others.find((one) => one.class === usual?.class) ?? others[0];
  const rows = label === null && able ? moe : [best, second].filter(Boolean);
  const mark = html`<span title="its label" aria-label=", its label"> ✓</span>`;
  const row = ({ class: name, p }) => html`<li data-class="${name}"><span>${name}${name === label && mark}</span>
    <i class="mv-bar mv-accent"><i style="width:${100 * p}%"></i></i><b class="mv-num">${percent(p)}</b></li>`;
  const which = view.model.variant !== "trained" ? `${view.model.variant} ` : otherModel(view) && "changed ";
  const most = thing === "page" && "most are"; // of many emoji
  return html`<p>The ${which}model ${view.moment ? "said" : "says"} ${most}</p>
    <ul class="${rows.length > 2 && "mv-flow-all"}">${rows.map(row)}</ul>`;
}

/** @param {View} view @param {Layer} layer */
function layerChoice(view, layer) {
  const selected = (name) => new Markup(name === layer.name ? "selected" : "");
  const option = ({ name }, index) => html`<option value="${index}" ${selected(name)}>${name}</option>`;
  return view.layers.length > 1 && html`<label class="mv-flow-layer">Layer
    <select data-change="flow-layer" data-key="flow-layer">${view.layers.map(option)}</select></label>`;
}

// ---- the boxes ------------------------------------------------------------------------------------------------------

/** How strongly the box of an expert shows the patches for which it is a later choice. */
const LATER = 0.42;

/**
 * [P] how strongly an expert's box shows each patch: 1 where it is the first choice, less where it is a later one;
 * where every patch takes from all experts (Soft MoE), as much as it takes.
 * @param {Layer} layer @param {number} expert
 */
export function opacityIn(layer, expert) {
  const most = strongest(layer).high;
  return firstExperts(layer).map((first, patch) => {
    const weight = patchWeights(layer, patch)[expert];
    if (layer.kind === "soft") return weight / most;
    return first === expert ? 1 : weight > 0 ? LATER : 0;
  });
}

/** @param {Opening} opening @param {View} view @param {Layer} layer */
function boxesOf(opening, view, layer) {
  const { num_experts: experts } = layer;
  const across = experts > 8 ? 8 : Math.min(4, experts);
  const [rows, columns] = view.model.grid;
  const boxes = [...Array(experts).keys()].map((expert) => oneBox(opening, view, layer, expert));
  return html`<div class="mv-flow-boxes ${experts > 8 && "mv-many"}" style="--across:${across};--aspect:${columns / rows}"
    role="group" aria-label="Experts of ${layer.name}">${boxes}</div>`;
}

/** @param {Opening} opening @param {View} view @param {Layer} layer @param {number} expert */
function oneBox(opening, view, layer, expert) {
  const gone = isAway(view.settings.away, layer.layer, expert);
  const [amount, also] = gone ? ["away", ""] : amountOf(layer, expert, opening.unit ?? PATCH);
  const idle = !gone && layer.kind !== "soft" && layer.counts[expert] === 0;
  const name = opening.nameOf?.(layer.layer, expert);
  const words = [`Expert ${expert}: ${amount}`, also, name].filter(Boolean).join(", ");
  const click = opening.able && `. ${gone ? "Put it back" : "Take it away"}`;
  return html`<button type="button" class="mv-flow-box" data-action="take" data-expert="${expert}" data-key="flow-${expert}"
    style="--own:${expertColour(expert, layer.num_experts)}" aria-label="${words}${click}"
    ${opening.able && html`aria-pressed="${gone}"`} ${idle && new Markup("disabled")}><canvas aria-hidden="true"></canvas>
    <span>${chip(expert, layer.num_experts, "mv-box-chip")}<small>${name && html`<b>${name}</b>`}
      <span data-part="amount">${amount}</span>${also && html`<em>${also}</em>`}</small></span></button>`;
}

/**
 * How much an expert computes, and what else it does less of.
 * @param {Layer} layer @param {number} expert @param {[string, string]} unit
 */
export function amountOf(layer, expert, unit) {
  if (layer.kind === "soft") return [percent(expertShares(layer)[expert]), "of the output"];
  const first = firstExperts(layer).filter((mine) => mine === expert).length;
  const later = layer.counts[expert] - first;
  const rank = layer.kind === "token_choice" && layer.top_k === 2 ? "second choice" : "also";
  if (layer.route_by === "image") return [first ? "this image" : later ? "second" : "none", ""];
  const also = later > 0 && `${rank} for ${later}`;
  return first ? [plural(first, ...unit), also] : [also || "none", ""];
}

// The opening: the patches of a photo fly to the networks that compute them, and a click takes a network away.

import { answerWords, controlWords, effectOf } from "./app_hand.js";
import { changedWords } from "./core_answer.js";
import { capital } from "./core_kinds.js";
import { firstExperts, mosaicPlaces, paintRegions, patchOf } from "./core_mosaic.js";
import { underlay } from "./core_stage.js";
import { brush, chip, expertColour, fillBox, html, Markup, percent, pictureSource, present } from "./core_util.js";
/** @import { BootModel, Effect, FlowHost, Layer, View, Wish } from "./types.js" */

const FLIGHT_MS = 900;
const SPREAD_MS = 1100; // from the first patch that leaves to the last one
const SHORT_MS = 500; // of patches whose network is taken away
const THUMBS = 2;
const NUMBERS = "no one two three four five six seven eight nine ten eleven twelve".split(" ");
export const PAST_WORDS = "Recorded of this moment are its routes and answers. Only the trained model can be changed.";
/** @param {number} count */
const numberWord = (count) => NUMBERS[count] ?? String(count);
const still = () => matchMedia("(prefers-reduced-motion: reduce)").matches;
const smooth = (share) => share * share * (3 - 2 * share);

/** A patch on its way, in CSS pixels of the section: from and to are [x, y, side]. */
/** @typedef {{ patch: number, from: number[], to: number[], start: number, ms: number }} Flight */

export class Flow {
  /** @param {FlowHost} app */
  constructor(app) {
    this.app = app;
    this.picture = this.grid = this.shown = ""; // what is drawn: image, grid, layer
    this.box = app.core.box("flow");
    /** @type {number | null} the expert that is pointed at */
    this.lit = null;
    /** @type {(number | null)[]} of what is drawn: the network of each patch */
    this.first = [];
    /** @type {Set<number>} patches in the air */
    this.away = new Set();
    this.veil = 1; // how much of the contours is there
    this.turn = Symbol("none");
    this.listen();
  }

  /** @param {string} name @returns {any} */
  part(name) { return this.box.querySelector(`[data-part="${name}"]`); }

  /** @returns {HTMLElement[]} */
  boxes() { return [...this.box.querySelectorAll(".mv-flow-box")].map((one) => /** @type {HTMLElement} */ (one)); }

  get view() { return present(this.app.state).view; }
  get layer() { return present(this.app.state).currentLayer; }

  listen() {
    const { box } = this;
    box.addEventListener("pointermove", (event) => this.point(event));
    box.addEventListener("pointerleave", () => this.light(null));
    box.addEventListener("focusin", (event) => this.light(boxOf(event.target)));
    box.addEventListener("focusout", () => this.light(null));
    box.addEventListener("click", (event) => {
      const expert = this.expertAt(event);
      if (expert !== null && /** @type {HTMLElement} */ (event.target).closest("[data-part=photo]")) this.app.toggleAway(this.layer.layer, expert);
    });
    new ResizeObserver(() => this.app.state && this.part("photo") && this.paint()).observe(box);
  }

  /** @param {PointerEvent} event */
  point(event) { if (event.pointerType !== "touch") this.light(boxOf(event.target) ?? this.expertAt(event)); }

  /** The network of the patch under the pointer. @param {MouseEvent} event */
  expertAt(event) {
    const photo = /** @type {HTMLElement} */ (event.target).closest?.("[data-part=photo]");
    if (!photo || !this.app.state) return null;
    const { left, top, width, height } = photo.getBoundingClientRect();
    const [rows, columns] = this.view.model.grid;
    const [row, column] = [Math.floor(((event.clientY - top) / height) * rows), Math.floor(((event.clientX - left) / width) * columns)];
    return this.first[row * columns + column] ?? null;
  }

  /** Fade everything but one network's part, if it has one. @param {number | null} wanted */
  light(wanted) {
    const expert = this.first.includes(wanted) ? wanted : null;
    if (expert === this.lit) return;
    this.lit = expert;
    this.boxes().forEach((one) => one.classList.toggle("mv-lit", Number(one.dataset.expert) === expert));
    this.paint();
  }

  // ---- drawing ----------------------------------------------------------------------------------------------------

  /**
   * All of it. Patches fly where the same image is routed anew; at the first sight of the page all of them do.
   * @param {boolean} [opening]
   */
  async draw(opening = false) {
    const { view, layer, app } = this;
    const turn = (this.turn = Symbol("drawn"));
    const same = this.picture === view.picture.src && this.grid === String(view.model.grid) && this.shown === layer.name;
    const before = same ? this.places() : null;
    const was = this.first;
    this.first = firstExperts(layer);
    Object.assign(this, { picture: view.picture.src, grid: String(view.model.grid), shown: layer.name, lit: null });
    fillBox(this.box, layout(app, view, layer, this.first));
    fillBox(app.core.box("layer"), layerChoice(view, layer));
    this.dots(effectOf(view));
    const moved = before ? this.first.map((expert, patch) => (expert === was[patch] ? -1 : patch)).filter((patch) => patch >= 0 && before[patch]) : [];
    Object.assign(this, { away: new Set(still() ? [] : moved), veil: 1 });
    if (before) this.paint(); // the same image is there at once: nothing blinks
    app.tellRoute?.(view);
    await this.load();
    if (this.turn !== turn) return undefined; // drawn anew meanwhile
    if (opening && !still()) return this.play();
    if (!before || still()) return undefined;
    const to = this.places();
    return this.fly(moved.filter((patch) => to[patch]).map((patch) => ({ patch, from: present(before[patch]), to: present(to[patch]), start: 0, ms: SHORT_MS })));
  }

  /** What one network less did was measured meanwhile, beside the same number of patches moved at random. */
  tell() {
    fillBox(this.part("said"), say(this.app, this.view));
    this.dots(effectOf(this.view));
  }

  /** The answers after moves at random, on the bar of the class. @param {Effect | null} effect */
  dots(effect) {
    const rows = [...this.box.querySelectorAll(".mv-flow-answer li")];
    const bar = rows.find((row) => present(row.firstElementChild).textContent === effect?.target)?.querySelector(".mv-bar");
    const at = (delta) => html`<em style="left:${100 * (present(effect).before[0].p + delta)}%"></em>`;
    effect?.control?.delta_ps.forEach((delta) => bar?.insertAdjacentHTML("beforeend", String(at(delta))));
  }

  /** The image, which may be there in more pixels by now. */
  async load() {
    const image = this.part("image");
    if (!image) return;
    const { source, sharp } = underlay(present(this.app.state), this.view);
    if (image.getAttribute("src") !== source) image.src = source;
    image.classList.toggle("mv-sharp", sharp);
    await image.decode().catch(() => null); // another image came between
    this.paint();
  }

  /** Where each patch lies among the networks, in CSS pixels of the section: [x, y, side]; null without one. */
  places() {
    const home = this.box.getBoundingClientRect();
    /** @type {(number[] | null)[]} */
    const places = this.first.map(() => null);
    this.each((canvas, patches) => {
      const { left, top, width, height } = canvas.getBoundingClientRect();
      mosaicPlaces(patches.length, height / width).forEach(([x, y, side], place) => {
        places[patches[place]] = [left - home.left + x * width, top - home.top + y * width, side * width];
      });
    });
    return places;
  }

  /** @param {(canvas: HTMLCanvasElement, patches: number[]) => void} job for each network's mosaic */
  each(job) {
    this.boxes().forEach((one) => {
      const expert = Number(one.dataset.expert);
      const patches = this.first.map((mine, patch) => (mine === expert ? patch : -1)).filter((patch) => patch >= 0);
      job(/** @type {HTMLCanvasElement} */ (one.querySelector("canvas")), patches);
    });
  }

  /** Contours and mosaics, without the patches that are in the air. */
  paint() {
    const [image, canvas] = [this.part("image"), this.part("contours")];
    if (!image?.naturalWidth) return;
    const { view, layer } = this;
    const { grid } = view.model;
    const scale = devicePixelRatio || 1;
    const width = canvas.clientWidth * scale;
    Object.assign(canvas, { width, height: (width * grid[0]) / grid[1] });
    const context = brush(canvas);
    context.globalAlpha = 1;
    canvas.style.opacity = String(this.veil);
    const paper = getComputedStyle(this.box).getPropertyValue("--bg").trim();
    paintRegions(context, layer, this.first, grid, { side: width / grid[1], unit: scale, lit: this.lit, paper });
    this.each((mosaic, patches) => {
      const side = mosaic.clientWidth * scale;
      Object.assign(mosaic, { width: side, height: mosaic.clientHeight * scale });
      const tile = brush(mosaic);
      mosaicPlaces(patches.length, mosaic.clientHeight / mosaic.clientWidth).forEach(([x, y, part], place) => {
        const gap = Math.round(Math.min(scale, part * side * 0.06 + 0.4)); // whole pixels: else some lines vanish
        const [left, top, right, bottom] = [x, y, x + part, y + part].map((edge) => Math.round(edge * side));
        if (!this.away.has(patches[place])) tile.drawImage(image, ...patchOf(image, patches[place], grid), left, top, right - left - gap, bottom - top - gap);
      });
    });
  }

  // ---- flying -----------------------------------------------------------------------------------------------------

  /** All patches lift off the photo, the top left first. */
  play() {
    const [home, photo] = [this.box, this.part("photo")].map((one) => one.getBoundingClientRect());
    const [rows, columns] = this.view.model.grid;
    const side = photo.width / columns;
    /** @type {Flight[]} */
    const flights = [];
    this.places().forEach((to, patch) => {
      if (!to) return;
      const [row, column] = [Math.floor(patch / columns), patch % columns];
      const start = SPREAD_MS * (0.75 * (row / rows) + 0.25 * (column / columns));
      flights.push({ patch, from: [photo.left - home.left + column * side, photo.top - home.top + row * side, side], to, start, ms: FLIGHT_MS });
    });
    this.veil = 0;
    return this.fly(flights);
  }

  /** @param {Flight[]} flights */
  async fly(flights) {
    const turn = (this.turn = Symbol("flight"));
    const [image, air] = [this.part("image"), this.part("air")];
    if (!flights.length || !image.naturalWidth) return this.land();
    const { grid } = this.view.model;
    const scale = Math.min(2, devicePixelRatio || 1);
    Object.assign(air, { width: this.box.clientWidth * scale, height: this.box.clientHeight * scale, hidden: false });
    const context = brush(air);
    const last = Math.max(...flights.map(({ start, ms }) => start + ms));
    const opening = this.veil < 1;
    this.away = new Set(flights.map(({ patch }) => patch));
    this.paint();
    const begun = performance.now();
    for (let now = 0; now < last; now = performance.now() - begun) {
      context.clearRect(0, 0, air.width, air.height);
      let landed = false;
      flights.forEach(({ patch, from, to, start, ms }) => {
        const share = (now - start) / ms;
        if (share >= 1) { landed = this.away.delete(patch) || landed; return; }
        if (share < 0) return;
        const part = smooth(share);
        const [x, y, side] = from.map((value, axis) => scale * (value + (to[axis] - value) * part));
        const lift = Math.sin(Math.PI * share) * 26 * scale;
        context.drawImage(image, ...patchOf(image, patch, grid), x, y - lift, side, side);
      });
      if (opening) {
        this.veil = Math.max(0, (now / last - 0.55) / 0.45);
        this.part("contours").style.opacity = String(this.veil);
      }
      if (landed) this.paint();
      await new Promise(requestAnimationFrame);
      if (this.turn !== turn) return undefined;
    }
    return this.land();
  }

  land() {
    Object.assign(this, { away: new Set(), veil: 1 });
    const air = this.part("air");
    if (air) air.hidden = true;
    this.paint();
  }
}

/** @param {EventTarget | null} target */
function boxOf(target) {
  const one = /** @type {HTMLElement | null} */ (/** @type {HTMLElement} */ (target).closest?.(".mv-flow-box"));
  return one && !/** @type {HTMLButtonElement} */ (one).disabled ? Number(one.dataset.expert) : null;
}

// ---- what stands there ----------------------------------------------------------------------------------------------

/** @param {FlowHost} app @param {View} view @param {Layer} layer @param {(number | null)[]} first */
function layout(app, view, layer, first) {
  const [rows, columns] = view.model.grid;
  const what = view.picture.label ?? "photo";
  return html`
    <div class="mv-flow-head"><div><h1>${headlineOf(view, layer)}</h1><p>${sentence(layer, rows * columns)}</p></div>
      ${app.asker && html`<div class="mv-flow-pick" role="group" aria-label="Photo">${thumbs(app)}
        <button type="button" class="mv-button" data-action="choose" data-key="flow-choose">Your photo</button></div>`}</div>
    <div class="mv-flow-row">
      <div class="mv-flow-left"><div class="mv-flow-photo" data-part="photo" style="--aspect:${columns / rows}"><img data-part="image" alt="${what}, ${rows} × ${columns} patches" src="${pictureSource(view.picture.src)}"
          draggable="false"><canvas data-part="contours" aria-hidden="true"></canvas></div>
        <div class="mv-flow-bar"><button type="button" class="mv-primary" data-action="fly" data-key="fly">Replay</button>${answer(view, app.usual)}</div></div>
      <div class="mv-flow-right"><div class="mv-flow-boxes" style="--across:${Math.min(4, layer.num_experts)}" role="group" aria-label="Networks of ${layer.name}">${[...Array(layer.num_experts).keys()].map((expert) => oneBox(app, layer, expert, first))}</div>
        <div class="mv-flow-say" role="status" data-part="said">${say(app, view)}</div><div data-part="route" aria-live="polite"></div></div></div>
    <canvas class="mv-flow-air" data-part="air" aria-hidden="true" hidden></canvas>`;
}

/** @param {View} view @param {Layer} layer */
export const headlineOf = ({ picture: { label } }, { num_experts: experts, route_by: unit }) =>
  `${unit === "image" ? `One of ${numberWord(experts)} small networks gets` : `${capital(numberWord(experts))} small networks share`} this ${oneOf(label)}.`;

/** "cat"; "image" where a class is of many, such as "smileys". @param {string | null} label */
const oneOf = (label) => (/s$/.test(label ?? "") ? "image" : label ?? "photo");

/** @param {Layer} layer @param {number} patches */
function sentence({ kind, top_k: k, route_by: unit }, patches) {
  if (unit === "image") return `A router sends the whole image to ${k === 1 ? "one expert" : `${numberWord(k)} experts; boxes show the first`}.`;
  if (kind === "soft") return `Each of ${patches} squares takes something from all; you see who gives it most.`;
  if (kind === "expert_choice") return `Each picks some of ${patches} squares; you see who weighs most.`;
  return `A router sends each of ${patches} squares to ${k === 1 ? "one expert" : `${numberWord(k)} experts; boxes show the first`}.`;
}

/** Other photos; the one that is shown is no choice. @param {FlowHost} app */
function thumbs({ picture, own, model: { examples } }) {
  const mine = own.slice(0, 1).map(({ id, name, data }) => ({ action: "own", id: String(id), name, thumb: data, on: picture.own === id }));
  const labels = [...new Set(examples.map(({ label }) => label))];
  const first = labels.map((label) => present(examples.find((one) => one.label === label)));
  const known = [...new Set([...first, ...examples])].map(({ id, name, label, thumb }) => ({
    action: "example", id, name: label ? `${label}, ${name}` : name, thumb, on: picture.id === id }));
  return [...mine, ...known].slice(0, THUMBS).map(({ action, id, name, thumb, on }) => html`<button type="button"
    data-action="${action}" data-id="${id}" data-key="flow-${action}-${id}" aria-pressed="${on}" ${on && new Markup("disabled")}
    aria-label="${name}"><img src="${pictureSource(thumb)}" alt=""></button>`);
}

/**
 * The likeliest class, and beside it what the model said with all networks, else the next one.
 * @param {View} view @param {string | null} usual
 */
function answer(view, usual) {
  const [best, ...others] = view.prediction.moe;
  const second = others.find(({ class: name }) => name === usual) ?? others[0];
  const rows = view.picture.label === null ? view.prediction.moe : [best, second].filter(Boolean); // of an own image all classes
  const row = ({ class: name, p }) => html`<li><span>${name}</span><i class="mv-bar mv-accent"><i style="width:${100 * p}%"></i></i><b class="mv-num">${percent(p)}</b></li>`;
  const which = view.model.variant !== "trained" ? `${view.model.variant} ` : otherModel(view) && "changed ";
  return html`<div class="mv-flow-answer"><p>The ${which}model ${view.moment ? "said" : "says"}</p><ul class="${rows.length > 2 && "mv-flow-all"}">${rows.map(row)}</ul></div>`;
}

/** What a link or the details made of the trained model, but for networks that are away. @param {View} view */
function otherModel(view) {
  const { model: { variant, accuracy_text: known }, settings: { intervention, noise, off_reason: off } } = view;
  const words = [variant !== "trained" && `${capital(known)}.`, intervention && changedWords(view), off,
    typeof noise === "number" && "The routers draw noise, as in training."];
  return words.filter(Boolean).join(" ");
}

/** @param {View} view @param {Layer} layer */
const layerChoice = (view, layer) => view.layers.length > 1 && html`<label class="mv-flow-layer">Layer <select data-change="flow-layer" data-key="flow-layer">${view.layers.map(({ name }, index) => html`<option
  value="${index}" ${new Markup(name === layer.name ? "selected" : "")}>${name}</option>`)}</select></label>`;

/** @param {FlowHost} app @param {Layer} layer @param {number} expert @param {(number | null)[]} first */
function oneBox(app, layer, expert, first) {
  const count = first.filter((mine) => mine === expert).length;
  const gone = isAway(app, layer.layer, expert);
  const able = app.asker && !app.state?.view.moment;
  return html`<button type="button" class="mv-flow-box" data-action="take" data-expert="${expert}" data-key="flow-${expert}" style="--own:${expertColour(expert, layer.num_experts)}"
    ${able && html`aria-pressed="${gone}"`} ${!count && !gone && new Markup("disabled")} aria-label="Network ${expert}: ${count} patches${able && `. ${gone ? "Put it back" : "Take it away"}`}">
    <span>${chip(expert, layer.num_experts, "mv-box-chip")}<small>${gone ? "away" : count || "none"}</small></span><canvas aria-hidden="true"></canvas></button>`;
}

// ---- the door to everything below -------------------------------------------------------------------------------

const DOOR_KEY = "moevision.door";
/** What only the details show: a link that names it opens them. */
export const BEHIND = ["variant", "picture2", "step", "expert", "patch", "mode", "slot", "k", "capacity", "noise", "do", "tab", "list", "class", "level"];

/** Private windows may refuse storage; then it lasts as long as the page. */
export const doorMemory = {
  read() { try { return localStorage.getItem(DOOR_KEY) !== null; } catch { return false; } },
  /** @param {boolean} open */
  keep(open) { try { if (open) localStorage.setItem(DOOR_KEY, "open"); else localStorage.removeItem(DOOR_KEY); } catch { /* nothing to keep it in */ } },
};

/** @param {Wish} wish */
export const opensDoor = (wish) => BEHIND.some((key) => wish[key] !== undefined);

// ---- networks that are away -------------------------------------------------------------------------------------

/** @param {FlowHost} app @param {number} layer @param {number} expert */
export const isAway = (app, layer, expert) => app.away.some(([where, which]) => where === layer && which === expert);

/** @param {FlowHost} app @param {View} view */
function say(app, view) {
  const control = effectOf(view);
  if (!app.asker) return "";
  const trained = (action) => html`<button type="button" class="mv-button" data-action="${action}"
    data-key="said-${action}">Show the trained model</button>`;
  if (view.moment) return html`<p>${PAST_WORDS}</p>${trained("to-trained")}`;
  const { length: gone } = view.settings.away ?? [];
  const special = otherModel(view);
  const best = view.prediction.moe[0].class;
  const usual = app.usual ?? best;
  const { label, unlike } = view.picture;
  const [other] = app.model.class_names.length === 2 ? app.model.class_names.filter((name) => name !== usual) : ["something else"];
  if (special && !gone) return html`<p><b>${special}</b></p>${trained("as-is")}`;
  if (unlike && !gone) return html`<p>${unlike}</p>`;
  const change = label ? `this ${oneOf(label)} becomes ${article(other)}` : "the answer changes";
  if (!gone) return html`<p>Click a box to take it away: how many before ${change}?</p>
    ${tellingCase(app) && html`<button type="button" class="mv-button" data-action="matters" data-key="matters">Take away one that matters</button>`}`;
  const words = best === usual ? `still ${best}` : `now ${best}`;
  const told = control ? answerWords(control) : `${words}, ${percent(view.prediction.moe[0].p)}`;
  return html`<p>${special && `${special} `}<b>${gone} ${gone === 1 ? "network" : "networks"} away: ${told}.</b>${control && html` <span class="mv-soft">${controlWords(control).replaceAll(" %", "\u00a0%")}.</span>`}</p>
    <button type="button" class="mv-button" data-action="put-back" data-key="put-back">Put all back</button>`;
}

/** The case in which one network less changes the answer most: of this model, else of the next that has one.
 * @param {FlowHost} app */
export const tellingCase = ({ model, boot }) => [model, ...boot.models].find(({ card }) => card.matters);

/** @param {string} word */
const article = (word) => (word === "something else" ? word : `${/^[aeiou]/i.test(word) ? "an" : "a"} ${word}`);

/** Networks that an address takes away, "9.3_9.4", as far as the model has them.
 * @param {string | undefined} word @param {BootModel} model @returns {[number, number][]} */
export function readAway(word, model) {
  const pairs = (word ?? "").split("_").map((one) => one.split(".").map(Number));
  const sound = pairs.filter(([layer, expert]) => expert >= 0 && expert < (model.routers.find((one) => one.layer === layer)?.num_experts ?? 0) && Number.isInteger(expert));
  return /** @type {[number, number][]} */ ([...new Map(sound.map((pair) => [pair.join("."), pair])).values()]);
}

/** @param {[number, number][]} away */
export const awayWord = (away) => (away.length ? away.map((pair) => pair.join(".")).join("_") : null);

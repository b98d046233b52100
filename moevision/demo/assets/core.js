// The shared view: stage, strip, prediction, load and inspector around one ViewState. The app, an exported page and a
// notebook use it alike. Everything here works on what is in the page already: no change of layer, no hover and no
// click asks a server.

import { drawLoads, drawPrediction, drawVerdict } from "./core_answer.js";
import { drawInspector, drawWhere } from "./core_inspector.js";
import { Player } from "./core_play.js";
import { Card } from "./core_card.js";
import { describePatch, MODES, modesOf, routingWords } from "./core_kinds.js";
import { drawLens } from "./core_lens.js";
import { Sheet } from "./core_sheet.js";
import { drawSlots } from "./core_slots.js";
import { drawLegend, drawStrip, frameStrip, hasOriginal, keepOriginal, pictureTitle, Stage } from "./core_stage.js";
import { centrePatch, readPlace, ViewState } from "./core_state.js";
import { Time } from "./core_time.js";
import { clamp, fillBox, html, present, TERMS } from "./core_util.js";
/** @import { Handlers, Moments, TimeSource, View, Wish } from "./types.js" */

/** @param {string} name @param {string} [extra] */
const box = (name, extra = "") => html`<div data-box="${name}" class="mv-box-${name} ${extra}"></div>`;

/** The places that `Core` fills: the stage column and the inspector. The film may stand elsewhere. */
export const coreLayout = (film = box("time")) => html`
  <section class="mv-center" aria-label="Image and routing">
    ${box("verdict")}
    <div class="mv-work">
      <div class="mv-stages">
        <div class="mv-toolbar">${modeSwitch()}
          <label class="mv-check" data-box="as-seen" data-off><input type="checkbox" data-change="as-seen" data-key="as-seen">As the model sees it</label>
          <label class="mv-strength">Overlay <input type="range" min="0" max="100" step="5" data-change="strength" data-key="strength"></label></div>
        <div class="mv-pictures"><div data-box="stage-0"></div><div data-box="stage-1" hidden></div></div>
        ${box("legend")}${box("hand")}${box("slots")}${film}${box("strip")}
      </div>
      <div class="mv-side">${box("prediction")}${box("second")}${box("loads")}${box("lens")}</div>
    </div>
  </section>
  <aside class="mv-inspector" aria-label="Patch inspector"><div class="mv-grip">${box("where")}
    <button type="button" class="mv-button mv-handle" data-action="sheet" aria-expanded="false">Details</button></div>
    ${box("card")}${box("inspector")}${box("similar")}</aside>`;

const modeSwitch = () => html`<div class="mv-switch" role="group" aria-label="Colour by">
  ${Object.entries(MODES).map(([mode, { label }]) => html`<button type="button" data-action="mode" data-mode="${mode}"
    data-key="mode-${mode}">${label}</button>`)}</div>`;

export class Core {
  /**
   * @param root element that holds `coreLayout()`; all listeners sit on it, since what is inside comes and goes.
   * @param state ViewState to draw, or null: then `attach` brings it later, when there is an image.
   */
  constructor(root, state) {
    this.root = root;
    // Without an image there is nothing on the page that could ask for it.
    this.state = /** @type {ViewState} */ (/** @type {any} */ (state));
    /** @type {Stage[]} */
    this.stages = [];
    /** @type {number | null} whose patch is pinned, while the pointer is over another image's */
    this.pinned = null;
    /** @type {TimeSource} where recorded moments of the training come from; whoever has some says so. */
    this.timeSource = { about: () => null, get: () => Promise.reject(new Error("nothing was recorded")) };
    this.player = new Player(root, {
      layers: { ms: 1000, size: () => this.state.view.layers.length, at: () => this.state.layer, go: (index) => this.goToLayer(index) },
      training: { ms: 500, size: () => this.time?.steps.length ?? 0, at: () => this.time?.at ?? 0, go: (place) => this.time?.go(place) },
    });
    this.sheet = new Sheet(root);
    /** @type {Handlers} what a click on `data-action` does. */
    this.actions = this.ownActions();
    /** @type {Handlers} what a field with `data-change` does. */
    this.changes = {
      strength: (input) => this.state.set({ strength: input.value / 100 }),
      "as-seen": (input) => this.state.set({ asSeen: input.checked }),
      moment: (input) => this.time?.slide(input),
    };
    this.listen();
    if (state) this.attach(state);
  }

  /** @param {ViewState} state */
  attach(state) {
    this.state = state;
    this.card = new Card(this.box("card"), state, (text) => this.announce(text), this.changes);
    this.time = new Time(this.box("time"), state, this.timeSource);
    this.drawAll();
    if (state.mode === "slots") this.fetchSlots();
    state.subscribe((changed) => this.update(changed));
  }

  /** @param {string} name @returns {HTMLElement} */
  box(name) { return this.root.querySelector(`[data-box="${name}"]`); }

  ownActions() {
    return {
      layer: (button) => this.goToLayer(Number(button.dataset.index)),
      mode: (button) => this.state.set({ mode: button.dataset.mode }),
      "soft-expert": (button) => this.state.set({ slotExpert: Number(button.dataset.expert) }),
      "soft-side": (button) => this.state.set({ slotSide: button.dataset.side }),
      "soft-slot": (button) => this.state.set({ slot: button.dataset.pick === "all" ? null : Number(button.dataset.pick) }),
      "soft-again": () => { this.state.slotMaps.forget(this.state.view, this.state.currentLayer, this.state.slotExpert); this.fetchSlots(); },
      step: (button) => this.card?.go(Number(button.dataset.step)),
      play: () => this.card?.play(),
      run: (button) => this.player.toggle(button.dataset.row),
      "to-trained": () => this.time?.go(this.time.last),
      sheet: () => this.sheet.open(!this.sheet.isOpen),
      unpin: () => this.state.set({ patch: null }),
      highlight: (button) => {
        const { state } = this;
        const expert = Number(button.dataset.expert);
        if (state.mode === "slots") return state.set({ slotExpert: expert });
        return state.set({ highlight: state.highlight === expert ? null : expert, mode: "expert" });
      },
    };
  }

  listen() {
    const { root } = this;
    root.addEventListener("click", (event) => this.onClick(event));
    // A key that is pressed before anything has the focus comes from the body.
    document.addEventListener("keydown", (event) => (event.target === document.body || root.contains(event.target)) && this.onKey(event));
    root.addEventListener("pointerover", (event) => this.onPoint(event));
    root.addEventListener("pointerleave", () => this.endHover());
    ["input", "change"].forEach((kind) => root.addEventListener(kind, (event) => {
      const field = event.target.closest?.("[data-change]");
      // Sliders follow the hand; everything else waits until the choice is made.
      if (field && kind === (field.dataset.live ?? (field.type === "range" ? "input" : "change"))) {
        this.changes[field.dataset.change]?.(field, event);
      }
    }));
    new Tooltip(root);
  }

  /** @param {any} event */
  onClick(event) {
    const cell = event.target.closest(".mv-cell");
    if (cell) {
      this.pin(Number(cell.dataset.patch), this.slotOf(cell));
      return this.sheet.open(true);
    }
    const target = event.target.closest("[data-action]");
    if (target && !target.disabled) this.actions[target.dataset.action]?.(target, event);
  }

  /** @param {HTMLElement} element */
  slotOf(element) { return Number(/** @type {HTMLElement} */ (element.closest("[data-slot]")).dataset.slot); }

  /** @param {any} event */
  onPoint(event) {
    // A finger has no hover: its tap pins.
    if (event.pointerType === "touch" || !this.state) return;
    const cell = event.target.closest?.(".mv-cell");
    if (!cell) return this.endHover();
    this.pinned ??= this.state.active;
    return this.state.set({ hover: Number(cell.dataset.patch), active: this.slotOf(cell) });
  }

  /** The inspector goes back to the pinned patch, which may be in the other image. */
  endHover() {
    if (!this.state || this.state.hover === null) return;
    this.state.set({ hover: null, active: this.pinned ?? this.state.active });
    this.pinned = null;
  }

  /** @param {any} event */
  onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || !this.state) return;
    const typing = event.target.matches("input:not([type=range]), select, textarea");
    if (!typing && (event.key === "+" || event.key === "=")) return this.stepLayer(1, event);
    if (!typing && (event.key === "-" || event.key === "_")) return this.stepLayer(-1, event);
    if (event.key === "Escape" && this.sheet.isOpen) return this.sheet.open(false);
    const cell = event.target.closest(".mv-cell");
    if (cell) this.onGridKey(event, Number(cell.dataset.patch), this.slotOf(cell));
  }

  /** @param {any} event @param {number} patch @param {number} slot */
  onGridKey(event, patch, slot) {
    const [rows, columns] = this.state.view.model.grid;
    const column = patch % columns;
    const target = {
      ArrowRight: column < columns - 1 ? patch + 1 : patch,
      ArrowLeft: column > 0 ? patch - 1 : patch,
      ArrowDown: patch + columns < rows * columns ? patch + columns : patch,
      ArrowUp: patch >= columns ? patch - columns : patch,
      Home: event.shiftKey ? 0 : patch - column,
      End: event.shiftKey ? rows * columns - 1 : patch - column + columns - 1,
      Enter: patch,
      " ": patch,
    }[event.key];
    if (event.key === "Escape") this.state.set({ patch: null });
    if (target === undefined) return;
    event.preventDefault();
    this.pin(target, slot);
    if (event.key === "Enter" || event.key === " ") this.sheet.open(true);
  }

  /** @param {number} patch @param {number} slot */
  pin(patch, slot) {
    this.pinned = null;
    this.state.set({ patch, active: slot, hover: null });
    this.stages[slot].focusPatch(patch);
    this.announce(describePatch(this.state.view, this.state.currentLayer, patch));
  }

  /** @param {number} step @param {Event} event */
  stepLayer(step, event) {
    event.preventDefault();
    this.goToLayer(clamp(this.state.layer + step, 0, this.state.view.layers.length - 1));
  }

  /** @param {number} index */
  goToLayer(index) {
    this.state.set({ layer: index });
    const { currentLayer: layer, patch, view } = this.state;
    this.announce(`Layer ${layer.name}${patch === null ? "" : `, ${describePatch(view, layer, patch)}`}`);
  }

  /** @param {string} text */
  announce(text) {
    const region = this.root.querySelector("[data-live]");
    if (region) region.textContent = text;
  }

  // ---- drawing ------------------------------------------------------------------------------------------------

  drawAll() {
    const { state } = this;
    this.stages = state.views.map((view, slot) => (this.stages[slot]?.shows(view) ? this.stages[slot].drawAgain() : new Stage(this.box(`stage-${slot}`), state, slot)));
    this.box("stage-1").hidden = state.views.length < 2;
    this.root.classList.toggle("mv-pair", state.views.length > 1);
    drawVerdict(this.box("verdict"), state, "hand" in this.actions);
    drawPrediction(this.box("prediction"), state.views[0]);
    if (state.views[1]) drawPrediction(this.box("second"), state.views[1]);
    else fillBox(this.box("second"), "");
    this.drawStrip();
    drawLens(this.box("lens"), state.view);
    this.time?.draw();
    this.root.classList.toggle("mv-past", state.view.moment !== undefined);
    this.drawLayer();
    this.drawControls();
  }

  /**
   * Where the images lie in a row that is swiped (phones), show this one.
   * @param {number} slot
   */
  bringImage(slot) {
    const stage = this.box(`stage-${slot}`);
    present(stage.parentElement).scrollTo({ left: stage.offsetLeft });
  }

  drawStrip() {
    drawStrip(this.box("strip"), this.state);
    this.player.mark();
  }

  drawLayer() {
    drawLoads(this.box("loads"), this.state);
    drawLegend(this.box("legend"), this.state);
    drawSlots(this.box("slots"), this.state);
    this.drawPatch();
  }

  drawPatch() {
    drawWhere(this.box("where"), this.state);
    this.card?.draw();
    drawInspector(this.box("inspector"), this.state);
  }

  drawControls() {
    const { state, root } = this;
    const modes = modesOf(state.currentLayer);
    root.querySelectorAll("[data-mode]").forEach((button) => {
      button.setAttribute("aria-pressed", String(button.dataset.mode === state.mode));
      button.hidden = !modes.includes(button.dataset.mode);
    });
    this.box("as-seen").toggleAttribute("data-off", !state.views.some(hasOriginal)); // its place is kept: nothing moves
    const slider = root.querySelector("[data-change=strength]");
    if (slider) slider.value = state.strength * 100;
  }

  /** @param {Set<string>} changed */
  update(changed) {
    const { state } = this;
    const has = (...names) => names.some((name) => changed.has(name));
    const slots = has("slotExpert", "slot", "slotSide", "slotsHere");
    if (state.mode === "slots" && (has("views", "active", "layer", "mode", "slotExpert"))) this.fetchSlots();
    if (has("views")) return this.drawAll();
    if (has("layer", "mode", "highlight", "strength") || slots) this.stages.forEach((stage) => stage.colour());
    if (has("asSeen")) this.drawPictures();
    if (has("patch", "hover", "active")) this.stages.forEach((stage) => stage.outline());
    if (has("layer")) {
      frameStrip(this.box("strip"), this.state);
      this.time?.draw();
    }
    if (has("active")) {
      if (!has("hover")) this.bringImage(state.active); // what the pointer passes over moves nothing
      this.drawStrip();
      drawLens(this.box("lens"), state.view);
    }
    if (has("layer", "highlight", "active")) drawLoads(this.box("loads"), this.state);
    if (has("highlight")) drawWhere(this.box("where"), this.state);
    if (has("layer", "mode", "highlight", "active") || slots) drawLegend(this.box("legend"), this.state);
    if (has("layer", "mode", "active") || slots) drawSlots(this.box("slots"), this.state);
    if (has("layer", "patch", "hover", "active", "mode") || slots) this.drawPatch();
    else if (has("step")) this.card?.draw();
    if (has("layer", "mode", "strength")) this.drawControls();
    return undefined;
  }

  /** What lies under the patches, wherever it is shown: when a sharper one came, or the model's input is wanted. */
  drawPictures() {
    this.stages.forEach((stage) => stage.picture());
    this.drawStrip();
    drawInspector(this.box("inspector"), this.state);
    this.drawControls();
  }

  /** Get the slots that are looked at, of every image on the stage; the parts that show them draw when they come. */
  fetchSlots() {
    const { state } = this;
    const { slotMaps: maps, slotExpert: expert } = state;
    if (!maps.ask) return;
    state.views.forEach(async (view) => {
      const layer = view.layers[state.layer];
      if (maps.get(view, layer, expert)) return;
      await maps.need(view, layer, expert);
      state.set({ slotsHere: state.slotsHere + 1 });
    });
  }
}

/** Explanations of terms: one floating box, shown on hover and focus, gone on Escape. */
class Tooltip {
  /** @param {HTMLElement} root */
  constructor(root) {
    this.root = root;
    this.bubble = document.createElement("div");
    this.bubble.className = "mv-tip";
    this.bubble.setAttribute("role", "tooltip");
    this.bubble.hidden = true;
    root.append(this.bubble);
    const follow = (event) => this.show(event.target.closest?.(".mv-term, [data-tip]"));
    root.addEventListener("pointerover", follow);
    root.addEventListener("focusin", follow);
    root.addEventListener("focusout", () => this.show(null));
    root.addEventListener("pointerleave", () => this.show(null));
    document.addEventListener("keydown", (event) => event.key === "Escape" && this.show(null));
  }

  /** @param {HTMLElement | null} target */
  show(target) {
    this.bubble.hidden = !target;
    if (!target) return;
    this.bubble.textContent = target.dataset.tip ?? TERMS[target.dataset.term];
    const at = target.getBoundingClientRect();
    const home = this.root.getBoundingClientRect();
    const width = Math.min(300, home.width - 16);
    this.bubble.style.width = `${width}px`;
    this.bubble.style.left = `${clamp(at.left - home.left, 8, Math.max(8, home.width - width - 8))}px`;
    const above = at.bottom + this.bubble.offsetHeight + 12 > window.innerHeight;
    this.bubble.style.top = `${above ? at.top - home.top - this.bubble.offsetHeight - 6 : at.bottom - home.top + 6}px`;
  }
}

/**
 * A page of one view without a server: export and notebook.
 * @param {HTMLElement} root @param {View} view @param {Moments | null} moments of the training, where they were recorded
 */
export function startStatic(root, view, moments) {
  // In a notebook's frame there is less room, and its height is fixed.
  root.classList.toggle("mv-framed", window.self !== window.top);
  const about = [view.model.title, view.model.accuracy_text, ...routingWords(view.layers).map(([where, words]) => `${where}: ${words}`)];
  root.innerHTML = String(html`<header class="mv-header"><h1>Routing of ${pictureTitle(view)}</h1>
      <p class="mv-soft">${about.filter(Boolean).join(" · ")}</p></header>
    <div class="mv-columns mv-static">${coreLayout()}</div>
    <p class="mv-note mv-footnote">Routing shows which expert computes a patch. It doesn't show what attention or the residual path
      contribute, nor what caused the prediction. Schema ${view.schema}.</p>
    <div class="mv-hidden" aria-live="polite" data-live></div>`);
  if (view.picture.sharp) keepOriginal(view, view.picture.sharp);
  const core = new Core(root, null);
  if (moments) core.timeSource = { about: () => moments, get: () => Promise.resolve(moments) };
  core.attach(new ViewState(view, placeAsked(view)));
  const openMoment = () => core.time?.open(Number(addressed().step ?? core.time.steps.at(-1)));
  openMoment();
  addEventListener("hashchange", () => {
    core.state.set(placeAsked(view));
    openMoment();
  });
  return core;
}

/**
 * What an exported page is asked for behind the #, in the words of the explorer's links: #layer=9&expert=L9.E3&step=0.
 * @returns {Wish}
 */
const addressed = () => Object.fromEntries(new URLSearchParams(location.hash.slice(1)));

/** @param {View} view */
const placeAsked = (view) => readPlace({ patch: String(centrePatch(view)), ...addressed() }, view);

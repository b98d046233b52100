// The explorer's view: photo, boxes, and what is said about them, around one ViewState. The app, a saved page, a notebook
// and the Gradio frame use it alike. Everything here works on what is in the page already: no change of layer, no hover
// and no click asks a server.

import { drawPrediction } from "./core_answer.js";
import { Card } from "./core_card.js";
import { Flow, flowParts } from "./core_flow.js";
import { describePatch, MODES, modesIn, routingWords } from "./core_kinds.js";
import { drawLegend, drawWhere, hasOriginal, keepOriginal, pictureTitle, Stage } from "./core_stage.js";
import { centrePatch, readPlace, ViewState } from "./core_state.js";
import { Time } from "./core_time.js";
import { clamp, html, TERMS } from "./core_util.js";
import { otherModel } from "./core_words.js";
/** @import { Handlers, Moments, Opening, TimeSource, View, Wish } from "./types.js" */

/** @param {string} name */
const box = (name) => html`<div data-box="${name}" class="mv-box-${name}"></div>`;

/** The places that `Core` fills: photo and boxes, and the details, which are seen where the root has the class mv-open. */
export const coreLayout = () => html`
  <section class="mv-flow" aria-label="Where the patches go" data-box="flow">${flowParts.head}
    <div class="mv-flow-row">
      <div class="mv-flow-left"><div class="mv-flow-photo"><div data-box="stage"></div>${flowParts.badge}</div>${flowParts.bar}
        <div class="mv-detail"><div class="mv-toolbar">${modeSwitch()}
          <label class="mv-check" data-box="as-seen" data-off><input type="checkbox" data-change="as-seen" data-key="as-seen">As the model sees it</label></div>
        ${box("legend")}${box("where")}${box("hand")}</div></div>
      <div class="mv-flow-right">${flowParts.boxes}
        <section class="mv-detail mv-box-time" aria-label="The training" data-box="time"></section>
        <div class="mv-detail mv-side">${box("prediction")}</div></div>
    </div>${flowParts.air}
  </section>`;

/** Where the picture of the computation stands, apart from the rest. */
export const cardLayout = () => html`<section data-box="card" class="mv-box-card" aria-label="How a patch is computed"></section>`;

const modeSwitch = () => html`<div class="mv-switch" role="group" aria-label="Colour by">
  ${Object.entries(MODES).map(([mode, { label }]) => html`<button type="button" data-action="mode" data-mode="${mode}"
    data-key="mode-${mode}">${label}</button>`)}</div>`;

export class Core {
  /**
   * Until `attach` brings a state, there is no image, and nothing on the page that could ask for it.
   * @param {any} root element that holds `coreLayout()`; all listeners sit on it, since what is inside comes and goes.
   * @param {Opening} opening
   */
  constructor(root, opening) {
    this.root = root;
    this.state = /** @type {ViewState} */ (/** @type {any} */ (null));
    this.flow = new Flow(this, opening);
    /** @type {Stage | null} */
    this.stage = null;
    /** @type {TimeSource} where recorded moments of the training come from; whoever has some says so. */
    this.timeSource = { about: () => null, get: () => Promise.reject(new Error("nothing was recorded")) };
    /** @type {Handlers} what a click on `data-action` does. */
    this.actions = this.ownActions();
    /** @type {Handlers} what a field with `data-change` does. */
    this.changes = {
      "as-seen": (input) => this.state.set({ asSeen: input.checked }),
      "flow-layer": (select) => this.state.set({ layer: Number(select.value), highlight: null }),
      moment: (input) => this.time?.slide(input),
    };
    this.listen();
  }

  /** @param {ViewState} state */
  attach(state) {
    this.state = state;
    this.card = new Card(this.box("card"), state, this.changes);
    this.time = new Time(this.box("time"), state, this.timeSource);
    this.drawAll();
    this.flow.draw(true);
    state.subscribe((changed) => this.update(changed));
  }

  /** @param {string} name @returns {HTMLElement} */
  box(name) { return this.root.querySelector(`[data-box="${name}"]`); }

  ownActions() {
    return {
      mode: (button) => this.state.set({ mode: button.dataset.mode }),
      fly: () => this.flow.play(),
      run: () => this.time?.play(),
      "to-trained": () => this.time?.go(this.time.last),
      highlight: (button) => {
        const { state } = this;
        const expert = Number(button.dataset.expert);
        const mode = ["reads", "regions"].includes(state.mode) ? state.mode : "expert";
        state.set({ highlight: state.highlight === expert ? null : expert, mode });
      },
    };
  }

  listen() {
    const { root } = this;
    root.addEventListener("click", (event) => this.onClick(event));
    // A key that is pressed before anything has the focus comes from the body.
    document.addEventListener("keydown", (event) => (event.target === document.body || root.contains(event.target)) && this.onKey(event));
    root.addEventListener("pointerover", (event) => this.onPoint(event));
    root.addEventListener("pointerleave", () => this.state?.set({ hover: null })); // back to the pinned patch
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
    if (cell) return this.pin(Number(cell.dataset.patch));
    const target = event.target.closest("[data-action]");
    return target && !target.disabled ? this.actions[target.dataset.action]?.(target, event) : undefined;
  }

  /** @param {any} event */
  onPoint(event) {
    // A finger has no hover: its tap pins.
    if (event.pointerType === "touch" || !this.state) return;
    const cell = event.target.closest?.(".mv-cell");
    this.state.set({ hover: cell ? Number(cell.dataset.patch) : null });
  }

  /** @param {any} event */
  onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || !this.state) return;
    const typing = event.target.matches("input:not([type=range]), select, textarea");
    if (!typing && (event.key === "+" || event.key === "=")) return this.stepLayer(1, event);
    if (!typing && (event.key === "-" || event.key === "_")) return this.stepLayer(-1, event);
    const cell = event.target.closest(".mv-cell");
    if (cell) this.onGridKey(event, Number(cell.dataset.patch));
  }

  /** @param {any} event @param {number} patch */
  onGridKey(event, patch) {
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
    this.pin(target);
  }

  /** @param {number} patch */
  pin(patch) {
    this.state.set({ patch, hover: null });
    this.stage?.focusPatch(patch);
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
    this.stage = this.stage?.shows(state.view) ? this.stage.drawAgain() : new Stage(this.box("stage"), state);
    drawPrediction(this.box("prediction"), state.view);
    this.time?.draw();
    this.root.classList.toggle("mv-past", state.view.moment !== undefined);
    this.drawLayer();
    this.drawControls();
  }

  drawLayer() {
    drawLegend(this.box("legend"), this.state);
    this.drawPatch();
  }

  drawPatch() {
    this.card?.draw();
    drawWhere(this.box("where"), this.state);
  }

  drawControls() {
    const { state, root } = this;
    const modes = modesIn(state.view, state.currentLayer);
    root.querySelectorAll("[data-mode]").forEach((button) => {
      button.setAttribute("aria-pressed", String(button.dataset.mode === state.mode));
      button.hidden = !modes.includes(button.dataset.mode);
    });
    this.box("as-seen").toggleAttribute("data-off", !hasOriginal(state.view)); // its place is kept: nothing moves
  }

  /** @param {Set<string>} changed */
  update(changed) {
    const has = (...names) => names.some((name) => changed.has(name));
    if (has("view")) {
      this.drawAll();
      return void this.flow.draw();
    }
    if (has("layer")) this.flow.draw();
    else if (has("mode", "highlight")) this.flow.paint();
    if (has("layer", "mode", "highlight")) this.stage?.colour();
    if (has("asSeen")) this.drawPictures();
    if (has("patch", "hover")) this.stage?.outline();
    if (has("layer")) this.time?.draw();
    if (has("layer", "mode", "highlight")) drawLegend(this.box("legend"), this.state);
    if (has("layer", "patch", "mode")) this.drawPatch();
    else if (has("hover", "highlight")) drawWhere(this.box("where"), this.state); // the sums stay with the pinned patch
    if (has("layer", "mode")) this.drawControls();
    return undefined;
  }

  /** What lies under the patches, wherever it is shown: when a sharper one came, or the model's input is wanted. */
  drawPictures() {
    this.stage?.picture();
    this.flow.load();
    this.drawPatch();
    this.drawControls();
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
 * A page of one view without a server: a saved page or a notebook's, with the details, or a frame of photo and boxes only.
 * @param {HTMLElement} root @param {View} view @param {{ moments?: Moments | null, details?: boolean }} [more]
 *   moments of the training, where they were recorded
 */
export function startStatic(root, view, { moments = null, details = true } = {}) {
  // In a notebook's frame there is less room, and its height is fixed.
  root.classList.toggle("mv-framed", window.self !== window.top);
  root.classList.toggle("mv-open", details);
  const about = [view.model.title, view.model.accuracy_text, ...routingWords(view.layers).map(([where, words]) => `${where}: ${words}`)];
  root.innerHTML = String(html`${coreLayout()}<div class="mv-flow-end" data-box="layer"></div>${cardLayout()}
    ${details && html`<p class="mv-note mv-footnote">${pictureTitle(view)}. ${about.filter(Boolean).join(" · ")}.<br>Routing shows which expert computes a
      patch. It doesn't show what attention or the residual path contribute, nor what caused the prediction. Schema ${view.schema}.</p>`}
    <div class="mv-hidden" aria-live="polite" data-live></div>`);
  if (view.picture.sharp) keepOriginal(view, view.picture.sharp);
  const core = new Core(root, ONLY_LOOKED);
  if (moments) core.timeSource = { about: () => moments, get: () => Promise.resolve(moments) };
  const [[gone] = [null]] = view.settings.away ?? []; // the layer where an expert is away is the one to show
  const layer = gone === null ? null : view.model.layers.indexOf(gone);
  core.attach(new ViewState(view, details ? placeAsked(view) : { layer }));
  if (!details) return core;
  const openMoment = () => core.time?.open(Number(addressed().step ?? core.time.steps.at(-1)));
  openMoment();
  addEventListener("hashchange", () => {
    core.state.set(placeAsked(view));
    openMoment();
  });
  return core;
}

/** Where nobody can route the image again. @type {Opening} */
const ONLY_LOOKED = {
  able: false,
  usual: null,
  take: () => undefined,
  choices: () => "",
  said: (view) => [otherModel(view), view.picture.unlike].filter(Boolean).map((words) => html`<p>${words}</p>`),
};

/**
 * What an exported page is asked for behind the #, in the words of the explorer's links: #layer=9&expert=L9.E3&step=0.
 * @returns {Wish}
 */
const addressed = () => Object.fromEntries(new URLSearchParams(location.hash.slice(1)));

/** @param {View} view */
const placeAsked = (view) => readPlace({ patch: String(centrePatch(view)), ...addressed() }, view);

// The explorer: choices of model, image and settings around the shared view, and the tabs below it.

import { drawHeader, drawRail, drawSettings, limitable, listenForFiles, otherK, railHandlers } from "./app_rail.js";
import { askView, drawHand, handActions, spokenResult } from "./app_hand.js";
import { levelMemory, levelOf } from "./app_level.js";
import { drawQuestion } from "./app_question.js";
import { asAskError, Asker, emptyBox, errorBox, waitingBox } from "./app_server.js";
import { closeMenuByClick, PLACE, readAddress, readIntervention, readNoise, readPlace, shareHandlers, writeAddress } from "./app_share.js";
import { drawSimilar, showSimilar } from "./app_similar.js";
import { Tour, tourMemory } from "./app_tour.js";
import { Core, coreLayout } from "./core.js";
import { keepOriginal, pictureTitle } from "./core_stage.js";
import { centrePatch, ViewState } from "./core_state.js";
import { fillBox, html, percent, present } from "./core_util.js";
import { AboutTab } from "./tab_about.js";
import { ClassesTab } from "./tab_classes.js";
import { CompareTab } from "./tab_compare.js";
import { ExpertsTab } from "./tab_experts.js";
import { WhatIfTab } from "./tab_whatif.js";
/** @import { Boot, Chosen, Intervention, Server, Tab, View, Wish } from "./types.js" */

const TABS = [ExpertsTab, ClassesTab, WhatIfTab, CompareTab, AboutTab];

const appLayout = () => html`
  <header class="mv-header" data-box="header"></header>
  <div class="mv-columns"><nav class="mv-rail" aria-label="Images" data-box="rail"></nav>
    <div class="mv-main" data-box="main"><div class="mv-progress" data-box="progress" hidden><i></i></div>
      <div data-box="trouble"></div><div data-box="blank" hidden></div><div class="mv-view" data-box="view">${coreLayout()}</div></div>
    <section class="mv-settings mv-research" aria-label="Change the routing" data-box="settings"></section></div>
  <section class="mv-below" aria-label="What the experts do" data-box="tabs"><div class="mv-tabs" role="tablist" aria-label="Questions"></div>
    <div class="mv-panel" role="tabpanel" tabindex="0" data-box="panel"></div></section>
  <div class="mv-toast" role="status" data-box="toast" hidden></div>
  <div class="mv-hidden" aria-live="polite" data-live></div>`;

export class App {
  /** @param {HTMLElement} root @param {Asker} asker @param {Boot} boot */
  constructor(root, asker, boot) {
    this.root = root;
    this.asker = asker;
    this.boot = boot;
    this.model = boot.models[0];
    this.variant = this.model.variants[0];
    /** @type {Chosen[]} */
    this.pictures = [{ kind: "none" }];
    /** @type {ViewState | null} */
    this.state = null;
    this.slot = 0;
    this.topK = null;
    this.capacity = null;
    this.noise = null;
    /** @type {Intervention | null} */
    this.intervention = null;
    this.tab = "experts";
    this.level = "simple";
    this.opened = false;
    this.opening = false;
    this.tickets = [0, 0];
    this.place = history.state?.[PLACE] ?? 0;
    this.page = null;
    /** @type {Chosen[][]} */
    this.trail = [];
    root.innerHTML = String(appLayout());
    this.core = new Core(root, null);
    /** @type {number | null} the expert that the page itself highlighted when it opened: nobody's choice yet */
    this.given = null;
    this.swapping = false;
    this.waiting = false;
    /** @type {Tab[]} */
    this.tabs = TABS.map((Tab) => new Tab(this));
    this.connect();
  }

  /** @param {View | undefined} view the first one, which comes with the page */
  async start(view) {
    const wish = readAddress();
    this.choose(wish);
    if (this.level === "simple" && this.isDefault(wish)) this.opening = this.addOther() && wish.expert === undefined;
    this.drawFrame();
    this.drawTabs();
    if (!this.hasPicture()) return this.showBlank();
    // The first view comes with the page, so that nothing has to be asked before something is seen.
    /** @type {Record<number, View>} */
    const ready = view && this.isDefault(wish) ? { 0: view } : {};
    await this.load([...this.pictures.keys()], ready, wish);
    if (!this.state && wish.picture) await this.startElsewhere(wish);
    if (this.state && !tourMemory.seen()) new Tour(this.core);
  }

  /**
   * The image of a link may not be here (another data folder): show the usual first one, and say so.
   * @param {Wish} given
   */
  async startElsewhere({ picture, picture2, ...wish }) {
    this.choose(wish);
    if (!this.hasPicture()) return this.showBlank();
    await this.load([0], {}, wish);
    return this.notify("The link's image isn't on this server; here is another one.");
  }

  /**
   * Take over what the address asks for, as far as this server has it.
   * @param {Wish} wish
   */
  choose(wish) {
    const { models, default: first } = this.boot;
    const find = (id) => models.find((model) => model.id === id);
    this.model = find(wish.model) ?? find(first?.model) ?? models[0];
    this.variant = this.model.variants.find((name) => name === wish.variant) ?? this.model.variants[0];
    // The rail shows a few examples; a link may name any image that the server knows.
    const usual = this.model.examples.find(({ id }) => id === first?.picture) ?? this.model.examples[0];
    const chosen = wish.picture ?? usual?.id;
    this.pictures = [chosen ? { kind: "example", id: chosen } : { kind: "none" }];
    if (wish.picture2) this.pictures.push({ kind: "example", id: wish.picture2 });
    this.level = levelOf(wish, levelMemory.read());
    this.opened ||= wish.tab !== undefined || wish.expert !== undefined;
    const k = Number(wish.k);
    this.topK = Number.isInteger(k) && k >= 1 && k <= this.model.max_top_k ? otherK(this.model, k) : null;
    const capacity = Number(wish.capacity);
    const limited = wish.capacity !== undefined && limitable(this.model).length > 0;
    this.capacity = limited && capacity >= 0.25 && capacity <= 2 ? capacity : null;
    this.noise = readNoise(wish.noise, this.model);
    this.intervention = readIntervention(wish.do, this.model);
    this.tab = this.tabs.find(({ id }) => id === wish.tab)?.id ?? this.tab;
  }

  /** @param {Wish} wish */
  isDefault(wish) {
    const { default: first } = this.boot;
    return this.model.id === first?.model && this.variant === this.model.variants[0] && this.pictures[0].id === first?.picture
      && this.topK === null && this.capacity === null && this.noise === null && this.intervention === null && wish.picture2 === undefined;
  }

  hasPicture() { return this.pictures.every(({ kind }) => kind !== "none"); }

  connect() {
    const rail = railHandlers(this);
    Object.assign(this.core.actions, rail.actions, shareHandlers(this), handActions(this), ...this.tabs.map((tab) => tab.actions ?? {}), {
      tab: (button) => this.openTab(button.dataset.tab),
      retry: () => this.load([...this.pictures.keys()]),
      undo: () => this.change(null),
      level: (button) => this.chooseLevel(button.dataset.level),
      calm: () => this.chooseSettings({ noise: null }),
      redraw: () => this.chooseSettings({ noise: (this.noise ?? 0) + 1 }),
      similar: () => showSimilar(this),
      tour: () => this.state && new Tour(this.core),
    });
    Object.assign(this.core.changes, rail.changes, ...this.tabs.map((tab) => tab.changes ?? {}));
    this.core.changes.noise = (input) => this.chooseSettings({ noise: input.checked ? 1 : null });
    listenForFiles(this, this.root);
    this.root.addEventListener("keydown", (event) => this.onTabKey(event));
    window.addEventListener("popstate", ({ state }) => Number.isInteger(state?.[PLACE]) && this.goTo(state[PLACE]));
    closeMenuByClick(this.root);
  }

  // ---- choices ------------------------------------------------------------------------------------------------

  /**
   * What the server is asked about one of the images.
   * @param {number} slot
   */
  question(slot) {
    const { kind, id, data } = this.pictures[slot];
    const picture = kind === "example" ? { kind, id } : { kind, data };
    return { model: this.model.id, variant: this.variant, picture, top_k: this.topK, capacity: this.capacity, intervention: this.intervention, noise: this.noise };
  }

  /** All of that, as text that can be compared. */
  questions() { return JSON.stringify(this.pictures.map((_, slot) => this.question(slot))); }

  /** @param {Chosen} picture */
  choosePicture(picture) {
    this.pictures[this.slot] = picture;
    return this.load([this.slot]);
  }

  /**
   * Open an image of the model's data, at a patch where one is named.
   * @param {string} id @param {string} [patch]
   */
  async openExample(id, patch) {
    await this.choosePicture({ kind: "example", id });
    if (patch === undefined || !this.state) return;
    this.state.set({ patch: Number(patch) });
    this.core.box("main").scrollIntoView({ block: "start" });
  }

  /** @param {number} count */
  choosePictureCount(count) {
    if (count === this.pictures.length) return undefined;
    if (count === 1) {
      this.pictures.length = 1;
      this.slot = 0;
      this.drawFrame();
      return this.state && this.show([this.state.views[0]], "picture");
    }
    if (!this.addOther()) this.pictures.push({ ...this.pictures[0] });
    this.slot = 1;
    return this.load([1]);
  }

  /** Put an example of another class beside the first image; false where there is none. */
  addOther() {
    const first = this.model.examples.find(({ id }) => id === this.pictures[0].id);
    const label = first ? first.label : this.state?.views[0].picture.label;
    const other = this.model.examples.find((one) => one.id !== this.pictures[0].id && one.label !== label);
    if (other) this.pictures.push({ kind: "example", id: other.id });
    return other !== undefined;
  }

  /** @param {string} level */
  chooseLevel(level) {
    this.level = level;
    levelMemory.keep(level);
    if (level === "simple") this.state?.set({ mode: "expert" });
    this.drawFrame();
    this.drawTabs();
    this.refreshTab(null);
    this.remember();
  }

  /** Simple shows what the experts do when somebody asks for it. */
  get closed() { return this.level === "simple" && !this.opened; }

  /** The expert that a visitor chose, whose page then stands under Experts; null for none. */
  get chosenExpert() { return this.state && this.state.highlight !== this.given ? this.state.highlight : null; }

  /** @param {number} slot */
  chooseSlot(slot) { this.slot = slot; this.drawFrame(); }

  /** @param {string} id */
  chooseModel(id) {
    if (id === this.model.id) return undefined;
    const own = this.pictures.find(({ kind }) => kind === "upload");
    this.choose({ model: id });
    // A visitor's own image goes along; an example belongs to its model.
    if (own) this.pictures = [own];
    this.slot = 0;
    this.drawFrame();
    if (!this.hasPicture()) return this.showBlank();
    return this.load([0], {}, null, "model");
  }

  /** @param {string} variant */
  chooseVariant(variant) {
    this.variant = variant;
    return this.load([...this.pictures.keys()], {}, null, "model");
  }

  /** @param {Partial<App>} change */
  chooseSettings(change) {
    Object.assign(this, change);
    this.drawFrame();
    return this.load([...this.pictures.keys()], {}, null, "settings");
  }

  // ---- views --------------------------------------------------------------------------------------------------

  /**
   * Get the views of some slots and show them; an answer that a newer question has overtaken is dropped.
   * @param {number[]} slots @param {Record<number, View>} [ready] @param {Wish | null} [wish]
   * @param {string} [kind]
   */
  async load(slots, ready = {}, wish = null, kind = "picture") {
    if (!this.hasPicture()) return this.showBlank();
    this.drawFrame();
    slots.forEach((slot) => { this.tickets[slot] += 1; });
    const ticket = [...this.tickets];
    const current = () => slots.every((slot) => ticket[slot] === this.tickets[slot]);
    this.busy(true);
    try {
      const words = (text) => this.notify(text);
      const answers = await Promise.all(slots.map((slot) => ready[slot] ?? askView(this, slot, words)));
      if (!current()) return undefined;
      slots.forEach((slot, place) => { if (this.pictures[slot].data) keepOriginal(answers[place], this.pictures[slot].data); });
      fillBox(this.core.box("trouble"), "");
      const views = this.pictures.map((_, slot) => (slots.includes(slot) ? answers[slots.indexOf(slot)] : present(this.state).views[slot]));
      this.show(views, kind, wish);
    } catch (error) {
      if (current()) fillBox(this.core.box("trouble"), errorBox(asAskError(error), "retry"));
    } finally {
      if (current()) this.busy(false);
    }
    return undefined;
  }

  /**
   * Back and Forward: show what the address says, with the images that were there.
   * @param {number} place
   */
  goTo(place) {
    clearTimeout(this.remembering);
    const wish = readAddress();
    const before = this.questions();
    this.tab = "experts"; // unless the address names another
    this.choose(wish);
    Object.assign(this, { place, page: null, slot: 0, pictures: this.trail[place] ? [...this.trail[place]] : this.pictures });
    this.drawTabs();
    this.drawFrame();
    if (this.state && this.questions() === before) return this.show(this.state.views, null, wish);
    return this.load([...this.pictures.keys()], {}, wish, "model");
  }

  /** @param {View[]} views @param {string | null} kind @param {Wish | null} [wish] */
  show(views, kind, wish = null) {
    if (!views[0]) return;
    this.core.box("blank").hidden = true;
    this.core.box("view").hidden = false;
    const first = this.state === null;
    const start = first || wish ? readPlace(wish ?? {}, views[0]) : {};
    if (!this.state) {
      if (wish?.patch === undefined) start.patch = centrePatch(views[0]);
      this.state = new ViewState(views[0], { views, ...start });
      this.state.slotMaps.ask = (place, number, expert) => this.asker.ask("slots", { ...this.question(place), layer: number, expert });
      this.core.attach(this.state);
      this.state.subscribe((changed) => this.follow(changed));
    } else {
      this.state.set({ views, active: Math.min(this.slot, views.length - 1), ...start });
    }
    drawHand(this);
    drawQuestion(this);
    this.announceResult(views[Math.min(this.slot, views.length - 1)]);
    drawSimilar(this);
    this.remember();
    this.refreshTab(first ? null : kind);
  }

  /** @param {View} view */
  announceResult(view) {
    const best = view.prediction.moe[0];
    this.core.announce(spokenResult(view) ?? `${pictureTitle(view)}: the model sees ${best.class}, ${percent(best.p)}`);
  }

  /** @param {Set<string>} changed */
  follow(changed) {
    if (["patch", "active", "views"].some((name) => changed.has(name))) drawSimilar(this);
    if (["layer", "highlight", "mode"].some((name) => changed.has(name))) drawHand(this);
    if (changed.has("layer") || changed.has("highlight")) drawQuestion(this);
    if (changed.has("highlight") && this.state?.highlight !== this.given) this.given = null;
    if (changed.has("layer")) this.refreshTab("layer");
    else if (changed.has("highlight")) this.refreshTab("highlight");
    if (["layer", "patch", "mode", "highlight", "slotExpert", "slot", "slotSide"].some((name) => changed.has(name))) this.remember();
  }

  /** Write the address a moment later: browsers refuse pages that rewrite it at every key press. */
  remember() {
    clearTimeout(this.remembering);
    this.remembering = setTimeout(() => writeAddress(this), 120);
  }

  /**
   * Change the routing, or undo that.
   * @param {Intervention | null} intervention
   */
  change(intervention) { return this.chooseSettings({ intervention }); }

  showBlank() {
    this.core.box("view").hidden = true;
    this.core.box("blank").hidden = false;
    fillBox(this.core.box("trouble"), "");
    fillBox(this.core.box("blank"), html`<div class="mv-state mv-tall"><p><b>Bring an image</b></p>
      <p class="mv-note">${this.model.title} knows ${this.model.class_names.join(", ")}. Drop a photo anywhere, paste one, or choose a file.</p>
      <button type="button" class="mv-primary" data-action="choose">Choose a file</button></div>`);
    this.refreshTab("model");
    this.remember();
  }

  /** @param {boolean} is */
  busy(is) {
    this.waiting = is;
    if (this.state) drawHand(this);
    const bar = this.core.box("progress");
    bar.hidden = !is;
    this.core.box("main").setAttribute("aria-busy", String(is));
    this.sliding?.cancel();
    if (is && !window.matchMedia("(prefers-reduced-motion: reduce)").matches) {
      this.sliding = present(bar.firstElementChild).animate([{ left: "-30%" }, { left: "100%" }], { duration: 1000, iterations: Infinity });
    }
  }

  drawFrame() {
    this.root.classList.toggle("mv-simple", this.level === "simple");
    drawHeader(this.core.box("header"), this);
    drawRail(this.core.box("rail"), this);
    drawSettings(this.core.box("settings"), this);
  }

  /** @param {string} text */
  notify(text) {
    const toast = this.core.box("toast");
    toast.textContent = text;
    toast.hidden = false;
    clearTimeout(this.toasting);
    this.toasting = setTimeout(() => { toast.hidden = true; }, 4000);
  }

  // ---- tabs ---------------------------------------------------------------------------------------------------

  drawTabs() {
    fillBox(this.root.querySelector(".mv-tabs"), html`${this.tabs.map(({ id, label }) => html`<button type="button" role="tab" id="mv-tab-${id}"
      data-action="tab" data-tab="${id}" data-key="tab-${id}" aria-selected="${id === this.tab && !this.closed}" tabindex="${id === this.tab ? 0 : -1}">${label}</button>`)}`);
    this.core.box("panel").hidden = this.closed;
    this.core.box("panel").setAttribute("aria-labelledby", `mv-tab-${this.tab}`);
  }

  /** @param {any} event */
  onTabKey(event) {
    if (event.target.getAttribute("role") !== "tab") return;
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const index = this.tabs.findIndex(({ id }) => id === this.tab);
    this.openTab(this.tabs[(index + step + this.tabs.length) % this.tabs.length].id);
    /** @type {HTMLElement} */ (this.root.querySelector("[role=tab][aria-selected=true]")).focus();
  }

  /** @param {string} id */
  openTab(id) {
    this.tab = id;
    this.opened = true;
    this.drawTabs();
    this.refreshTab(null);
    this.remember();
  }

  /** @param {number} layer @param {number} expert */
  takeAway(layer, expert) {
    if (!this.state) return undefined;
    this.state.set({ layer: this.model.layers.indexOf(layer), highlight: expert, mode: "expert" });
    this.core.box("main").scrollIntoView({ block: "start" });
    return this.change({ kind: "ablate", layer, expert, fill: "next_best", seed: 0 });
  }

  /**
   * Draw the open tab again if what changed matters to it (null: it was just opened).
   * @param {string | null} kind
   */
  async refreshTab(kind) {
    if (this.closed) return;
    const tab = present(this.tabs.find(({ id }) => id === this.tab));
    if (kind !== null && kind !== "model" && !tab.follows.includes(kind)) return;
    const panel = this.core.box("panel");
    const ticket = (this.panelTicket = Symbol(tab.id));
    const wanted = () => ticket === this.panelTicket;
    if (!this.state && tab.id !== "about") {
      fillBox(panel, this.hasPicture() ? waitingBox("Opening the image…") : emptyBox("No image yet", "This fills when an image is on the stage."));
      return;
    }
    try {
      await tab.draw(panel, wanted);
    } catch (error) {
      if (wanted()) fillBox(panel, errorBox(asAskError(error)));
    }
  }
}

/**
 * Entry of the gradio page. A page that can't even start says so in place of the empty screen.
 * @param {HTMLElement} root @param {any} value @param {Server} server
 */
export async function startApp(root, value, server) {
  try {
    const given = typeof value === "string" ? JSON.parse(value || "{}") : value ?? {};
    const asker = new Asker(server);
    await new App(root, asker, given.boot ?? (await asker.ask("boot", {}))).start(given.view);
  } catch (error) {
    root.innerHTML = String(errorBox(asAskError(error)));
  }
}

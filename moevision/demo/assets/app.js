// The explorer: choices of model, image and settings around the shared view, and the tabs below it.

import { choose, chooseCount } from "./app_choice.js";
import { blankBox, drawHeader, drawRail, drawSettings, railHandlers } from "./app_rail.js";
import { askView, drawHand, handActions, spokenResult } from "./app_hand.js";
import { followAddress, goTo } from "./app_history.js";
import { doorMemory, Flow, isAway, opensDoor, tellingCase } from "./app_flow.js";
import { countShared, drawShared, listenForFiles, ownHandlers, ownMemory } from "./app_own.js";
import { asAskError, Asker, errorBox, server, slide } from "./app_server.js";
import { closeMenuByClick, PLACE, readAddress, shareHandlers, writeAddress } from "./app_share.js";
import { sharpen } from "./app_sharp.js";
import { drawSimilar, showSimilar } from "./app_similar.js";
import { drawPanel, drawTabs, pressTab } from "./app_tabs.js";
import { nextStep, timeSource, trainedViews } from "./app_time.js";
import { Core, coreLayout } from "./core.js";
import { keepOriginal, pictureTitle } from "./core_stage.js";
import { centrePatch, readPlace, ViewState } from "./core_state.js";
import { trainedView } from "./core_time.js";
import { fillBox, html, percent, present } from "./core_util.js";
import { AboutTab } from "./tab_about.js";
import { ClassesTab } from "./tab_classes.js";
import { CompareTab } from "./tab_compare.js";
import { DataTab } from "./tab_data.js";
import { ExpertsTab } from "./tab_experts.js";
import { WhatIfTab } from "./tab_whatif.js";
/** @import { Boot, Chosen, Failure, Intervention, Pending, Shares, Tab, View, Wish } from "./types.js" */

const TABS = [ExpertsTab, ClassesTab, WhatIfTab, CompareTab, DataTab, AboutTab];
/** @type {Pending} */
const NOTHING = { slots: [], kind: null, wish: null };

const appLayout = () => html`
  <div class="mv-progress" data-box="progress" hidden><i></i></div>
  <div data-box="trouble"></div><div data-box="own-error"></div><div data-box="blank" hidden></div>
  <section class="mv-flow" aria-label="Where the patches go" data-box="flow"></section>
  <section class="mv-box-time" aria-label="The training" data-box="time"></section>
  <div class="mv-flow-end"><button type="button" class="mv-button" data-action="door" data-key="door" aria-expanded="false">Look closer</button></div>
  <div class="mv-depth" data-box="depth" hidden>
  <header class="mv-header" data-box="header"></header>
  <div class="mv-columns"><nav class="mv-rail" aria-label="Images" data-box="rail"></nav>
    <div class="mv-main" data-box="main"><div class="mv-view" data-box="view">${coreLayout(html``)}</div></div>
    <section class="mv-settings" aria-label="Change the routing" data-box="settings"></section></div>
  <section class="mv-below" aria-label="What the experts do" data-box="tabs"><div class="mv-tabs" role="tablist" aria-label="Questions"></div>
    <div class="mv-panel" role="tabpanel" tabindex="0" data-box="panel"></div></section></div>
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
    this.own = ownMemory.read();
    this.lastOwn = Math.max(0, ...this.own.map(({ id }) => id));
    /** @type {Shares[] | Error | null} */
    this.shared = null;
    this.counted = "";
    this.slot = 0;
    this.topK = null;
    this.capacity = null;
    this.noise = null;
    /** @type {Intervention | null} */
    this.intervention = null;
    this.tab = "experts";
    /** @type {{ key: string | null, only: string | null }} the list of training images under Data, and its class */
    this.ranked = { key: null, only: null };
    this.door = opensDoor(readAddress()) || doorMemory.read();
    /** @type {[number, number][]} layer and expert of each network that is away */
    this.away = [];
    /** @type {string | null} what the model says when none is */
    this.usual = null;
    this.ticket = 0;
    /** @type {symbol | null} the last question above the image that is counted for */
    this.asking = null;
    /** @type {Pending} what was asked for and isn't shown yet */
    this.pending = NOTHING;
    /** @type {WeakMap<View, ReturnType<App["question"]>>} what the server was asked for each view */
    this.asked = new WeakMap();
    /** @type {symbol | null} */
    this.panelTicket = null;
    this.place = history.state?.[PLACE] ?? 0;
    /** @type {string | null} what this entry of the browser's history shows, as `entryText` has it; null until that is written */
    this.page = null;
    root.innerHTML = String(appLayout());
    this.core = new Core(root, null);
    this.core.timeSource = timeSource(this);
    this.swapping = false;
    this.waiting = false;
    /** @type {Tab[]} */
    this.tabs = TABS.filter((Tab) => Tab !== DataTab || boot.models.some(({ score_lists: lists }) => lists.length)).map((Tab) => new Tab(this));
    this.flow = new Flow(this);
    this.connect();
    this.drawDoor();
  }

  /** @param {View[]} views that come with the page */
  async start(views) {
    await followAddress(this, views);
  }

  /** The page comes with the examples of its first model. */
  async fetchExamples() {
    if (this.boot.whole) return;
    const { models } = await this.asker.ask("boot", {});
    this.boot.models = models.map((model) => (model.id === this.model.id ? this.model : model));
    this.boot.whole = true;
  }

  hasPicture() { return this.pictures.every(({ kind }) => kind !== "none"); }

  connect() {
    const [rail, own] = [railHandlers(this), ownHandlers(this)];
    Object.assign(this.core.actions, rail.actions, own.actions, shareHandlers(this), handActions(this), ...this.tabs.map((tab) => tab.actions ?? {}), {
      tab: (button) => this.openTab(button.dataset.tab),
      retry: () => (this.pending.wish ? followAddress(this) : this.load([...this.pictures.keys()], [], null, "model")),
      undo: () => this.change(null),
      door: () => this.openDoor(!this.door),
      take: (button) => this.toggleAway(present(this.state).currentLayer.layer, Number(button.dataset.expert)),
      "put-back": () => this.chooseSettings({ away: [] }),
      matters: () => this.showStrongest(),
      fly: () => this.flow.play(),
      calm: () => this.chooseSettings({ noise: null }),
      redraw: () => this.chooseSettings({ noise: (this.noise ?? 0) + 1 }),
      similar: () => showSimilar(this),
    });
    Object.assign(this.core.changes, rail.changes, own.changes, ...this.tabs.map((tab) => tab.changes ?? {}));
    // A slider that was in the hand isn't drawn anew; what it chose is, a moment after it was let go.
    this.core.box("settings").addEventListener("change", () => setTimeout(() => this.drawFrame(), 200));
    this.core.changes["flow-layer"] = (select) => this.state?.set({ layer: Number(select.value), highlight: null });
    this.core.changes.noise = (input) => this.chooseSettings({ noise: input.checked ? 1 : null });
    listenForFiles(this, this.root);
    this.root.addEventListener("keydown", (event) => pressTab(this, event));
    window.addEventListener("popstate", ({ state }) => Number.isInteger(state?.[PLACE]) && goTo(this, state[PLACE]));
    closeMenuByClick(this.root);
  }

  // ---- choices ------------------------------------------------------------------------------------------------

  /**
   * What the server is asked about one of the images that are chosen.
   * @param {number} slot
   */
  question(slot) {
    const { kind, id, data } = this.pictures[slot];
    const picture = kind === "example" ? { kind, id } : { kind, data };
    return { ...this.settings(), picture };
  }

  /**
   * What it was asked for a view that is shown. Another image, network or change may be chosen since, and not be here yet.
   * @param {View} view
   */
  questionOf(view) { return present(this.asked.get(trainedView(view))); }

  settings() { return { model: this.model.id, variant: this.variant, top_k: this.topK, capacity: this.capacity, intervention: this.intervention, noise: this.noise, ...(this.away.length && { away: this.away }) }; }

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
    if (patch === undefined || this.state?.view.picture.id !== id) return; // another choice came between, or it failed
    this.state.set({ patch: Number(patch) });
    this.core.box("main").scrollIntoView({ block: "start" });
  }

  /** @param {number} count */
  choosePictureCount(count) { return chooseCount(this, count); }

  /** @param {boolean} open */
  openDoor(open) {
    this.door = open;
    doorMemory.keep(open);
    this.drawDoor();
    this.drawTabs();
    this.refreshTab(null);
    this.remember();
    if (open) this.core.box("depth").scrollIntoView({ block: "start" });
  }

  drawDoor() {
    this.core.box("depth").hidden = !this.door;
    const button = present(this.root.querySelector("[data-action=door]"));
    button.setAttribute("aria-expanded", String(this.door));
    button.textContent = this.door ? "Close the details" : "Look closer";
  }

  /** Nobody is asked about what stands behind a closed door. */
  get closed() { return !this.door; }

  /** @param {number} layer @param {number} expert */
  toggleAway(layer, expert) {
    const others = this.away.filter(([where, which]) => where !== layer || which !== expert);
    return this.chooseSettings({ away: isAway(this, layer, expert) ? others : [...this.away, [layer, expert]] });
  }

  /** First the image as it is, then without the network, so that its patches are seen to move. */
  async showStrongest() {
    const model = present(tellingCase(this));
    const { picture, away } = model.card.matters;
    this.away = [];
    if (model.id !== this.model.id) await this.chooseModel(model.id);
    await this.openExample(picture);
    if (this.state?.view.picture.id !== picture) return; // another choice came between
    present(this.state).set({ layer: model.layers.indexOf(away[0][0]) });
    await this.chooseSettings({ away });
  }

  /** @param {number} slot */
  chooseSlot(slot) {
    this.slot = slot;
    this.drawFrame();
    this.core.bringImage(slot);
  }

  /** @param {string} id */
  async chooseModel(id) {
    if (id === this.model.id) return this.load([]); // in place of another one that is waited for
    const current = this.takeTurn();
    this.busy(true);
    const error = await this.fetchExamples().catch(asAskError);
    if (!current()) return undefined;
    if (error) {
      this.notify(error.message);
      return this.load([]);
    }
    const own = this.pictures.find(({ kind }) => kind === "upload");
    choose(this, { model: id });
    // A visitor's own image goes along; an example belongs to its model.
    if (own) this.pictures = [own];
    this.slot = 0;
    return this.load([0], [], null, "model");
  }

  /** @param {string} variant */
  chooseVariant(variant) {
    this.variant = variant;
    return this.load([...this.pictures.keys()], [], null, "model");
  }

  /** @param {Partial<App>} change */
  chooseSettings(change) {
    Object.assign(this, change);
    this.drawFrame();
    return this.load([...this.pictures.keys()], [], null, "settings");
  }

  // ---- views --------------------------------------------------------------------------------------------------

  /** Whatever is still on its way is wanted no more; the answer tells whether that is true of the caller by now. */
  takeTurn() {
    const ticket = (this.ticket += 1);
    return () => ticket === this.ticket;
  }

  /**
   * Get the views of some slots and show them. A newer question asks again for what an older one still waits for, so
   * that the older one's answer is dropped whole; and for what an older one couldn't get.
   * @param {number[]} wanted @param {(View | undefined)[]} [ready] @param {Wish | null} [wish] of an address that is followed
   * @param {string} [kind]
   * @returns {Promise<string>} "shown", "blank", "late" if another choice came between, or the code of the error on the page
   */
  async load(wanted, ready = [], wish = null, kind = "picture") {
    this.drawFrame();
    if (!this.hasPicture()) return this.showBlank();
    const current = this.takeTurn();
    const slots = [...this.pictures.keys()].filter((slot) => !this.state || wanted.includes(slot) || this.pending.slots.includes(slot));
    const shown = this.pending.kind === "model" ? "model" : kind;
    this.pending = { slots, kind: shown, wish };
    this.busy(true);
    try {
      const words = (text) => this.notify(text);
      const answers = await Promise.all(slots.map((slot) => ready[slot] ?? askView(this, slot, words)));
      if (!current()) return "late";
      slots.forEach((slot, place) => {
        this.asked.set(answers[place], this.question(slot));
        if (this.pictures[slot].data) keepOriginal(answers[place], this.pictures[slot].data);
      });
      fillBox(this.core.box("trouble"), "");
      const views = this.pictures.map((_, slot) => (slots.includes(slot) ? answers[slots.indexOf(slot)] : present(this.state).views[slot]));
      this.show(views, shown, wish);
    } catch (error) {
      return current() ? this.fail(asAskError(error)) : "late";
    }
    this.pending = NOTHING;
    this.busy(false);
    return "shown";
  }

  /**
   * What was asked for stays open: a button tries it again, and so does the next choice.
   * @param {Failure} error
   */
  fail(error) {
    fillBox(this.core.box("trouble"), errorBox(error, "retry"));
    this.busy(false);
    return error.code ?? "page";
  }

  /** @param {View[]} given @param {string | null} kind @param {Wish | null} [wish] */
  show(given, kind, wish = null) {
    if (!given[0]) return;
    const views = trainedViews(given);
    const step = nextStep(this, kind, wish?.step);
    this.showStage(true);
    const first = this.state === null;
    const start = first || wish ? readPlace(wish ?? {}, views[0]) : {};
    if (!views[0].settings.away?.length) this.usual = views[0].prediction.moe[0].class;
    if (!this.state) {
      if (wish?.patch === undefined) start.patch = centrePatch(views[0]);
      this.state = new ViewState(views[0], { views, ...start });
      this.state.slotMaps.ask = (view, number, expert) => this.asker.ask("slots", { ...this.questionOf(view), layer: number, expert });
      this.core.attach(this.state);
      this.state.subscribe((changed) => this.follow(changed));
    } else {
      const other = this.state.view.model.id !== views[0].model.id && { highlight: null };
      this.state.set({ views, active: Math.min(this.slot, views.length - 1), ...other, ...start });
    }
    if (step !== undefined) this.core.time?.open(step);
    sharpen(this, views);
    countShared(this);
    drawHand(this);
    if (first) this.flow.draw(true);
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
    if (["views", "active", "layer"].some((name) => changed.has(name))) this.flow.draw();
    if (changed.has("layer") || changed.has("highlight")) drawShared(this);
    if (changed.has("layer")) this.refreshTab("layer");
    else if (changed.has("highlight")) this.refreshTab("highlight");
    if (["views", "layer", "patch", "mode", "highlight", "slotExpert", "slot", "slotSide"].some((name) => changed.has(name))) this.remember();
  }

  /** Write the address a moment later: browsers refuse pages that rewrite it at every key press. */
  remember() {
    clearTimeout(this.remembering);
    if (!this.pending.wish) this.remembering = setTimeout(() => writeAddress(this), 120);
  }

  /**
   * Change the routing, or undo that.
   * @param {Intervention | null} intervention
   */
  change(intervention) { return this.chooseSettings({ intervention }); }

  showBlank() {
    this.takeTurn(); // no answer that is still on its way may be shown
    this.pending = NOTHING;
    this.busy(false);
    this.showStage(false);
    fillBox(this.core.box("trouble"), "");
    fillBox(this.core.box("blank"), blankBox(this.model));
    this.refreshTab("model");
    this.remember();
    return "blank";
  }

  /** The image and its routing, or what asks for an image. @param {boolean} is */
  showStage(is) {
    this.core.box("blank").hidden = is;
    ["flow", "time", "view"].forEach((name) => { this.core.box(name).hidden = !is; });
  }

  /** @param {boolean} is */
  busy(is) {
    this.waiting = is;
    if (this.state) drawHand(this);
    this.core.box("main").setAttribute("aria-busy", String(is));
    slide(this.core.box("progress"), is);
  }

  drawFrame() {
    drawHeader(this.core.box("header"), this);
    drawRail(this.core.box("rail"), this);
    const settings = this.core.box("settings");
    if (!settings.querySelector("input[type=range]:active")) drawSettings(settings, this); // it stays in the hand
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

  drawTabs() { drawTabs(this); }

  /** @param {string} id */
  openTab(id) {
    this.tab = id;
    this.door = true;
    this.drawDoor();
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

  /** @param {string | null} kind */
  refreshTab(kind) { return drawPanel(this, kind); }
}

/**
 * Entry of the page. A page that can't even start says so in place of the empty screen.
 * @param {HTMLElement} root @param {Boot} boot @param {View[]} views
 */
export async function startApp(root, boot, views) {
  try {
    await new App(root, new Asker(server), boot).start(views);
  } catch (error) {
    root.innerHTML = String(errorBox(asAskError(error)));
  }
}

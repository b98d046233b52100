// The explorer: choices of model, image and settings around the shared view, and the tabs below it.

import { choose, followAddress, goTo, readAddress, writeAddress } from "./app_address.js";
import { server } from "./app_fetch.js";
import { drawHand, handActions, measure, spokenResult } from "./app_hand.js";
import { allExperts, fallOf, isOfEmoji } from "./app_models.js";
import { AppOpening, doorMemory, opensDoor, PAST_WORDS, tellingCase } from "./app_opening.js";
import { listenForFiles, ownHandlers, ownMemory } from "./app_own.js";
import { blankBox, drawFooter, drawHeader, drawRail, drawSettings, railHandlers } from "./app_rail.js";
import { asAskError, Asker, errorBox, slide } from "./app_server.js";
import { closeMenuByClick, shareHandlers } from "./app_share.js";
import { drawSorting, playSorting } from "./app_sorting.js";
import { sharpen, timeSource } from "./app_later.js";
import { drawPanel, drawTabs, pressTab } from "./app_tabs.js";
import { listenForPicker, typedHandlers } from "./app_typed.js";
import { cardLayout, Core, coreLayout } from "./core.js";
import { isAway } from "./core_kinds.js";
import { keepOriginal, pictureTitle } from "./core_stage.js";
import { centrePatch, readPlace, ViewState } from "./core_state.js";
import { trainedView } from "./core_time.js";
import { fillBox, html, percent, present } from "./core_util.js";
import { AboutTab } from "./tab_about.js";
import { ClassesTab } from "./tab_classes.js";
import { ExpertsTab } from "./tab_experts.js";
/** @import { Boot, Chosen, Failure, Intervention, Pending, Tab, View, Wish } from "./types.js" */

const TABS = [ExpertsTab, ClassesTab, AboutTab];
const SERVERLESS = ["ExpertsTab", "AboutTab"];
/** @type {Pending} */
const NOTHING = { open: false, kind: null, wish: null };

const appLayout = () => html`
  <div class="mv-progress" data-box="progress" hidden><i></i></div>
  <div data-box="trouble"></div><div data-box="own-error"></div><div data-box="blank" hidden></div>
  <section class="mv-flow" aria-label="Where photos go" data-box="sorting" hidden></section>
  <div data-box="main">${coreLayout()}</div>
  <div class="mv-flow-end"><button type="button" class="mv-button" data-action="door" data-key="door"
    aria-expanded="false">Look closer</button><span class="mv-detail" data-box="layer"></span></div>
  <div class="mv-depth mv-detail" data-box="depth">
  <header class="mv-header" data-box="header"></header>${cardLayout()}
  <div class="mv-columns"><nav class="mv-rail" aria-label="Images" data-box="rail"></nav>
    <section class="mv-settings" aria-label="Change the routing" data-box="settings"></section></div>
  <section class="mv-below" aria-label="What the experts do" data-box="tabs">
    <div class="mv-tabs" role="tablist" aria-label="Questions"></div>
    <div class="mv-panel" role="tabpanel" tabindex="0" data-box="panel"></div></section></div>
  <footer class="mv-footer" data-box="footer"></footer>
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
    /** @type {Chosen} */
    this.picture = { kind: "none" };
    /** @type {ViewState | null} */
    this.state = null;
    this.own = ownMemory.read();
    this.lastOwn = Math.max(0, ...this.own.map(({ id }) => id));
    this.topK = null;
    this.capacity = null;
    /** @type {Intervention | null} */
    this.intervention = null;
    this.tab = "experts";
    this.door = opensDoor(readAddress()) || doorMemory.read();
    /** @type {[number, number][]} layer and number of each expert that is away */
    this.away = [];
    /** @type {{ fewest: number, most: number } | null} how many emoji a typed page has */
    this.typing = null;
    this.ticket = 0;
    /** @type {Pending} what was asked for and isn't shown yet */
    this.pending = NOTHING;
    /** @type {WeakMap<View, ReturnType<App["question"]>>} what the server was asked for each view */
    this.asked = new WeakMap();
    /** @type {symbol | null} */
    this.panelTicket = null;
    /** @type {string | null} what this entry of the browser's history shows; null until that is written */
    this.page = null;
    this.plain = JSON.stringify(this.settings()); // of the view that comes with the page
    root.innerHTML = String(appLayout());
    root.classList.toggle("mv-embed", new URLSearchParams(location.search).has("embed")); // photo and boxes only
    this.opening = new AppOpening(this);
    this.core = new Core(root, this.opening);
    this.core.timeSource = timeSource(this);
    this.leading = false;
    const able = TABS.filter((Tab) => !boot.device || SERVERLESS.includes(Tab.name));
    /** @type {Tab[]} */
    this.tabs = able.map((Tab) => new Tab(this));
    this.connect();
    this.drawDoor();
  }

  /** The page comes with the examples of its first model. */
  async fetchExamples() {
    if (this.boot.whole) return;
    const { models } = await this.asker.ask("boot", {});
    this.boot.models = models.map((model) => (model.id === this.model.id ? this.model : model));
    this.boot.whole = true;
  }

  connect() {
    const [rail, own, typed] = [railHandlers(this), ownHandlers(this), typedHandlers(this)];
    const { actions, changes } = this.core;
    Object.assign(actions, rail.actions, own.actions, typed.actions, shareHandlers(this), handActions(this), ...this.tabs.map((tab) => tab.actions), {
      tab: (button) => this.openTab(button.dataset.tab),
      model: (button) => this.chooseModel(button.dataset.id),
      retry: () => (this.pending.wish ? followAddress(this) : this.load("model")),
      door: () => this.openDoor(!this.door),
      take: (button) => this.toggleAway(present(this.state).currentLayer.layer, Number(button.dataset.expert)),
      "put-back": () => this.chooseSettings({ away: [] }),
      sort: () => playSorting(this),
      "as-is": () => { // the trained model, routed as it was trained to
        this.variant = this.model.variants[0];
        Object.assign(this, { topK: null, capacity: null, intervention: null });
        return this.load("model");
      },
      fall: () => this.takeFewest(),
      "all-away": () => this.chooseSettings({ away: allExperts(this.model) }),
      matters: () => this.showStrongest(),
    });
    Object.assign(changes, rail.changes, own.changes, typed.changes, ...this.tabs.map((tab) => tab.changes));
    listenForFiles(this, this.root);
    listenForPicker(this);
    this.root.addEventListener("keydown", (event) => pressTab(this, event));
    addEventListener("popstate", () => goTo(this));
    closeMenuByClick(this.root);
  }

  // ---- choices ------------------------------------------------------------------------------------------------

  /** What the server is asked about the image that is chosen. */
  question() {
    const { kind, id, text, data } = this.picture;
    const picture = { example: { kind, id }, page: { kind, text } }[kind] ?? { kind, data };
    return { ...this.settings(), picture };
  }

  /**
   * What it was asked for a view that is shown. Another image, model or change may be chosen since, and not be here yet.
   * @param {View} view
   */
  questionOf(view) { return present(this.asked.get(trainedView(view))); }

  settings() {
    const { variant, capacity, intervention, away } = this;
    const asked = { model: this.model.id, variant, top_k: this.topK, capacity, intervention };
    return { ...asked, ...(away?.length && { away }) };
  }

  /** @param {Chosen} picture */
  choosePicture(picture) {
    this.picture = picture;
    return this.load();
  }

  /** Open an image of the model's data, at a patch where one is named. @param {string} id @param {string} [patch] */
  async openExample(id, patch) {
    await this.choosePicture({ kind: "example", id });
    if (patch === undefined || this.state?.view.picture.id !== id) return; // another choice came between, or it failed
    this.state.set({ patch: Number(patch) });
    this.core.box("main").scrollIntoView({ block: "start" });
  }

  /** @param {boolean} open */
  openDoor(open) {
    this.door = open;
    doorMemory.keep(open);
    this.drawDoor();
    this.drawTabs();
    this.refreshTab(null);
    this.remember();
  }

  drawDoor() {
    this.root.classList.toggle("mv-open", this.door);
    const button = present(this.root.querySelector("[data-action=door]"));
    button.setAttribute("aria-expanded", String(this.door));
    button.textContent = this.door ? "Close the details" : "Look closer";
  }

  /** @param {number} layer @param {number} expert */
  toggleAway(layer, expert) {
    const others = this.away.filter(([where, which]) => where !== layer || which !== expert);
    return this.chooseSettings({ away: isAway(this.away, layer, expert) ? others : [...this.away, [layer, expert]] });
  }

  /** The place of the layer in which the fewest experts change the answer of this example; null where none was found. */
  fallingLayer() {
    const [[layer] = [null]] = (this.opening.falls ?? fallOf(this.model, this.picture.id))?.away ?? [];
    return layer === null ? null : this.model.layers.indexOf(layer);
  }

  /** The fewest experts without which the answer of this example changes, in the layer where they are. */
  takeFewest() {
    const { away } = present(this.opening.falls);
    this.state?.set({ layer: this.fallingLayer(), highlight: null });
    const head = this.core.box("head"); // what comes of it is said there
    if (head.getBoundingClientRect().bottom < 0) head.scrollIntoView({ block: "start" });
    return this.chooseSettings({ away });
  }

  /** First the image as it is, then without the expert, so that its patches are seen to move. */
  async showStrongest() {
    const model = present(tellingCase(this));
    const { model: before } = this;
    const { picture, away } = model.card.matters;
    this.leading = true; // what is seen on the way is no place to come back to
    this.away = [];
    if (this.state) this.state.set({ view: trainedView(this.state.view) });
    if (model.id !== this.model.id) await this.chooseModel(model.id);
    await this.openExample(picture);
    this.leading = false;
    if (this.state?.view.picture.id !== picture) return; // another choice came between
    this.state?.set({ layer: model.layers.indexOf(away[0][0]) });
    await this.chooseSettings({ away });
    this.core.box("main").scrollIntoView({ block: "start" });
    if (model !== before) this.notify(`Another model: ${model.title}.`);
  }

  /** @param {string} id */
  async chooseModel(id) {
    if (id === this.model.id) return this.load("picture", { again: false }); // another one is waited for
    const current = this.takeTurn();
    this.busy(true);
    const error = await this.fetchExamples().catch(asAskError);
    if (!current()) return undefined;
    if (error) {
      this.notify(error.message);
      return this.load("picture", { again: false });
    }
    const { picture } = this;
    choose(this, { model: id });
    // A visitor's own image goes along, if it isn't a page of emoji that is wanted; an example belongs to its model.
    if (picture.kind === "upload" && !isOfEmoji(this.model)) this.picture = picture;
    return this.load("model");
  }

  /** @param {Partial<App>} change */
  chooseSettings(change) {
    if (this.state?.view.moment) { // it would be done to the trained model, which isn't the one that is shown
      this.notify(PAST_WORDS);
      return this.drawFrame();
    }
    Object.assign(this, change);
    return this.load("settings");
  }

  // ---- views --------------------------------------------------------------------------------------------------

  /** Whatever is still on its way is wanted no more; the answer tells whether that is true of the caller by now. */
  takeTurn() {
    const ticket = (this.ticket += 1);
    return () => ticket === this.ticket;
  }

  /**
   * Get the view of what is chosen, and show it. What an older question still waits for is dropped.
   * @param {string} [kind] of what changes by it
   * @param {{ ready?: View, wish?: Wish | null, again?: boolean }} [how] `wish`: of an address; `again`:
   *   also where nothing is waited for
   * @returns {Promise<string>} "shown", "blank", "late" if another choice came between, or the code of an error
   */
  async load(kind = "picture", { ready, wish = null, again = true } = {}) {
    this.drawFrame();
    if (this.picture.kind === "none") return this.showBlank();
    const current = this.takeTurn();
    const kept = again || this.pending.open ? undefined : this.state?.view;
    const shown = this.pending.kind === "model" ? "model" : kind;
    this.pending = { open: true, kind: shown, wish };
    this.busy(true);
    try {
      const question = this.question();
      const view = kept ?? ready ?? await this.asker.ask("route", question, (text) => this.notify(text));
      if (!current()) return "late";
      if (!kept) this.asked.set(trainedView(view), question);
      if (this.picture.data) keepOriginal(view, this.picture.data);
      if (this.picture.kind === "page") keepOriginal(view, view.picture.src); // smooth, as examples
      fillBox(this.core.box("trouble"), "");
      this.show(view, shown, wish);
    } catch (error) {
      return current() ? this.fail(asAskError(error)) : "late";
    }
    this.pending = NOTHING;
    this.busy(false);
    return "shown";
  }

  /** What was asked for stays open: a button tries it again, and so does the next choice. @param {Failure} error */
  fail(error) {
    fillBox(this.core.box("trouble"), errorBox(error, "retry"));
    this.busy(false);
    return error.code ?? "page";
  }

  /** @param {View} given @param {string} kind @param {Wish | null} wish */
  show(given, kind, wish) {
    const view = trainedView(given);
    // The moment to show next: that of a link, or the one that was on the stage when another example was chosen.
    const step = wish?.step ?? (kind === "picture" ? this.state?.view.moment?.step : undefined);
    this.showStage(true);
    const first = this.state === null;
    const start = first || wish ? readPlace(wish ?? {}, view) : {};
    if (first && wish?.layer === undefined && start.layer === null) start.layer = this.fallingLayer();
    this.opening.compare(view);
    if (!this.state) {
      if (wish?.patch === undefined) start.patch = centrePatch(view);
      this.state = new ViewState(view, start);
      this.core.attach(this.state);
      this.state.subscribe((changed) => this.follow(changed));
    } else {
      const other = this.state.view.model.id !== view.model.id && { highlight: null };
      this.state.set({ view, ...other, ...start });
    }
    if (step !== undefined) this.core.time?.open(Number(step));
    drawSorting(this);
    if (first || kind === "model") playSorting(this);
    sharpen(this, view);
    drawHand(this);
    measure(this, view);
    this.opening.search(view);
    this.announceResult(view);
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
    const has = (...names) => names.some((name) => changed.has(name));
    if (has("layer", "highlight")) drawHand(this);
    if (has("layer", "highlight")) this.refreshTab(has("layer") ? "layer" : "highlight");
    if (has("view", "layer", "patch", "mode", "highlight")) this.remember();
  }

  /** Write the address a moment later: browsers refuse pages that rewrite it at every key press. */
  remember() {
    clearTimeout(this.remembering);
    if (!this.pending.wish && !this.leading) this.remembering = setTimeout(() => writeAddress(this), 120);
  }

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
    this.core.box("main").hidden = !is;
  }

  /** @param {boolean} is */
  busy(is) {
    this.core.box("main").setAttribute("aria-busy", String(is));
    slide(this.core.box("progress"), is);
  }

  drawFrame() {
    drawHeader(this.core.box("header"), this);
    drawFooter(this.core.box("footer"), this);
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

  drawTabs() { drawTabs(this); }

  /** @param {string} id */
  openTab(id) {
    this.tab = id;
    this.drawTabs();
    this.refreshTab(null);
    this.remember();
  }

  /** @param {string | null} kind */
  refreshTab(kind) { return drawPanel(this, kind); }
}

/**
 * Entry of the page. A page that can't even start says so in place of the empty screen.
 * @param {HTMLElement} root @param {Boot} boot @param {View[]} views
 */
export async function startApp(root, boot, [view]) {
  try {
    const app = new App(root, new Asker(server), boot);
    const { tab, expert, patch } = readAddress(); // before it is written anew
    await followAddress(app, view);
    if (app.door && (tab || (expert && !patch))) app.core.box("tabs").scrollIntoView(); // a link lands on what it names
  } catch (error) {
    root.innerHTML = String(errorBox(asAskError(error)));
  }
}

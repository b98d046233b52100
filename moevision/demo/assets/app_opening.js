// What the app adds to photo and boxes: other images, one thing to try, and what came of it.

import { classPart } from "./app_hand.js";
import { allExperts, exampleName, fallOf, isOfEmoji } from "./app_models.js";
import { pause } from "./app_server.js";
import { typedField } from "./app_typed.js";
import { answerWords, controlWords, effectOf, effects } from "./core_effect.js";
import { plural } from "./core_kinds.js";
import { html, Markup, percent, pictureSource, present } from "./core_util.js";
import { goneWords, otherModel, PATCH } from "./core_words.js";
/** @import { App } from "./app.js" */
/** @import { BootModel, Guess, Opening, View, Wish } from "./types.js" */

const THUMBS = 3;
export const PAST_WORDS = "Recorded of this moment are its routes and answers. Only the trained model can be changed.";

/** @implements {Opening} */
export class AppOpening {
  /** @param {App} app */
  constructor(app) {
    this.app = app;
    /** @type {{ question: string, guess: Guess } | null} what the model said of an image with all experts */
    this.whole = null;
    /** @type {Map<string, { away: [number, number][] | null }>} by how few experts an answer falls, searched here */
    this.searched = new Map();
    /** @type {Map<string, number>} with how few a visitor changed it */
    this.least = new Map();
  }

  get able() {
    return !this.app.state?.view.moment;
  }
  get usual() {
    return this.whole?.guess ?? null;
  }
  get thing() {
    return isOfEmoji(this.app.model) ? "page" : "image";
  }
  /** @returns {[string, string]} */
  get unit() {
    return isOfEmoji(this.app.model) ? ["emoji", "emoji"] : PATCH;
  }

  /** @param {number} layer @param {number} expert */
  take(layer, expert) {
    return this.app.toggleAway(layer, expert);
  }

  /** What the model says of the image of a view with all experts: said already, or asked for. @param {View} view */
  async compare(view) {
    const { app } = this;
    const { away, ...whole } = app.questionOf(view);
    const question = JSON.stringify(whole);
    if (!away) this.whole = { question, guess: view.prediction.moe[0] };
    if (!away || this.whole?.question === question) return;
    this.whole = null;
    const failed = () => ({ prediction: null }); // the trouble is said where the view is
    const { prediction } = await app.asker.ask("route", whole).catch(failed);
    if (app.state?.view !== view || !prediction) return;
    this.whole = { question, guess: prediction.moe[0] };
    app.core.flow.tell();
  }

  /** By how few experts the answer falls: as the model's card says, else as it was searched; undefined: not known. */
  get falls() {
    const { model, state } = this.app;
    if (state?.view.model.id !== model.id) return undefined;
    return fallOf(model, state.view.picture.id) ?? this.searched.get(imageKey(state.view));
  }

  /** Look for the fewest experts that change the answer for an image of which no card tells. @param {View} view */
  async search(view) {
    const { app } = this;
    if (!app.model.can_search || this.falls || view.moment || otherModel(view)) return;
    const { model, picture } = app.questionOf(view);
    const { ticket } = app;
    await pause(400); // for who looks, not for who clicks on
    if (app.ticket !== ticket) return;
    const found = await app.asker.remember("fewest", { model, picture }).catch(() => null); // without it there is no record
    if (!found) return;
    this.searched.set(imageKey(view), found);
    if (app.state && imageKey(app.state.view) === imageKey(view)) app.core.flow.tell();
  }

  /**
   * "69 % smileys"; "mixed" where the model's experts have counted names and this one has none.
   * @param {number} layer @param {number} expert
   */
  nameOf(layer, expert) {
    const { names } = this.app.model.card;
    if (!names?.length) return null;
    const found = names.find((one) => one.layer === layer && one.expert === expert);
    return found ? `${percent(found.share)} ${found.name}` : "mixed";
  }

  /** Other images: the visitor's own, the model's, and one of another model. */
  choices() {
    const { picture, own, model, boot } = this.app;
    const one = (action, id, name, thumb, on = false) => html`<button type="button" data-action="${action}" data-id="${id}"
      data-key="flow-${action}-${id}" aria-pressed="${on}" ${on && new Markup("disabled")} aria-label="${name}">
      <img src="${pictureSource(thumb)}" alt=""></button>`;
    const mine = own.slice(0, 1).map(({ id, name, data }) => one("own", id, name, data, picture.own === id));
    const labels = [...new Set(model.examples.map(({ label }) => label))];
    const first = labels.map((label) => present(model.examples.find((example) => example.label === label)));
    const shown = model.examples.filter(({ id }) => id === picture.id);
    const inOrder = new Set([...first.slice(0, 1), ...shown, ...first, ...model.examples]);
    const known = [...inOrder].map(({ id, name, label, thumb }) => one("example", id, exampleName(label, name), thumb, picture.id === id));
    const elsewhere = boot.models
      .filter(({ id, examples }) => id !== model.id && examples.length)
      .sort((some, other) => Number(isOfEmoji(other)) - Number(isOfEmoji(some)));
    const another = elsewhere.slice(0, 1).map(({ id, title, examples }) => one("model", id, title, examples[0].thumb));
    const room = THUMBS - another.length - Number(isOfEmoji(model)); // its field takes the place of one
    return html`<div class="mv-flow-pick" role="group" aria-label="Images">${[...mine, ...known].slice(0, room)}${another}
      ${isOfEmoji(model) ? typedField(this.app) : html`<button type="button" class="mv-button" data-action="choose" data-key="flow-choose">Your photo</button>`}
    </div>`;
  }

  /** @param {View} view */
  said(view) {
    if (view.moment)
      return html`<p class="mv-soft">Only the trained model can be changed.</p>
        ${actionButton("to-trained", "Show it")}`;
    const special = otherModel(view);
    if (view.settings.away?.length || view.settings.intervention)
      return html`${special && html`<p>${special}</p>`}${this.result(view, special)}`;
    if (special)
      return html`<p><b>${special}</b></p>
        ${actionButton("as-is", "Show the trained model")}`;
    const own = view.picture.id === null && ownWords(this.app, view.model.class_names);
    const soft = [wrongWords(view), own, namesWords(this.app)];
    return html`${view.picture.unlike && html`<p>${view.picture.unlike}</p>`}${this.invitation(view)}
      ${soft.filter(Boolean).map((words) => html`<p class="mv-soft">${words}</p>`)}`;
  }

  /** The one thing to try: the fewest experts that change the answer, where that was searched. @param {View} view */
  invitation({ picture: { id }, layers }) {
    const { app } = this;
    const { falls } = this;
    const other = tellingCase(app);
    const another = other && html` ${actionButton("matters", "See one that changes")}`;
    if (!falls)
      return html`<p>Click an expert to take it away.</p>
        ${another}`;
    if (!falls.away) {
      return html`<p>No expert, nor any two or three of a layer, changes this answer.</p>
        ${actionButton("all-away", `Take all ${allExperts(app.model).length} away`)}`;
    }
    if (!fallOf(app.model, id)) {
      return html`<p>Click experts away until the answer changes. The fewest: ${falls.away.length}.</p>
        ${actionButton("fall", "Show me")}`;
    }
    const [[layer, expert]] = falls.away;
    const isIt = (one) => falls.away.length === 1 && one.layer === layer && one.expert === expert;
    const name = app.model.card.names?.find(isIt)?.name;
    const whose = name ? `the ${name}’ expert` : goneWords(falls.away, layers, app.state?.currentLayer.layer);
    return html`<button type="button" class="mv-primary" data-action="fall" data-key="fall">Take ${whose} away</button>
      <p class="mv-soft">or click any other.</p>`;
  }

  /** The fewest experts with which the visitor changed the answer, beside the fewest there are. @param {View} view @param {[number, number][]} away */
  record(view, away) {
    const { falls, usual } = this;
    if (!falls?.away || !usual || view.prediction.moe[0].class === usual.class) return "";
    const least = Math.min(away.length, this.least.get(imageKey(view)) ?? Infinity);
    this.least.set(imageKey(view), least);
    const isGame = !fallOf(this.app.model, view.picture.id) || away.length > falls.away.length;
    return isGame && `Record: fewest experts away: you ${least}, best ${falls.away.length}.`;
  }

  /** What came of it, beside as much at random. @param {View} view @param {string} special what else isn't as it was trained */
  result(view, special) {
    const { app, usual } = this;
    const { away = [] } = view.settings;
    const effect = effectOf(view);
    const [best] = view.prediction.moe;
    const now = `${best.class === usual?.class ? "still" : "now"} ${best.class}, ${percent(best.p)}`;
    const told = effect ? answerWords(effect) : now;
    const control = measured(view, this.unit);
    const findings = away.length > 0 && [this.record(view, away), needless(view, away, usual), newPages(app, away), chosenFrom(app, view)];
    return html`<p><b>${away.length > 0 && `${plural(away.length, "expert")} away: `}${told}.</b>
        ${control && html`<span class="mv-soft">${control.replaceAll(" %", "\u00a0%")}</span>`}</p>
      ${findings && findings.filter(Boolean).map((words) => html`<p class="mv-soft">${words}</p>`)}
      ${classPart(view)}
      <div class="mv-flow-do">
        <button type="button" class="mv-primary" data-action="share-card" data-key="share-card">Share this card</button>
        ${away.length > 0 && actionButton("put-back", away.length > 1 ? "Put all back" : "Put it back")}
        ${special && actionButton("as-is", "Show the trained model")}
      </div>`;
  }
}

/** What as much at random did: measured, being measured, or why it can't be. @param {View} view @param {[string, string]} unit */
function measured(view, unit) {
  const effect = effects.get(view);
  if (effect === null) return "Measuring it beside as much at random…";
  if (effect instanceof Error) return effect.message;
  return effect ? `${controlWords(effect, unit)}${effect.control ? "; each circle is one draw" : ""}.` : "";
}

/** Of one's own image: which classes there are, what is cut off. @param {App} app @param {string[]} names */
function ownWords({ own, picture }, names) {
  const { cut = 0 } = own.find(({ id }) => id === picture.own) ?? {};
  const outside = cut < 0.01 ? "" : ` It sees the middle square: ${percent(cut)} of your photo lies outside.`;
  return `It knows ${names.slice(0, -1).join(", ")} and ${names.at(-1)}, and nothing else.${outside}`;
}

/** Of a page that was typed, and of which the model says something else than what most of it is. @param {View} view */
const wrongWords = ({ picture: { id, label }, prediction: { moe } }) =>
  id === null && label && moe[0].class !== label && `Most are ${label}: the model is wrong.`;

/** What the share in an expert's name is of. @param {App} app */
function namesWords({ model: { card } }) {
  const [one] = card.names ?? [];
  return one && `${percent(one.share)} ${one.name}: of all emoji that expert ${one.expert} gets.`;
}

/** @param {string} action @param {string} label */
const actionButton = (action, label) =>
  html`<button type="button" class="mv-button" data-action="${action}" data-key="said-${action}">${label}</button>`;

/** The case in which one expert less changes the answer most: of this model, else of the next that has one. @param {App} app */
export const tellingCase = ({ model, boot, picture }) =>
  [model, ...boot.models].find(
    ({ id, card }) => card.matters && (id !== model.id || card.matters.picture !== picture.id),
  );

/** Which image of which model it is, whatever is away. @param {View} view */
const imageKey = ({ model: { id }, picture: { src } }) => id + src;

/**
 * Whether the answer is the same without all experts of a layer, and nothing else is away.
 * @param {View} view @param {[number, number][]} away @param {Guess | null} usual
 */
function needless({ layers, prediction }, away, usual) {
  const [best] = prediction.moe;
  if (best.class !== usual?.class) return "";
  const awayIn = ({ layer }) => away.filter(([where]) => where === layer).length;
  const skipped = layers.filter((layer) => awayIn(layer) > 0);
  if (skipped.some((layer) => awayIn(layer) < layer.num_experts)) return "";
  const names = skipped.map(({ name }) => name).join(" and ");
  const which = skipped.length > 1 ? "these layers" : "this layer";
  return `All of ${names} away: still ${best.class}. This answer doesn't need ${which}.`;
}

/**
 * From how many images the opening's was chosen, how many of these fall like it, and how good the model is.
 * @param {App} app @param {View} view
 */
function chosenFrom({ model: { card }, opening: { thing } }, { model, picture: { id } }) {
  if (!card.matters?.chosen || card.matters.picture !== id) return "";
  const { right, named = right, change } = card.matters.chosen; // named: those whose class has an expert of its name
  return `This ${thing} was chosen: of ${named.toLocaleString("en")} named right, ${change} change without one expert.
    The model: ${model.accuracy_text.replaceAll(" %", "\u00a0%")}.`;
}

/** What the same change does over new pages, where that was measured. @param {App} app @param {[number, number][]} away */
function newPages({ model }, away) {
  const gone = away
    .map(([, expert]) => expert)
    .sort()
    .join();
  const [name, found] =
    Object.entries(model.card.without ?? {}).find(([, { experts }]) => [...experts].sort().join() === gone) ?? [];
  if (!found) return "";
  const change = ([before, after]) => `${percent(before).replace(" %", "")} → ${percent(after)}`;
  return `On ${found.pages.toLocaleString("en")} new pages: ${name} ${change(found.own)} right, all others ${change(found.others)}.`;
}

// ---- the door to everything below -------------------------------------------------------------------------------

const DOOR_KEY = "moevision.door";
/** What only the details show: a link that names it opens them. */
export const BEHIND =
  "variant picture2 step expert patch mode slot k capacity do tab list class level".split(" ");

/** Private windows may refuse storage; then it lasts as long as the page. */
export const doorMemory = {
  read() {
    try {
      return localStorage.getItem(DOOR_KEY) !== null;
    } catch {
      return false;
    }
  },
  /** @param {boolean} open */
  keep(open) {
    try {
      if (open) localStorage.setItem(DOOR_KEY, "open");
      else localStorage.removeItem(DOOR_KEY);
    } catch {
      /* nothing to keep it in */
    }
  },
};

/** @param {Wish} wish */
export const opensDoor = (wish) => BEHIND.some((key) => wish[key] !== undefined);

// ---- experts that are away --------------------------------------------------------------------------------------

/** Experts that an address takes away, "9.3_9.4", as far as the model has them.
 * @param {string | undefined} word @param {BootModel} model @returns {[number, number][]} */
export function readAway(word, model) {
  const pairs = (word ?? "").split("_").map((one) => one.split(".").map(Number));
  const sound = pairs.filter(
    ([layer, expert]) =>
      expert >= 0 &&
      expert < (model.routers.find((one) => one.layer === layer)?.num_experts ?? 0) &&
      Number.isInteger(expert),
  );
  return /** @type {[number, number][]} */ ([...new Map(sound.map((pair) => [pair.join("."), pair])).values()]);
}

/** @param {[number, number][]} away */
export const awayWord = (away) => (away.length ? away.map((pair) => pair.join(".")).join("_") : null);

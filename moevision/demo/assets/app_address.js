// The address: what it asks for, what of that this server has, and writing the view into it, so that Back leads back.

import { isOfEmoji } from "./app_models.js";
import { awayWord, BEHIND, opensDoor, readAway } from "./app_opening.js";
import { chosenOwn, OWN } from "./app_own.js";
import { limitable, otherK } from "./app_rail.js";
import { asAskError } from "./app_server.js";
/** @import { App } from "./app.js" */
/** @import { ViewState } from "./core_state.js" */
/** @import { BootModel, Intervention, View, Wish } from "./types.js" */

/** Of links that name a second image, the first one is shown. */
const LINK_KEYS = ["model", "picture", "page", "layer", "away", ...BEHIND];

/** What the address asks for: texts, checked by whoever uses them. */
export function readAddress() {
  const found = new URLSearchParams(location.search);
  const ofGrid = found.has("embed") ? ["mode", "slot"] : []; // which isn't there
  /** @type {Wish} */
  const wish = Object.fromEntries([...found].filter(([key]) => LINK_KEYS.includes(key) && !ofGrid.includes(key)));
  return wish;
}

// ---- words of a link ----------------------------------------------------------------------------------------

/**
 * An intervention as a word, "force.3.1.next_best.0" or "swap.3.1-4.next_best.0", and back; null where it has no sense.
 * @param {Intervention} given
 */
const interventionWord = ({ kind, layer, expert, other, fill, seed }) =>
  [kind, layer ?? "all", kind === "swap" ? `${expert}-${other}` : expert ?? "any", fill, seed].join(".");

/** @param {string | undefined} word @param {BootModel} model @returns {Intervention | null} */
export function readIntervention(word, model) {
  const [kind, layerText, expertText, fill, seedText] = (word ?? "").split(".");
  const [layer, seed] = [layerText, seedText].map(Number);
  const [expert, other] = (expertText ?? "").split("-").map(Number);
  const any = kind === "random";
  const every = any && layerText === "all";
  const experts = model.routers.find((router) => router.layer === layer)?.num_experts ?? 0;
  const within = (number) => Number.isInteger(number) && number >= 0 && number < experts;
  const known = ["ablate", "force", "swap", "random"].includes(kind) && ["next_best", "zero"].includes(fill);
  const sound = known && Number.isInteger(seed) && seed >= 0 && (every || experts > 0) && (any || within(expert))
    && (kind !== "swap" || (within(other) && other !== expert));
  if (!sound) return null;
  const both = kind === "swap" ? { other } : {};
  return /** @type {any} */ ({ kind, layer: every ? null : layer, expert: any ? null : expert, ...both, fill, seed });
}

/** Take over what the address asks for, as far as this server has it. @param {App} app @param {Wish} wish */
export function choose(app, wish) {
  const { models, default: first } = app.boot;
  const find = (id) => models.find((model) => model.id === (id === "cats_vs_dogs" ? "photos" : id)); // its former name
  const typed = wish.page === undefined ? undefined : find(wish.model) ?? models.find(isOfEmoji);
  const model = typed ?? find(wish.model) ?? find(first?.model) ?? models[0];
  if (wish.model !== undefined && !find(wish.model)) app.notify(`There is no model ${wish.model} here.`);
  // The rail shows a few examples, first the one whose experts matter; a link may name any image that the server knows.
  const id = wish.picture ?? model.examples[0]?.id;
  const [k, capacity] = [wish.k, wish.capacity].map(Number);
  const change = app.boot.device ? null : readIntervention(wish.do, model);
  // An expert that was taken away in a link of an earlier version is away as the opening has it.
  const gone = change?.kind === "ablate" && change.fill === "next_best";
  const word = [wish.away, gone && `${change.layer}.${change.expert}`].filter(Boolean).join("_");
  Object.assign(app, {
    model,
    variant: model.variants.find((name) => name === wish.variant) ?? model.variants[0],
    picture: typed && isOfEmoji(typed) ? { kind: "page", text: wish.page } : id ? { kind: "example", id } : { kind: "none" },
    door: app.door || opensDoor(wish),
    away: readAway(word, model),
    topK: Number.isInteger(k) && k >= 1 && k <= model.max_top_k ? otherK(model, k) : null,
    capacity: limitable(model).length && capacity >= 0.25 && capacity <= 2 ? capacity : null,
    intervention: gone ? null : change,
  });
  const tab = { whatif: "experts", compare: "classes" }[wish.tab ?? ""] ?? wish.tab; // tabs of an earlier version
  app.tab = app.tabs.find((one) => one.id === tab)?.id ?? app.tab;
}

// ---- following it -------------------------------------------------------------------------------------------

/** Back and Forward lead to a place of the history. @param {App} app */
export function goTo(app) {
  app.tab = "experts"; // unless the address names another
  app.page = entryText(new URL(location.href), history.state?.[OWN] ?? null);
  return followAddress(app);
}

/**
 * Show what the address says, now or when that failed and is tried again. Until it is shown, or something else is
 * chosen, the address stays as it is.
 * @param {App} app @param {View} [first] that comes with the page
 */
export async function followAddress(app, first) {
  clearTimeout(app.remembering);
  const current = app.takeTurn();
  const { open } = app.pending;
  const wish = readAddress();
  app.pending = { open: true, kind: "model", wish };
  if (wish.model !== undefined && wish.model !== app.model.id && !app.boot.whole) {
    app.drawFrame();
    app.drawTabs();
    app.busy(true);
    const error = await app.fetchExamples().catch(asAskError);
    if (!current()) return undefined;
    if (error) return app.fail(error);
  }
  const before = JSON.stringify(app.question());
  choose(app, wish);
  const own = app.own.find(({ id }) => id === history.state?.[OWN]);
  if (own) app.picture = chosenOwn(own);
  app.drawDoor();
  app.drawTabs();
  // Nothing has to be asked before something is seen.
  const came = first && app.picture.id === first.picture.id && JSON.stringify(app.settings()) === app.plain;
  const same = app.state && !open && JSON.stringify(app.question()) === before;
  const ready = same ? app.state?.view : came ? first : undefined;
  const outcome = await app.load("model", { ready, wish });
  if (!app.state && wish.picture && ["bad_request", "bad_image"].includes(outcome)) return showAnother(app, wish);
  return outcome === "shown" && arrive(app);
}

/**
 * The image of a link may not be here (another data folder): show the usual first one, and say so.
 * @param {App} app @param {Wish} given
 */
async function showAnother(app, { picture, ...wish }) {
  choose(app, wish);
  if (await app.load("model", { wish }) !== "shown") return;
  arrive(app);
  app.notify("The link's image isn't on this server; here is another one.");
}

/**
 * What the address asked for is on the stage, or what stands in its place: the same entry of the history.
 * @param {App} app
 */
function arrive(app) {
  app.page = null;
  writeAddress(app);
}

// ---- writing it ---------------------------------------------------------------------------------------------

/**
 * What makes an entry of the history another one, as text that can be compared.
 * @param {URL} address @param {number | null} own the visitor's own image, which an address can't carry
 */
function entryText({ searchParams: found }, own) {
  const expert = found.get("expert")?.split(".")[1]; // its layer isn't a place of its own
  return JSON.stringify([["model", "variant", "picture", "page", "do", "away", "tab"].map((key) => found.get(key)), expert, own]);
}

/** What the address says of a state. @param {ViewState} state @returns {Record<string, unknown>} */
const placeWords = ({ view, currentLayer: layer, highlight, mode }) => ({
  step: view.moment?.step,
  layer: layer.layer,
  expert: highlight === null ? null : `${layer.name}.E${highlight}`,
  mode: mode === "regions" ? null : mode,
});

/**
 * Write the view into the address; foreign keys stay. Another image, model, expert, intervention or tab is a new entry
 * in the browser's history, to which Back returns; layer, patch, colouring and sliders only change the entry.
 * @param {App} app
 */
export function writeAddress(app) {
  const { state, picture } = app;
  const values = {
    ...(state && placeWords(state)),
    model: app.model.id,
    variant: app.variant === "trained" ? null : app.variant,
    picture: picture.kind === "example" ? picture.id : null,
    page: picture.kind === "page" ? picture.text : null,
    patch: app.door ? state?.patch : null,
    k: app.topK,
    capacity: app.capacity,
    do: app.intervention && interventionWord(app.intervention),
    away: awayWord(app.away),
    tab: app.tab === "experts" ? null : app.tab,
  };
  const address = new URL(location.href);
  LINK_KEYS.forEach((key) => {
    const value = values[key];
    if (value === null || value === undefined) address.searchParams.delete(key);
    else address.searchParams.set(key, value);
  });
  const own = picture.own ?? null;
  const page = entryText(address, own);
  const moved = app.page !== null && app.page !== page;
  history[moved ? "pushState" : "replaceState"]({ ...history.state, [OWN]: own }, "", address);
  app.page = page;
}

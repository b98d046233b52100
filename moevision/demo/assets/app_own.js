// The visitor's own images: a strip of up to a dozen, kept as long as the browser's tab, and which expert they share most.

import { asAskError, AskError, errorBox } from "./app_server.js";
import { chip, fillBox, html, layerExpert, percent, pictureSource, present } from "./core_util.js";
import { shrinkPicture } from "./own_file.js";
/** @import { App } from "./app.js" */
/** @import { Chosen, Own, Shares } from "./types.js" */

const OWN_KEY = "moevision.own";
export const MOST_OWN = 12;
/** Which of one's own images an entry of the browser's history shows: an address can't carry them, a reload keeps them. */
export const OWN = "moevision.own";

/** Private windows may refuse storage, and a dozen may be too many for it; then they last as long as the page. */
export const ownMemory = {
  /** @returns {Own[]} */
  read() {
    try {
      const found = JSON.parse(sessionStorage.getItem(OWN_KEY) ?? "[]");
      return found.filter(({ id, name, data }) => Number.isInteger(id) && typeof name === "string" && pictureSource(data)).slice(0, MOST_OWN);
    } catch { return []; }
  },
  /** @param {Own[]} own */
  keep(own) { try { sessionStorage.setItem(OWN_KEY, JSON.stringify(own)); } catch { /* nothing to keep it in */ } },
};

/** @param {Own} own @returns {Chosen} */
export const chosenOwn = ({ id, name, data }) => ({ kind: "upload", own: id, name, data });

/**
 * The own images that an entry of the history shows, as far as they weren't forgotten.
 * @param {App} app @param {(number | null)[] | undefined} ids
 */
export function restoreOwn(app, ids) {
  ids?.slice(0, 2).forEach((id, slot) => {
    const own = app.own.find((one) => one.id === id);
    if (own && slot <= app.pictures.length) app.pictures[slot] = chosenOwn(own);
  });
}

/** @param {App} app */
export function ownStrip(app) {
  if (!app.own.length) return "";
  const shown = app.pictures[app.slot];
  const thumb = ({ id, name, data }) => html`<li><button type="button" data-action="own" data-id="${id}" data-key="own-${id}" aria-pressed="${shown.own === id}"
    aria-label="Your image ${name}"><img src="${pictureSource(data)}" alt=""><span>${name}</span></button></li>`;
  return html`<ul class="mv-examples mv-own" aria-label="Your images">${app.own.map(thumb)}</ul>
    <div class="mv-shared" data-box="shared">${sharedBox(app)}</div>
    <button type="button" class="mv-quiet" data-action="forget" data-key="forget">Forget ${app.own.length > 1 ? "them" : "it"}</button>`;
}

/**
 * The expert that computes most of some images, counted: [expert, its mean share, in how many it is the busiest].
 * @param {number[][]} shares of the experts, image by image @returns {[number, number, number]}
 */
export function mostShared(shares) {
  const experts = [...shares[0].keys()];
  const means = experts.map((expert) => shares.reduce((sum, one) => sum + one[expert], 0) / shares.length);
  const best = means.indexOf(Math.max(...means));
  return [best, means[best], shares.filter((one) => one[best] === Math.max(...one)).length];
}

/** @param {App} app */
function sharedBox(app) {
  const { own, shared, state } = app;
  if (own.length < 2 || !state) return "";
  // While another model or setting is on its way, the numbers are those of the one before.
  if (!shared || app.counted !== toCount(app)) return html`<p class="mv-soft">Counting…</p>`;
  if (shared instanceof Error) return errorBox(asAskError(shared), "count-own");
  const layer = state.currentLayer;
  const shares = shared.map(({ layers }) => present(layers.find((one) => one.layer === layer.layer)).shares);
  const [expert, share, first] = mostShared(shares);
  const even = percent(1 / layer.num_experts);
  return html`<p>Your ${own.length} images share <button type="button" class="mv-quiet" data-action="highlight" data-expert="${expert}" data-key="shared"
    aria-pressed="${state.highlight === expert}">${layerExpert(layer, expert)}</button> ${chip(expert, layer.num_experts)} most: ${percent(share)} of their patch choices (even: ${even}).
    It is the busiest in ${first} of ${own.length}.</p>`;
}

/**
 * What is counted, as text that can be compared.
 * @param {App} app
 */
const toCount = (app) => JSON.stringify([app.settings(), app.own.map(({ id }) => id)]);

/** @param {App} app */
export const drawShared = (app) => fillBox(app.core.box("shared"), sharedBox(app));

/**
 * Ask for the shares of every own image under the present settings; an answer is asked for once.
 * @param {App} app
 */
export async function countShared(app) {
  const question = toCount(app);
  if (app.counted === question && !(app.shared instanceof Error)) return drawShared(app);
  Object.assign(app, { counted: question, shared: null });
  drawShared(app);
  if (app.own.length < 2) return undefined;
  try {
    /** @type {Shares[]} */
    const shares = [];
    const settings = app.settings();
    for (const { id, data } of app.own) {
      shares.push(await app.asker.remember("shares", { ...settings, picture: { kind: "upload", data } }, JSON.stringify(["shares", settings, id])));
      if (app.counted !== question) return undefined;
    }
    app.shared = shares;
  } catch (error) {
    if (app.counted === question) app.shared = asAskError(error);
  }
  return drawShared(app);
}

/**
 * Drop anywhere on the page, and paste anywhere but into a field.
 * @param {App} app @param {HTMLElement} root
 */
export function listenForFiles(app, root) {
  root.addEventListener("dragover", (event) => { event.preventDefault(); root.classList.add("mv-dragging"); });
  root.addEventListener("dragleave", (event) => { if (!root.contains(/** @type {Node} */ (event.relatedTarget))) root.classList.remove("mv-dragging"); });
  root.addEventListener("drop", (event) => {
    event.preventDefault();
    root.classList.remove("mv-dragging");
    takeFiles(app, event.dataTransfer?.files);
  });
  document.addEventListener("paste", (event) => {
    const files = event.clipboardData?.files;
    if (files?.length && root.isConnected) { event.preventDefault(); takeFiles(app, files); }
  });
}

/**
 * The first one goes on the stage, all of them into the strip.
 * @param {App} app @param {Iterable<File> | undefined} given
 */
async function takeFiles(app, given) {
  const files = [...(given ?? [])];
  /** @type {Own[]} */
  const taken = [];
  /** @type {AskError[]} */
  const refused = [];
  fillBox(app.core.box("own-error"), "");
  for (const file of files.slice(0, MOST_OWN)) {
    try {
      taken.push({ id: ++app.lastOwn, name: file.name, data: await shrinkPicture(file, app.boot.limits) });
    } catch (error) {
      refused.push(error instanceof AskError ? error : new AskError(`This browser can't read ${files.length > 1 ? file.name : "that file"} as an image. JPEG, PNG and WebP work.`));
    }
  }
  const kept = [...taken, ...app.own].slice(0, MOST_OWN);
  if (files.length > MOST_OWN || kept.length < taken.length + app.own.length) app.notify(`There is room for ${MOST_OWN} images; the oldest made way.`);
  app.own = kept;
  ownMemory.keep(kept);
  if (taken.length) await app.choosePicture(chosenOwn(taken[0]));
  if (refused.length) fillBox(app.core.box("own-error"), html`${refused.map((error) => errorBox(error))}`);
}

/** @param {App} app */
export function ownHandlers(app) {
  return {
    actions: {
      own: (button) => {
        const own = app.own.find(({ id }) => id === Number(button.dataset.id));
        return own && app.choosePicture(chosenOwn(own));
      },
      forget: () => {
        app.own = [];
        ownMemory.keep([]);
        app.drawFrame();
        app.remember();
      },
      "count-own": () => countShared(app),
      camera: () => app.core.box("camera").click(),
    },
    changes: { file: (input) => { const files = [...input.files]; input.value = ""; return takeFiles(app, files); } },
  };
}

// The visitor's own images: up to a dozen, kept as long as the browser's tab.

import { AskError, errorBox } from "./app_server.js";
import { isOfEmoji } from "./app_models.js";
import { fillBox, html, pictureSource } from "./core_util.js";
import { shrinkPicture } from "./own_file.js";
/** @import { App } from "./app.js" */
/** @import { Chosen, Own } from "./types.js" */

const OWN_KEY = "moevision.own";
export const MOST_OWN = 12;
/** Which of one's own images an entry of the browser's history shows: an address can't carry it, a reload keeps it. */
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

/** @param {App} app */
export function ownStrip(app) {
  if (!app.own.length) return "";
  const thumb = ({ id, name, data }) => html`<li><button type="button" data-action="own" data-id="${id}" data-key="own-${id}" aria-pressed="${app.picture.own === id}"
    aria-label="Your image ${name}"><img src="${pictureSource(data)}" alt=""><span>${name}</span></button></li>`;
  return html`<ul class="mv-examples mv-own" aria-label="Your images">${app.own.map(thumb)}</ul>
    <button type="button" class="mv-quiet" data-action="forget" data-key="forget">Forget ${app.own.length > 1 ? "them" : "it"}</button>`;
}

/** Drop anywhere on the page, and paste anywhere but into a field. @param {App} app @param {HTMLElement} root */
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
      taken.push({ id: ++app.lastOwn, name: file.name, ...(await shrinkPicture(file, app.boot.limits)) });
    } catch (error) {
      refused.push(error instanceof AskError ? error : new AskError(`This browser can't read ${files.length > 1 ? file.name : "that file"} as an image. JPEG, PNG, WebP, GIF and AVIF work; save HEIC of an iPhone as JPEG first.`));
    }
  }
  const kept = [...taken, ...app.own].slice(0, MOST_OWN);
  if (files.length > MOST_OWN || kept.length < taken.length + app.own.length) app.notify(`There is room for ${MOST_OWN} images; the oldest made way.`);
  app.own = kept;
  ownMemory.keep(kept);
  if (taken.length) await showOwn(app, chosenOwn(taken[0]));
  if (refused.length) fillBox(app.core.box("own-error"), html`${refused.map((error) => errorBox(error))}`);
}

/** A photo is for a model of photos. @param {App} app @param {Chosen} own */
function showOwn(app, own) {
  const other = isOfEmoji(app.model) && app.boot.models.find((model) => !isOfEmoji(model));
  if (!other) return app.choosePicture(own);
  app.picture = own;
  return app.chooseModel(other.id);
}

/** @param {App} app */
export function ownHandlers(app) {
  return {
    actions: {
      own: (button) => {
        const own = app.own.find(({ id }) => id === Number(button.dataset.id));
        return own && showOwn(app, chosenOwn(own));
      },
      forget: () => {
        app.own = [];
        ownMemory.keep([]);
        app.drawFrame();
        app.remember();
      },
    },
    changes: { file: (input) => { const files = [...input.files]; input.value = ""; return takeFiles(app, files); } },
  };
}

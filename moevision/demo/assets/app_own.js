// The visitor's own images: up to a dozen, kept as long as the browser's tab, and whose route their patches take.

import { asAskError, AskError, errorBox } from "./app_server.js";
import { isOfEmoji } from "./app_models.js";
import { firstExperts } from "./core_mosaic.js";
import { chip, fillBox, html, pictureSource } from "./core_util.js";
import { shrinkPicture } from "./own_file.js";
/** @import { App } from "./app.js" */
/** @import { Chosen, GalleryPatch, Own, View } from "./types.js" */

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

/**
 * The routes through the layers that most patches in the middle half of an image take, the most frequent first.
 * @param {View} view @returns {{ path: number[], count: number }[]}
 */
export function routesOf({ layers, model: { grid: [rows, columns] } }) {
  const firsts = layers.map(firstExperts);
  /** @type {Map<string, { path: number[], count: number }>} */
  const found = new Map();
  firsts[0].forEach((_, patch) => {
    const [row, column] = [Math.floor(patch / columns), patch % columns];
    const path = firsts.map((first) => first[patch]);
    if (Math.abs(row + 0.5 - rows / 2) > rows / 4 || Math.abs(column + 0.5 - columns / 2) > columns / 4 || path.includes(null)) return;
    const one = found.get(path.join()) ?? { path: /** @type {number[]} */ (path), count: 0 };
    found.set(path.join(), { ...one, count: one.count + 1 });
  });
  return [...found.values()].sort((one, other) => other.count - one.count);
}

const TRIED = 3; // routes, of which the first that some patch of the model's images takes is told

/**
 * Of an own image: what the model knows, and which patches of its images take the route of those in the middle.
 * @param {App} app @param {View} view
 */
export async function tellRoute(app, view) {
  const tell = (words) => app.state?.view === view && fillBox(app.core.box("route"), words);
  if (view.picture.id !== null || view.moment || view.settings.away?.length) return void tell("");
  const { id: model, variant, class_names: names } = view.model;
  const knows = html`<p class="mv-soft">It knows ${names.length > 1 && `${names.slice(0, -1).join(", ")} and `}${names.at(-1)}, and
    nothing else.</p>`;
  tell(knows);
  if (app.boot.device || !app.model.has_pictures || !view.layers.every(({ kind }) => kind === "token_choice")) return;
  try {
    for (const { path, count } of routesOf(view).slice(0, TRIED)) {
      const { patches } = await app.asker.remember("similar", { model, variant, path, class: null });
      if (patches.length) return void tell(html`${routeWords(view, path, count, patches)}${knows}`);
    }
  } catch (error) {
    tell(html`${errorBox(asAskError(error))}${knows}`);
  }
}

/** @param {View} view @param {number[]} path @param {number} count @param {GalleryPatch[]} patches */
function routeWords({ layers }, path, count, patches) {
  const labels = patches.map(({ label }) => label);
  const most = [...new Set(labels)].sort((one, other) => labels.filter((each) => each === other).length - labels.filter((each) => each === one).length)[0];
  const way = path.map((expert, place) => html`${place > 0 && " and "}${chip(expert, layers[place].num_experts)} in ${layers[place].name}`);
  return html`<p>${count === 1 ? "A patch in its middle goes" : `${count} patches in its middle go`} to ${way}, as do these of other images, ${labels.filter((each) => each === most).length} of ${patches.length} of ${most}:</p>
    <div class="mv-route">${patches.slice(0, 8).map(({ crop, label }) => html`<img src="${pictureSource(crop)}" alt="${label}">`)}</div>`;
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
      camera: () => app.core.box("camera").click(),
    },
    changes: { file: (input) => { const files = [...input.files]; input.value = ""; return takeFiles(app, files); } },
  };
}

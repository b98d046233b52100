// Taking the view elsewhere: the address, and the three exports.

import { awayWord } from "./app_flow.js";
import { canvasPng, loadPicture, sharePng } from "./app_card.js";
import { OWN } from "./app_own.js";
import { asAskError, AskError } from "./app_server.js";
import { MODES } from "./core_kinds.js";
import { SIDES } from "./core_slots.js";
import { GREY_MODES, patchLooks, pictureTitle, underlay } from "./core_stage.js";
import { momentWords } from "./core_time.js";
import { brush, clamp, html, inkOn, layerExpert, percent, present, rgba } from "./core_util.js";
/** @import { App } from "./app.js" */
/** @import { ViewState } from "./core_state.js" */
/** @import { BootModel, Intervention, Look, Wish } from "./types.js" */

export const shareMenu = () => html`<details class="mv-menu"><summary class="mv-button">Share</summary><div class="mv-menu-list">
  ${[["link", "Copy link", "opens this view"], ["card", "Card (PNG)", "1200 × 630, for a post or a slide"], ["png", "Image (PNG)", "the stage as you see it"], ["json", "Data (JSON)", "every number, schema moevision.view/2"],
    ["page", "Page (HTML)", "one file, works without a network"]].map(([kind, title, hint]) => html`<button type="button" data-action="export-${kind}" data-key="export-${kind}">
    <b>${title}</b><span class="mv-soft">${hint}</span></button>`)}</div></details>`;

/**
 * A click beside the menu closes it.
 * @param {HTMLElement} root
 */
export function closeMenuByClick(root) {
  document.addEventListener("click", (event) => {
    const menu = /** @type {HTMLDetailsElement | null} */ (root.querySelector(".mv-menu[open]"));
    if (menu && !menu.contains(/** @type {Node} */ (event.target))) menu.open = false;
  });
}

/** @param {App} app */
export function shareHandlers(app) {
  const name = (ending) => exportName(present(app.state), ending);
  const close = (button) => { button.closest("details").open = false; };
  const guarded = (job) => async (button) => {
    close(button);
    try { await job(); } catch (error) { app.notify(asAskError(error).message); }
  };
  const staged = (job) => guarded(async () => {
    if (!app.state || !app.hasPicture()) throw new AskError("Nothing is on the stage yet: choose an image.");
    await job();
  });
  return {
    "export-link": guarded(async () => {
      await copyText(location.href);
      app.notify(app.pictures.some(({ kind }) => kind === "upload") ? "Link copied. It can't carry your own image: it opens on an example." : "Link copied.");
    }),
    "export-png": staged(async () => { download(await stagePng(present(app.state)), name("png")); app.notify("Image saved."); }),
    "export-card": staged(async () => { download(await sharePng(present(app.state)), name("png")); app.notify("Card saved."); }),
    "export-json": staged(async () => {
      const text = JSON.stringify(present(app.state).view, null, 1);
      download(new Blob([text], { type: "application/json" }), name("json"));
      app.notify("Data saved.");
    }),
    "export-page": staged(async () => {
      const page = await app.asker.ask("export_html", app.questionOf(present(app.state).view));
      download(new Blob([page.html], { type: "text/html" }), page.filename);
      app.notify("Page saved.");
    }),
  };
}

/**
 * The clipboard is only open to secure pages (https or loopback); a classroom's http address needs the old way.
 * @param {string} text
 */
async function copyText(text) {
  if (navigator.clipboard && window.isSecureContext) {
    try { return await navigator.clipboard.writeText(text); } catch { /* no permission: fall through to the old way */ }
  }
  const field = document.createElement("textarea");
  field.value = text;
  document.body.append(field);
  field.select();
  const copied = document.execCommand("copy");
  field.remove();
  if (!copied) throw new AskError("The browser doesn't let the page copy. The address bar holds the same link.");
}

/** @param {Blob} blob @param {string} name */
export function download(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

/** @param {ViewState} state @param {string} ending */
const exportName = (state, ending) => ["moevision", state.view.model.id, state.view.picture.name, state.currentLayer.name, state.mode]
  .join("_").replace(/[^\w.-]+/g, "-") + `.${ending}`;

// ---- PNG ----------------------------------------------------------------------------------------------------

/**
 * The active stage as an image of 1024 px with a caption that says what it is.
 * @param {ViewState} state
 */
async function stagePng(state) {
  const { view, currentLayer: layer } = state;
  const [rows, columns] = view.model.grid;
  const side = 1024 / columns;
  const canvas = document.createElement("canvas");
  canvas.width = 1024;
  canvas.height = side * rows + 76 + (view.picture.credit ? 26 : 0);
  const context = brush(canvas);
  context.fillStyle = "#ffffff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  const { source, sharp } = underlay(state, view);
  const picture = await loadPicture(source);
  const [width, height] = [picture.naturalWidth, picture.naturalHeight];
  const square = Math.min(width, height);
  context.imageSmoothingEnabled = sharp;
  if (GREY_MODES.includes(state.mode)) context.filter = "grayscale(1)";
  context.drawImage(picture, (width - square) / 2, (height - square) / 2, square, square, 0, 0, 1024, side * rows);
  context.filter = "none";
  patchLooks(state, view, layer).forEach((look, patch) => {
    paintPatch(context, look, (patch % columns) * side, Math.floor(patch / columns) * side, side);
  });
  paintCaption(context, state, side * rows);
  return canvasPng(canvas);
}

/**
 * @param {CanvasRenderingContext2D} context @param {Look} look @param {number} x @param {number} y
 * @param {number} side
 */
function paintPatch(context, look, x, y, side) {
  context.fillStyle = rgba(look.colour, look.alpha);
  context.fillRect(x, y, side, side);
  if (!look.text || look.faint) return;
  const size = clamp(side * 0.24, 10, 26);
  context.font = `700 ${size}px Arial, sans-serif`;
  const width = context.measureText(look.text).width + size * 0.7;
  context.fillStyle = look.chip === null ? "#ffffff" : look.colour;
  context.fillRect(x + side - width, y + side - size * 1.3, width, size * 1.3);
  context.fillStyle = look.chip === null ? "#1d1d1b" : inkOn(look.colour);
  context.fillText(look.text, x + side - width + size * 0.35, y + side - size * 0.3);
}

/** @param {CanvasRenderingContext2D} context @param {ViewState} state @param {number} top */
function paintCaption(context, state, top) {
  const { view, currentLayer: layer } = state;
  const best = view.prediction.moe[0];
  context.fillStyle = "#1d1d1b";
  context.font = "600 22px Arial, sans-serif";
  context.fillText(`${view.model.title}, ${view.model.variant} · ${layer.name} · ${modeWords(state)} · ${pictureTitle(view)}`, 12, top + 32, 1000);
  context.font = "18px Arial, sans-serif";
  context.fillStyle = "#5c5c57";
  context.fillText(`${view.moment ? `${momentWords(view.moment)}: ` : "prediction: "}${best.class} ${percent(best.p)} · ${layer.words} · moevision`, 12, top + 60, 1000);
  if (view.picture.credit) context.fillText(`photo: ${view.picture.credit}`, 12, top + 86, 1000);
}

/** @param {ViewState} given */
function modeWords({ mode, currentLayer: layer, slotExpert, slot, slotSide }) {
  if (mode !== "slots") return MODES[mode].label.toLowerCase();
  return `${slot === null ? "slots" : `slot ${slot}`} of ${layerExpert(layer, slotExpert)}, ${SIDES[slotSide].toLowerCase()}`;
}

// ---- the address --------------------------------------------------------------------------------------------

/** Which entry of the history this is. */
export const PLACE = "moevision.place";
const LINK_KEYS = ["model", "variant", "picture", "picture2", "step", "layer", "expert", "patch", "mode", "slot", "k", "capacity", "noise", "do", "away", "tab", "list", "class", "level"];

/**
 * An intervention as one word of the address, "ablate.3.1.next_best.0" or "swap.3.1-4.next_best.0", and back; null if the word makes no sense.
 * @param {Intervention} given
 */
const interventionWord = ({ kind, layer, expert, other, fill, seed }) => [kind, layer ?? "all", kind === "swap" ? `${expert}-${other}` : expert ?? "any", fill ?? "next_best", seed ?? 0].join(".");

/** @param {string | undefined} word @param {BootModel} model @returns {Intervention | null} */
export function readIntervention(word, model) {
  const [kind, layerText, expertText, fill, seedText] = (word ?? "").split(".");
  const [layer, seed] = [layerText, seedText].map(Number);
  const [expert, other] = (expertText ?? "").split("-").map(Number);
  const every = kind === "random" && layerText === "all";
  const experts = model.routers.find((router) => router.layer === layer)?.num_experts ?? 0;
  const within = (number) => Number.isInteger(number) && number >= 0 && number < experts;
  const sound = ["ablate", "force", "swap", "random"].includes(kind) && ["next_best", "zero"].includes(fill) && Number.isInteger(seed) && seed >= 0
    && (every || model.layers.includes(layer)) && (kind === "random" || within(expert)) && (kind !== "swap" || (within(other) && other !== expert));
  // Checked above, which types can't follow.
  return sound ? /** @type {Intervention} */ ({ kind, layer: every ? null : layer, expert: kind === "random" ? null : expert, ...(kind === "swap" ? { other } : {}), fill, seed }) : null;
}

/**
 * Which draw of the routers' noise; null for none, and where no router has any.
 * @param {string | undefined} word @param {BootModel} model
 */
export function readNoise(word, model) {
  const able = word !== undefined && model.routers.some(({ noise }) => noise !== "none");
  const draw = Number(word);
  return able && Number.isInteger(draw) && draw >= 0 && draw < 2 ** 31 ? draw : null;
}

/**
 * Which slots are shown, as one word of the address, "2.5.reads" or "2.all.takes".
 * @param {ViewState} given
 */
const slotWord = ({ slotExpert, slot, slotSide }) => [slotExpert, slot ?? "all", slotSide].join(".");

/**
 * The highlighted expert as one word of the address, "L3.E1".
 * @param {ViewState} given
 */
const expertWord = ({ highlight, currentLayer: layer }) => `${layer.name}.E${highlight}`;

/** What the address asks for: texts, checked by whoever uses them. */
export function readAddress() {
  const found = new URLSearchParams(location.search);
  /** @type {Wish} */
  const wish = Object.fromEntries([...found].filter(([key]) => LINK_KEYS.includes(key)));
  return wish;
}

/**
 * What makes an entry of the history another one, as text that can be compared.
 * @param {URL} address @param {(number | null)[]} own the visitor's own images, which an address can't carry
 */
export function entryText({ searchParams: found }, own) {
  const expert = found.get("expert")?.split(".")[1]; // its layer isn't a place of its own
  return JSON.stringify([["model", "variant", "picture", "picture2", "do", "away", "tab"].map((key) => found.get(key)), expert, own]);
}

/**
 * Write the view into the address; foreign keys stay. Another image, model, expert, intervention or tab is a new entry in
 * the browser's history, to which Back returns; layer, patch, colouring and sliders only change the entry.
 * @param {App} app
 */
export function writeAddress(app) {
  const { state, pictures } = app;
  const values = {
    model: app.model.id,
    variant: app.variant === "trained" ? null : app.variant,
    picture: pictures[0].kind === "example" ? pictures[0].id : null,
    picture2: pictures[1]?.kind === "example" ? pictures[1].id : null,
    step: state?.view.moment?.step,
    layer: state?.currentLayer.layer,
    expert: state && state.highlight !== null ? expertWord(state) : null,
    patch: app.door ? state?.patch : null,
    mode: state?.mode === "expert" ? null : state?.mode,
    slot: state?.mode === "slots" ? slotWord(state) : null,
    k: app.topK,
    capacity: app.capacity,
    noise: app.noise,
    do: app.intervention && interventionWord(app.intervention),
    away: awayWord(app.away),
    tab: app.tab === "experts" ? null : app.tab,
    list: app.tab === "data" ? app.ranked.key : null,
    class: app.tab === "data" ? app.ranked.only : null,
  };
  const address = new URL(location.href);
  LINK_KEYS.forEach((key) => {
    const value = values[key];
    if (value === null || value === undefined) address.searchParams.delete(key);
    else address.searchParams.set(key, value);
  });
  const own = pictures.map((picture) => picture.own ?? null);
  const page = entryText(address, own);
  const moved = app.page !== null && app.page !== page;
  if (moved) app.place += 1;
  history[moved ? "pushState" : "replaceState"]({ ...history.state, [PLACE]: app.place, [OWN]: own }, "", address);
  app.page = page;
}

// Taking the view elsewhere: a link, and what can be saved.

import { sharePng } from "./app_card.js";
import { asAskError, AskError } from "./app_server.js";
import { controlWords, effectOf } from "./core_effect.js";
import { html, present } from "./core_util.js";
import { headlineOf } from "./core_words.js";
/** @import { App } from "./app.js" */
/** @import { ViewState } from "./core_state.js" */

const ITEMS = [
  ["link", "Copy link", "opens this view"],
  ["card", "Card (PNG)", "1200 × 630, for a post or a slide"],
  ["embed", "Frame (HTML)", "photo and boxes, to paste into a page of yours"],
  ["json", "Data (JSON)", "every number, schema moevision.view/2"],
  ["page", "Page (HTML)", "one file, works without a network"],
];
/** Only a page that others can see is worth a frame. @param {App} app */
export const shareMenu = ({ boot }) => html`<details class="mv-menu"><summary class="mv-button">Share</summary>
  <div class="mv-menu-list">${ITEMS.filter(([kind]) => kind !== "embed" || boot.device || !boot.local).map(([kind, title, hint]) => html`<button type="button" data-action="export-${kind}"
    data-key="export-${kind}"><b>${title}</b><span class="mv-soft">${hint}</span></button>`)}</div></details>`;

/** A click beside the menu closes it. @param {HTMLElement} root */
export function closeMenuByClick(root) {
  document.addEventListener("click", (event) => {
    const menu = /** @type {HTMLDetailsElement | null} */ (root.querySelector(".mv-menu[open]"));
    if (menu && !menu.contains(/** @type {Node} */ (event.target))) menu.open = false;
  });
}

/** @param {App} app */
export function shareHandlers(app) {
  const guarded = (job) => async (button) => {
    const menu = button.closest("details");
    if (menu) menu.open = false;
    try { app.notify(await job()); } catch (error) { app.notify(asAskError(error).message); }
  };
  /** What is saved of the state, under a name that ends so. */
  const saved = (said, ending, make) => guarded(async () => {
    if (!app.state || app.picture.kind === "none") throw new AskError("Nothing is on the stage yet: choose an image.");
    const { view, currentLayer: layer, mode } = app.state;
    const name = ["moevision", view.model.id, view.picture.name, layer.name, mode].join("_").replace(/[^\w.-]+/g, "-");
    const made = await make(app.state);
    download(made.blob ?? made, made.filename ?? `${name}.${ending}`);
    return `${said} saved.`;
  });
  return {
    "export-link": guarded(async () => {
      await copyText(location.href);
      return app.picture.kind === "upload" ? "Link copied. It can't carry your own image: it opens on an example." : "Link copied.";
    }),
    "export-embed": guarded(async () => {
      const address = new URL(location.href);
      address.searchParams.set("embed", "1");
      await copyText(`<iframe src="${address.href.replaceAll("&", "&amp;")}" title="See inside a Mixture of Experts" width="100%" height="760" style="border:0"></iframe>`);
      return "Frame copied: paste it into a page.";
    }),
    "export-card": saved("Card", "card.png", (state) => cardOf(app, state)),
    "share-card": guarded(() => shareCard(app)),
    "export-json": saved("Data", "json", ({ view }) => new Blob([JSON.stringify(view, null, 1)], { type: "application/json" })),
    "export-page": saved("Page", "html", async ({ view }) => {
      const page = await app.asker.ask("export_html", app.questionOf(view));
      return { blob: new Blob([page.html], { type: "text/html" }), filename: page.filename };
    }),
  };
}

/** @param {App} app @param {ViewState} state */
function cardOf({ opening }, state) {
  const effect = effectOf(state.view);
  const elsewhere = !/^(localhost|127\.|\[::1\])/.test(location.hostname);
  return sharePng(state, { usual: opening.usual, thing: opening.thing, control: effect ? controlWords(effect, opening.unit) : "", address: elsewhere ? location.host : "" });
}

/** By the device's own menu where it has one for images, else as a file, with the link in the clipboard. @param {App} app */
async function shareCard(app) {
  const state = present(app.state);
  const file = new File([await cardOf(app, state)], "moevision.png", { type: "image/png" });
  if (navigator.canShare?.({ files: [file] })) {
    try {
      await navigator.share({ files: [file], text: `${headlineOf(state.view, state.currentLayer, app.opening.usual, app.opening.thing)} ${location.href}` });
      return "Shared.";
    } catch (error) {
      if (error instanceof Error && error.name === "AbortError") return "Not shared.";
    }
  }
  download(file, file.name);
  const copied = await copyText(location.href).then(() => true, () => false);
  return copied ? "Card saved, link copied." : "Card saved.";
}

/** The clipboard is only open to secure pages (https or loopback). @param {string} text */
async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    throw new AskError("The browser doesn't let the page copy. The address bar holds the same link.");
  }
}

/** @param {Blob} blob @param {string} name */
export function download(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// The row of tabs: which one is open, how arrow keys walk along it, and what stands below it.

import { asAskError, emptyBox, errorBox, waitingBox } from "./app_server.js";
import { fillBox, html, present } from "./core_util.js";
/** @import { App } from "./app.js" */

/** @param {App} app */
export function drawTabs({ root, core, tabs, tab, door }) {
  const one = ({ id, label }) => html`<button type="button" role="tab" id="mv-tab-${id}" data-action="tab" data-tab="${id}"
    data-key="tab-${id}" aria-selected="${id === tab && door}" tabindex="${id === tab ? 0 : -1}">${label}</button>`;
  fillBox(root.querySelector(".mv-tabs"), html`${tabs.map(one)}`);
  core.box("panel").setAttribute("aria-labelledby", `mv-tab-${tab}`);
}

/** @param {App} app @param {any} event */
export function pressTab(app, event) {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step || event.target.getAttribute("role") !== "tab") return;
  event.preventDefault();
  const index = app.tabs.findIndex(({ id }) => id === app.tab);
  app.openTab(app.tabs[(index + step + app.tabs.length) % app.tabs.length].id);
  /** @type {HTMLElement} */ (app.root.querySelector("[role=tab][aria-selected=true]")).focus();
}

/**
 * Draw the open tab again if what changed matters to it (null: it was just opened). Behind a closed door nothing is asked.
 * @param {App} app @param {string | null} kind
 */
export async function drawPanel(app, kind) {
  if (!app.door) return;
  const tab = present(app.tabs.find(({ id }) => id === app.tab));
  if (kind !== null && kind !== "model" && !tab.follows.includes(kind)) return;
  const panel = app.core.box("panel");
  const ticket = (app.panelTicket = Symbol(tab.id));
  const wanted = () => ticket === app.panelTicket;
  const blank = app.picture.kind === "none";
  const none = blank ? emptyBox("No image yet", "It fills when an image is here.") : waitingBox("Opening the image…");
  if ((blank || !app.state) && tab.id !== "about") return void fillBox(panel, none);
  try {
    await tab.draw(panel, wanted);
  } catch (error) {
    if (wanted()) fillBox(panel, errorBox(asAskError(error)));
  }
}

// The row of tabs: which one is open, and how arrow keys walk along it.

import { fillBox, html } from "./core_util.js";
/** @import { App } from "./app.js" */

/** @param {App} app */
export function drawTabs({ root, core, tabs, tab, closed }) {
  fillBox(root.querySelector(".mv-tabs"), html`${tabs.map(({ id, label }) => html`<button type="button" role="tab" id="mv-tab-${id}"
    data-action="tab" data-tab="${id}" data-key="tab-${id}" aria-selected="${id === tab && !closed}" tabindex="${id === tab ? 0 : -1}">${label}</button>`)}`);
  core.box("panel").hidden = closed;
  core.box("panel").setAttribute("aria-labelledby", `mv-tab-${tab}`);
}

/** @param {App} app @param {any} event */
export function pressTab(app, event) {
  if (event.target.getAttribute("role") !== "tab") return;
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  event.preventDefault();
  const index = app.tabs.findIndex(({ id }) => id === app.tab);
  app.openTab(app.tabs[(index + step + app.tabs.length) % app.tabs.length].id);
  /** @type {HTMLElement} */ (app.root.querySelector("[role=tab][aria-selected=true]")).focus();
}

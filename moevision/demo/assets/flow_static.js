// The opening alone, without a server: in a Gradio app, or in a file.

import { Flow } from "./app_flow.js";
import { keepOriginal } from "./core_stage.js";
import { ViewState } from "./core_state.js";
import { html, present } from "./core_util.js";
/** @import { FlowHost, View } from "./types.js" */

/** @param {HTMLElement} root @param {View} view */
export function startFlow(root, view) {
  root.innerHTML = String(html`<section class="mv-flow" aria-label="Where the patches go" data-box="flow"></section>
    <div class="mv-flow-end" data-box="layer"></div>`);
  if (view.picture.sharp) keepOriginal(view, view.picture.sharp);
  const state = new ViewState(view, { layer: null });
  const model = /** @type {any} */ ({ examples: [], class_names: view.model.class_names, card: {} });
  /** @type {FlowHost} */
  const host = { core: { box: (name) => present(root.querySelector(`[data-box="${name}"]`)) }, state, picture: { kind: "none" }, own: [], away: view.settings.away ?? [], usual: null,
    model, boot: { models: [] }, toggleAway: () => undefined };
  const flow = new Flow(host);
  root.addEventListener("click", (event) => /** @type {Element} */ (event.target).closest("[data-action=fly]") && flow.play());
  state.subscribe(() => flow.draw());
  root.addEventListener("change", ({ target }) => state.set({ layer: Number(/** @type {any} */ (target).value) }));
  flow.draw(true);
}

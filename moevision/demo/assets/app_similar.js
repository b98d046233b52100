// Patches of the model's images that take the same path as the pinned one; asked for by a button below the inspector.

import { asAskError, errorBox, waitingBox } from "./app_server.js";
import { fillBox, html, present } from "./core_util.js";
import { gallery } from "./tab_experts.js";
/** @import { App } from "./app.js" */

/** @param {App} app */
export function drawSimilar({ state, model, core }) {
  const { patch, view } = present(state);
  // A path needs an expert in every layer; where experts choose, a patch may have none.
  const wanted = model.has_pictures && !view.moment && patch !== null && view.layers.every((layer) => layer.experts[patch].length);
  fillBox(core.box("similar"), wanted ? html`<button type="button" class="mv-button" data-action="similar" data-key="similar">Patches with the same path</button>` : "");
}

/** @param {App} app */
export async function showSimilar({ state, asker, core }) {
  const place = core.box("similar");
  if (!state) return;
  const { view, patch } = state;
  if (patch === null) return;
  const wanted = () => state.patch === patch && state.view === view;
  fillBox(place, waitingBox("Looking for patches with this path…"));
  try {
    const path = view.layers.map((layer) => layer.experts[patch][0]);
    const { id: model, variant } = view.model;
    const { patches } = await asker.remember("similar", { model, variant, path, class: null });
    if (!wanted()) return;
    fillBox(place, patches.length ? gallery("Patches with the same path", patches)
      : html`<p class="mv-note">No patch of the model's images takes exactly this path.</p>`);
  } catch (error) {
    if (wanted()) fillBox(place, errorBox(asAskError(error), "similar"));
  }
}

/**
 * The patches that each expert likes most, beside its direction in the picture of the computation.
 * @param {App} app
 */
export async function showLikes({ state, asker, core, closed }) {
  if (!state || closed) return;
  const { view, currentLayer: layer } = state;
  const { id: model, variant } = view.model;
  const wanted = () => state.currentLayer === layer;
  const answer = await asker.whenReady("experts", { model, variant, layer: layer.layer }, wanted).catch(() => null); // the cards below say why
  if (wanted() && answer?.experts.some(({ top }) => top.length)) core.card?.like(view, layer, answer.experts.map(({ top }) => top));
}

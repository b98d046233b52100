// What comes when a view is there already, so that nobody waits for it: the image in more pixels, what experts like
// most, moments of the training; and, by a button, patches of the model's images that take the same path.

import { asAskError, errorBox, waitingBox } from "./app_server.js";
import { hasOriginal, keepOriginal } from "./core_stage.js";
import { fillBox, html, present } from "./core_util.js";
import { gallery } from "./tab_experts.js";
/** @import { App } from "./app.js" */
/** @import { TimeSource, View } from "./types.js" */

/** @param {App} app @param {View} view */
export async function sharpen(app, view) {
  const { id } = view.picture;
  if (!id || hasOriginal(view)) return;
  // Without it the page shows the model's input, as it does while it waits; the asker has told the console.
  const { src } = await app.asker.remember("sharp", { model: app.model.id, picture: id }).catch(() => ({ src: null }));
  if (!src) return;
  keepOriginal(view, src);
  if (app.state?.view.picture !== view.picture) return;
  app.core.drawPictures();
}

/** @param {App} app */
export function drawSimilar({ state, model, core }) {
  const { patch, view } = present(state);
  // A path needs an expert in every layer; where experts choose, a patch may have none.
  const wanted = model.has_pictures && !view.moment && patch !== null && view.layers.every((layer) => layer.experts[patch].length);
  fillBox(core.box("similar"), wanted && html`<button type="button" class="mv-button" data-action="similar"
    data-key="similar">Patches with the same path</button>`);
}

/** @param {App} app */
export async function showSimilar({ state, asker, core }) {
  const place = core.box("similar");
  if (!state || state.patch === null) return;
  const { view, patch } = state;
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
export async function showLikes({ state, asker, core, door }) {
  if (!state || !door) return;
  const { view, currentLayer: layer } = state;
  const { id: model, variant } = view.model;
  const wanted = () => state.currentLayer === layer;
  const question = { model, variant, layer: layer.layer };
  const answer = await asker.whenReady("experts", question, wanted).catch(() => null); // the cards below say why
  if (wanted() && answer?.experts.some(({ top }) => top.length)) core.card?.like(view, layer, answer.experts.map(({ top }) => top));
}

/** @param {View} given */
const asTrained = ({ settings: { off_distribution: off, capacity, noise, away } }) =>
  !off && capacity === null && typeof noise !== "number" && !away?.length;

/**
 * Which images have recorded moments of the training, and where they come from.
 * @param {App} app @returns {TimeSource}
 */
export const timeSource = (app) => ({
  about: (view) => {
    const { id: shown, variant } = view.model; // another model may be chosen, and on its way
    const history = app.boot.models.find(({ id }) => id === shown)?.history;
    const { id } = view.picture;
    if (!history?.tracks[variant]) return null;
    if (!asTrained(view)) return "How it learned was recorded without changes of the routing: put all back to see it.";
    if (id !== null && history.images.includes(id)) return history;
    return `The training was recorded for the first ${history.images.length} examples only.`;
  },
  get: ({ model: { id, variant }, picture }) => app.asker.remember("history", { model: id, variant, picture: picture.id }),
});

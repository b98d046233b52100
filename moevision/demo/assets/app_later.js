// What comes when a view is there already, so that nobody waits for it: the image in more pixels, what experts like
// most, and moments of the training.

import { hasOriginal, keepOriginal } from "./core_stage.js";
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
const asTrained = ({ settings: { off_distribution: off, capacity, away } }) => !off && capacity === null && !away?.length;

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

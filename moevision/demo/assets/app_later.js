// What comes when a view is there already, so that nobody waits for it: the image in more pixels, and moments of the training.

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
    if (!history || variant !== "trained") return null;
    if (!asTrained(view)) return "How it learned was recorded without changes of the routing: put all back to see it.";
    if (id !== null && history.images.includes(id)) return history;
    return `The training was recorded for the first ${history.images.length} examples only.`;
  },
  get: ({ model: { id, variant }, picture }) => app.asker.remember("history", { model: id, variant, picture: picture.id }),
});

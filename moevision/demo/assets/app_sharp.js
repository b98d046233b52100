// What lies under the patches: the model sees few pixels, and the server has more of most examples. Asked for when the view
// is there already, so that nobody waits for it.

import { hasOriginal, keepOriginal } from "./core_stage.js";
/** @import { App } from "./app.js" */
/** @import { View } from "./types.js" */

/** @param {App} app @param {View[]} views */
export async function sharpen(app, views) {
  await Promise.all(views.map(async (view) => {
    const { id } = view.picture;
    if (!id || hasOriginal(view)) return;
    // Without it the page shows the model's input, as it does while it waits; the asker has told the console.
    const { src } = await app.asker.remember("sharp", { model: app.model.id, picture: id }).catch(() => ({ src: null }));
    if (!src) return;
    keepOriginal(view, src);
    if (app.state?.views.some(({ picture }) => picture === view.picture)) {
      app.core.drawPictures();
      app.flow.load();
    }
  }));
}

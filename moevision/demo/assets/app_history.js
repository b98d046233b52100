// Showing what the address says: at the start, and on the way back and forward through the browser's history.

import { choose, isDefault } from "./app_choice.js";
import { OWN, restoreOwn } from "./app_own.js";
import { asAskError } from "./app_server.js";
import { entryText, readAddress, writeAddress } from "./app_share.js";
import { present } from "./core_util.js";
/** @import { App } from "./app.js" */
/** @import { View, Wish } from "./types.js" */

/**
 * Back and Forward lead to a place of the history.
 * @param {App} app @param {number} place
 */
export function goTo(app, place) {
  app.tab = "experts"; // unless the address names another
  Object.assign(app, { place, page: entryText(new URL(location.href), history.state?.[OWN] ?? []) });
  return followAddress(app);
}

/**
 * Show what the address says, now or when that failed and is tried again. Until it is shown, or something else is chosen,
 * the address stays as it is.
 * @param {App} app @param {View[]} [views] that come with the page
 */
export async function followAddress(app, views = []) {
  clearTimeout(app.remembering);
  const current = app.takeTurn();
  const open = app.pending.slots.length > 0;
  const wish = readAddress();
  app.pending = { slots: [...app.pictures.keys()], kind: "model", wish };
  if (wish.model !== undefined && wish.model !== app.model.id && !app.boot.whole) {
    app.drawFrame();
    app.drawTabs();
    app.busy(true);
    const error = await app.fetchExamples().catch(asAskError);
    if (!current()) return undefined;
    if (error) return app.fail(error);
  }
  const before = app.questions();
  choose(app, wish);
  app.slot = 0;
  restoreOwn(app, history.state?.[OWN]);
  const usual = isDefault(app, wish);
  app.drawDoor();
  app.drawTabs();
  // Nothing has to be asked before something is seen.
  const here = usual ? app.pictures.map(({ id }) => views.find(({ picture }) => picture.id === id)) : [];
  const same = app.state && !open && app.questions() === before;
  const outcome = await app.load([...app.pictures.keys()], same ? present(app.state).views : here, wish, "model");
  if (!app.state && wish.picture && ["bad_request", "bad_image"].includes(outcome)) return showAnother(app, wish);
  return outcome === "shown" && arrive(app);
}

/**
 * The image of a link may not be here (another data folder): show the usual first one, and say so.
 * @param {App} app @param {Wish} given
 */
async function showAnother(app, { picture, picture2, ...wish }) {
  choose(app, wish);
  if (await app.load([0], [], wish) !== "shown") return;
  arrive(app);
  app.notify("The link's image isn't on this server; here is another one.");
}

/**
 * What the address asked for is on the stage, or what stands in its place: the same entry of the history.
 * @param {App} app
 */
function arrive(app) {
  app.page = null;
  writeAddress(app);
}

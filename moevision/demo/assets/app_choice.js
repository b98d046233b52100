// What is chosen: from the address, and one image or two.

import { opensDoor, readAway } from "./app_flow.js";
import { limitable, otherK } from "./app_rail.js";
import { readIntervention, readNoise } from "./app_share.js";
/** @import { App } from "./app.js" */
/** @import { Wish } from "./types.js" */

/**
 * Take over what the address asks for, as far as this server has it.
 * @param {App} app @param {Wish} wish
 */
export function choose(app, wish) {
  const { models, default: first } = app.boot;
  const find = (id) => models.find((model) => model.id === id);
  app.model = find(wish.model) ?? find(first?.model) ?? models[0];
  app.variant = app.model.variants.find((name) => name === wish.variant) ?? app.model.variants[0];
  // The rail shows a few examples; a link may name any image that the server knows.
  const usual = app.model.examples.find(({ id }) => id === first?.picture) ?? app.model.examples[0];
  const chosen = wish.picture ?? usual?.id;
  app.pictures = [chosen ? { kind: "example", id: chosen } : { kind: "none" }];
  if (wish.picture2) app.pictures.push({ kind: "example", id: wish.picture2 });
  app.door ||= opensDoor(wish);
  app.away = readAway(wish.away, app.model);
  const k = Number(wish.k);
  app.topK = Number.isInteger(k) && k >= 1 && k <= app.model.max_top_k ? otherK(app.model, k) : null;
  const capacity = Number(wish.capacity);
  const limited = wish.capacity !== undefined && limitable(app.model).length > 0;
  app.capacity = limited && capacity >= 0.25 && capacity <= 2 ? capacity : null;
  app.noise = readNoise(wish.noise, app.model);
  app.intervention = app.boot.device ? null : readIntervention(wish.do, app.model);
  app.ranked = { key: wish.list ?? null, only: wish.class ?? null };
  app.tab = app.tabs.find(({ id }) => id === wish.tab)?.id ?? app.tab;
}

/**
 * Whether the first view, which comes with the page, is what the address asks for.
 * @param {App} app @param {Wish} wish
 */
export function isDefault(app, wish) {
  const { default: first } = app.boot;
  return app.model.id === first?.model && app.variant === app.model.variants[0] && app.pictures[0].id === first?.picture
    && app.topK === null && app.capacity === null && app.noise === null && app.intervention === null && !app.away.length && wish.picture2 === undefined;
}

/** @param {App} app @param {number} count */
export function chooseCount(app, count) {
  if (count === app.pictures.length) return undefined;
  if (count === 1) {
    app.pictures.length = 1;
    app.slot = 0;
    if (app.waiting || app.pending.slots.length || !app.state) return app.load([0]);
    app.drawFrame();
    return app.show([app.state.views[0]], "picture");
  }
  if (!addOther(app)) app.pictures.push({ ...app.pictures[0] });
  app.slot = 1;
  return app.load([1]);
}

/**
 * Put an example of another class beside the first image; false where there is none.
 * @param {App} app
 */
export function addOther(app) {
  const first = app.model.examples.find(({ id }) => id === app.pictures[0].id);
  const label = first ? first.label : app.state?.views[0].picture.label;
  const other = app.model.examples.find((one) => one.id !== app.pictures[0].id && one.label !== label);
  if (other) app.pictures.push({ kind: "example", id: other.id });
  return other !== undefined;
}

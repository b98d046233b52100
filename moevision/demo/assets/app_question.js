// The sentence that the page opens on: where the shown images differ most, counted in them and in all images of the atlas.

import { capital, expertShares } from "./core_kinds.js";
import { momentWords, trainedView } from "./core_time.js";
import { fillBox, html, percent, present } from "./core_util.js";
/** @import { App } from "./app.js" */
/** @import { ClassesAnswer, ClassLayer, Layer, View } from "./types.js" */

/**
 * The expert whose shares of two classes differ most, among those that stand out for either; null where none does.
 * @param {ClassLayer} counted @param {number} first @param {number} second
 */
export function tellingExpert({ share, significant }, first, second) {
  const apart = (expert) => Math.abs((share[first][expert] ?? 0) - (share[second][expert] ?? 0));
  const able = [...share[first].keys()].filter((expert) => significant[first][expert] || significant[second][expert]);
  return able.length ? able.reduce((best, expert) => (apart(expert) > apart(best) ? expert : best)) : null;
}

/**
 * The sentence as [expert, words]; null where the images have no two classes that were counted.
 * @param {ClassesAnswer} answer @param {View[]} views @param {Layer} layer
 */
export function question(answer, views, layer) {
  const counted = answer.layers.find((one) => one.layer === layer.layer);
  const [a, b] = views.map(({ picture }) => picture.label ?? "");
  const [first, second] = [a, b].map((name) => answer.class_names.indexOf(name));
  if (!counted || first === second || [first, second].some((place) => place < 0 || counted.share[place][0] === null)) return null;
  const expert = tellingExpert(counted, first, second);
  if (expert === null) return [null, `No expert of ${layer.name} stands out for ${a} or ${b}, counted over ${answer.n_images} images.`];
  const share = (view) => expertShares(present(view.layers.find((one) => one.layer === layer.layer)))[expert];
  const [here, { moment }] = [views.map(share), views[0]];
  if (moment) {
    const now = views.map((view) => percent(share(trainedView(view)))).join(" and ");
    return [expert, `${capital(momentWords(moment))}, expert ${expert} of ${layer.name} takes ${percent(here[0])} of this ${a} and ${percent(here[1])} of this ${b}. Trained: ${now}.`];
  }
  return [expert, `Expert ${expert} of ${layer.name} takes ${percent(here[0])} of this ${a} and ${percent(here[1])} of this ${b}. `
    + `Over all ${answer.n_images} counted images: ${percent(counted.share[first][expert] ?? 0)} for ${a}, ${percent(counted.share[second][expert] ?? 0)} for ${b}.`];
}

/** @param {App} app */
export async function drawQuestion(app) {
  const state = present(app.state);
  const box = app.core.box("question");
  const [views, layer] = [state.views, state.currentLayer];
  if (views.length < 2 || !app.model.has_pictures) return fillBox(box, "");
  const { id: model, variant } = views[0].model;
  // Its place is kept until it is counted, and what was counted of another network doesn't stand there meanwhile.
  if (!box.firstElementChild || box.dataset.network !== `${model} ${variant}`) fillBox(box, html`<p class="mv-asking mv-soft">Counting…</p>`);
  box.dataset.network = `${model} ${variant}`;
  const ticket = (app.asking = Symbol(layer.name));
  const wanted = () => app.asking === ticket && state.views === views && state.currentLayer === layer;
  const answer = await app.asker.whenReady("classes", { model, variant }, wanted).catch(() => null);
  if (!wanted()) return undefined;
  const found = answer && question(answer, views, layer);
  if (!found) return fillBox(box, "");
  const [expert, words] = found;
  // The page opens on that expert; afterwards the choice is the visitor's.
  if (app.opening) {
    Object.assign(app, { opening: false, given: expert }); // no place in the history, no page of its own
    state.set({ highlight: expert });
  }
  return fillBox(box, html`<p class="mv-question">${words} ${expert !== null && html`<button type="button" class="mv-quiet" data-action="highlight"
    data-expert="${expert}" data-key="question">${state.highlight === expert ? "Show all experts" : "Show its patches"}</button>`}</p>`);
}

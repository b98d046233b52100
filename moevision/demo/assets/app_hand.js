// Changes of the routing other than taking experts away, which is the opening's (core_flow.js); and what one change does
// to the answer, beside as many random changes.

import { asAskError, pause } from "./app_server.js";
import { answerWords, controlWords, effectOf, effects } from "./core_effect.js";
import { fillBox, fixed, html, present, signed } from "./core_util.js";
import { changedWords } from "./core_words.js";
/** @import { App } from "./app.js" */
/** @import { ClassEffect, Intervention, View } from "./types.js" */

/**
 * The question whose effect is measured: of an intervention, or of the experts that are away.
 * @param {App} app @param {View} view
 */
function oneChange(app, view) {
  const { away = [], ...question } = app.questionOf(view);
  if (question.intervention || (away.length > 1 && !skipsLayer(view, away))) return app.questionOf(view);
  if (away.length !== 1) return null;
  const [[layer, expert]] = away;
  return { ...question, intervention: { kind: "ablate", layer, expert } };
}

/** Of a layer without any expert all choices are moved, at random as well. @param {View} view @param {[number, number][]} away */
const skipsLayer = ({ layers }, away) =>
  layers.some(({ layer, num_experts: experts }) => away.filter(([where]) => where === layer).length === experts);

/**
 * The view comes after one pass, the effect after many more: it is measured for who looks, not for who clicks on.
 * @param {App} app @param {View} view
 */
export async function measure(app, view) {
  const question = view.moment ? null : oneChange(app, view);
  if (!question || effects.has(view)) return;
  effects.set(view, null);
  const { ticket } = app;
  await pause(400);
  if (app.ticket !== ticket) return void effects.delete(view);
  effects.set(view, await app.asker.ask("what_if", question).catch(asAskError));
  if (app.state?.view !== view) return;
  app.core.flow.tell();
  app.announceResult(view);
}

/** @param {Intervention | null} one @param {Intervention | null} other */
const same = (one, other) => JSON.stringify(one) === JSON.stringify(other);

/** @param {number} layer @param {number} expert @returns {Intervention} */
const forced = (layer, expert) => ({ kind: "force", layer, expert, fill: "next_best", seed: 0 });

/** @param {App} app */
export const handActions = (app) => ({
  // What is on already goes off by the same button.
  hand: () => {
    const { currentLayer: { layer }, highlight: expert } = present(app.state);
    const wished = forced(layer, Number(expert));
    return app.chooseSettings({ intervention: same(wished, app.intervention) ? null : wished });
  },
  "hand-class": () => tellClass(app),
});

/** What can be done with the expert whose patches stand out. @param {App} app */
export function drawHand(app) {
  const { currentLayer: { layer }, highlight: expert } = present(app.state);
  // While another model is on its way, the expert is still one of the model before.
  const router = app.model.routers.find((one) => one.layer === layer);
  const able = expert !== null && router && !("force" in router.refused);
  fillBox(app.core.box("hand"), able && html`<button type="button" class="mv-button" data-action="hand" data-key="hand"
    aria-pressed="${same(forced(layer, expert), app.intervention)}">Send all patches to expert ${expert}</button>`);
}

/** What the same change does over images of the class. @param {App} app */
async function tellClass(app) {
  const { view } = present(app.state);
  const { picture, ...asked } = /** @type {any} */ (oneChange(app, view));
  const tell = (words) => { overClass.set(view, words); app.core.flow.tell(); };
  const target = effectOf(view)?.target;
  tell("Looking at them…");
  const answer = await app.asker.remember("class_effect", { ...asked, class: target }).catch(asAskError);
  if (answer instanceof Error) return tell(answer.message);
  const { class_effect: found, without } = answer;
  return tell(found ? classWords(found) : withoutWords({ without }) || `There are too few images of ${target} here.`);
}

/** @type {WeakMap<View, string>} */
const overClass = new WeakMap();

/** What its change does over more images, or a button that asks for it: for who looks closer. @param {View} view */
export function classPart(view) {
  const effect = effectOf(view);
  const { intervention, away = [] } = view.settings;
  if (!effect || !(intervention || away.length === 1)) return "";
  return html`<p class="mv-soft mv-detail" data-part="class">${overClass.get(view) ?? html`<button type="button" class="mv-quiet"
    data-action="hand-class" data-key="hand-class">Over more images of ${effect.target}</button>`}</p>`;
}

/** @param {ClassEffect} given */
export function classWords({ n, class: name, delta_p: p, delta_logit: logit, sd_logit: sd, control_delta_logit: control }) {
  const spread = sd !== null && Number.isFinite(sd) ? ` ± ${fixed(sd, 3)} between images` : "";
  const beside = control !== null && Number.isFinite(control) ? `; with random choices instead ${signed(control, 3)}` : "";
  return `Over ${n} images of ${name}: ${signed(p * 100, 1)} points of probability, logit ${signed(logit, 3)}${spread}${beside}.`;
}

/**
 * What taking an expert away does over test images; empty where nobody measured it.
 * @param {Pick<import("./types.js").ExpertCard, "without">} card
 */
export function withoutWords({ without }) {
  if (!without) return "";
  const { images_per_class: images, delta_logit: delta, control_delta_logit: control } = without;
  const beside = control === null ? "" : `, as much at random ${signed(control)}`;
  return `Taken away, over ${images} test images of each class: logit of the true class ${signed(delta)}${beside}; `
    + `most for ${without.strongest_class}, ${signed(without.strongest_delta_logit)}.`;
}

/** All of a result, for a screen reader. @param {View} view */
export function spokenResult(view) {
  const effect = effectOf(view);
  return effect && `${changedWords(view)} ${answerWords(effect)}. ${controlWords(effect)}`;
}

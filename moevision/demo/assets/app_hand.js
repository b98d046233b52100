// An expert in the hand: chosen under the image, every patch is sent to it, or it is swapped with another; and what one
// change does to the answer, beside as many random changes. Taking experts away is the opening's (core_flow.js).

import { asAskError, pause } from "./app_server.js";
import { answerWords, controlWords, effectOf, effects, moves } from "./core_effect.js";
import { capital, isAway } from "./core_kinds.js";
import { chip, fillBox, fixed, html, layerExpert, present, signed } from "./core_util.js";
import { changedWords } from "./core_words.js";
/** @import { App } from "./app.js" */
/** @import { ClassEffect, Fill, Intervention, Layer, View } from "./types.js" */

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
  drawHand(app);
  app.core.flow.tell();
  app.announceResult(view);
}

/** @param {Intervention | null} one @param {Intervention | null} other */
const same = (one, other) => JSON.stringify(one) === JSON.stringify(other);

/** @param {any} given @returns {Intervention} */
const wish = ({ kind, layer, expert, other }) => ({ kind, layer: layer === "" ? null : Number(layer),
  expert: expert === "" ? null : Number(expert), ...(other === "" ? {} : { other: Number(other) }), fill: "next_best", seed: 0 });

/** @param {App} app */
export const handActions = (app) => ({
  // What is on already goes off by the same button.
  hand: (button) => {
    const wished = wish(button.dataset);
    return app.chooseSettings({ intervention: same(wished, app.intervention) ? null : wished });
  },
  "hand-swap": () => { app.swapping = !app.swapping; drawHand(app); },
  "hand-class": () => tellClass(app),
});

/**
 * A button that changes the routing, or undoes that.
 * @param {App} app @param {string} label @param {{ kind: string, layer: number | null, expert?: number, other?: number }} given
 * @param {Fill} [mark] in the place of the label, which is spoken
 */
export function handButton({ intervention }, label, { kind, layer, expert, other }, mark) {
  const data = { kind, layer: layer ?? "", expert: expert ?? "", other: other ?? "" };
  return html`<button type="button" class="${mark ? "mv-pick" : "mv-button"}" data-action="hand" aria-label="${label}"
    data-kind="${kind}" data-layer="${data.layer}" data-expert="${data.expert}" data-other="${data.other}"
    data-key="hand-${kind}-${data.layer}-${data.other}" aria-pressed="${same(wish(data), intervention)}">${mark ?? label}</button>`;
}

/** @param {App} app */
export function drawHand(app) {
  const state = present(app.state);
  if (state.highlight === null) app.swapping = false;
  const { currentLayer: layer, highlight: expert } = state;
  // While another model is on its way, the expert is still one of the model before.
  const row = state.view.model.id !== app.model.id ? ""
    : expert === null ? html`<span class="mv-soft">Click an expert to change it.</span>` : picked(app, layer, expert);
  fillBox(app.core.box("hand"), html`<div class="mv-hand-row">${row}</div>${result(state.view)}`);
}

/**
 * The expert in the hand and what can be done with it.
 * @param {App} app @param {Layer} layer @param {number} expert
 */
function picked(app, layer, expert) {
  const { refused } = present(app.model.routers.find((one) => one.layer === layer.layer));
  const others = [...Array(layer.num_experts).keys()].filter((other) => other !== expert);
  const at = { layer: layer.layer, expert };
  const away = isAway(app.away, layer.layer, expert);
  return html`<b>${layerExpert(layer, expert)}</b>
    <span class="mv-hand-row" role="group" aria-label="Change ${layerExpert(layer, expert)}">
    ${others.length > 0 && html`<button type="button" class="mv-button" data-action="take" data-expert="${expert}"
      data-key="hand-take" aria-pressed="${away}">Take away</button>`}
    ${!("force" in refused) && handButton(app, "Send all here", { kind: "force", ...at })}
    ${others.length > 0 && html`<button type="button" class="mv-button" data-action="hand-swap" data-key="hand-swap"
      aria-expanded="${app.swapping}">Swap</button>`}
    ${app.swapping && others.map((other) => handButton(app, `Swap with E${other}`, { kind: "swap", ...at, other },
    chip(other, layer.num_experts)))}</span>`;
}

/** What was changed, and before → after beside the control. @param {View} view */
function result(view) {
  const { intervention } = view.settings;
  if (!changedWords(view)) return "";
  const known = effects.has(view) && effects.get(view) !== null;
  return html`<div class="mv-results" role="${known ? "note" : "status"}"><p><b>Changed model.</b> ${changedWords(view)}</p>
    <p>${line(view)}</p><div class="mv-hand-row"><button type="button" class="mv-button"
      data-action="${intervention ? "undo" : "put-back"}" data-key="hand-undo">Undo</button>
    ${effectOf(view) && (intervention || view.settings.away?.length === 1) && html`<button type="button" class="mv-quiet" data-action="hand-class" data-key="hand-class">
      Over more images of ${effectOf(view)?.target}</button>`}</div><p data-part="class" aria-live="polite"></p></div>`;
}

/** @param {View} view */
function line(view) {
  if (!effects.has(view)) return "";
  const effect = effects.get(view);
  if (!effect) return "Measuring it beside as much at random…";
  if (effect instanceof Error) return effect.message;
  const { control } = effect;
  if (!moves(effect) || !control) return html`<b>${answerWords(effect)}</b>. ${controlWords(effect)}`;
  return html`<b>${answerWords(effect)}</b>. <button type="button" class="mv-term mv-soft"
    data-tip="${capital(control.what)}, ${control.n} times: mean and standard deviation.">${controlWords(effect)}</button>`;
}

/**
 * What the same change does over images of the class.
 * @param {App} app
 */
async function tellClass(app) {
  const { view } = present(app.state);
  const { picture, ...asked } = /** @type {any} */ (oneChange(app, view));
  const tell = (words) => app.state?.view === view && fillBox(app.core.box("hand").querySelector("[data-part=class]"), words);
  const target = effectOf(view)?.target;
  tell("Looking at them…");
  const answer = await app.asker.remember("class_effect", { ...asked, class: target }).catch(asAskError);
  if (answer instanceof Error) return void tell(answer.message);
  const { class_effect: found, without } = answer;
  tell(found ? classWords(found) : withoutWords({ without }) || `There are too few images of ${target} here.`);
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

/**
 * All of a result, for a screen reader.
 * @param {View} view
 */
export function spokenResult(view) {
  const effect = effectOf(view);
  return effect && `${changedWords(view)} ${answerWords(effect)}. ${controlWords(effect)}`;
}

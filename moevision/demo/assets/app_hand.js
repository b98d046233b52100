// An expert in the hand: chosen under the image, it is taken away, forced or swapped there, and what that does to the
// answer stands in the same place, beside as many random changes.

import { asAskError } from "./app_server.js";
import { interventionWords } from "./core_answer.js";
import { capital } from "./core_kinds.js";
import { chip, fillBox, html, layerExpert, percent, present } from "./core_util.js";
/** @import { App } from "./app.js" */
/** @import { Effect, Intervention, Layer, View } from "./types.js" */

/** @type {WeakMap<View, Effect | Error>} */
const effects = new WeakMap();

/**
 * What the intervention of a view did to its answer; null where none was measured, or not yet.
 * @param {View} view
 */
export function effectOf(view) {
  const found = effects.get(view) ?? null;
  return found instanceof Error ? null : found;
}

/**
 * The view of an image after one pass. The effect of an intervention takes many more: it is measured while the view is
 * looked at, but not under noise.
 * @param {App} app @param {number} slot @param {(words: string) => unknown} words
 * @returns {Promise<View>}
 */
export async function askView(app, slot, words) {
  const question = app.question(slot);
  const view = await app.asker.ask("route", question, words);
  if (question.intervention && question.noise === null) measure(app, question, view);
  return view;
}

/** @param {App} app @param {object} question @param {View} view */
async function measure(app, question, view) {
  effects.set(view, await app.asker.ask("what_if", question).catch(asAskError));
  if (!app.state?.views.includes(view)) return;
  drawHand(app);
  app.announceResult(view);
  app.refreshTab("settings");
}

/** @param {Intervention | null} one @param {Intervention | null} other */
const same = (one, other) => JSON.stringify(one) === JSON.stringify(other);

/** @param {App} app @param {any} fields @returns {Intervention} */
function wish(app, { kind, other }) {
  const { currentLayer: { layer }, highlight: expert } = present(app.state);
  return { kind, layer, expert, ...(other === undefined ? {} : { other: Number(other) }), fill: "next_best", seed: 0 };
}

/** @param {App} app */
export function handActions(app) {
  const { highlight } = app.core.actions;
  return {
    highlight: (button, event) => {
      highlight(button, event);
      if (!button.closest(".mv-inspector")) return;
      app.core.sheet.open(false);
      app.core.box("hand").scrollIntoView({ block: "nearest" });
    },
    // What is on already goes off by the same button.
    hand: (button) => {
      const wished = wish(app, button.dataset);
      return app.change(same(wished, app.intervention) ? null : wished);
    },
    "hand-swap": () => { app.swapping = !app.swapping; drawHand(app); },
    "hand-more": () => { app.openTab("whatif"); app.core.box("tabs").scrollIntoView({ block: "start" }); },
  };
}

/** @param {App} app */
export function drawHand(app) {
  const state = present(app.state);
  if (state.highlight === null) app.swapping = false;
  const { currentLayer: layer, highlight: expert, mode } = state;
  // While another model is on its way, the expert is still one of the model before.
  const row = state.view.model.id !== app.model.id ? "" : expert === null ? html`<span class="mv-soft">Click an expert to change it.</span>` : picked(app, layer, expert);
  fillBox(app.core.box("hand"), html`${mode !== "slots" && html`<div class="mv-hand-row">${row}</div>`}${app.intervention && results(app)}`);
}

/**
 * The expert in the hand and what can be done with it.
 * @param {App} app @param {Layer} layer @param {number} expert
 */
function picked(app, layer, expert) {
  const { refused } = present(app.model.routers.find((one) => one.layer === layer.layer));
  const others = [...Array(layer.num_experts).keys()].filter((other) => other !== expert);
  const button = (kind, label, other) => html`<button type="button" class="${other === undefined ? "mv-button" : "mv-pick"}" data-action="hand" data-kind="${kind}"
    ${other !== undefined && html`data-other="${other}" aria-label="Swap with E${other}"`} data-key="hand-${kind}-${other}"
    aria-pressed="${same(wish(app, { kind, other }), app.intervention)}">${label}</button>`;
  return html`<b>${layerExpert(layer, expert)}</b><span class="mv-hand-row" role="group" aria-label="Change ${layerExpert(layer, expert)}">
    ${others.length > 0 && button("ablate", "Take away")}${!("force" in refused) && button("force", "Send all here")}
    ${others.length > 0 && html`<button type="button" class="mv-button" data-action="hand-swap" data-key="hand-swap" aria-expanded="${app.swapping}">Swap</button>`}
    ${app.swapping && others.map((other) => button("swap", chip(other, layer.num_experts), other))}</span>`;
}

/**
 * What was changed, and for each image before → after beside the control.
 * @param {App} app
 */
function results(app) {
  const { views } = present(app.state);
  const undo = html`<button type="button" class="mv-button" data-action="undo" data-key="hand-undo">Undo</button>`;
  if (!views.every(({ settings }) => same(settings.intervention, app.intervention))) {
    return html`<div class="mv-results"><p role="status">${app.waiting && "Trying it, and as much at random…"}</p><div class="mv-hand-row">${undo}</div></div>`;
  }
  const place = (slot) => views.length > 1 && html`<span class="mv-soft">${["First", "Second"][slot]} image:</span> `;
  const measured = views.every((view) => effects.has(view) || typeof view.settings.noise === "number");
  return html`<div class="mv-results" role="${measured ? "note" : "status"}"><p><b>Changed model.</b> ${interventionWords(present(app.intervention), app.model.routers)}</p>
    ${views.map((view, slot) => html`<p>${place(slot)}${line(view)}</p>`)}
    <div class="mv-hand-row">${undo}${effectOf(views[0]) && html`<button type="button" class="mv-quiet" data-action="hand-more" data-key="hand-more">All numbers</button>`}</div></div>`;
}

/** @param {View} view */
function line(view) {
  const effect = effectOf(view);
  if (!effect && typeof view.settings.noise === "number") return "A change is measured without noise: turn the noise off.";
  if (!effect) return html`<span role="status">${/** @type {Error | undefined} */ (effects.get(view))?.message ?? "Measuring it beside as much at random…"}</span>`;
  const { control } = effect;
  if (!moves(effect) || !control) return html`<b>${answerWords(effect)}</b>. ${controlWords(effect)}`;
  return html`<b>${answerWords(effect)}</b>. <button type="button" class="mv-term mv-soft"
    data-tip="${capital(control.what)}, ${control.n} times: mean and standard deviation.">${controlWords(effect)}</button>`;
}

/**
 * All of a result, for a screen reader.
 * @param {View} view
 */
export function spokenResult(view) {
  const effect = effectOf(view);
  const { intervention } = view.settings;
  return effect && intervention && `${interventionWords(intervention, view.model.routers)} ${answerWords(effect)}. ${controlWords(effect)}`;
}

/** What stands where a control would be the change itself. */
export const NO_CONTROL = "No control: as many random choices are these, since an image has one expert.";

/** @param {Effect} effect */
const moves = ({ moved, moved_prefix: prefix }) => moved + prefix > 0;

/**
 * Mean and standard deviation of the control's probability of the class, and the digits that the spread leaves.
 * @param {NonNullable<Effect["control"]>} control @param {Effect["before"]} before
 */
function controlled({ delta_ps: deltas }, before) {
  const mean = deltas.reduce((sum, delta) => sum + delta, 0) / deltas.length;
  const spread = Math.sqrt(deltas.reduce((sum, delta) => sum + (delta - mean) ** 2, 0) / (deltas.length - 1));
  return { mean: before[0].p + mean, spread, digits: spread < 0.0095 ? 1 : 0 };
}

/**
 * "cat 92 % → 31 %, now dog", or that it stays: what becomes of the class that was predicted before.
 * @param {Effect} effect
 */
export function answerWords(effect) {
  const { before, after, target, delta_p: delta, control } = effect;
  const digits = control ? controlled(control, before).digits : 0;
  const [old, now] = [before[0].p, before[0].p + delta].map((p) => percent(p, digits));
  const other = after[0].class === target ? "" : `, now ${after[0].class}`;
  return old === now ? `${target} stays ${now}${other}` : `${target} ${old} → ${now}${other}`;
}

/** @param {Effect} effect */
export function controlWords(effect) {
  if (!moves(effect)) return "No patch changes its experts, so there is nothing to compare with.";
  if (!effect.control) return NO_CONTROL;
  const { mean, spread, digits } = controlled(effect.control, effect.before);
  return `As much at random: ${percent(mean, digits)} ± ${percent(spread, digits)}`;
}

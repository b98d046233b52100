// Tab "What if": all numbers of the change that is on, and what chance changes of that size do; and the changes that
// aren't about one expert. What one does with an expert is in app_hand.js.

import { effectOf, NO_CONTROL } from "./app_hand.js";
import { asAskError, errorBox } from "./app_server.js";
import { FILL_WORDS, predictionColumn, RANDOM_WORDS } from "./core_answer.js";
import { withoutWords } from "./tab_experts_words.js";
import { expertColour, fillBox, fixed, html, inkOn, Markup, present, signed, term } from "./core_util.js";
/** @import { App } from "./app.js" */
/** @import { ClassEffect, Effect, Intervention, Wanted } from "./types.js" */

export class WhatIfTab {
  /** @param {App} app */
  constructor(app) {
    this.app = app;
    this.id = "whatif";
    this.label = "What if";
    this.follows = ["model", "picture", "settings", "layer"];
    this.changes = { "if-fill": (select) => app.change(/** @type {Intervention} */ ({ ...app.intervention, fill: select.value })) };
    this.actions = {
      "if-random": (button) => app.change({ kind: "random", layer: button.dataset.layer ? Number(button.dataset.layer) : null, expert: null, fill: "next_best", seed: 0 }),
    };
  }

  /** @param {HTMLElement} panel @param {Wanted} wanted */
  async draw(panel, wanted) {
    const { app } = this;
    const [view] = present(app.state).views;
    const effect = effectOf(view);
    fillBox(panel, html`${this.choices()}<div data-part="result">${effect ? this.story(effect) : view.settings.intervention ? "" : html`<p class="mv-note mv-lead">Click an expert under the image to take it
      away, to send every patch to it, or to swap it with another. The answer then stands there beside a control, and all its numbers here.</p>`}</div>`);
    if (!effect) return;
    const told = panel.querySelector("[data-part=class]");
    try {
      const { picture, noise, ...asked } = app.questionOf(view);
      const { class_effect: byClass, without } = await app.asker.ask("class_effect", { ...asked, class: effect.target });
      if (wanted()) fillBox(told, byClass ? classWords(byClass) : withoutWords({ without }));
    } catch (error) {
      if (wanted()) fillBox(told, errorBox(asAskError(error)));
    }
  }

  /** What an absent expert's patches get, and random routing: in the layer that is shown, and in every layer. */
  choices() {
    const { intervention } = this.app;
    const { currentLayer, view: { model: { routers } } } = present(this.app.state);
    const shown = present(routers.find(({ layer }) => layer === currentLayer.layer));
    const random = (layer, label) => html`<button type="button" class="mv-button" data-action="if-random" data-layer="${layer}" data-key="if-random-${layer}"
      aria-pressed="${intervention?.kind === "random" && intervention.layer === layer}">${label}</button>`;
    const away = intervention?.kind === "ablate" && routers.find(({ layer }) => layer === intervention.layer);
    return html`<div class="mv-form">${random(shown.layer, `${RANDOM_WORDS[shown.kind]} in ${shown.name}`)}
      ${routers.length > 1 && random(null, "In every layer")}
      ${away && html`<label><span>Patches of ${away.name}·E${intervention.expert}</span><select data-change="if-fill" data-key="if-fill">${Object.entries(FILL_WORDS).map(([value, words]) => html`<option
        value="${value}" ${new Markup(value === intervention.fill ? "selected" : "")}>${words[away.kind]}</option>`)}</select></label>`}</div>
      ${shown.refused.force && html`<p class="mv-note">Patches can't be sent to one expert in ${shown.name}: ${shown.refused.force}.</p>`}`;
  }

  /** @param {Effect} result */
  story(result) {
    const { before, after, control, others } = result;
    const label = present(this.app.state).views[0].picture.label;
    return html`<p class="mv-sentence">${result.sentence}</p>
      <div class="mv-split"><div class="mv-two">${predictionColumn("before", before, label)}${predictionColumn("after", after, label)}</div>
      <div><h3>Change of the ${term("logit", "logit")} of ${result.target}</h3>${this.strip(result)}
        <p class="mv-note">${control ? `Grey: ${control.what}, ${control.n} times, mean ${signed(control.mean, 3)} ± ${fixed(control.sd, 3)}.` : NO_CONTROL}
        ${others.length > 0 && "Numbers: each other expert of the layer."}</p>
        <p class="mv-note" data-part="class" aria-live="polite">Looking at more images of ${result.target}…</p></div></div>`;
  }

  /**
   * Control dots, other experts and the change itself on one axis.
   * @param {Effect} result
   */
  strip(result) {
    const { control, others } = result;
    const experts = others.length + 1; // of the layer, where the change is about one of them
    const deltas = control?.deltas ?? [];
    const values = [0, result.delta_logit, ...deltas, ...others.map((other) => other.delta_logit)].filter(Number.isFinite);
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const span = high - low || 1;
    const x = (value) => 20 + ((value - low) / span) * 440;
    const spoken = `The change is ${signed(result.delta_logit)}; ${control ? `random controls ${signed(control.mean)} plus or minus ${fixed(control.sd)}` : "no control"}`;
    const rows = stackRows(others.map(({ delta_logit: delta }) => x(delta)), 18);
    const below = 66 + 18 * Math.max(0, ...rows);
    const other = ({ expert, delta_logit: delta }, index) => {
      const colour = expertColour(expert, experts);
      return html`<g transform="translate(${x(delta)} ${62 + rows[index] * 18})"><rect x="-8" y="-8" width="16" height="16" rx="4" fill="${colour}"/>
        <text y="4" fill="${inkOn(colour)}">${expert}</text></g>`;
    };
    return html`<svg class="mv-stripplot" viewBox="0 0 480 ${below + 42}" role="img" aria-label="${spoken}">
      ${control && html`<rect class="mv-band" x="${x(control.mean - control.sd)}" width="${Math.max(1, (2 * control.sd / span) * 440)}" y="8" height="${below}"/>`}
      <line x1="${x(0)}" x2="${x(0)}" y1="8" y2="${below + 8}"/>
      ${deltas.map((delta, index) => html`<circle class="mv-control" cx="${x(delta)}" cy="${24 + (index % 4) * 7}" r="3.5"/>`)}
      ${others.map(other)}
      <path class="mv-change" d="M ${x(result.delta_logit)} 10 l 8 12 l -8 12 l -8 -12 z"/>
      <text x="${x(0)}" y="${below + 22}">0</text><text x="${x(result.delta_logit)}" y="${Math.abs(x(result.delta_logit) - x(0)) > 30 ? below + 22 : below + 36}" class="mv-strong">${signed(result.delta_logit, 3)}</text></svg>`;
  }
}

/**
 * For marks at these places the lowest row each in which no mark is nearer than `width`.
 * @param {number[]} places @param {number} width
 */
function stackRows(places, width) {
  const taken = [];
  return places.map((place) => {
    let row = 0;
    while (taken.some(([other, there]) => there === row && Math.abs(other - place) < width)) row += 1;
    taken.push([place, row]);
    return row;
  });
}

/** @param {ClassEffect} given */
function classWords({ n, class: name, delta_p: p, delta_logit: logit, sd_logit: sd, control_delta_logit: control }) {
  const spread = sd !== null && Number.isFinite(sd) ? ` ± ${fixed(sd, 3)} between images` : "";
  const beside = control !== null && Number.isFinite(control) ? `; with random choices instead ${signed(control, 3)}` : "";
  return `Over ${n} images of ${name}: ${signed(p * 100, 1)} points of probability, logit ${signed(logit, 3)}${spread}${beside}.`;
}

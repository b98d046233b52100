// Tab "What if": change the routing, see what becomes of the prediction, and what chance changes of that size do.

import { asAskError, errorBox, waitingBox } from "./app_server.js";
import { FILL_WORDS, KIND_WORDS, predictionColumn } from "./core_answer.js";
import { expertColour, fillBox, fixed, html, inkOn, Markup, present, signed, term } from "./core_util.js";
/** @import { App } from "./app.js" */
/** @import { ClassEffect, Effect, Fill, Intervention } from "./types.js" */

export class WhatIfTab {
  /** @param {App} app */
  constructor(app) {
    this.app = app;
    this.id = "whatif";
    this.label = "What if";
    this.follows = ["model", "picture", "settings"];
    this.result = null;
    /** @type {Intervention} */
    this.form = { kind: "ablate", layer: null, expert: 0, fill: "next_best", seed: 0 };
    const field = (name, convert) => (input) => { this.touched = true; this.form[name] = convert(input.value); this.result = null; this.drawForm(); };
    this.changes = {
      "if-kind": field("kind", String),
      "if-layer": field("layer", (value) => (value === "all" ? null : Number(value))),
      "if-expert": field("expert", Number),
      "if-fill": field("fill", String),
    };
    this.actions = {
      "if-run": () => this.run(),
      "if-show": () => this.app.showChanged(this.intervention(), this.result.view),
    };
  }

  /** @param {number} layer @param {number} expert */
  preset(layer, expert) {
    Object.assign(this.form, { kind: "ablate", layer, expert });
    this.touched = true;
    this.result = null;
  }

  /** @param {HTMLElement} panel */
  async draw(panel) {
    const { form, app } = this;
    const { layers } = app.model;
    this.panel = panel;
    if (form.kind !== "random" && !layers.includes(form.layer ?? -1)) form.layer = present(app.state).currentLayer.layer;
    if (!this.touched) this.suggest();
    fillBox(panel, html`<div data-part="form"></div><div data-part="result" aria-live="polite"></div>`);
    // Coming back to the tab finds the result that was left there, as long as it answers the same question.
    if (this.asked !== this.wish()) this.result = null;
    this.drawForm();
    if (this.result) this.tell(this.story(this.result));
  }

  /** Until somebody chooses: the expert of the pinned patch, in the layer that is shown. */
  suggest() {
    const { currentLayer: layer, patch } = present(this.app.state);
    Object.assign(this.form, { layer: layer.layer, expert: patch === null ? 0 : layer.experts[patch][0] ?? 0 });
  }

  drawForm() {
    const { form, app } = this;
    const { layers } = app.model;
    if (form.kind !== "random" && form.layer === null) form.layer = present(app.state).currentLayer.layer;
    const kinds = this.settle();
    const [first] = this.chosenLayers();
    const choice = (value, label, chosen) => html`<option value="${value}" ${new Markup(String(value) === String(chosen) ? "selected" : "")}>${label}</option>`;
    const pick = (name, label, options) => html`<label><span>${label}</span><select data-change="${name}" data-key="${name}">${options}</select></label>`;
    fillBox(this.panel?.querySelector("[data-part=form]"), html`<div class="mv-form">
      ${pick("if-kind", "Change", kinds.map(([value, label]) => choice(value, label, form.kind)))}
      ${pick("if-layer", "Layer", [form.kind === "random" && choice("all", "every layer", form.layer ?? "all"), ...layers.map((layer) => choice(layer, `L${layer}`, form.layer))])}
      ${form.kind !== "random" && pick("if-expert", "Expert", [...Array(first.num_experts).keys()].map((expert) => choice(expert, `E${expert}`, form.expert)))}
      ${form.kind === "ablate" && pick("if-fill", "Its patches", Object.entries(FILL_WORDS).map(([value, words]) => choice(value, words[first.kind], form.fill)))}
      <button type="button" class="mv-primary" data-action="if-run" data-key="if-run">Try it</button></div>
      ${Object.entries(first.refused).filter(([kind]) => kind in KIND_WORDS).map(([kind, why]) => html`<p class="mv-note">
        "${KIND_WORDS[kind].token_choice}" has no meaning in ${first.name}: ${why}.</p>`)}`);
    if (!this.result) {
      this.tell(html`<p class="mv-note mv-lead">The answer for this image comes beside two controls: as much
        taken away at random in the same layer, and every other expert in turn.</p>`);
    }
  }

  /** The layers that the form is about. */
  chosenLayers() {
    const { routers } = this.app.model;
    return this.form.layer === null ? routers : routers.filter(({ layer }) => layer === this.form.layer);
  }

  /** Bring the form to what the layer allows; returns the kinds of change that it does, with their words. */
  settle() {
    const { form } = this;
    const layers = this.chosenLayers();
    const way = form.layer === null ? "token_choice" : layers[0].kind;
    const allowed = (kind) => layers.every(({ refused }) => !(kind in refused));
    const kinds = Object.entries(KIND_WORDS).filter(([kind]) => allowed(kind)).map(([kind, words]) => [kind, words[way]]);
    if (!kinds.some(([kind]) => kind === form.kind)) [[form.kind]] = kinds;
    form.expert = Math.min(form.expert ?? 0, layers[0].num_experts - 1);
    return kinds;
  }

  async run() {
    const { app } = this;
    const button = /** @type {HTMLButtonElement} */ (this.panel?.querySelector("[data-action=if-run]"));
    const token = (this.token = Symbol("run"));
    this.touched = true; // what was asked stays in the form
    button.disabled = true;
    this.tell(waitingBox("Trying it, and the controls…"));
    const asked = this.wish();
    const wanted = () => this.token === token && asked === this.wish();
    try {
      const result = await app.asker.ask("what_if", JSON.parse(asked), (words) => wanted() && this.tell(waitingBox(words)));
      if (!wanted()) return;
      this.result = result;
      this.asked = asked;
      this.tell(this.story(result));
    } catch (error) {
      if (wanted()) this.tell(errorBox(asAskError(error), "if-run"));
    } finally {
      button.disabled = false;
    }
  }

  /** What the form asks about the first image, as text that can be compared. */
  wish() { return JSON.stringify({ ...this.app.question(0), noise: null, intervention: this.intervention() }); }

  /**
   * The tab may have been drawn anew, or left, since the question was asked.
   * @param {Fill} markup
   */
  tell(markup) { fillBox(this.panel?.querySelector("[data-part=result]"), markup); }

  /** @returns {Intervention} */
  intervention() {
    const { kind, layer, expert, fill, seed } = this.form;
    return { kind, layer, expert: kind === "random" ? null : expert, fill, seed };
  }

  /** @param {Effect} result */
  story(result) {
    const { before, after, control, class_effect: byClass } = result;
    const label = present(this.app.state).views[0].picture.label;
    return html`<p class="mv-sentence">${result.sentence}</p>
      <div class="mv-split"><div class="mv-two">${predictionColumn("before", before, label)}${predictionColumn("after", after, label)}</div>
      <div><h3>Change of the ${term("logit", "logit")} of ${result.target}</h3>${this.strip(result)}
        <p class="mv-note">Grey: ${control.what ?? "the same number of patch choices changed at random"}, ${control.n} times, mean ${signed(control.mean, 3)} ± ${fixed(control.sd, 3)}.
        Numbers: each other expert of the layer.</p>
        <p class="mv-note">${byClass ? classWords(byClass) : "No effect over the class: there are too few images of it here."}</p></div></div>
      <p class="mv-after"><button type="button" class="mv-button" data-action="if-show" data-key="if-show">Show the changed routing on the image</button></p>`;
  }

  /**
   * Control dots, other experts and the change itself on one axis.
   * @param {Effect} result
   */
  strip(result) {
    const { control, others } = result;
    const experts = others.length + 1; // of the layer, where the change is about one of them
    const values = [0, result.delta_logit, ...control.deltas, ...others.map((other) => other.delta_logit)].filter(Number.isFinite);
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const span = high - low || 1;
    const x = (value) => 20 + ((value - low) / span) * 440;
    const spoken = `The change is ${signed(result.delta_logit)}; random controls ${signed(control.mean)} plus or minus ${fixed(control.sd)}`;
    const rows = stackRows(others.map(({ delta_logit: delta }) => x(delta)), 18);
    const below = 66 + 18 * Math.max(0, ...rows);
    const other = ({ expert, delta_logit: delta }, index) => {
      const colour = expertColour(expert, experts);
      return html`<g transform="translate(${x(delta)} ${62 + rows[index] * 18})"><rect x="-8" y="-8" width="16" height="16" rx="4" fill="${colour}"/>
        <text y="4" fill="${inkOn(colour)}">${expert}</text></g>`;
    };
    return html`<svg class="mv-stripplot" viewBox="0 0 480 ${below + 42}" role="img" aria-label="${spoken}">
      <rect class="mv-band" x="${x(control.mean - control.sd)}" width="${Math.max(1, (2 * control.sd / span) * 440)}" y="8" height="${below}"/>
      <line x1="${x(0)}" x2="${x(0)}" y1="8" y2="${below + 8}"/>
      ${control.deltas.map((delta, index) => html`<circle class="mv-control" cx="${x(delta)}" cy="${24 + (index % 4) * 7}" r="3.5"/>`)}
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

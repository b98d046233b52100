// Tab "Compare": two images are described, two classes are tested. Finding nothing is a result too.

import { asAskError, AskError, emptyBox, errorBox, waitingBox } from "./app_server.js";
import { expertShares, shareOf } from "./core_kinds.js";
import { pictureTitle } from "./core_stage.js";
import { trainedView } from "./core_time.js";
import { chip, fillBox, fixed, html, Markup, percent, present, signed, term } from "./core_util.js";
import { NO_PICTURES } from "./tab_experts.js";
/** @import { App } from "./app.js" */
/** @import { CompareAnswer, DifferenceLayer, ExpertDifference, Fill } from "./types.js" */

export class CompareTab {
  /** @param {App} app */
  constructor(app) {
    this.app = app;
    this.id = "compare";
    this.label = "Compare";
    this.follows = ["model", "picture", "settings"];
    this.a = null;
    this.b = null;
    this.results = new Map(); // the last comparison of each variant: it is still there when somebody comes back
    const choose = (side) => (select) => { this[side] = select.value; };
    this.changes = { "compare-a": choose("a"), "compare-b": choose("b") };
    this.actions = { "compare-run": () => this.run(), "compare-two": () => app.choosePictureCount(2) };
  }

  /** @param {HTMLElement} panel */
  async draw(panel) {
    const { class_names: names, routers } = present(this.app.state).view.model;
    this.panel = panel;
    this.a = names.includes(this.a) ? this.a : names.includes("cat") ? "cat" : names[0];
    this.b = names.includes(this.b) ? this.b : names.includes("dog") ? "dog" : names[1];
    const pick = (name, label, chosen) => html`<label><span>${label}</span><select data-change="${name}" data-key="${name}">${names.map((entry) => html`
      <option ${new Markup(entry === chosen ? "selected" : "")}>${entry}</option>`)}</select></label>`;
    fillBox(panel, html`<div class="mv-split"><section><h2>Two classes</h2>
        ${this.app.model.has_pictures ? html`<p class="mv-note">Share of ${shareOf(routers)} per expert, first class minus second.</p>
          <div class="mv-form">${pick("compare-a", "Class", this.a)}${pick("compare-b", "against", this.b)}
          <button type="button" class="mv-primary" data-action="compare-run" data-key="compare-run">Compare</button></div>
          <div data-part="classes" aria-live="polite"></div>` : emptyBox("No images to compare classes with", NO_PICTURES)}</section>
      <section><h2>Two images</h2>${this.pictures()}</section></div>`);
    const result = this.results.get(this.subject());
    if (result) this.tell(this.differences(result));
  }

  /** Whose classes are compared. */
  network() {
    const { id: model, variant } = present(this.app.state).view.model;
    return { model, variant };
  }

  subject() { return Object.values(this.network()).join(" "); }

  /**
   * The tab may have been drawn anew, or left, since the question was asked.
   * @param {Fill} markup
   */
  tell(markup) { fillBox(this.panel?.querySelector("[data-part=classes]"), markup); }

  async run() {
    const { app, a, b } = this;
    if (a === b) return this.tell(errorBox(new AskError("Choose two different classes.")));
    const subject = this.subject();
    const token = (this.token = Symbol("run"));
    this.tell(waitingBox(`Comparing ${a} with ${b}…`));
    try {
      const answer = await app.asker.remember("compare", { ...this.network(), a, b });
      this.results.set(subject, answer);
      if (this.token === token && this.subject() === subject) this.tell(this.differences(answer));
    } catch (error) {
      if (this.token === token && this.subject() === subject) this.tell(errorBox(asAskError(error), "compare-run"));
    }
    return undefined;
  }

  /** @param {CompareAnswer} answer */
  differences(answer) {
    const { class_a: a, class_b: b } = answer;
    const all = answer.layers.flatMap(({ experts }) => experts);
    const reach = Math.max(...all.flatMap(({ difference, low, high }) => [difference, low ?? 0, high ?? 0].map(Math.abs)), 1e-6);
    const [found, intervals] = [all.some(({ significant }) => significant), all.some(({ low }) => low !== null)];
    return html`<p class="mv-sentence">${answer.sentence}</p>
      ${!found && html`<p class="mv-note">That is a result too: at this number of images, ${a} and ${b} share their experts.</p>`}
      <p class="mv-note">${answer.n_a} images of ${a}, ${answer.n_b} of ${b}. ${intervals ? html`Lines: 95 % intervals from resampling images. Filled: stands out after ${term("fdr", "correction")} for looking at ${all.length} experts.`
    : "Filled: the share of one of the two stands out beyond labels shuffled over images, as under Classes."}</p>
      ${answer.layers.map((layer) => html`<h3>L${layer.layer}</h3><ul class="mv-forest">${layer.experts.map((entry) => this.interval(entry, layer, reach))}</ul>`)}
      <p class="mv-forest-axis"><span>more in ${b}</span><span>0</span><span>more in ${a}</span></p>`;
  }

  /** @param {ExpertDifference} given @param {DifferenceLayer} layer @param {number} reach */
  interval({ expert, difference, low, high, q, significant }, layer, reach) {
    const at = (value) => 50 + (value / reach) * 48;
    const span = low === null || high === null || q === null ? null : `, ${signed(low * 100, 1)} to ${signed(high * 100, 1)}, q ${fixed(q, 3)}`;
    const words = `L${layer.layer}·E${expert}: ${signed(difference * 100, 1)} points${span ?? ""}`;
    return html`<li class="${significant ? "mv-stands" : ""}">${chip(expert, layer.experts.length)}
      <span class="mv-dots" role="img" aria-label="${words}"><i class="mv-zero" style="left:50%"></i>${span && html`<i class="mv-range" style="left:${at(low)}%;right:${100 - at(high)}%"></i>`}
      <i class="mv-dot ${significant ? "mv-main" : ""}" style="left:${at(difference)}%"></i></span>
      <span class="mv-num">${signed(difference * 100, 1)} pts</span></li>`;
  }

  /** Shares of two images next to each other: a description of these two, no test. */
  pictures() {
    const state = present(this.app.state);
    const [first, second] = state.views.map(trainedView);
    if (!second) {
      return html`<div class="mv-state"><p>Put a second image beside the first to see where their patches go.</p>
        <button type="button" class="mv-button" data-action="compare-two" data-key="compare-two">Show two images</button></div>`;
    }
    const block = (layer, index) => {
      const experts = layer.num_experts;
      const [here, there] = [expertShares(layer), expertShares(second.layers[index])];
      const top = Math.max(...here, ...there, 1e-6);
      const bar = (value) => html`<span class="mv-bar mv-accent"><i style="width:${(value / top) * 100}%"></i></span>`;
      return html`<h3>${layer.name}</h3><ul class="mv-mirror">${[...Array(experts).keys()].map((expert) => html`<li>
        <span class="mv-num">${percent(here[expert])}</span>${bar(here[expert])}${chip(expert, experts)}${bar(there[expert])}
        <span class="mv-num">${percent(there[expert])}</span></li>`)}</ul>`;
    };
    return html`<p class="mv-note">Part of each image that every expert computes. This describes two images: it has no interval and says nothing about their classes.</p>
      <p class="mv-mirror-head"><b>${pictureTitle(first)}</b><b>${pictureTitle(second)}</b></p>${first.layers.map(block)}`;
  }
}

// Tab "Classes": class against expert, only what stands above the null coloured; and two classes against each other.
// Finding nothing is a result too.

import { asAskError, AskError, emptyBox, errorBox, waitingBox } from "./app_server.js";
import { shareOf } from "./core_kinds.js";
import { chip, clamp, fillBox, fixed, html, layerExpert, Markup, MINUS, percent, pictureSource, present, signed } from "./core_util.js";
import { NO_PICTURES } from "./tab_experts.js";
/** @import { App } from "./app.js" */
/** @import { ClassesAnswer, CompareAnswer, DifferenceLayer, ExpertDifference, Wanted } from "./types.js" */

/** Commands stand in backticks. @param {string} sentence */
const coded = (sentence) => sentence.split("`").map((part, at) => (at % 2 ? html`<code>${part}</code>` : part));
/** The answer, and below it a line for each number that it rests on. @param {string} sentence */
const lines = (sentence) =>
  sentence.split(/(?= \()|(?<=; )/).map((part, at) => (at ? html`<span>${coded(part)}</span>` : coded(part)));
const ENOUGH = 50; // images: of fewer, hardly any class has three mistakes of one kind

export class ClassesTab {
  /** @param {App} app */
  constructor(app) {
    this.app = app;
    this.id = "classes";
    this.label = "Classes";
    this.follows = ["model", "layer"];
    this.a = "cat"; // the two that are compared, as far as the model has them
    this.b = "dog";
    /** @type {Record<string, symbol>} what was asked for last below the table and beside it */
    this.tickets = {};
    const choose = (side) => (select) => { this[side] = select.value; };
    this.changes = { "compare-a": choose("a"), "compare-b": choose("b") };
    this.actions = {
      cell: (button) => this.showCell(button.dataset.class, Number(button.dataset.expert)),
      "compare-run": () => this.compare(),
      mistakes: () => this.mistakes(),
    };
  }

  /** @param {HTMLElement} panel @param {Wanted} wanted */
  async draw(panel, wanted) {
    const { app } = this;
    const { id: model, variant, routers } = present(app.state).view.model;
    fillBox(panel, waitingBox("Counting which class goes where…"));
    const answer = await app.asker.whenReady("classes", { model, variant }, wanted);
    if (!wanted()) return;
    if (!answer.layers.length) return fillBox(panel, emptyBox("No images to count in", answer.note || NO_PICTURES));
    this.panel = panel;
    this.model = model;
    this.variant = variant;
    /** @type {ClassesAnswer} */
    this.answer = answer;
    const shown = answer.layers.find(({ layer }) => layer === present(app.state).currentLayer.layer) ?? answer.layers[0];
    this.layer = shown;
    this.kind = routers.find(({ layer }) => layer === shown.layer)?.kind;
    const [first, second] = answer.class_names;
    if (!answer.class_names.includes(this.a)) this.a = first;
    if (!answer.class_names.includes(this.b)) this.b = second;
    fillBox(panel, html`<div class="mv-split"><div><div data-part="table"></div><div data-part="cell" aria-live="polite"></div>
      ${app.model.num_examples >= ENOUGH && html`<button type="button" class="mv-button" data-action="mistakes"
        data-key="mistakes">Mistakes and routes</button>`}</div><div><h2>Three questions about ${shown.name}</h2>
        ${shown.answers.map((one) => html`<p class="mv-answer ${one.answer === "yes" && "mv-right"}">${lines(one.sentence)}</p>`)}
        <h2>Two classes</h2><p class="mv-note">Share of ${shareOf(routers)} per expert, first class minus second.</p>
        <div class="mv-form">${this.pick("a", "Class")}${this.pick("b", "against")}
          <button type="button" class="mv-primary" data-action="compare-run" data-key="compare-run">Compare</button></div>
        <div data-part="classes" aria-live="polite"></div></div></div>`);
    this.drawTable();
  }

  drawTable() {
    const [answer, layer] = [present(this.answer), this.layer];
    const empty = (row) => layer.share[row][0] === null; // no image of the class, so no share either
    const columns = [...layer.share[0].keys()];
    const marked = layer.significant.flat().filter(Boolean).length;
    const line = (name, row) => html`<tr><th scope="row">${name}</th>${empty(row)
      ? html`<td class="mv-none" colspan="${columns.length}">no images</td>` : columns.map((expert) => this.cell(row, expert))}</tr>`;
    fillBox(this.part("table"), html`
      <h2>Class × expert in ${layer.name}</h2>
      <p class="mv-note">${this.kind === "token_choice" ? "Share of a class's patch choices that an expert computes."
    : "Of what a class's patches take from experts, the part that comes from one."} Coloured: further from the expert's mean share
        than ${fixed(layer.threshold * 100, 1)} points, which the most extreme cell exceeds by chance one time in twenty
        (labels shuffled over ${answer.n_images} images). ${marked ? `${marked} cells stand out.` : "No cell stands out alone."}</p>
      <div class="mv-scroll" tabindex="0" role="region" aria-label="Class by expert"><table class="mv-heat">
        <thead><tr><th scope="col"><span class="mv-soft">class</span></th>${columns.map((expert) => html`<th scope="col">${chip(expert, columns.length)}</th>`)}</tr></thead>
        <tbody>${answer.class_names.map(line)}</tbody></table></div>
      <p class="mv-note"><i class="mv-key mv-more"></i> more than its mean share (+) <i class="mv-key mv-less"></i> less (−).
        Click a cell for its images. ${layer.load_words && `Load: ${layer.load_words}.`}</p>`);
  }

  /** @param {string} name */
  part(name) { return this.panel?.querySelector(`[data-part=${name}]`); }

  /** @param {number} row @param {number} expert */
  cell(row, expert) {
    const { share, excess, significant } = this.layer;
    const digits = this.kind === "soft" ? 1 : 0;
    const over = excess[row][expert];
    const strength = Math.round(clamp(Math.abs(over) / Math.max(...excess.flat().map(Math.abs), 1e-9), 0.15, 1) * 60);
    const marked = significant[row][expert];
    const style = marked && `background:color-mix(in srgb, var(${over > 0 ? "--more" : "--less"}) ${strength}%, transparent)`;
    const name = present(this.answer).class_names[row];
    const words = `${percent(share[row][expert], digits)}, ${signed(over * 100, 1)} points${marked ? ", stands out" : ""}`;
    return html`<td style="${style}"><button type="button" data-action="cell" data-class="${name}" data-expert="${expert}"
      data-key="cell-${row}-${expert}" aria-label="${name}, expert ${expert}: ${words}">
      ${fixed(share[row][expert] * 100, digits)}${marked && html`<sup>${over > 0 ? "+" : MINUS}</sup>`}</button></td>`;
  }

  /**
   * Ask, and show the answer in a part of the panel; who asks again there meanwhile has it.
   * @param {string} part @param {string} waiting @param {string} name @param {object} question @param {(answer: any) => any} show
   */
  async ask(part, waiting, name, question, show) {
    const ticket = (this.tickets[part] = Symbol(name));
    fillBox(this.part(part), waitingBox(waiting));
    const { model, variant } = this;
    const answer = await this.app.asker.remember(name, { model, variant, ...question }).catch(asAskError);
    if (ticket === this.tickets[part]) fillBox(this.part(part), answer instanceof AskError ? errorBox(answer) : show(answer));
  }

  /** The images of a class with most patches at an expert. @param {string} name @param {number} expert */
  showCell(name, expert) {
    const { layer } = this;
    const item = ({ id, thumb, label, share }) => html`<li><button type="button" data-action="example" data-id="${id}"
      aria-label="Open ${label}, ${percent(share)} of its patches"><img src="${pictureSource(thumb)}" alt="">
      <span>${percent(share)}</span></button></li>`;
    const question = { layer: layer.layer, expert, class: name };
    return this.ask("cell", `Looking for images of ${name}…`, "cell", question, ({ pictures }) => html`
      <h3>${name} with most patches at ${layerExpert(layer, expert)}</h3>${pictures.length
  ? html`<ul class="mv-thumbs">${pictures.map(item)}</ul>` : html`<p class="mv-note">No image of ${name} has patches there.</p>`}`);
  }

  /** Images that are called another class most often, and whose routes theirs are more like. */
  mistakes() {
    const open = ({ id, thumb }) => html`<li><button type="button" data-action="example" data-id="${id}"
      aria-label="Open ${id}"><img src="${pictureSource(thumb)}" alt=""></button></li>`;
    const way = ({ name, to_label: own, to_other: other }) => `${name} ${fixed(own)} and ${fixed(other)}`;
    const group = ({ label, called, images, layers, pictures }) => html`<h3>${images} of ${label}, called ${called}</h3>
      <ul class="mv-thumbs">${pictures.map(open)}</ul><p class="mv-note">How far their routes are from those of right
        ones of ${label} and of ${called} (0: equal, 1: no expert in common): ${layers.map(way).join("; ")}.</p>`;
    const none = html`<p class="mv-note">Fewer than three images of any class are called another.</p>`;
    const tell = ({ groups }) => (groups.length ? groups.map(group) : none);
    return this.ask("cell", "Looking for mistakes…", "mistakes", {}, tell);
  }

  /** @param {"a" | "b"} side @param {string} label */
  pick(side, label) {
    return html`<label><span>${label}</span><select data-change="compare-${side}" data-key="compare-${side}">
      ${present(this.answer).class_names.map((name) => html`<option ${new Markup(name === this[side] ? "selected" : "")}>${name}</option>`)}
      </select></label>`;
  }

  compare() {
    const { a, b } = this;
    if (a === b) return fillBox(this.part("classes"), errorBox(new AskError("Choose two different classes.")));
    return this.ask("classes", `Comparing ${a} with ${b}…`, "compare", { a, b }, (answer) => this.differences(answer));
  }

  /** @param {CompareAnswer} answer */
  differences({ class_a: a, class_b: b, n_a: first, n_b: second, sentence, layers }) {
    const all = layers.flatMap(({ experts }) => experts);
    const found = all.some(({ significant }) => significant);
    return html`<p class="mv-sentence">${sentence}</p>
      ${!found && html`<p class="mv-note">That is a result too: at this number of images, ${a} and ${b} share their experts.</p>`}
      <p class="mv-note">${first} images of ${a}, ${second} of ${b}. Points more of the first, or less;
        bold: beyond labels shuffled over images.</p>
      ${layers.map((layer) => html`<h3>L${layer.layer}</h3>
        <ul class="mv-forest">${layer.experts.map((entry) => difference(entry, layer))}</ul>`)}`;
  }
}

/** @param {ExpertDifference} given @param {DifferenceLayer} layer */
const difference = ({ expert, difference: more, significant }, { experts }) => html`<li class="${significant && "mv-stands"}">
  ${chip(expert, experts.length)} <span class="mv-num">${signed(more * 100, 1)} pts</span></li>`;

// Tab "Classes": class against expert, only what stands above the null coloured.

import { asAskError, emptyBox, errorBox, waitingBox } from "./app_server.js";
import { chip, clamp, fillBox, fixed, html, layerExpert, MINUS, percent, pictureSource, present, signed } from "./core_util.js";
import { NO_PICTURES } from "./tab_experts.js";
/** @import { App } from "./app.js" */
/** @import { ClassesAnswer, Wanted } from "./types.js" */

const RESET = "none";

export class ClassesTab {
  /** @param {App} app */
  constructor(app) {
    this.app = app;
    this.id = "classes";
    this.label = "Classes";
    this.follows = ["model", "layer"];
    /** @type {number | string} */
    this.byExpert = RESET;
    /** @type {number | string} */
    this.byClass = RESET;
    /** @type {string | null} whose table it is */
    this.model = null;
    /** @type {symbol | null} */
    this.cellTicket = null;
    const sort = (key, value) => { this[key] = this[key] === value ? RESET : value; this.drawTable(); };
    this.actions = {
      "sort-expert": (button) => sort("byExpert", Number(button.dataset.expert)),
      "sort-class": (button) => sort("byClass", Number(button.dataset.class)),
      cell: (button) => this.showCell(button),
    };
  }

  /** @param {HTMLElement} panel @param {Wanted} wanted */
  async draw(panel, wanted) {
    const { app } = this;
    const { id: model, variant, routers } = present(app.state).view.model;
    fillBox(panel, waitingBox("Counting which class goes where…"));
    const answer = await app.asker.whenReady("classes", { model, variant }, wanted);
    if (!wanted()) return;
    if (!answer.layers.length) return fillBox(panel, emptyBox("No images to count classes in", answer.note || NO_PICTURES));
    this.panel = panel;
    if (this.model !== model) Object.assign(this, { model, byClass: RESET, byExpert: RESET }); // its own rows and columns
    this.variant = variant;
    /** @type {ClassesAnswer} */
    this.answer = answer;
    const shown = answer.layers.find(({ layer }) => layer === present(app.state).currentLayer.layer) ?? answer.layers[0];
    this.layer = shown;
    this.kind = routers.find(({ layer }) => layer === shown.layer)?.kind;
    fillBox(panel, html`<div class="mv-split"><div><div data-part="table"></div><div data-part="cell" aria-live="polite"></div></div>
      <div>${this.information()}</div></div>`);
    this.drawTable();
  }

  drawTable() {
    const [answer, layer] = [present(this.answer), this.layer];
    const order = (size, value) => [...Array(size).keys()].sort((a, b) => (value ? value(b) - value(a) : 0) || a - b);
    const empty = (row) => layer.share[row][0] === null; // no image of the class, so no share either
    const rows = order(answer.class_names.length, this.byExpert === RESET ? null : (row) => layer.excess[row][this.byExpert] ?? -Infinity);
    const columns = order(layer.share[0].length, this.byClass === RESET ? null : (column) => layer.excess[this.byClass][column]);
    const marked = layer.significant.flat().filter(Boolean).length;
    fillBox(this.panel?.querySelector("[data-part=table]"), html`
      <h2>Class × expert in ${layer.name}</h2>
      <p class="mv-note">${this.kind === "token_choice" ? "Share of a class's patch choices that an expert computes." : "Of what a class's patches take from experts, the part that comes from one."} Coloured: further from the expert's mean share
        than ${fixed(layer.threshold * 100, 1)} points, which the most extreme cell exceeds by chance one time in twenty
        (labels shuffled over ${answer.n_images} images). ${marked ? `${marked} cells stand out.` : "No cell stands out alone."}</p>
      <div class="mv-scroll" tabindex="0" role="region" aria-label="Class by expert"><table class="mv-heat"><thead><tr><th scope="col"><span class="mv-soft">class</span></th>${columns.map((expert) => this.expertHead(expert))}</tr></thead>
      <tbody>${rows.map((row) => html`<tr><th scope="row"><button type="button" data-action="sort-class" data-class="${row}" data-key="class-${row}"
        aria-pressed="${this.byClass === row}" data-tip="Sort experts by ${answer.class_names[row]}">${answer.class_names[row]}</button></th>
        ${empty(row) ? html`<td class="mv-none" colspan="${columns.length}">no images</td>` : columns.map((expert) => this.cell(row, expert))}</tr>`)}</tbody></table></div>
      <p class="mv-note"><i class="mv-key mv-more"></i> more than its mean share (+) <i class="mv-key mv-less"></i> less (−). Click a head to sort, a cell for its images. ${layer.load_words && `Load: ${layer.load_words}.`}</p>`);
  }

  /** @param {number} expert */
  expertHead(expert) {
    const experts = this.layer.share[0].length;
    return html`<th scope="col" aria-sort="${this.byExpert === expert ? "descending" : "none"}"><button type="button" data-action="sort-expert"
      data-expert="${expert}" data-key="head-${expert}" aria-label="Sort classes by expert ${expert}">${chip(expert, experts)}</button></th>`;
  }

  /** @param {number} row @param {number} expert */
  cell(row, expert) {
    const { share, excess, significant } = this.layer;
    const over = excess[row][expert];
    const strength = Math.round(clamp(Math.abs(over) / Math.max(...excess.flat().map(Math.abs), 1e-9), 0.15, 1) * 60);
    const colour = over > 0 ? "var(--more)" : "var(--less)";
    const style = significant[row][expert] ? `background:color-mix(in srgb, ${colour} ${strength}%, transparent)` : "";
    const name = present(this.answer).class_names[row];
    return html`<td style="${style}"><button type="button" data-action="cell" data-class="${name}" data-expert="${expert}" data-key="cell-${row}-${expert}"
      aria-label="${name}, expert ${expert}: ${percent(share[row][expert], this.kind === "soft" ? 1 : 0)}, ${signed(over * 100, 1)} points${significant[row][expert] ? ", stands out" : ""}">
      ${fixed(share[row][expert] * 100, this.kind === "soft" ? 1 : 0)}${significant[row][expert] && html`<sup>${over > 0 ? "+" : MINUS}</sup>`}</button></td>`;
  }

  /** @param {HTMLElement} button */
  async showCell(button) {
    const { app, layer } = this;
    const ticket = (this.cellTicket = Symbol(button.dataset.class));
    const place = this.panel?.querySelector("[data-part=cell]");
    const { class: name, expert } = button.dataset;
    fillBox(place, waitingBox(`Looking for images of ${name}…`));
    try {
      const question = { model: this.model, variant: this.variant, layer: layer.layer, expert: Number(expert), class: name };
      const { pictures } = await app.asker.remember("cell", question);
      if (ticket !== this.cellTicket) return;
      const item = ({ id, thumb, label, share }) => {
        return html`<li><button type="button" data-action="example" data-id="${id}" aria-label="Open ${label}, ${percent(share)} of its patches">
          <img src="${pictureSource(thumb)}" alt=""><span>${percent(share)}</span></button></li>`;
      };
      fillBox(place, html`<h3>${name} with most patches at ${layerExpert(layer, Number(expert))}</h3>
        ${pictures.length ? html`<ul class="mv-thumbs">${pictures.map(item)}</ul>` : html`<p class="mv-note">No image of ${name} has patches there.</p>`}`);
    } catch (error) {
      if (ticket === this.cellTicket) fillBox(place, errorBox(asAskError(error)));
    }
  }

  information() {
    const { layer } = this;
    return html`<h2>Three questions about ${layer.name}</h2>
      ${layer.answers.map((answer) => html`<p class="mv-answer ${answer.answer === "yes" ? "mv-right" : ""}">${answer.sentence}</p>`)}`;
  }
}

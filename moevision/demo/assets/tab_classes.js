// Tab "Classes": class against expert, only what stands above the null coloured, and every number beside comparisons.

import { asAskError, emptyBox, errorBox, waitingBox } from "./app_server.js";
import {
  chip, clamp, fillBox, fixed, html, layerExpert, MINUS, percent, pictureSource, present, signed, term,
} from "./core_util.js";
import { NO_PICTURES } from "./tab_experts.js";
/** @import { App } from "./app.js" */
/** @import { ClassesAnswer, DotLine, Information, Wanted } from "./types.js" */

const COMPARISONS = {
  untrained: ["untrained router", "The same network with fresh random weights; one dot per start."],
  hash: ["hash routing", "Experts given out by a fixed hash, blind to the image."],
  hash_position: ["hash of the position", "Experts given out by a fixed hash of where the patch lies."],
  kmeans_colour: ["clusters of patch colour", "As many clusters as experts, made from the patches' colours alone."],
  kmeans_input: ["clusters of the layer's input", "As many clusters as experts, made from what the layer gets."],
};
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
        (labels shuffled over ${answer.n_images} images). ${marked ? `${marked} cells stand out.` : "No cell stands out: on these images the experts don't tell the classes apart."}</p>
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
      ${layer.answers.map((answer) => html`<p class="mv-answer ${answer.answer === "yes" ? "mv-right" : ""}">${answer.sentence}</p>`)}
      ${layer.information.length > 0 && html`<p class="mv-note">Below: what knowing the expert tells, in ${term("bits", "bits")} beyond
        shuffled labels, beside what tells as much without a trained router.</p>`}
      ${layer.information.map((entry) => this.measure(entry))}`;
  }

  /** @param {Information} entry */
  measure(entry) {
    /** @type {DotLine[]} */
    const lines = [["this router", [entry.value_bits], [entry.low, entry.high], "The router of this model, with its 95 % interval."]];
    // Of several dots the number is the one that the sentence below turns on: every other training has to exceed, and
    // every comparison to be exceeded.
    if (entry.seeds?.length) lines.push(["other training seeds", entry.seeds, null, "The same training from other random starts.", "min"]);
    Object.entries(entry.baselines ?? {}).forEach(([name, values]) => {
      const [label, tip] = COMPARISONS[name] ?? [name.replaceAll("_", " "), ""];
      lines.push([label, values, null, tip, "max"]);
    });
    return html`<section class="mv-measure"><h3>expert ↔ ${entry.about.replaceAll("_", " ")} <b class="mv-num">${fixed(entry.value_bits, 3)} bits</b>
      <span>(${fixed(entry.low, 3)} to ${fixed(entry.high, 3)}${Number.isFinite(entry.share_of_entropy) && `, ${percent(entry.share_of_entropy, 1)} of what there is to know`})</span></h3>
      ${dotLines(lines)}<p>${entry.sentence}</p></section>`;
  }
}

/**
 * Named rows of dots on one axis: [label, values, interval or null, explanation, "min" or "max": which of several is told].
 * @param {DotLine[]} lines
 */
function dotLines(lines) {
  const every = lines.flatMap(([, values, interval]) => [...values, ...(interval ?? [])]).filter(Number.isFinite);
  const [low, high] = [Math.min(0, ...every), Math.max(1e-3, ...every)];
  const at = (value) => `${((value - low) / (high - low)) * 96 + 2}%`;
  const told = (values, which) => html`${values.length > 1 && html`<small>${which}</small> `}${fixed(Math[which](...values), 3)}`;
  const line = ([label, values, interval, tip, which = "max"], index) => html`<li><span data-tip="${tip}">${label}</span><span class="mv-dots">
    <i class="mv-zero" style="left:${at(0)}"></i>
    ${interval && html`<i class="mv-range" style="left:${at(interval[0])};right:calc(100% - ${at(interval[1])})"></i>`}
    ${values.filter(Number.isFinite).map((value) => html`<i class="mv-dot ${index ? "" : "mv-main"}" style="left:${at(value)}"></i>`)}</span>
    <span class="mv-num mv-soft">${told(values, which)}</span></li>`;
  return html`<ul class="mv-lines">${lines.map(line)}</ul>`;
}

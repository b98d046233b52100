// One picture of how a layer computed a patch: from its pixels to the residual stream, left to right, in the layer's own
// numbers. A vector is drawn by a few of its numbers, one of which can be followed: gates, layer scale and stream add up.

import { goneFrom } from "./core_kinds.js";
import { computedPatch, sparsityWords } from "./core_numbers.js";
import { underlay } from "./core_stage.js";
import { chip, clamp, expertColour, fillBox, fixed, html, Markup, percent, present, rowColumn, signed } from "./core_util.js";
/** @import { ViewState } from "./core_state.js" */
/** @import { Channels, Choice, Computed, Fill, Handlers, Layer, View } from "./types.js" */

const MOST_ROWS = 8;
const MOST_DRAWN = 4; // networks; the others of a patch are one term of the sum
/** @param {number} value */
const figure = (value) => fixed(value, 3);
/** What a reader gets who calculates with the numbers that are shown. @param {number} value */
const asShown = (value) => Math.round(value * 1000) / 1000;

/** Dots of a drawn network and all lines between its three layers, as a path in a box of 84 × 72. */
const NETWORK = (() => {
  const dots = [5, 7, 5].map((count, place) => [...Array(count).keys()].map((dot) => [12 + 30 * place, (72 * (dot + 0.5)) / count]));
  const lines = dots.slice(1).flatMap((next, place) => dots[place].flatMap((from) => next.map((to) => `M${from}L${to}`)));
  return { lines: lines.join(""), dots: dots.flat() };
})();

export class Card {
  /** @param {HTMLElement} box @param {ViewState} state @param {Handlers} changes what fields do */
  constructor(box, state, changes) {
    this.box = box;
    this.state = state;
    /** @type {number | null} the place of the number that is followed; null: that which changes most */
    this.at = null;
    this.wiring = 0;
    changes.channel = (select) => this.follow(Number(select.value));
    box.addEventListener("pointermove", (event) => { // not what comes under the pointer because the page scrolls
      const cell = /** @type {HTMLElement} */ (event.target).closest?.("[data-at]");
      if (cell) this.follow(Number(/** @type {HTMLElement} */ (cell).dataset.at));
    });
    new ResizeObserver(() => this.wire()).observe(box);
  }

  /** @param {number} at */
  follow(at) {
    if (at === this.at) return;
    this.at = at;
    this.draw();
  }

  draw() {
    const { view, currentLayer: layer, patch } = this.state;
    const computed = patch === null ? null : computedPatch(view, layer, patch);
    this.box.hidden = !computed; // at a moment of the training it isn't known
    fillBox(this.box, computed && patch !== null && this.picture(view, layer, patch, computed));
    cancelAnimationFrame(this.wiring); // measured once in a frame, when all of the page is written
    this.wiring = requestAnimationFrame(() => this.wire());
  }

  /** @param {View} view @param {Layer} layer @param {number} patch @param {Computed} computed */
  picture(view, layer, patch, computed) {
    const channels = summed(computed);
    const [row, column] = rowColumn(patch, view.model.grid[1]);
    const at = this.at ?? strongestOf(channels);
    const part = (name, title, content) => html`<section class="mv-part mv-part-${name}"><h3>${title}</h3>${content}</section>`;
    return html`<h2>How ${layer.name} computed this patch</h2>
      <div class="mv-parts-row"><svg class="mv-wires" aria-hidden="true"></svg>
        ${part("patch", "A patch", this.photo(view, row, column))}
        ${part("read", html`is ${channels.of} numbers`, html`${vector("read", channels.read, at)}${numberChoice(channels, at)}`)}
        ${part("rows", layer.learned ? html`are compared with ${layer.num_experts} directions` : html`goes where a rule says`, this.rows(view, layer, computed))}
        ${part("kept", keptTitle(layer, computed), networks(view, layer, computed, channels, at))}
        ${part("sum", "their sum", vector("total", channels.total, at))}
        ${channels.before && channels.after && channels.scale && html`${channels.scale.some((one) => one !== 1) && part("scale", "× layer scale", vector("scale", channels.scale, at))}
        ${part("before", "+ the stream", vector("before", channels.before, at))}${part("after", "goes on", vector("after", channels.after, at))}`}</div>
      <p class="mv-told" data-part="told">${sumWords(layer, computed, channels, at)}</p>
      <p class="mv-note" data-part="say">${words(layer, computed)} ${computed.missing.join(" ")} ${sparsityWords(view, layer, patch)}</p>`;
  }

  /** @param {View} view @param {number} row @param {number} column */
  photo(view, row, column) {
    const [rows, columns] = view.model.grid;
    const { source, sharp } = underlay(this.state, view);
    return html`<div class="mv-zoom ${sharp && "mv-sharp"}" data-wire="patch" style="background-image:url('${source}');background-size:${100 * columns}% ${100 * rows}%;background-position:${inWindow(column, columns)}% ${inWindow(row, rows)}%"></div>
      <p class="mv-soft">row ${row}, column ${column}</p>`;
  }

  /** Scores and shares of the experts. @param {View} view @param {Layer} layer @param {Computed} computed */
  rows(view, layer, computed) {
    const { scores, noise, shares, sigmoid, bias, choices } = computed;
    const drawn = noise ? scores.map((score, each) => score + noise[each]) : scores;
    const reach = Math.max(...drawn.map(Math.abs), 1e-6);
    const shown = rowsOf(layer, computed);
    const row = (expert) => {
      const choice = choices.find((one) => one.expert === expert);
      const half = (50 * Math.abs(drawn[expert])) / reach;
      const share = sigmoid ? fixed(shares[expert]) : percent(shares[expert], layer.kind === "soft" ? 1 : 0);
      const lost = (choice && !choice.kept && choice.weight >= 0.005) || goneFrom(view, layer).includes(expert);
      return html`<li data-expert="${expert}" data-wire="row-${expert}" class="${choice?.kept || lost ? "" : "mv-away"} ${lost ? "mv-lost-row" : ""}">
        ${chip(expert, layer.num_experts)}${layer.learned ? html`<span class="mv-score"><i style="left:${drawn[expert] < 0 ? 50 - half : 50}%;width:${half}%"></i></span>
        <span class="mv-num" data-n="score">${fixed(scores[expert])}${noise && html` <small>${signed(noise[expert]).replace(/^(?=\d)/, "+")}</small>`}</span>
        <span class="mv-share"><i style="width:${100 * clamp(shares[expert], 0, 1)}%;background:${expertColour(expert, layer.num_experts)}"></i></span>
        <span class="mv-num" data-n="share">${share}${lost && !choice && html` <small>away</small>`}${bias && html` <small>${signed(bias[expert], 3)}</small>`}</span>` : html`<span>${choice ? "the rule" : ""}</span>`}</li>`;
    };
    return html`<ol class="mv-card-rows ${!layer.learned && "mv-ruled"}">${layer.learned && html`<li class="mv-row-head" aria-hidden="true"><span></span><span>score</span><span></span><span>share</span><span></span></li>`}
      ${shown.map(row)}</ol>${layer.num_experts > shown.length && html`<p class="mv-note">${layer.num_experts - shown.length} more experts aren't shown.</p>`}`;
  }

  // ---- lines between the parts ------------------------------------------------------------------------------------

  /** Lines as wide as what flows along them; where the parts stand below one another there are none. */
  wire() {
    const svg = this.box.querySelector(".mv-wires");
    if (!svg) return;
    const home = present(svg.parentElement).getBoundingClientRect();
    const parts = [...this.box.querySelectorAll(".mv-part")].map((one) => one.getBoundingClientRect());
    const inRow = home.width > 0 && parts.every(({ top }) => Math.abs(top - parts[0].top) < 2);
    svg.setAttribute("viewBox", `0 0 ${home.width || 1} ${home.height || 1}`);
    const place = (name) => this.box.querySelector(`[data-wire="${name}"]`)?.getBoundingClientRect();
    const line = ([from, to, width, colour]) => {
      const [a, b] = [place(from), place(to)];
      if (!a || !b) return "";
      const [x, y, u, v] = [a.right - home.left, a.top + a.height / 2 - home.top, b.left - home.left, b.top + b.height / 2 - home.top];
      const bend = (u - x) / 2;
      return html`<path d="M${x} ${y}C${x + bend} ${y} ${u - bend} ${v} ${u} ${v}" stroke="${colour}" stroke-width="${width}"/>`;
    };
    fillBox(svg, inRow && html`${this.wires().map(line)}`);
  }

  /** From, to, width and colour. @returns {[string, string, number, string][]} */
  wires() {
    const soft = "var(--wire)";
    const rows = /** @type {NodeListOf<HTMLElement>} */ (this.box.querySelectorAll(".mv-card-rows [data-expert]"));
    const kept = /** @type {NodeListOf<HTMLElement>} */ (this.box.querySelectorAll(".mv-network"));
    const each = [...kept].flatMap((one) => {
      const { expert, gate } = one.dataset;
      const colour = expert ? expertColour(Number(expert), this.state.currentLayer.num_experts) : soft;
      const width = 2 + 8 * clamp(Number(gate), 0, 1);
      const name = `net-${expert ?? "other"}`;
      return /** @type {[string, string, number, string][]} */ ([[expert ? `row-${expert}` : "read", name, width, colour], [name, "total", width, colour]]);
    });
    return [["patch", "read", 3, soft], ...[...rows].map((one) => /** @type {[string, string, number, string]} */ (["read", present(one.dataset.wire), 1.5, soft])), ...each,
      ["total", "scale", 3, soft], [this.box.querySelector(".mv-part-scale") ? "scale" : "total", "before", 3, soft], ["before", "after", 3, soft]];
  }
}

/** A background's position in percent counts in units of image minus window. @param {number} place from 1 @param {number} size */
const inWindow = (place, size) => (100 * (place - 1)) / Math.max(1, size - 1);

/** The choices that are drawn, in order of number. @param {Computed} computed */
const drawnOf = ({ kept }) => [...kept].sort((one, other) => other.weight - one.weight).slice(0, MOST_DRAWN).sort((one, other) => one.expert - other.expert);

/**
 * The numbers as they are shown, and their sums by these: they are the model's to the last figures. `others` is what
 * comes from networks that aren't drawn, and from the shared ones.
 * @param {Computed} computed @returns {Channels & { others: number[], given(choice: Choice): number[] }}
 */
function summed(computed) {
  const { choices, kept, channels } = computed;
  const drawn = drawnOf(computed);
  const given = (choice) => channels.outputs[choices.indexOf(choice)].map(asShown);
  const others = channels.total.map((_, place) => asShown(kept.filter((one) => !drawn.includes(one)).reduce((sum, one) => sum + one.weight * given(one)[place], channels.shared?.[place] ?? 0)));
  const total = others.map((other, place) => asShown(drawn.reduce((sum, one) => sum + asShown(one.weight) * given(one)[place], other)));
  const [scale, before] = [channels.scale, channels.before].map((values) => values && values.map(asShown));
  return { ...channels, given, others, total, scale, before, after: before && scale && total.map((value, place) => asShown(value * scale[place] + before[place])) };
}

/** Where the number stands that the layer changes most. @param {Channels} channels */
function strongestOf({ total, scale }) {
  const sizes = total.map((value, place) => Math.abs(value * (scale ? scale[place] : 1)));
  return sizes.indexOf(Math.max(...sizes));
}

/**
 * Some numbers of a vector, and the one that is followed. @param {string} name @param {number[]} values @param {number} at
 */
function vector(name, values, at) {
  const most = Math.max(...values.map(Math.abs), 1e-6);
  const cell = (value, place) => html`<i data-at="${place}" class="${place === at && "mv-at"}" style="background:color-mix(in srgb, var(${value < 0 ? "--less" : "--more"}) ${Math.round((90 * Math.abs(value)) / most)}%, var(--surface))"></i>`;
  return html`<div class="mv-vector"><div class="mv-cells" data-wire="${name}" aria-hidden="true">${values.map(cell)}</div><b class="mv-num" data-n="${name}">${figure(values[at])}</b></div>`;
}

/** @param {Channels} channels @param {number} at */
const numberChoice = ({ index }, at) => html`<label class="mv-follow"><span class="mv-soft">number</span> <select data-change="channel" data-key="channel">${index.map((channel, place) => html`
  <option value="${place}" ${new Markup(place === at ? "selected" : "")}>${channel}</option>`)}</select></label>`;

/** @param {Layer} layer @param {Computed} computed */
function keptTitle(layer, { kept }) {
  if (layer.kind === "soft") return `all ${layer.num_experts} compute`;
  return kept.length ? html`${kept.length} of ${layer.num_experts} compute` : "nobody computes";
}

/**
 * The networks that ran for a patch, each with what it gave and its gate; beyond a few, and the shared ones, as one term.
 * @param {View} view @param {Layer} layer @param {Computed} computed @param {ReturnType<typeof summed>} numbers @param {number} at
 */
function networks(view, layer, computed, numbers, at) {
  const { choices, kept, channels } = computed;
  const drawn = drawnOf(computed);
  const lost = choices.filter((choice) => !choice.kept && choice.weight >= 0.005);
  const one = (choice) => html`<div class="mv-network" data-wire="net-${choice.expert}" data-gate="${choice.weight}" data-expert="${choice.expert}">
    ${drawnNetwork(expertColour(choice.expert, layer.num_experts), channels)}${vector("given", numbers.given(choice), at)}<span class="mv-times">× <b class="mv-num" data-n="gate">${figure(choice.weight)}</b></span></div>`;
  const names = othersWords(computed);
  return html`${drawn.map(one)}${names && html`<div class="mv-network" data-wire="net-other" data-gate="0.1"><span class="mv-soft">${names}</span>${vector("others", numbers.others, at)}</div>`}
    ${lost.map(({ expert, weight }) => html`<p class="mv-lost-row">${chip(expert, layer.num_experts)} <span class="mv-num">${fixed(weight)} ${goneFrom(view, layer).includes(expert) ? "taken away" : "full"}</span></p>`)}
    ${!kept.length && !channels.shared && html`<p class="mv-soft">It goes on as it came.</p>`}`;
}

/** Networks that have a part in the sum and aren't drawn. @param {Computed} computed */
const othersWords = ({ kept, channels }) => [kept.length > MOST_DRAWN && `${kept.length - MOST_DRAWN} others`, channels.shared && "shared"].filter(Boolean).join(" and ");

/** @param {string} colour @param {Channels} channels */
const drawnNetwork = (colour, { of, hidden }) => html`<figure><svg viewBox="0 0 84 72" aria-hidden="true"><path d="${NETWORK.lines}" stroke="${colour}"/>
  ${NETWORK.dots.map(([x, y]) => html`<circle cx="${x}" cy="${y}" r="3.4" fill="${colour}"/>`)}</svg><figcaption>${of} → ${hidden} → ${of}</figcaption></figure>`;

/**
 * The sums of the number that is followed, in a sentence.
 * @param {Layer} layer @param {Computed} computed @param {ReturnType<typeof summed>} numbers @param {number} at @returns {Fill}
 */
function sumWords(layer, computed, { given, others, total, scale, before, after, index, of }, at) {
  if (!computed.kept.length && computed.channels.shared === null) return `${layer.kind === "expert_choice" ? "No expert took this patch" : "No expert computes this patch"}: it goes on as it came.`;
  const terms = drawnOf(computed).map((choice) => `${figure(choice.weight)} × ${figure(given(choice)[at])}`);
  if (othersWords(computed)) terms.push(`${figure(others[at])} (${othersWords(computed)})`);
  const scaled = scale && (scale.every((one) => one === 1) ? "" : ` × ${figure(scale[at])} (layer scale)`);
  const stream = scale && before && after && html`;${scaled} + ${figure(before[at])} of the stream = <b>${figure(after[at])}</b>`;
  return html`Number ${index[at]}: ${terms.join(" + ")} = <b>${figure(total[at])}</b>${stream}. <span class="mv-soft">Shown are the ${index.length} of ${of} numbers that ${layer.name} changes most in this image.</span>`;
}

/** What the router does, in its own words. @param {Layer} layer @param {Computed} computed */
const words = ({ steps }, { kept }) => ["scores", "shares", "kept", ...(kept.length ? ["weights"] : [])].map((step) => steps[step]).filter(Boolean).join(" ");

/**
 * The experts that have a row, in order of number; of very many those with the largest shares.
 * @param {Layer} layer @param {Computed} computed
 */
function rowsOf(layer, { shares, choices }) {
  const all = [...Array(layer.num_experts).keys()];
  if (all.length <= MOST_ROWS) return all;
  const chosen = new Set(choices.filter(({ kept }) => kept).map(({ expert }) => expert));
  const first = (expert) => (chosen.has(expert) ? 1 : 0) + shares[expert] / 1e3;
  return all.sort((a, b) => first(b) - first(a)).slice(0, MOST_ROWS).sort((a, b) => a - b);
}

// Small tools that every other file uses: escaping templates, colours, words. No state lives here.

import { HIGHLIGHT, NEUTRAL, PALETTE } from "./palette.js";
/** @import { Fill, Layer } from "./types.js" */

/** Marks a string that is HTML already, so that `html` doesn't escape it a second time. */
export class Markup {
  /** @param {string} text */
  constructor(text) { this.text = text; }
  toString() { return this.text; }
}

const ENTITIES = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
/** @param {unknown} value */
const escapeText = (value) => String(value).replace(/[&<>"']/g, (character) => ENTITIES[character]);

/**
 * Template tag: everything that is put in is escaped unless it came out of `html` itself (or an array of that). False
 * leaves a place empty, but a state such as aria-pressed says it: without a value a button wouldn't be a toggle.
 * @param {TemplateStringsArray} strings @param {...Fill} values
 */
export function html(strings, ...values) {
  const fill = (value) => {
    if (value === null || value === undefined || value === false) return "";
    if (value instanceof Markup) return value.text;
    return Array.isArray(value) ? value.map(fill).join("") : escapeText(value);
  };
  return new Markup(strings.reduce((text, part, index) => text + (values[index - 1] === false && /aria-(pressed|expanded|selected|checked)="$/.test(text) ? "false" : fill(values[index - 1])) + part));
}

/**
 * What must be there.
 * @template T @param {T} value @returns {NonNullable<T>}
 */
export function present(value) {
  if (value === null || value === undefined) throw new Error("a part of the page is missing");
  return value;
}

/** @param {HTMLCanvasElement} canvas */
export const brush = (canvas) => present(canvas.getContext("2d"));

/**
 * Put markup into a box, as `html` would. Focus survives if the focused element has a data-key that comes back.
 * @param {Element | null | undefined} box @param {Fill} markup
 */
export function fillBox(box, markup) {
  if (!box) return;
  const focused = /** @type {HTMLElement} */ (document.activeElement);
  const key = box.contains(focused) ? focused.dataset.key : undefined;
  box.innerHTML = String(html`${markup}`);
  if (key === undefined) return;
  const again = /** @type {HTMLElement | null} */ (box.querySelector(`[data-key="${CSS.escape(key)}"]`));
  again?.focus({ preventScroll: true });
}

/**
 * Only inline images are ever shown: a value that names an address would leave this machine.
 * @param {string} source
 */
export const pictureSource = (source) => (/^data:image\/(png|jpeg|webp);base64,/.test(source || "") ? source : "");

// ---- numbers ------------------------------------------------------------------------------------------------
export const MINUS = "\u2212";
// A value that rounds to nothing has no sign.
/** @param {string} text */
const withoutZeroSign = (text) => (/[1-9]/.test(text) ? text : text.replace("-", ""));
/** @param {number} value @param {number} [digits] */
export const fixed = (value, digits = 2) => (Number.isFinite(value) ? withoutZeroSign(value.toFixed(digits)).replace("-", MINUS) : "–");
/** @param {number} value @param {number} [digits] */
export const signed = (value, digits = 2) => (value > 0 && /[1-9]/.test(value.toFixed(digits)) ? "+" : "") + fixed(value, digits);
/** @param {number} value @param {number} [digits] */
export const percent = (value, digits = 0) => `${fixed(value * 100, digits)} %`;
/** @param {number} value @param {number} low @param {number} high */
export const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

// ---- experts ------------------------------------------------------------------------------------------------
/** @param {number} experts */
export const hasColours = (experts) => experts <= PALETTE.length;

/**
 * Beyond the palette an expert is its number on grey, and one at a time can stand out.
 * @param {number} expert @param {number} experts @param {boolean} [standsOut]
 */
export function expertColour(expert, experts, standsOut = false) {
  if (hasColours(experts)) return PALETTE[expert];
  return standsOut ? HIGHLIGHT : NEUTRAL;
}

/** @param {string} hex */
export function luminance(hex) {
  const channel = (start) => {
    const value = parseInt(hex.slice(start, start + 2), 16) / 255;
    return value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  };
  return 0.2126 * channel(1) + 0.7152 * channel(3) + 0.0722 * channel(5);
}

/**
 * Black or white, whichever is easier to read on a colour (WCAG contrast ratio; black from luminance 0.179 on).
 * @param {string} hex
 */
export const inkOn = (hex) => (luminance(hex) > 0.179 ? "#000000" : "#ffffff");

/** The colour of every scale: how much, not which. */
export const SCALE_COLOUR = "#4a3aa7";

/** @param {string} hex @param {number} alpha */
export const rgba = (hex, alpha) => {
  const part = (start) => parseInt(hex.slice(start, start + 2), 16);
  return `rgba(${part(1)},${part(3)},${part(5)},${alpha.toFixed(3)})`;
};

/**
 * Number on the expert's colour: the one mark by which an expert is known everywhere on the page.
 * @param {number} expert @param {number} experts @param {string} [extra]
 */
export function chip(expert, experts, extra = "") {
  const colour = expertColour(expert, experts);
  return html`<span class="mv-chip ${extra}" style="background:${colour};color:${inkOn(colour)}">${expert}</span>`;
}

/**
 * An expert's mark that takes the expert into the hand, and puts it back.
 * @param {Layer} layer @param {number} expert @param {number | null} highlight @param {Markup} mark @param {string} key
 */
export const pickButton = (layer, expert, highlight, mark, key) => html`<button type="button" class="mv-pick" data-action="highlight" data-expert="${expert}"
  data-key="${key}" aria-pressed="${highlight === expert}" aria-label="${layerExpert(layer, expert)}: show its patches">${mark}</button>`;

/** @param {{ name: string }} layer @param {number} expert */
export const layerExpert = (layer, expert) => `${layer.name}·E${expert}`;

// ---- patches ------------------------------------------------------------------------------------------------
/** @param {number} patch @param {number} columns */
export const rowColumn = (patch, columns) => [Math.floor(patch / columns) + 1, (patch % columns) + 1];

// ---- words that need explaining -----------------------------------------------------------------------------
export const TERMS = {
  taken: "Experts choose patches here, not patches experts. One patch may have several experts, or none; then it goes on as it came.",
  margin: "Highest minus second-highest router probability. Near 0 the choice could easily have been another one.",
  entropy: "How undecided the router is, in bits: 0 when one expert gets everything, log2 of the number of experts when all are equal.",
  capacity: "A limit on how many patches an expert takes. What comes too late is dropped: the expert adds nothing to it.",
  topk: "How many experts compute each patch.",
  dense: "A model without experts, of the same compute per image, trained by the same recipe on the same images.",
};

/** A word with its explanation on hover, focus or tap. @param {string} name @param {Fill} label */
export function term(name, label) {
  return html`<button type="button" class="mv-term" data-term="${name}" aria-description="${TERMS[name]}">${label}</button>`;
}

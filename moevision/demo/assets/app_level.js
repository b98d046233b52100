// Simple or Research: how much the page says. What only Research shows has the class `mv-research`.

import { html } from "./core_util.js";
/** @import { Wish } from "./types.js" */

const LEVEL_KEY = "moevision.level";
export const LEVELS = { simple: "Simple", research: "Research" };

/** Private windows may refuse storage; then the level lasts as long as the page. */
export const levelMemory = {
  read() { try { return localStorage.getItem(LEVEL_KEY); } catch { return null; } },
  /** @param {string} level */
  keep(level) { try { localStorage.setItem(LEVEL_KEY, level); } catch { /* nothing to keep it in */ } },
};

/**
 * The level that a link asks for, else the one of the last visit. A link to what only Research shows asks for it too.
 * @param {Wish} wish @param {string | null} kept
 */
export function levelOf(wish, kept) {
  if (wish.level !== undefined && wish.level in LEVELS) return wish.level;
  if (["mode", "slot", "k", "capacity", "noise"].some((key) => wish[key] !== undefined)) return "research";
  return kept !== null && kept in LEVELS ? kept : "simple";
}

/** @param {string} level */
export const levelSwitch = (level) => html`<div class="mv-switch" role="group" aria-label="How much the page says">${Object.entries(LEVELS).map(([name, label]) => html`<button
  type="button" data-action="level" data-level="${name}" data-key="level-${name}" aria-pressed="${name === level}">${label}</button>`)}</div>`;

// Play: one control that runs through whatever has places in a row, the layers or the moments of the training.

import { html } from "./core_util.js";
/** @import { Row } from "./types.js" */

/** @param {string} row @param {string} what runs, as in "Play the layers" */
export const playButton = (row, what) => html`<button type="button" class="mv-quiet mv-play" data-action="run" data-row="${row}" data-key="run-${row}"
  aria-label="Play ${what}">Play</button>`;

export class Player {
  /** @param {HTMLElement} root @param {Record<string, Row>} rows */
  constructor(root, rows) {
    this.root = root;
    this.rows = rows;
    /** @type {string | null} */
    this.playing = null;
    this.turn = Symbol("nothing");
  }

  /** @param {string} row */
  toggle(row) {
    if (this.playing === row) return this.stop();
    return this.run(row);
  }

  stop() {
    this.turn = Symbol("nothing");
    this.playing = null;
    this.mark();
  }

  /**
   * From the present place, or from the first one where that is the last, to the last one. Who chooses another place
   * meanwhile has it.
   * @param {string} row
   */
  async run(row) {
    const { size, at, go, ms } = this.rows[row];
    const turn = Symbol(row);
    this.turn = turn;
    this.playing = row;
    this.mark();
    for (let next = at() === size() - 1 ? 0 : at() + 1; next < size(); next += 1) {
      await go(next);
      if (next < size() - 1) await new Promise((resolve) => setTimeout(resolve, ms));
      if (this.turn !== turn) return;
      if (at() !== next) break;
    }
    this.stop();
  }

  /** Say on every button whether it plays: those of other parts are drawn anew while one runs. */
  mark() {
    this.root.classList.toggle("mv-playing", this.playing !== null);
    this.root.querySelectorAll("[data-row]").forEach((button) => {
      button.textContent = /** @type {HTMLElement} */ (button).dataset.row === this.playing ? "Pause" : "Play";
    });
  }
}

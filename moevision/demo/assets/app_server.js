// Asking the server: one place for errors, for "busy", and for answers that aren't ready yet.

import { html, Markup, present } from "./core_util.js";
/** @import { Failure, Server, Wanted } from "./types.js" */

/** What went wrong, in a sentence for the visitor. */
export class AskError extends Error {
  /** @param {string} sentence @param {string} [code] */
  constructor(sentence, code) { super(sentence); this.code = code; }
}

/** @param {number} milliseconds */
export const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
const BUSY_TRIES = 4;
const READY_TRIES = 80;

export class Asker {
  /** @param {Server} asked */
  constructor(asked) { this.server = asked; this.answers = new Map(); }

  /**
   * Call a server function with one object. A busy server is asked again a few times before that is an error.
   * @param {string} name @param {object} question @param {(words: string) => unknown} [onBusy]
   */
  async ask(name, question, onBusy = () => {}) {
    for (let attempt = 1; ; attempt += 1) {
      const answer = await this.call(name, question);
      if (!answer.error) return answer;
      if (answer.code !== "busy" || attempt >= BUSY_TRIES) throw new AskError(answer.error, answer.code);
      onBusy(answer.error);
      await pause(700 * attempt);
    }
  }

  /** @param {string} name @param {object} question */
  async call(name, question) {
    const silent = new AskError("The server doesn't answer. If it is still running, try again.", "offline");
    const answer = await Promise.resolve(this.server[name](question)).catch((cause) => {
      console.warn(`moevision: ${name} failed`, cause?.message ?? cause);
      throw silent;
    });
    if (!answer || typeof answer !== "object") throw silent;
    return answer;
  }

  /**
   * Like `ask`, but the same question is asked once. A question with an image in it has a key without: keys are kept.
   * @param {string} name @param {object} question @param {string} [key]
   */
  remember(name, question, key = JSON.stringify([name, question])) {
    if (!this.answers.has(key)) {
      const answer = this.ask(name, question).then((value) => {
        if (value.status === "computing") this.answers.delete(key);
        return value;
      });
      answer.catch(() => this.answers.delete(key));
      this.answers.set(key, answer);
    }
    return this.answers.get(key);
  }

  /**
   * Ask until the answer isn't "computing" any more; `wanted()` tells whether anybody still waits for it.
   * @param {string} name @param {object} question @param {Wanted} wanted
   */
  async whenReady(name, question, wanted) {
    for (let attempt = 0; attempt < READY_TRIES; attempt += 1) {
      const answer = await this.remember(name, question);
      if (answer.status !== "computing" || !wanted()) return answer;
      await pause(1500);
    }
    throw new AskError("This still isn't computed after two minutes. Reload the page to look again.", "busy");
  }
}

// ---- designed states ----------------------------------------------------------------------------------------

// Turned by SVG itself, which needs no rule of the style sheet.
const SPINNER = new Markup(`<svg class="mv-spinner" viewBox="0 0 24 24" aria-hidden="true"><circle cx="12" cy="12" r="9"/>
  <path d="M12 3a9 9 0 0 1 9 9"><animateTransform attributeName="transform" type="rotate" from="0 12 12" to="360 12 12" dur="0.9s" repeatCount="indefinite"/></path></svg>`);

const sliding = new WeakMap();
/**
 * Show that an answer is waited for; the bar moves where motion is wanted.
 * @param {HTMLElement} bar @param {boolean} is
 */
export function slide(bar, is) {
  bar.hidden = !is;
  sliding.get(bar)?.cancel(); // getAnimations() would lay out the page, once more for each answer
  if (!is || matchMedia("(prefers-reduced-motion: reduce)").matches) return;
  const way = [{ left: "-30%" }, { left: "100%" }];
  sliding.set(bar, present(bar.firstElementChild).animate(way, { duration: 1000, iterations: Infinity }));
}

/** @param {string} text */
export const waitingBox = (text) => html`<div class="mv-state" role="status">${SPINNER}<p>${text}</p></div>`;

/** @param {string} title @param {string} text */
export const emptyBox = (title, text) => html`<div class="mv-state"><p><b>${title}</b></p><p class="mv-note">${text}</p></div>`;

/** @param {Failure} error @param {string} [action] */
export const errorBox = (error, action) => html`<div class="mv-state mv-error" role="alert"><p><b>${error.code === "busy" ? "Busy" : "That didn't work"}</b></p>
  <p>${error.message}</p>${action && html`<button type="button" class="mv-button" data-action="${action}">Try again</button>`}</div>`;

/** Anything that isn't an AskError is a fault of the page: say so on the console too. @param {any} error */
export function asAskError(error) {
  if (error instanceof AskError) return error;
  console.error(error);
  return new AskError(`The page stumbled (${error.message}). Reload it.`, "page");
}

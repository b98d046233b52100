// Four steps for somebody who is here for the first time. Shown once per browser, skippable at every step.

import { clamp, html, present } from "./core_util.js";
/** @import { Core } from "./core.js" */

const TOUR_KEY = "moevision.tour.seen";
const TOUR = [
  { at: "verdict", title: "What does the model see?", text: "The model's guess comes first; ✓ means that it is right." },
  { at: "stage-0", title: "Where did each patch go?", text: "The number in a patch is the expert that computes it; stronger colour means a higher weight. Click a patch, or walk with the arrow keys." },
  { at: "where", title: "Why this expert?", text: "How the patch was computed, step by step, and its path through the layers." },
  { at: "tabs", title: "Is it more than chance?", text: "What each expert is for, what changes without it, and whether a pattern stands above simple comparisons." },
];

/** Private windows may refuse storage; then the tour comes again, which is better than a broken page. */
export const tourMemory = {
  seen() { try { return localStorage.getItem(TOUR_KEY) !== null; } catch { return false; } },
  keep() { try { localStorage.setItem(TOUR_KEY, "1"); } catch { /* nothing to keep it in */ } },
};

export class Tour {
  /** @param {Core} core */
  constructor(core) {
    this.core = core;
    this.step = 0;
    this.bubble = document.createElement("div");
    this.bubble.className = "mv-tour";
    this.bubble.setAttribute("role", "dialog");
    this.bubble.setAttribute("aria-label", "Tour");
    core.root.append(this.bubble);
    core.actions["tour-next"] = () => this.show(this.step + 1);
    core.actions["tour-end"] = () => this.end();
    this.onKey = (event) => { if (event.key === "Escape") this.end(); };
    document.addEventListener("keydown", this.onKey);
    this.show(0);
  }

  /** @param {number} step */
  show(step) {
    if (step >= TOUR.length) return this.end();
    this.step = step;
    const { at, title, text } = TOUR[step];
    const last = step === TOUR.length - 1;
    this.target?.classList.remove("mv-spot");
    this.target = this.core.box(at);
    this.target.classList.add("mv-spot");
    this.bubble.innerHTML = String(html`<p class="mv-soft">${step + 1} of ${TOUR.length}</p><h2>${title}</h2><p>${text}</p>
      <div class="mv-tour-foot"><button type="button" class="mv-quiet" data-action="tour-end">${last ? "" : "Skip the tour"}</button>
      <button type="button" class="mv-primary" data-action="tour-next">${last ? "Start" : "Next"}</button></div>`);
    this.place();
    /** @type {HTMLElement} */ (this.bubble.querySelector(".mv-primary")).focus({ preventScroll: true });
  }

  /** Beside the target where there is room, else below its top edge. */
  place() {
    const home = this.core.root.getBoundingClientRect();
    const at = present(this.target).getBoundingClientRect();
    const width = Math.min(320, home.width - 24);
    this.bubble.style.width = `${width}px`;
    const right = at.right + 16 + width < home.right;
    const left = right ? at.right + 16 : clamp(at.left, home.left + 12, home.right - width - 12);
    const { sheet } = this.core;
    const low = sheet.isOne && sheet.box.contains(present(this.target));
    const below = low ? at.top - this.bubble.offsetHeight - 12 : right ? at.top : Math.min(at.bottom + 12, at.top + 260);
    this.bubble.style.left = `${left - home.left}px`;
    this.bubble.style.top = `${below - home.top}px`;
    this.bubble.scrollIntoView({ block: "nearest" });
  }

  end() {
    tourMemory.keep();
    this.target?.classList.remove("mv-spot");
    document.removeEventListener("keydown", this.onKey);
    this.bubble.remove();
    // The last step is far below: what the tour was about is on the screen when it is over.
    this.core.box("verdict").scrollIntoView({ block: "nearest" });
    /** @type {HTMLElement | null} */
    const cell = this.core.box("stage-0").querySelector(".mv-cell[tabindex='0']");
    cell?.focus({ preventScroll: true });
  }
}

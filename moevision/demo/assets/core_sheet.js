// The inspector as a bottom sheet, where the style sheet fixes it there (phones). Closed, it is a bar that names the pinned
// patch; a tap or Enter on a patch opens it, and the stage moves up so that both are seen. No dialog: the rest stays usable.

import { present } from "./core_util.js";

const SWIPE = 40; // px

export class Sheet {
  /** @param {HTMLElement} root */
  constructor(root) {
    this.box = /** @type {HTMLElement} */ (present(root.querySelector(".mv-inspector")));
    this.handle = /** @type {HTMLElement} */ (present(this.box.querySelector(".mv-handle")));
    this.stage = present(root.querySelector(".mv-pictures"));
    /** @type {number | null} */
    let from = null;
    // The style sheet takes touches of this row from the browser (touch-action), or it would scroll.
    const grip = /** @type {HTMLElement} */ (present(this.box.querySelector(".mv-grip")));
    grip.addEventListener("pointerdown", (event) => { from = event.pointerType === "touch" ? event.clientY : null; });
    grip.addEventListener("pointerup", (event) => {
      const way = from === null ? 0 : event.clientY - from;
      if (Math.abs(way) > SWIPE) this.open(way < 0);
    });
  }

  get isOne() { return getComputedStyle(this.box).position === "fixed"; }

  get isOpen() { return this.isOne && this.box.classList.contains("mv-open"); }

  /** @param {boolean} wanted */
  open(wanted) {
    if (!this.isOne || wanted === this.isOpen) return;
    if (!wanted && this.box.contains(document.activeElement)) this.handle.focus();
    this.box.classList.toggle("mv-open", wanted);
    this.box.scrollTop = 0;
    this.handle.setAttribute("aria-expanded", String(wanted));
    this.handle.textContent = wanted ? "Close" : "Details";
    const calm = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
    if (wanted) this.stage.scrollIntoView({ block: "start", behavior: calm ? "auto" : "smooth" });
  }
}

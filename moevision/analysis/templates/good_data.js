/**
 * The page of `moevision data score`: decisions about images by keyboard or mouse, undone one by one, saved as a CSV and
 * read again; and the map. Nothing leaves the page but the file that its reader saves.
 */

/**
 * @typedef {{id: string, label: string, decision: "keep" | "relabel" | "drop", newLabel: string}} Decision
 * @typedef {Decision | {id: string, decision: null}} Change
 */

export const HEAD = "image,label,decision,new_label";

/** @param {string} text */
const cell = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);

/** Cells of a CSV, row by row. @param {string} text */
function rowsOf(text) {
  const rows = [/** @type {string[]} */ ([])];
  for (const [, quoted, plain, end] of text.matchAll(/(?:"((?:[^"]|"")*)"|([^",\r\n]*))(,|\r?\n|$)/g)) {
    rows[rows.length - 1].push(quoted === undefined ? plain : quoted.replaceAll('""', '"'));
    if (end !== ",") rows.push([]);
  }
  return rows;
}

/**
 * The decisions of a file that was saved here. Images that aren't shown are among them: saving again loses none.
 * @param {string} text
 * @returns {Decision[]}
 */
export function decisionsIn(text) {
  // Before it is parsed: another file may be large.
  if (text.split(/\r?\n/, 1)[0] !== HEAD) throw new Error(`it does not begin with ${HEAD}`);
  return rowsOf(text).slice(1).filter((row) => row.length > 1).map((row, index) => {
    const [id, label, word, newLabel] = row;
    const decision = /** @type {Decision["decision"]} */ (word);
    if (row.length !== 4 || !(word in WORDS)) throw new Error(`its row ${index + 1} is not a decision`);
    return { id, label, decision, newLabel };
  });
}

/** Decisions in the order in which they were made first; an image has its last one. */
export class Decisions {
  /** @type {Change[]} */
  changes = [];

  /** @param {Change} change */
  take(change) { this.changes.push(change); }

  /** Take the last change back; which image it was about, or null if there is none. */
  undo() { return this.changes.pop()?.id ?? null; }

  /** @returns {Map<string, Decision>} */
  now() {
    const known = new Map();
    for (const change of this.changes) {
      if (change.decision === null) known.delete(change.id);
      else known.set(change.id, change);
    }
    return known;
  }

  csv() {
    const row = ({ id, label, decision, newLabel }) => [id, label, decision, newLabel].map(cell).join(",");
    return [HEAD, ...[...this.now().values()].map(row), ""].join("\n");
  }
}

/**
 * Images per cell of the map, of one class or of all.
 * @param {number[][]} cells [class, column, row, images]
 * @param {number} wanted the class; -1: all
 */
export function cellsOf(cells, wanted) {
  const found = new Map();
  for (const [label, column, row, count] of cells) {
    if (wanted >= 0 && label !== wanted) continue;
    const key = `${column},${row}`;
    found.set(key, (found.get(key) ?? 0) + count);
  }
  return [...found].map(([key, count]) => [...key.split(",").map(Number), count]);
}

const WORDS = { keep: "keep", relabel: "label", drop: "drop" };
const KEYS = { k: "keep", w: "relabel", d: "drop" };

/** @template {Element} T @param {string} selector @param {new () => T} kind @returns {T} */
function element(selector, kind) {
  const found = document.querySelector(selector);
  if (!(found instanceof kind)) throw new Error(`the page has no ${selector}`);
  return found;
}

/** @param {{map: number[][], map_size: {columns: number, rows: number, most: number}}} told */
function drawMap(told) {
  const svg = element("#map svg", SVGSVGElement);
  const choice = element("#map select", HTMLSelectElement);
  const { columns, rows } = told.map_size;
  const say = element("#map-count", HTMLElement);
  const draw = () => {
    const cells = cellsOf(told.map, Number(choice.value));
    const most = Math.max(1, ...cells.map(([, , count]) => count));
    const total = cells.reduce((sum, [, , count]) => sum + count, 0);
    const rect = (/** @type {number[]} */ [column, row, count]) => `<rect class="cell" x="${column}" y="${rows - 1 - row}" width="1" height="1"
      fill-opacity="${(0.12 + 0.88 * Math.sqrt(count / most)).toFixed(3)}"><title>${count} images: mean p
      ${(column / columns).toFixed(2)} to ${((column + 1) / columns).toFixed(2)}</title></rect>`;
    svg.querySelectorAll("rect.cell").forEach((old) => old.remove());
    svg.insertAdjacentHTML("beforeend", cells.map(rect).join(""));
    say.textContent = `${total.toLocaleString("en")} images; the darkest cell has ${most.toLocaleString("en")}.`;
  };
  choice.addEventListener("change", draw);
  draw();
}

/** @param {{class_ids: string[]}} told */
function decide(told) {
  const decisions = new Decisions();
  const dialog = element("#relabel", HTMLDialogElement);
  const select = element("#relabel select", HTMLSelectElement);
  const bar = element("#bar", HTMLElement);
  let saved = 0;
  /** @type {HTMLElement | null} */
  let asked = null;
  const cards = /** @type {HTMLElement[]} */ ([...document.querySelectorAll(".card[data-id]")]);

  const show = () => {
    const known = decisions.now();
    for (const card of cards) {
      const decision = known.get(card.dataset.id ?? "");
      const word = decision ? WORDS[decision.decision] : "";
      card.dataset.decision = decision?.decision ?? "";
      const badge = card.querySelector(".badge");
      if (badge) badge.textContent = decision?.newLabel ? `${word}: ${decision.newLabel}` : word;
      card.querySelectorAll("button").forEach((button) => {
        button.setAttribute("aria-pressed", String(button.dataset.do === decision?.decision));
      });
    }
    bar.hidden = decisions.changes.length === 0;
    const count = known.size === 1 ? "1 decision" : `${known.size.toLocaleString("en")} decisions`;
    element("#count", HTMLElement).textContent = count;
  };

  /** @param {HTMLElement} card @param {string} what @param {string} [newLabel] */
  const take = (card, what, newLabel = "") => {
    const { id = "", label = "" } = card.dataset;
    const before = decisions.now().get(id);
    const decision = /** @type {Decision["decision"]} */ (what);
    const again = before?.decision === decision && before.newLabel === newLabel;
    decisions.take(again ? { id, decision: null } : { id, label, decision, newLabel });
    show();
  };

  /** @param {HTMLElement} card @param {string} what */
  const ask = (card, what) => {
    if (what !== "relabel") return void take(card, what);
    asked = card;
    const guess = told.class_ids.indexOf(card.dataset.guess ?? "");
    if (guess >= 0 && card.dataset.guess !== card.dataset.label) select.selectedIndex = guess;
    element("#relabel-name", HTMLElement).textContent = card.dataset.id ?? "";
    dialog.showModal();
    select.focus();
  };

  /**
   * At once: the dialog's event "close" comes behind keys that are typed by then, which meant another card.
   * @param {boolean} agreed
   */
  const answer = (agreed) => {
    const card = asked;
    asked = null;
    dialog.close();
    if (!card) return;
    if (agreed) take(card, "relabel", told.class_ids[select.selectedIndex]);
    focus(card);
  };

  const undo = () => {
    const id = decisions.undo();
    show();
    const card = cards.find((each) => each.dataset.id === id && each.checkVisibility());
    if (card) focus(card);
  };

  /** @param {HTMLElement} card */
  const focus = (card) => {
    card.parentElement?.querySelectorAll(".card[tabindex='0']").forEach((old) => old.setAttribute("tabindex", "-1"));
    card.setAttribute("tabindex", "0");
    card.focus();
  };

  /** @param {HTMLElement} card @param {number} step */
  const move = (card, step) => {
    const row = [...(card.parentElement?.querySelectorAll(".card") ?? [])];
    const next = row[row.indexOf(card) + step];
    if (next instanceof HTMLElement) focus(next);
  };

  document.addEventListener("click", (event) => {
    const button = event.target instanceof Element ? event.target.closest("button[data-do]") : null;
    const card = button?.closest(".card[data-id]");
    if (button instanceof HTMLElement && card instanceof HTMLElement) ask(card, button.dataset.do ?? "");
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || dialog.open) return;
    const card = event.target instanceof Element ? event.target.closest(".card") : null;
    const key = event.key.toLowerCase();
    if (key === "u" && !(event.target instanceof HTMLSelectElement)) undo();
    else if (!(card instanceof HTMLElement)) return;
    else if (event.key === "ArrowRight") move(card, 1);
    else if (event.key === "ArrowLeft") move(card, -1);
    else if (key === "e") card.querySelector("a")?.click();
    else if (key in KEYS && card.dataset.id !== undefined) ask(card, KEYS[key]);
    else return;
    event.preventDefault();
  });
  select.addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return; // which would only open the list of classes
    event.preventDefault();
    answer(true);
  });
  element("#relabel form", HTMLFormElement).addEventListener("submit", (event) => {
    event.preventDefault();
    answer(event.submitter instanceof HTMLButtonElement && event.submitter.value === "ok");
  });
  dialog.addEventListener("cancel", (event) => { event.preventDefault(); answer(false); });
  element("#undo", HTMLButtonElement).addEventListener("click", undo);
  element("#save", HTMLButtonElement).addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([decisions.csv()], { type: "text/csv" }));
    link.download = "decisions.csv";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
    saved = decisions.changes.length;
  });
  element("#load", HTMLInputElement).addEventListener("change", async (event) => {
    const input = /** @type {HTMLInputElement} */ (event.target);
    const file = input.files?.[0];
    if (!file) return;
    const said = element("#load-said", HTMLElement);
    try {
      const found = decisionsIn(await file.text());
      const clean = decisions.changes.length === saved;
      found.forEach((each) => decisions.take(each));
      if (clean) saved = decisions.changes.length;
      said.textContent = `${found.length.toLocaleString("en")} read`;
    } catch (error) {
      said.textContent = `${file.name} can't be read: ${error instanceof Error ? error.message : error}`;
    }
    input.value = ""; // so that the same file can be chosen again
    show();
  });
  addEventListener("beforeunload", (event) => { if (decisions.changes.length !== saved) event.preventDefault(); });
  show();
}

if (typeof document !== "undefined") {
  const told = JSON.parse(element("#told", HTMLElement).textContent ?? "{}");
  if (told.map.length) drawMap(told);
  decide(told);
}

// Tab "Data": the training images that a score ranks first, of runs that kept scores. A click puts one on the stage.

import { emptyBox, waitingBox } from "./app_server.js";
import { fillBox, html, Markup, pictureSource } from "./core_util.js";
/** @import { App } from "./app.js" */
/** @import { DataAnswer, RankedImage, Wanted } from "./types.js" */

export class DataTab {
  /** @param {App} app */
  constructor(app) {
    this.app = app;
    this.id = "data";
    this.label = "Data";
    this.follows = ["model", "picture"];
    this.actions = {
      "data-list": (button) => this.choose({ key: button.dataset.list }),
      "data-image": (button) => this.open(button.dataset.id),
    };
    this.changes = { "data-class": (select) => this.choose({ only: select.value || null }) };
  }

  /** What is shown, as far as this model has it: the address may name anything. */
  chosen() {
    const { model, ranked: { key, only } } = this.app;
    const lists = model.score_lists;
    return { list: lists.find((one) => one.key === key) ?? lists[0], only: model.class_names.find((name) => name === only) ?? null };
  }

  /** @param {Partial<App["ranked"]>} change */
  choose(change) {
    Object.assign(this.app.ranked, change);
    this.app.refreshTab(null);
    this.app.remember();
  }

  /** @param {string} id */
  async open(id) {
    await this.app.openExample(id);
    this.app.core.box("main").scrollIntoView({ block: "start" });
  }

  /** @param {HTMLElement} panel @param {Wanted} wanted */
  async draw(panel, wanted) {
    const { model } = this.app;
    if (!model.score_lists.length) return fillBox(panel, emptyBox("No scores of the training images", `${model.title} comes without them: fit leaves them in the folder of its run.`));
    const { list, only } = this.chosen();
    const switches = model.score_lists.map(({ key, name }) => html`<button type="button" data-action="data-list" data-list="${key}" data-key="list-${key}"
      aria-pressed="${key === list.key}">${name}</button>`);
    const classes = ["", ...model.class_names].map((name) => html`<option value="${name}" ${new Markup(name === (only ?? "") ? "selected" : "")}>${name || "all classes"}</option>`);
    const question = { model: model.id, list: list.key, class: only };
    if (this.question !== JSON.stringify(question) || !panel.querySelector("[data-part=ranked]")) {
      this.question = JSON.stringify(question);
      fillBox(panel, html`<p class="mv-note mv-lead"><b>Ranked lists, no verdicts:</b> in clean data the first images of every list are fine.
        The model learned from all of these images, with the label below each, so what it says of them is no test. A click shows what the router does with one.</p>
        <div class="mv-form"><div class="mv-switch mv-lists" role="group" aria-label="Ranked by">${switches}</div>
          <label><span class="mv-hidden">Class</span><select data-change="data-class" data-key="data-class" aria-label="Class">${classes}</select></label></div>
        <h2>${list.title}</h2><p class="mv-note mv-about">${list.about}</p><div data-part="ranked" aria-live="polite"></div>`);
      fillBox(panel.querySelector("[data-part=ranked]"), waitingBox("Opening the images…"));
    }
    /** @type {DataAnswer} */
    const answer = await this.app.asker.remember("data", question);
    if (wanted()) fillBox(panel.querySelector("[data-part=ranked]"), this.gallery(answer, only));
    return undefined;
  }

  /** @param {DataAnswer} answer @param {string | null} only */
  gallery({ images, entries }, only) {
    const which = only === null ? "training images" : `training images of ${only}`;
    if (!entries.length) return emptyBox("None", `No ${which} have scores.`);
    const first = images > entries.length ? `The first ${entries.length} of ${images.toLocaleString("en")}` : `All ${images.toLocaleString("en")}`;
    return html`<p class="mv-note">${first} ${which}.</p><ol class="mv-ranked">${entries.map((entry) => this.card(entry))}</ol>`;
  }

  /** @param {RankedImage} given */
  card({ id, name, label, value, right, visits, thumb, problem }) {
    const said = `right ${right} of ${visits} times`;
    const words = html`<b>${label}</b><span>${value}</span><span>${said}</span>`;
    if (thumb === null) return html`<li class="mv-missing" data-tip="${name}"><i>${problem}</i>${words}</li>`;
    const { kind, id: shown } = this.app.picture;
    return html`<li><button type="button" data-action="data-image" data-id="${id}" data-key="ranked-${id}" data-tip="${name}" aria-pressed="${kind === "example" && shown === id}"
      aria-label="Open ${name}: ${label}, ${value}, ${said}"><img src="${pictureSource(thumb)}" alt="">${words}</button></li>`;
  }
}

// The rail on the left: images to look at, the visitor's own, and what may be changed about the routing.

import { exampleName } from "./app_models.js";
import { ownStrip } from "./app_own.js";
import { asAskError } from "./app_server.js";
import { shareMenu } from "./app_share.js";
import { capital } from "./core_kinds.js";
import { fillBox, fixed, html, Markup, pictureSource, term } from "./core_util.js";
/** @import { App } from "./app.js" */
/** @import { BootModel, Fill, Router } from "./types.js" */

const VARIANTS_ASK = "What did training change?";
/** Capacity factors to choose from, the first ones far below what a layer is trained with. */
const CAPACITIES = [0.25, 0.5, 0.75, 1, 1.25, 1.5, 2];
export const VARIANTS = {
  trained: { label: "Trained", tip: "The model as it was trained." },
  untrained: { label: "Random weights", tip: "The same network with random weights everywhere, also where the training began with pretrained ones." },
};

/** @param {HTMLElement} box @param {App} app */
export function drawHeader(box, app) {
  const { model, variant } = app;
  const options = app.boot.models.map(({ id, title }) => html`<option value="${id}" ${new Markup(id === model.id ? "selected" : "")}>${title}</option>`);
  const switches = model.variants.map((name) => html`<button type="button" data-action="variant" data-variant="${name}" data-key="variant-${name}"
    data-tip="${VARIANTS[name]?.tip}" aria-pressed="${name === variant}">${VARIANTS[name]?.label ?? name}</button>`);
  fillBox(box, html`
    <div class="mv-model"><label><span class="mv-hidden">Model</span><select data-change="model" data-key="model">${options}</select></label>
      <p class="mv-soft"><b>${model.accuracy_texts[variant]}</b><br>${model.data_text}</p></div>
    <div class="mv-tools"><span class="mv-soft mv-asked" aria-hidden="true">${VARIANTS_ASK}</span>
      <div class="mv-switch" role="group" aria-label="${VARIANTS_ASK}">${switches}</div>${shareMenu(app)}</div>`);
}

/**
 * The other models, one click away; the pages of the product, and where code, citation and API are.
 * @param {HTMLElement} box @param {App} app
 */
export function drawFooter(box, { boot, model }) {
  const { lesson, code, cite } = boot.links;
  const others = boot.models.filter(({ id }) => id !== model.id);
  const call = `import base64, httpx, pathlib\n\nphoto = {"kind": "upload", "data": base64.b64encode(pathlib.Path("cat.jpg").read_bytes()).decode()}
httpx.post("${new URL("api/route", location.href)}", json={"picture": photo, "model": "${model.id}"}, timeout=60).json()\n\n# or as a Gradio app\nfrom moevision.demo import blocks\nblocks().launch()`;
  const fold = (name, text) => html`<details><summary data-key="footer-${name}">${name}</summary><pre tabindex="0">${text}</pre></details>`;
  const other = ({ id, title }) => html`<button type="button" class="mv-button" data-action="model" data-id="${id}"
    data-key="model-${id}">${title}</button> `;
  fillBox(box, html`${others.length > 0 && html`<p><span class="mv-soft">Other models:</span> ${others.map(other)}</p>`}
    <nav class="mv-site" aria-label="Pages"><a aria-current="page">Explorer</a>${lesson && html`<a href="${lesson}">Lesson</a>`}
      ${code && html`<a href="${code}">Code</a>`}${fold("Cite", cite)}${!boot.device && fold("API", call)}</nav>`);
}

/** @param {HTMLElement} box @param {App} app */
export function drawRail(box, app) {
  const lists = () => [...box.querySelectorAll(".mv-examples")];
  const places = lists().map(({ scrollTop, scrollLeft }) => ({ scrollTop, scrollLeft }));
  fillBox(box, html`
    <h2>Images</h2>
    ${ownStrip(app)}
    ${examples(app)}
    <button type="button" class="mv-drop" data-action="choose" data-key="choose"><b>Your own images</b><span>Drop them, paste them, or choose files</span></button>
    <input type="file" accept="image/*" multiple hidden data-change="file" data-box="file">
    <p class="mv-note">They ${app.boot.device ? "stay on this device" : app.boot.local ? "stay on this computer" : "are made small in your browser and stay between this page and the server"}; the browser forgets them with the tab.</p>`);
  const now = lists();
  if (now.length === places.length) now.forEach((list, place) => Object.assign(list, places[place]));
}

/** @param {BootModel} model */
export const blankBox = (model) => html`<div class="mv-state mv-tall"><p><b>Bring an image</b></p>
  <p class="mv-note">${model.title} knows ${model.class_names.join(", ")}. Drop a photo anywhere, paste one, or choose a file.</p>
  <button type="button" class="mv-primary" data-action="choose">Choose a file</button></div>`;

/** @param {App} app */
function examples(app) {
  if (!app.model.examples.length) {
    return html`<p class="mv-note mv-none">This model comes without images. Bring your own, or start with
      <code>moevision demo --data FOLDER</code>.</p>`;
  }
  const shown = app.picture;
  const thumb = ({ id, name, label, thumb: source }) => html`<li><button type="button" data-action="example" data-id="${id}" data-key="example-${id}"
    aria-pressed="${shown.kind === "example" && shown.id === id}" aria-label="${exampleName(label, name)}">
    <img src="${pictureSource(source)}" alt=""><span>${label ?? name}</span></button></li>`;
  const { examples: here, num_examples: all, shown: which } = app.model;
  return html`${which && html`<p class="mv-soft mv-which">${which}</p>`}<ul class="mv-examples" data-box="examples">${here.map(thumb)}</ul>
    ${numOfData(app.model) < all && html`<button type="button" class="mv-quiet" data-action="more" data-key="more">More</button>`}`;
}

/** @param {HTMLElement} box @param {App} app */
export function drawSettings(box, app) {
  const { model, topK, capacity } = app;
  fillBox(box, html`<h2>Change the routing</h2>
    ${changeable(model, "top_k").length > 0 && kControl(model, topK)}
    ${limitable(model).length > 0 && capacityControl(model, capacity)}
    ${refusals(model.routers, ["top_k", "capacity"]).map((sentence) => html`<p class="mv-note">${sentence}</p>`)}`);
}

/**
 * The layers in which a change has a meaning, and why it has none in the others.
 * @param {BootModel} model @param {string} name
 */
const changeable = (model, name) => model.routers.filter(({ refused }) => !(name in refused));
/** Where experts choose, a capacity is nothing else than another k. @param {BootModel} model */
export const limitable = (model) => changeable(model, "capacity").filter(({ kind }) => kind === "token_choice");
/** @param {Router[]} routers @param {string[]} names */
function refusals(routers, names) {
  const sentences = [...new Set(routers.flatMap(({ refused }) => names.flatMap((name) => refused[name] ?? [])))];
  const where = (sentence) => routers.filter(({ refused }) => Object.values(refused).includes(sentence)).map(({ name }) => name);
  return sentences.map((sentence) => (where(sentence).length < routers.length ? `${where(sentence).join(", ")}: ${sentence}.` : `${capital(sentence)}.`));
}

/**
 * A list of values of which one is the model's own.
 * @param {Fill} label @param {string} change @param {[number | "", string][]} values "" is the model's own @param {number | null} chosen
 */
const choiceOf = (label, change, values, chosen) => html`<label class="mv-choice"><span>${label}</span> <select data-change="${change}"
  data-key="${change}">${values.map(([value, words]) => html`<option value="${value}" ${new Markup(value === (chosen ?? "") ? "selected" : "")}>
  ${words}</option>`)}</select></label>`;

/** @param {BootModel} model @param {number | null} topK */
function kControl(model, topK) {
  const able = changeable(model, "top_k");
  const mean = able.some(({ kind }) => kind === "expert_choice") ? " on average" : "";
  const own = [...new Set(able.map((layer) => layer.top_k))];
  const others = [...Array(model.max_top_k).keys()].map((less) => less + 1).filter((k) => otherK(model, k) !== null);
  return choiceOf(term(mean ? "taken" : "topk", `Experts per patch${mean}`), "topk",
    [["", `${own.join(" and ")}, as trained`], ...others.map((k) => /** @type {[number, string]} */ ([k, String(k)]))], topK);
}

/** @param {BootModel} model @param {number | null} capacity */
function capacityControl(model, capacity) {
  const own = [...new Set(limitable(model).map((layer) => layer.capacity ?? "no limit"))];
  const others = [...new Set([...CAPACITIES, ...(capacity === null ? [] : [capacity])])].sort((one, other) => one - other);
  return choiceOf(term("capacity", "Capacity factor"), "capacity",
    [["", `${own.join(" and ")}, the model's own`], ...others.map((factor) => /** @type {[number, string]} */ ([factor, fixed(factor)]))], capacity);
}

/**
 * k as it is wished, or null if that is what every layer was trained with.
 * @param {BootModel} model @param {number} k
 */
export const otherK = (model, k) => (changeable(model, "top_k").every((layer) => layer.top_k === k) ? null : k);

/**
 * How many images of the model's data are in the rail; photos that come with a model aren't among them.
 * @param {BootModel} model
 */
const numOfData = (model) => model.examples.filter(({ id }) => !id.startsWith("photo/")).length;

/** @param {App} app */
async function moreExamples(app) {
  const { model } = app;
  try {
    const { examples: next, num_examples: all } = await app.asker.ask("examples", { model: model.id, start: numOfData(model) });
    const known = new Set(model.examples.map(({ id }) => id));
    model.num_examples = all; // fewer than before, where some can't be used
    model.examples.push(...next.filter(({ id }) => !known.has(id)));
    app.drawFrame();
    const list = app.core.box("examples");
    list.scrollTop = list.scrollHeight;
  } catch (error) {
    app.notify(asAskError(error).message);
  }
}

/** What the handlers of header and rail do; `app` keeps the choices and asks the server. @param {App} app */
export const railHandlers = (app) => ({
  actions: {
    example: (button) => app.openExample(button.dataset.id, button.dataset.patch),
    variant: (button) => { app.variant = button.dataset.variant; return app.load("model"); },
    more: () => moreExamples(app),
    choose: () => app.core.box("file").click(),
  },
  changes: {
    model: (select) => app.chooseModel(select.value),
    topk: ({ value }) => app.chooseSettings({ topK: value === "" ? null : Number(value) }),
    capacity: ({ value }) => app.chooseSettings({ capacity: value === "" ? null : Number(value) }),
  },
});

// The rail on the left: images to look at, the visitor's own, and what may be changed about the routing.

import { handButton } from "./app_hand.js";
import { ownStrip } from "./app_own.js";
import { asAskError } from "./app_server.js";
import { shareMenu } from "./app_share.js";
import { capital, headline, routingWords } from "./core_kinds.js";
import { fillBox, fixed, html, Markup, pictureSource, term } from "./core_util.js";
/** @import { App } from "./app.js" */
/** @import { BootModel, Router } from "./types.js" */

const VARIANTS_ASK = "What did training change?";
export const VARIANTS = {
  trained: { label: "Trained", tip: "The model as it was trained." },
  unbalanced: { label: "Without balance loss", tip: "The same recipe without the losses that keep experts balanced." },
  untrained: { label: "Random weights", tip: "The same network with random weights everywhere, also where the training began with pretrained ones." },
};

/** @param {HTMLElement} box @param {App} app */
export function drawHeader(box, app) {
  const { model, variant } = app;
  const options = app.boot.models.map(({ id, title }) => html`<option value="${id}" ${new Markup(id === model.id ? "selected" : "")}>${title}</option>`);
  const switches = model.variants.map((name) => html`<button type="button" data-action="variant" data-variant="${name}" data-key="variant-${name}"
    data-tip="${VARIANTS[name]?.tip}" aria-pressed="${name === variant}">${VARIANTS[name]?.label ?? name}</button>`);
  fillBox(box, html`
    <div class="mv-title"><h2>Patch by patch</h2><p class="mv-soft">${headline(model)}</p></div>
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
httpx.post("${new URL("api/route", location.href)}", json={"picture": photo, "model": "${model.id}"}, timeout=60).json()`;
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
    <button type="button" class="mv-button mv-camera" data-action="camera" data-key="camera">Take a photo</button>
    <input type="file" accept="image/*" multiple hidden data-change="file" data-box="file">
    <input type="file" accept="image/*" capture="environment" hidden data-change="file" data-box="camera">
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
    aria-pressed="${shown.kind === "example" && shown.id === id}" aria-label="${label ? `${label}, ${name}` : name}">
    <img src="${pictureSource(source)}" alt=""><span>${label ?? name}</span></button></li>`;
  const { examples: here, num_examples: all, shown: which } = app.model;
  return html`${which && html`<p class="mv-soft mv-which">${which}</p>`}<ul class="mv-examples" data-box="examples">${here.map(thumb)}</ul>
    ${numOfData(app.model) < all && html`<button type="button" class="mv-quiet" data-action="more" data-key="more">More</button>`}`;
}

/** @param {HTMLElement} box @param {App} app */
export function drawSettings(box, app) {
  const { model, topK, capacity } = app;
  fillBox(box, html`<h2>Change the routing</h2>
    ${routingWords(model.routers).map(([where, words]) => html`<p class="mv-note"><b>${where}</b>: ${words}</p>`)}
    ${changeable(model, "top_k").length > 0 && kControl(model, topK)}
    ${limitable(model).length > 0 && capacityControl(model, capacity)}
    ${refusals(model.routers, ["top_k", "capacity"]).map((sentence) => html`<p class="mv-note">${sentence}</p>`)}
    ${(topK !== null || capacity !== null) && html`<button type="button" class="mv-quiet" data-action="as-trained" data-key="as-trained">as trained</button>`}
    ${!app.boot.device && randomControl(app)}`);
}

/**
 * The layers in which a change has a meaning, and why it has none in the others.
 * @param {BootModel} model @param {string} name
 */
const changeable = (model, name) => model.routers.filter(({ refused }) => !(name in refused));
/**
 * Where experts choose, a capacity is nothing else than another k.
 * @param {BootModel} model
 */
export const limitable = (model) => changeable(model, "capacity").filter(({ kind }) => kind === "token_choice");
/** @param {Router[]} routers @param {string[]} names */
function refusals(routers, names) {
  const sentences = [...new Set(routers.flatMap(({ refused }) => names.flatMap((name) => refused[name] ?? [])))];
  const where = (sentence) => routers.filter(({ refused }) => Object.values(refused).includes(sentence)).map(({ name }) => name);
  return sentences.map((sentence) => (where(sentence).length < routers.length ? `${where(sentence).join(", ")}: ${sentence}.` : `${capital(sentence)}.`));
}

/** @param {App} app */
const randomControl = (app) => html`<div class="mv-hand-row" role="group" aria-label="Random experts"><span>Random experts in</span>
  ${app.model.routers.map(({ layer, name }) => handButton(app, name, { kind: "random", layer }))}
  ${app.model.routers.length > 1 && handButton(app, "all", { kind: "random", layer: null })}</div>`;

/** @param {BootModel} model @param {number | null} topK */
function kControl(model, topK) {
  const [first] = changeable(model, "top_k");
  const mean = changeable(model, "top_k").some(({ kind }) => kind === "expert_choice") ? " on average" : "";
  return html`<label class="mv-slider"><span>${term(mean ? "taken" : "topk", `Experts per patch${mean}`)} <output data-box="k-value">${kWords(model, topK)}</output></span>
      <input type="range" min="1" max="${model.max_top_k}" step="1" value="${topK ?? first.top_k}" data-change="topk" data-key="topk" aria-label="Experts per patch${mean}"></label>
    <p class="mv-off" data-box="k-mark" ${new Markup(topK === null ? "hidden" : "")}>off the training distribution</p>`;
}

/** @param {BootModel} model @param {number | null} capacity */
function capacityControl(model, capacity) {
  const own = [...new Set(limitable(model).map((layer) => layer.capacity))].filter((factor) => factor !== null);
  const hidden = new Markup(capacity === null ? "hidden" : "");
  const trained = capacity === null || limitable(model).every((layer) => layer.train_capacity === capacity);
  return html`<label class="mv-check"><input type="checkbox" data-change="limit" data-key="limit" ${new Markup(capacity === null ? "" : "checked")}>
      ${own.length ? `Another capacity than the model's own (factor ${own.join(" and ")})` : "Limit each expert's capacity"}</label>
    <label class="mv-slider" ${hidden}><span>${term("capacity", "Capacity factor")} <output data-box="capacity-value">${fixed(capacity ?? 1)}</output></span>
      <input type="range" min="0.25" max="2" step="0.05" value="${capacity ?? 1}" data-change="capacity" data-key="capacity" aria-label="Capacity factor"></label>
    <p class="mv-off" ${new Markup(trained ? "hidden" : "")}>off the training distribution</p>`;
}

/**
 * k as it is wished, or null if that is what every layer was trained with.
 * @param {BootModel} model @param {number} k
 */
export const otherK = (model, k) => (changeable(model, "top_k").every((layer) => layer.top_k === k) ? null : k);

/** @param {BootModel} model @param {number | null} topK */
function kWords(model, topK) {
  const able = changeable(model, "top_k");
  const trained = [...new Set(able.map((layer) => layer.top_k))];
  if (topK !== null) return `${topK} instead of ${trained.join(" and ")}`;
  return trained.length === 1 ? `${trained[0]}, as trained` : able.map((layer) => `${layer.top_k} in ${layer.name}`).join(", ");
}

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

/**
 * What the handlers of header and rail do; `app` keeps the choices and asks the server.
 * @param {App} app
 */
export function railHandlers(app) {
  let waiting;
  const soon = (job) => { clearTimeout(waiting); waiting = setTimeout(job, 180); };
  return {
    actions: {
      example: (button) => app.openExample(button.dataset.id, button.dataset.patch),
      variant: (button) => { app.variant = button.dataset.variant; return app.load("model"); },
      more: () => moreExamples(app),
      choose: () => app.core.box("file").click(),
      "as-trained": () => app.chooseSettings({ topK: null, capacity: null }),
    },
    changes: {
      model: (select) => app.chooseModel(select.value),
      limit: (input) => app.chooseSettings({ capacity: input.checked ? 1 : null }),
      topk: (input) => {
        const topK = otherK(app.model, Number(input.value));
        app.core.box("k-value").textContent = kWords(app.model, topK);
        app.core.box("k-mark").hidden = topK === null;
        soon(() => app.chooseSettings({ topK }));
      },
      capacity: (input) => {
        app.core.box("capacity-value").textContent = fixed(Number(input.value));
        soon(() => app.chooseSettings({ capacity: Number(input.value) }));
      },
    },
  };
}

// The page of a model whose router sends whole images to one expert or another: photos fly into the experts' boxes, beside
// the counts over all test photos.

import { firstExperts } from "./core_mosaic.js";
import { chip, expertColour, fillBox, html, pictureSource, present } from "./core_util.js";
import { numberWord } from "./core_words.js";
/** @import { App } from "./app.js" */
/** @import { Sorted, Sorting, View } from "./types.js" */

const SORT_MS = 700;
const BETWEEN_MS = 90; // from a photo that leaves to the next one

/** Draw it, or nothing for other models, and where an expert is away. @param {App} app */
export function drawSorting(app) {
  const { model, core, picture, state } = app;
  /** @type {Sorting | null} */
  const sorting = app.away.length ? null : model.card.sorting;
  const box = core.box("sorting");
  box.hidden = !sorting;
  app.root.classList.toggle("mv-sorting", Boolean(sorting));
  if (!sorting || !state || state.view.model.id !== model.id) return;
  const examples = new Map(model.examples.map((one) => [one.id, one]));
  const photos = sorting.photos.flatMap((photo) => {
    const example = examples.get(photo.id);
    return example ? [{ ...photo, thumb: example.thumb, label: example.label }] : [];
  });
  const own = picture.kind === "upload" ? ownOf(state.view, sorting) : null;
  fillBox(box, html`${sortingLayout(sorting, photos, own)}${sortingActions(app)}`);
}

/**
 * The same without a page around it, in a Gradio app: an image of a view among others.
 * @param {HTMLElement} root @param {View} view @param {Sorting} sorting @param {Sorted[]} photos
 */
export function startSorting(root, view, sorting, photos) {
  root.innerHTML = String(html`<section class="mv-flow" aria-label="Where photos go">${sortingLayout(sorting, photos, ownOf(view, sorting))}</section>`);
  flyInto(root);
}

/** A visitor's photo and where it went. @param {View} view @param {Sorting} sorting @returns {Sorted} */
function ownOf({ layers, prediction, picture }, { layer: where }) {
  const [expert] = firstExperts(present(layers.find(({ layer }) => layer === where)));
  return { id: "own", expert: Number(expert), answer: prediction.moe[0].class, thumb: picture.src, label: null };
}

/** @param {App} app */
export const playSorting = (app) => flyInto(app.core.box("sorting"));

/** All photos fly from the middle to where they are. @param {HTMLElement} box */
function flyInto(box) {
  if (box.hidden || matchMedia("(prefers-reduced-motion: reduce)").matches) return;
  const { left, top, width } = box.getBoundingClientRect();
  box.querySelectorAll("li").forEach((photo, place) => {
    const at = photo.getBoundingClientRect();
    const from = `translate(${left + width / 2 - at.left - at.width / 2}px, ${top - at.top}px) scale(.6)`;
    photo.animate([{ transform: from, opacity: 0 }, { opacity: 1, offset: 0.3 }, { transform: "none" }], {
      duration: SORT_MS,
      delay: BETWEEN_MS * place,
      easing: "ease-in-out",
      fill: "backwards",
    });
  });
}

/** @param {Sorting} sorting @param {Sorted[]} photos @param {Sorted | null} own */
function sortingLayout({ classes, routes, agree, images }, photos, own) {
  const experts = classes.map((_, expert) => expert);
  const headline = experts.map((expert) => `Expert\u00a0${expert} takes the ${classes[mostOf(routes, expert)]}s.`);
  const all = own ? [...photos, own] : photos;
  const fullest = Math.max(...experts.map((expert) => all.filter((one) => one.expert === expert).length));
  const across = Math.max(3, Math.min(4, Math.ceil(fullest / 3))); // few photos are shown large
  return html`<div class="mv-flow-head"><div><h1>${headline.join(" ")}</h1>
      <p>${images} photos that the model had never seen. A router looks at each and sends it to one of
        ${numberWord(experts.length)} experts.</p></div></div>
    <div class="mv-sorted" style="--across:${across}">${experts.map((expert) => sortedBox(expert, classes, routes, all))}</div>
    <p class="mv-told" role="status">${own && html`<b>Yours goes to expert ${own.expert}</b>, and the answer is ${own.answer}. `}Told which is
      which while it learned. Where a photo goes decides what it is called, on ${agree} of ${images} photos:
      a ${classes[1]} of the ${classes[0]}s' expert is ${agree < images && "mostly "}called a ${classes[0]}.</p>`;
}

/** What one can do on the page. @param {App} app */
function sortingActions({ model, boot }) {
  const untold = boot.models.find(
    ({ id, routers }) => id !== model.id && routers.every(({ route_by: by }) => by !== "image"),
  );
  return html`<div class="mv-flow-say"><div class="mv-flow-do">
    <button type="button" class="mv-primary" data-action="choose" data-key="sort-own">Which one gets your photo?</button>
    <button type="button" class="mv-button" data-action="sort" data-key="sort-again">Sort them again</button></div>
    ${untold &&
    html`<p class="mv-soft">Untold, a router divides images in other ways:
      <button type="button" class="mv-quiet" data-action="model" data-id="${untold.id}" data-key="sort-untold">
        see ${numberWord(untold.routers[0].num_experts)} experts</button>.</p>`}</div>`;
}

/** The class of which an expert has most. @param {number[][]} routes @param {number} expert */
const mostOf = (routes, expert) =>
  routes.map((row) => row[expert]).reduce((best, count, name, all) => (count > all[best] ? name : best), 0);

/** @param {number} expert @param {string[]} classes @param {number[][]} routes @param {Sorted[]} photos */
function sortedBox(expert, classes, routes, photos) {
  const most = mostOf(routes, expert);
  const counts = routes.map((row) => row[expert]);
  const all = routes[most].reduce((sum, count) => sum + count, 0);
  const others = classes.flatMap((name, place) => (place === most ? [] : [`${counts[place]} ${name}s`]));
  const right = counts[most] / counts.reduce((sum, count) => sum + count, 0);
  const photo = ({ id, thumb, label }) => {
    const strays = label !== null && label !== classes[most];
    const tag = id === "own" ? "yours" : strays && `${label} here`;
    return html`<li class="${id === "own" && "mv-mine"} ${strays && "mv-strays"}"><img src="${pictureSource(thumb)}"
      alt="${label ?? "your photo"}">${tag && html`<span>${tag}</span>`}</li>`;
  };
  return html`<section style="--own:${expertColour(expert, classes.length)}">
    <h2>${chip(expert, classes.length, "mv-box-chip")} ${counts[most]} of ${all} ${classes[most]}s</h2>
    <p class="mv-soft">and ${others.join(", ")}</p>
    <span class="mv-bar" aria-hidden="true"><i style="width:${100 * right}%;background:var(--own)"></i></span>
    <ul>${photos.filter((one) => one.expert === expert).map(photo)}</ul></section>`;
}

// The page of a model whose router sends whole images to one expert or another: photos fly into the experts' boxes, beside
// the counts over all test photos.

import { firstExperts } from "./core_mosaic.js";
import { chip, expertColour, fillBox, html, percent, pictureSource, present } from "./core_util.js";
import { article, numberWord } from "./core_words.js";
/** @import { App } from "./app.js" */
/** @import { BootModel, Sorted, Sorting, View } from "./types.js" */

const SORT_MS = 700;
const BETWEEN_MS = 90; // from a photo that leaves to the next one

/** How the test images of a model were sorted; null where nobody counted. @param {BootModel} model @returns {Sorting | null} */
export const sortingOf = ({ card }) => card.sorting ?? null;

/** Draw it, or nothing for other models. @param {App} app */
export function drawSorting(app) {
  const { model, core, picture, state } = app;
  const sorting = sortingOf(model);
  const box = core.box("sorting");
  box.hidden = !sorting;
  app.root.classList.toggle("mv-sorting", Boolean(sorting));
  if (!sorting || !state || state.view.model.id !== model.id) return;
  fillBox(box, sortingLayout(app, sorting, picture.kind === "upload" ? ownOf(state.view) : null));
}

/** A visitor's photo and where it went. @param {View} view @returns {Sorted} */
function ownOf(view) {
  const [expert] = firstExperts(present(view.layers.at(-1)));
  return {
    id: "own",
    expert: Number(expert),
    answer: view.prediction.moe[0].class,
    thumb: view.picture.src,
    label: null,
  };
}

/** All photos fly from the middle to where they are. @param {App} app */
export function playSorting(app) {
  const box = app.core.box("sorting");
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

/** @param {App} app @param {Sorting} sorting @param {Sorted | null} own */
function sortingLayout({ model, boot }, { classes, routes, agree, images, photos }, own) {
  const thumbs = new Map(model.examples.map(({ id, thumb, label }) => [id, { thumb, label }]));
  const known = photos.flatMap((photo) =>
    thumbs.has(photo.id) ? [{ ...photo, ...present(thumbs.get(photo.id)) }] : [],
  );
  const experts = classes.map((_, expert) => expert);
  const taken = experts.map((expert) => mostOf(routes, expert));
  const untold = boot.models.find(
    ({ id, routers }) => id !== model.id && routers.every(({ route_by: by }) => by !== "image"),
  );
  return html`<div class="mv-flow-head">
      <div>
        <h1>${experts.map((expert) => `Expert ${expert} takes the ${classes[taken[expert]]}s.`).join(" ")}</h1>
        <p>
          ${images} photos that the model had never seen. A router looks at each and sends it to one of
          ${numberWord(experts.length)} experts.
        </p>
      </div>
    </div>
    <div class="mv-sorted">${experts.map((expert) => sortedBox(expert, classes, routes, known, own))}</div>
    <div class="mv-flow-say">
      <button type="button" class="mv-primary" data-action="choose" data-key="sort-own">
        Which one gets your photo?
      </button>
      <button type="button" class="mv-button" data-action="sort" data-key="sort-again">Sort them again</button>
      ${own && html`<p role="status"><b>Yours goes to expert ${own.expert}</b>, and the answer is ${own.answer}.</p>`}
    </div>
    <p class="mv-soft">
      Told which is which while it learned. The answer follows the route on ${agree} of ${images} photos: a dog that
      goes to the cats' expert is called ${article("cat")} too.
      ${
        untold &&
        html`Untold, a router divides images in other ways:
          <button type="button" class="mv-quiet" data-action="model" data-id="${untold.id}" data-key="sort-untold">
            see eight experts</button
          >.`
      }
    </p>`;
}

/** The class of which an expert has most. @param {number[][]} routes @param {number} expert */
const mostOf = (routes, expert) =>
  routes.map((row) => row[expert]).reduce((best, count, name, all) => (count > all[best] ? name : best), 0);

/** @param {number} expert @param {string[]} classes @param {number[][]} routes @param {Sorted[]} known @param {Sorted | null} own */
function sortedBox(expert, classes, routes, known, own) {
  const most = mostOf(routes, expert);
  const counts = routes.map((row) => row[expert]);
  const all = routes[most].reduce((sum, count) => sum + count, 0);
  const others = classes.flatMap((name, place) => (place === most ? [] : [`${counts[place]} ${name}s`]));
  const right = counts[most] / counts.reduce((sum, count) => sum + count, 0);
  const here = [...known, ...(own ? [own] : [])].filter((photo) => photo.expert === expert);
  const photo = ({ id, thumb, label }) =>
    html`<li class="${id === "own" && "mv-mine"} ${label && label !== classes[most] && "mv-strays"}">
      <img
        src="${pictureSource(thumb)}"
        alt="${label ?? "your photo"}"
      />${label && label !== classes[most] && html`<span>${label} here</span>`}${id === "own" && html`<span>yours</span>`}
    </li>`;
  return html`<section style="--own:${expertColour(expert, classes.length)}">
    <h2>${chip(expert, classes.length, "mv-box-chip")} ${counts[most]} of ${all} ${classes[most]}s</h2>
    <p class="mv-soft">and ${others.join(", ")}</p>
    <span class="mv-bar" aria-hidden="true"
      ><i style="width:${percent(right, 1).replace(" ", "")};background:var(--own)"></i
    ></span>
    <ul>
      ${here.map(photo)}
    </ul>
  </section>`;
}

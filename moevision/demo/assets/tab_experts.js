// Tab "Experts": what each expert of the current layer is for, shown by what it computes.

import { withoutWords } from "./app_hand.js";
import { emptyBox, waitingBox } from "./app_server.js";
import { chip, expertColour, fillBox, fixed, html, percent, pictureSource, present, signed } from "./core_util.js";
/** @import { App } from "./app.js" */
/** @import { ExpertCard, ExpertsAnswer, GalleryPatch, Router, ShareRow, Wanted } from "./types.js" */

/**
 * A patch of a gallery inside its surroundings; `box` frames it, in fractions of the crop. A click opens its image.
 * @param {GalleryPatch} given
 */
function galleryPatch({ picture, patch, crop, box: [x, y, width, height], label, weight }) {
  const words = `${label ?? "patch"}, weight ${fixed(weight)}`;
  return html`<li class="mv-crop"><button type="button" data-action="example" data-id="${picture}" data-patch="${patch}" data-tip="${words}: open its image"
    aria-label="Open the image of this patch: ${words}"><img src="${pictureSource(crop)}" alt="">
    <i style="left:${x * 100}%;top:${y * 100}%;width:${width * 100}%;height:${height * 100}%"></i></button></li>`;
}

/** @param {string} title @param {GalleryPatch[]} patches */
export const gallery = (title, patches) => html`<h3>${title}</h3><ul class="mv-gallery">${patches.map(galleryPatch)}</ul>`;

/** @param {string} title @param {ShareRow[]} rows @param {string} name @param {number} digits */
function shareRows(title, rows, name, digits) {
  if (!rows?.length) return "";
  // The strongest few: a card is no table, and the heatmap under Classes has every number.
  const shown = [...rows].sort((a, b) => b.above - a.above).slice(0, CARD_ROWS);
  const row = (entry) => html`<li><span>${entry[name]}</span><span class="mv-num">${percent(entry.share, digits)}</span>
    <span class="mv-num mv-above ${entry.significant === false ? "mv-soft" : ""}">${signed(entry.above * 100, digits)} pts${entry.significant && html` <abbr title="above the null">●</abbr>`}</span></li>`;
  return html`<div><h3>${title}</h3><ul class="mv-shares">${shown.map(row)}</ul></div>`;
}

/**
 * "whisker: 45 %, its share of everything: 13 %"; empty where nothing stands out beyond chance.
 * @param {Pick<ExpertCard, "called">} card
 */
export const calledWords = ({ called }) =>
  (called ? `${called.name}: ${percent(called.share)}, its share of everything: ${percent(called.overall)}` : "");

/**
 * One of a layer's cards, or the page of that expert.
 * @param {ExpertCard} card @param {ExpertsAnswer} layer @param {Router} router @param {boolean} alone
 */
function expertCard(card, layer, router, alone) {
  const experts = router.num_experts;
  const soft = router.kind === "soft";
  const withoutPictures = layer.status === "no_pictures";
  const ratio = card.ideal_share > 0 ? card.load_share / card.ideal_share : 0;
  const none = card.top.length + card.random.length === 0;
  const called = calledWords(card);
  return html`<article class="mv-card ${alone && "mv-alone"}" aria-label="${card.name}">
    <header>${chip(card.expert, experts, "mv-big")}<div><h2>${card.name}</h2>
      ${called && html`<p class="mv-called">${called}</p>`}<p class="mv-soft">${percent(card.load_share, 1)} of ${soft ? "what patches take" : "all choices"}, ${fixed(ratio, 1)} × an equal share</p></div></header>
    <span class="mv-bar mv-loadline" style="--mark:${Math.min(1, card.ideal_share * 2.5) * 100}%"><i style="width:${Math.min(100, card.load_share * 250)}%;
      background:${expertColour(card.expert, experts)}"></i></span>
    ${alone && withoutWords(card) && html`<p class="mv-without">${withoutWords(card)}</p>`}
    ${withoutPictures ? "" : none ? html`<p class="mv-note">No patch of the images goes to this expert.</p>`
      : html`<div class="mv-galleries">${[[soft ? "Read most" : "Highest weight", card.top], [soft ? "Drawn at random, as it reads them" : "Picked at random", card.random]].map(([title, patches]) => html`<div>
        ${gallery(/** @type {string} */ (title), /** @type {GalleryPatch[]} */ (patches))}</div>`)}</div>`}
    <div class="mv-two">${shareRows("Classes", card.classes, "class", soft ? 1 : 0)}${shareRows("Drawn parts", card.parts, "part", soft ? 1 : 0)}</div>
    <footer><button type="button" class="mv-quiet" data-action="highlight" data-expert="${card.expert}" data-key="show-${card.expert}">${alone ? `All experts of ${layer.name}` : "Its page"}</button></footer>
  </article>`;
}

export class ExpertsTab {
  /** @param {App} app */
  constructor(app) {
    this.app = app;
    this.id = "experts";
    this.label = "Experts";
    /** @type {string | null} model, variant and layer of the cards that are shown or waited for */
    this.key = null;
    this.follows = ["model", "layer", "highlight"];
  }

  /** @param {HTMLElement} panel @param {Wanted} wanted */
  async draw(panel, wanted) {
    const { app } = this;
    const { currentLayer: layer, view: { model } } = present(app.state);
    const question = { model: model.id, variant: model.variant, layer: layer.layer };
    const key = Object.values(question).join();
    if (this.key !== key || !panel.querySelector(".mv-cards")) fillBox(panel, waitingBox(`Looking at the images of ${layer.name}…`));
    this.key = key;
    const answer = await app.asker.whenReady("experts", question, wanted);
    if (!wanted()) return;
    if (!answer.experts.length) return fillBox(panel, emptyBox("No images of experts", answer.note || NO_PICTURES));
    const router = present(model.routers.find((one) => one.layer === layer.layer));
    const hint = answer.status === "no_pictures" ? NO_PICTURES : "A click on a patch opens its image.";
    const one = app.state?.highlight ?? null;
    const shown = one === null ? answer.experts : answer.experts.filter(({ expert }) => expert === one);
    return fillBox(panel, html`<p class="mv-note mv-lead">${one === null && html`Experts of <b>${answer.name}</b>. `}${answer.note} ${hint}</p>
      <div class="mv-cards">${shown.map((card) => expertCard(card, answer, router, one !== null))}</div>`);
  }
}

const CARD_ROWS = 4;

export const NO_PICTURES = "This model comes without its images. Start the explorer with --data FOLDER to see patches of them here.";

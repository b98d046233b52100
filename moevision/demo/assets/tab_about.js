// Tab "About": how to read the page, what it doesn't show, and where the model comes from.

import { VARIANTS } from "./app_rail.js";
import { routingWords } from "./core_kinds.js";
import { fillBox, fixed, html, percent } from "./core_util.js";
/** @import { App } from "./app.js" */

const NOT_SHOWN = {
  "Not what the model attends to.": "Attention mixes the patches in every block, and this page doesn't draw it. What the answer rests on is read off behind it.",
  "Not everything that happens to a patch.": "The residual path carries it past the experts unchanged; an expert only adds to it.",
  "Not pixels alone.": "A patch in a deep layer carries context from the whole image.",
  "Not a cause.": "Where patches go doesn't say what matters for the answer. Take an expert away, and read the effect beside its control.",
  "Not a law from one image.": "A pattern counts when it stands above shuffled labels, an untrained router and plain clusters: see Classes.",
  "Not a meaning.": "Names on cards are counts on one set of images. Another training run gives other experts.",
};

/**
 * What the card says about the training of a variant, and by which commands the others came about: [name, value].
 * @param {Record<string, any>} card @param {string} variant
 */
function cardRows(card, variant) {
  const recipes = { trained: card.recipe, ...card.recipes };
  const balanced = card.balanced_accuracy?.[variant === "trained" ? "moe" : variant];
  const [share, low, high] = (balanced ?? []).map((one) => percent(one, 1));
  const rows = {
    recipe: recipes[variant],
    note: card.note,
    seed: variant === "trained" && card.seed, // the card tells that of the trained model only
    "tested on": variant !== "untrained" && card.test_images && `${card.test_images.toLocaleString("en")} images`,
    "balanced accuracy": balanced && `${share} (95 % interval ${low} to ${high})`,
    data: card.data,
    licence: card.licence,
  };
  Object.keys(recipes).forEach((name) => { if (name !== variant) rows[`recipe, ${name}`] = recipes[name]; });
  return Object.entries(rows).filter(([, value]) => value || value === 0);
}

export class AboutTab {
  /** @param {App} app */
  constructor(app) {
    this.app = app;
    this.id = "about";
    this.label = "About";
    this.follows = ["model"];
  }

  /** @param {HTMLElement} panel */
  async draw(panel) {
    const { model, boot, variant } = this.app;
    const rows = {
      shown: VARIANTS[variant]?.label ?? variant,
      patches: `${model.grid.join(" × ")} of ${fixed(model.image_size / model.grid[0], 0)} px`,
      experts: `in blocks ${model.layers.join(", ")}; router ${[...new Set(model.routers.map(({ router }) => router))].join(", ")}`,
      ...Object.fromEntries(cardRows(model.card ?? {}, variant)),
    };
    fillBox(panel, html`<div class="mv-split"><section class="mv-prose"><h2>How to read this page</h2>
      <p>A vision transformer cuts the image into patches. In some of its layers there are experts, and a router shares the
        patches out among them. Colour and number name a patch's first or strongest expert; stronger colour means a higher weight.</p>
      ${routingWords(model.routers).map(([where, text]) => html`<p><b>${where}</b>: ${text}.</p>`)}
      <p>L3·E2 is expert 2 of block 3. Experts of different layers have nothing to do with each other, even where they share a
        colour.</p><h2>What routing does not show</h2>
      <ul>${Object.entries(NOT_SHOWN).map(([what, why]) => html`<li><b>${what}</b> ${why}</li>`)}</ul></section>
      <section><h2>${model.title}</h2><p class="mv-note">${model.accuracy_texts[variant]}<br>${model.data_text}</p>
        <dl class="mv-card-table">${Object.entries(rows).map(([name, value]) => html`<div><dt>${name}</dt><dd>${value}</dd></div>`)}</dl>
        <p class="mv-note">moevision ${boot.version}. Nothing leaves this ${boot.device ? "device" : "server"}; no image is
          kept.</p></section></div>`);
  }
}

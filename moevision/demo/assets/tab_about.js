// Tab "About": how to read the page, what it doesn't show, and where the model comes from.

import { VARIANTS } from "./app_rail.js";
import { routingWords } from "./core_kinds.js";
import { fillBox, fixed, html, percent, present } from "./core_util.js";
/** @import { App } from "./app.js" */
/** @import { Router } from "./types.js" */

/**
 * What the card says about the training of a variant, in words, and by which commands the others came about: [name, value].
 * @param {Record<string, any>} card @param {string} variant
 */
function cardRows(card, variant) {
  const recipes = { trained: card.recipe, ...card.recipes };
  const epochs = (card.validation_top1 ?? []).map((top1) => fixed(100 * top1, 1)).join(", ");
  const others = Object.entries(recipes).filter(([name]) => name !== variant).map(([name, command]) => [`recipe, ${name}`, command]);
  // The card tells epochs and seed of the trained model only.
  const trained = variant === "trained" ? [["validation by epoch", epochs && `${epochs} %`], ["seed", card.seed]] : [];
  const tested = variant !== "untrained" && card.test_images && `${card.test_images.toLocaleString("en")} images`;
  return [["recipe", recipes[variant]], ["note", card.note], ...trained, ["tested on", tested], ["balanced accuracy", interval(card.balanced_accuracy?.[variant === "trained" ? "moe" : variant])], ["data", card.data], ["licence", card.licence], ...others];
}

const ROUTING_TEXTS = {
  token_choice: "Every patch chooses its experts.",
  image: "The mean of all patches chooses: every patch of an image goes to the same experts.",
  expert_choice: "Every expert chooses the patches that suit it best, as many as every other expert. A patch may have several experts, or none.",
  soft: "Nothing is chosen: a slot is a weighted mean of all patches, an expert computes its slots, and every patch takes a weighted mean of the results.",
  rule: "Nobody trained this router: it is a rule to compare learned ones with.",
};

/**
 * Which of these texts belongs to the layers that route in these words.
 * @param {Router[]} routers @param {string} words
 */
function routingText(routers, words) {
  const { kind, learned, route_by } = present(routers.find((router) => router.words === words));
  if (!learned) return "rule";
  return route_by === "image" ? "image" : kind;
}

/**
 * A share with the interval around it, in percent; nothing where it wasn't measured.
 * @param {[number, number, number] | undefined} found
 */
const interval = (found) => found && `${percent(found[0], 1)} (95 % interval ${percent(found[1], 1)} to ${percent(found[2], 1)})`;

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
    const card = model.card ?? {};
    const rows = cardRows(card, variant).filter(([, value]) => value || value === 0);
    fillBox(panel, html`<div class="mv-split"><section class="mv-prose"><h2>How to read this page</h2>
      <p>A vision transformer cuts the image into patches. In some of its layers there are experts,
        and a router shares the patches out among them. Colour and number of a patch name its first or strongest expert; stronger colour means a higher weight.</p>
      ${routingWords(model.routers).map(([where, words]) => html`<p><b>${where}</b>: ${words}. ${ROUTING_TEXTS[routingText(model.routers, words)]}</p>`)}
      <p>L3·E2 is expert 2 of block 3. Experts of different layers have nothing to do with each other, even where they share a colour.</p>
      <h2>What routing does not show</h2><ul>
        <li><b>Not what the model attends to.</b> Attention mixes the patches in every block, and this page doesn't draw it.</li>
        <li><b>Not everything that happens to a patch.</b> The residual path carries every patch past the experts unchanged; an expert only adds to it.</li>
        <li><b>Not pixels alone.</b> A patch in a deep layer carries context from the whole image.</li>
        <li><b>Not a cause.</b> Where patches go doesn't say what matters for the answer. Take an expert away under the image, and read the effect beside its control.</li>
        <li><b>Not a law from one image.</b> A pattern counts when it stands above shuffled labels, an untrained router and plain clusters: see Classes.</li>
        <li><b>Not a meaning.</b> Part and class names on cards are counts on one set of images. Another training run gives other experts.</li></ul></section>
      <section><h2>${model.title}</h2><p class="mv-note">${model.accuracy_texts[variant]}<br>${model.data_text}</p>
        <dl class="mv-card-table"><div><dt>shown</dt><dd>${VARIANTS[variant]?.label ?? variant}</dd></div>
          <div><dt>patches</dt><dd>${model.grid.join(" × ")} of ${fixed(model.image_size / model.grid[0], 0)} px</dd></div>
          <div><dt>experts</dt><dd>in blocks ${model.layers.join(", ")}; router ${[...new Set(model.routers.map(({ router }) => router))].join(", ")}</dd></div>
          ${rows.map(([name, value]) => html`<div><dt>${name}</dt><dd>${value}</dd></div>`)}</dl>
        <p class="mv-note">moevision ${boot.version}. Nothing leaves this ${boot.device ? "device" : "server"}; no image is kept.</p></section></div>`);
  }
}

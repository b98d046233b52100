// The stage: a picture under a grid of patches, and the strip of layers beneath it.

/** Fill and label of one patch in the present colouring: {colour, alpha, text, note}. */
function patchLook(state, layer, patch, experts) {
  if (state.mode === "expert") return expertLook(state, layer, patch, experts);
  if (state.mode === "drops") return dropLook(layer, patch);
  const entropy = state.mode === "entropy";
  const value = entropy ? layer.entropy[patch] : layer.margin[patch];
  const share = clamp(entropy ? value / Math.log2(experts) : value, 0, 1);
  return { colour: SCALE_COLOUR, alpha: 0.06 + 0.8 * share, text: fixed(value, 1), chip: null };
}

function expertLook(state, layer, patch, experts) {
  const expert = layer.experts[patch][0];
  const weight = layer.kept[patch][0] ? layer.weights[patch][0] : 0;
  const standsOut = state.highlight === null || layer.experts[patch].includes(state.highlight);
  const alpha = state.highlight === null ? weight * state.strength : standsOut ? 0.8 * state.strength : 0;
  const shown = state.highlight !== null && standsOut ? state.highlight : expert;
  return { colour: expertColour(shown, experts, state.highlight !== null && standsOut), alpha, text: String(shown), chip: shown, faint: !standsOut };
}

function dropLook(layer, patch) {
  const dropped = layer.kept[patch].filter((kept) => !kept).length;
  const share = dropped / layer.kept[patch].length;
  return { colour: DROP_COLOUR, alpha: 0.7 * share, text: dropped ? `×${dropped}` : "", chip: null, hatched: dropped > 0 };
}

const SCALE_COLOUR = "#4a3aa7";
const DROP_COLOUR = "#b3261e";

const rgba = (hex, alpha) => {
  const part = (start) => parseInt(hex.slice(start, start + 2), 16);
  return `rgba(${part(1)},${part(3)},${part(5)},${alpha.toFixed(3)})`;
};

/** One picture with its grid; `slot` is the position of its view in the state. */
class Stage {
  constructor(box, state, slot) {
    Object.assign(this, { box, state, slot });
    this.build();
  }

  get view() { return this.state.views[this.slot]; }

  build() {
    const { view, state } = this;
    const [rows, columns] = view.model.grid;
    const cell = (row, column) => html`<div role="gridcell" class="mv-cell" tabindex="-1"
      data-patch="${row * columns + column}"><span class="mv-mark"></span></div>`;
    const line = (row) => html`<div role="row" class="mv-row">${[...Array(columns).keys()].map((column) => cell(row, column))}</div>`;
    fillBox(this.box, html`
      <div class="mv-canvas" style="--columns:${columns};--rows:${rows};--aspect:${columns / rows}" data-slot="${this.slot}">
        <img class="mv-picture" alt="${pictureTitle(view)}, as the model sees it" src="${pictureSource(view.picture.src)}" draggable="false">
        <div class="mv-grid" role="grid" aria-label="Patches of ${pictureTitle(view)}, ${rows} rows and ${columns} columns"
          aria-rowcount="${rows}" aria-colcount="${columns}">${[...Array(rows).keys()].map(line)}</div>
      </div>`);
    this.cells = [...this.box.querySelectorAll(".mv-cell")];
    this.colour();
    this.outline();
  }

  /** Colours, numbers and spoken labels of all patches: on a change of layer or colouring. */
  colour() {
    const { state, view } = this;
    const layer = view.layers[state.layer];
    this.cells.forEach((cell, patch) => {
      const look = patchLook(state, layer, patch, view.model.num_experts);
      const mark = cell.firstElementChild;
      cell.style.backgroundColor = rgba(look.colour, look.alpha);
      cell.classList.toggle("mv-hatched", Boolean(look.hatched));
      cell.classList.toggle("mv-faint", Boolean(look.faint));
      mark.textContent = look.text;
      mark.classList.toggle("mv-number", look.chip === null);
      mark.style.background = look.chip === null ? "" : look.colour;
      mark.style.color = look.chip === null ? "" : inkOn(look.colour);
      cell.setAttribute("aria-label", describePatch(view, layer, patch));
    });
  }

  /** Outline of the pinned and the hovered patch, and the one place in the grid that Tab reaches. */
  outline() {
    const { state } = this;
    const active = state.active === this.slot;
    const entry = active && state.patch !== null ? state.patch : 0;
    this.cells.forEach((cell, patch) => {
      const pinned = active && patch === state.patch;
      cell.classList.toggle("mv-pinned", pinned);
      cell.classList.toggle("mv-hover", active && patch === state.hover);
      cell.setAttribute("aria-selected", String(pinned));
      cell.tabIndex = patch === entry ? 0 : -1;
    });
  }

  focusPatch(patch) { this.cells[patch]?.focus({ preventScroll: true }); }
}

function pictureTitle({ picture: { label, name } }) {
  return label && !name.startsWith(label) ? `${label}, ${name}` : name;
}

// ---- the strip of layers ------------------------------------------------------------------------------------

/** Thumbnails are drawn a cell per pixel and enlarged by the browser: cheap at any depth. */
function drawThumbnail(canvas, layer, model) {
  const [rows, columns] = model.grid;
  canvas.width = columns;
  canvas.height = rows;
  const context = canvas.getContext("2d");
  layer.experts.forEach((choice, patch) => {
    context.fillStyle = hasColours(model.num_experts)
      ? expertColour(choice[0], model.num_experts)
      : `hsl(220 8% ${20 + (70 * choice[0]) / model.num_experts}%)`;
    context.globalAlpha = layer.kept[patch][0] ? 0.35 + 0.65 * layer.weights[patch][0] : 0.1;
    context.fillRect(patch % columns, Math.floor(patch / columns), 1, 1);
  });
}

function drawStrip(box, state) {
  const { layers, model } = state.view;
  const item = (layer, index) => html`
    <button type="button" class="mv-layer" data-action="layer" data-index="${index}" data-key="layer-${index}"
      aria-pressed="${index === state.layer}" aria-label="Layer ${layer.name}">
      <canvas aria-hidden="true"></canvas><span>${layer.name}</span>
    </button>`;
  fillBox(box, html`
    <div class="mv-strip-head"><h2>${term("layer", "Layers with experts")}</h2>
      <span class="mv-keys"><kbd>+</kbd> <kbd>−</kbd> change layer</span></div>
    <div class="mv-layers" role="group" aria-label="Layer">${layers.map(item)}</div>
    <p class="mv-note">Colours aren't comparable across layers: ${layers.map((layer) => layerExpert(layer, 0)).join(" and ")}
      are different networks.</p>`);
  box.querySelectorAll("canvas").forEach((canvas, index) => drawThumbnail(canvas, layers[index], model));
}

/** A change of layer only moves the frame: nothing is drawn again, the focus stays. */
function frameStrip(box, state) {
  box.querySelectorAll(".mv-layer").forEach((button, index) => button.setAttribute("aria-pressed", String(index === state.layer)));
}

function drawLegend(box, state) {
  const { mode, view } = state;
  const experts = view.model.num_experts;
  const ramp = (low, high) => html`<span class="mv-ramp" aria-hidden="true"></span><span>${low} – ${high}</span>`;
  const key = {
    expert: () => hasColours(experts)
      ? [...Array(experts).keys()].map((expert) => chip(expert, experts))
      : html`<span>More than ${PALETTE.length} experts: read the numbers, or highlight one in the load bars.</span>`,
    entropy: () => ramp("0", `${fixed(Math.log2(experts), 1)} bits`),
    margin: () => ramp("0", "1"),
    drops: () => html`<span>×1: one of ${view.settings.top_k} choices dropped</span>`,
  }[mode]();
  fillBox(box, html`<div class="mv-legend-key">${key}</div><span class="mv-legend-hint">${legendHint(state)}</span>`);
}

function legendHint(state) {
  if (state.highlight !== null) return `only patches of ${layerExpert(state.currentLayer, state.highlight)} are coloured`;
  const quiet = state.mode === "drops" && !state.view.settings.capacity;
  return quiet ? "no capacity limit is set, so nothing is dropped" : MODES[state.mode].hint;
}

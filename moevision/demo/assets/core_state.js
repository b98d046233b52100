// What is being looked at. Parts of the page subscribe and draw themselves; nobody else is told.

const MODES = {
  expert: { label: "Expert", hint: "colour and number: first-choice expert · stronger colour: higher gate weight" },
  entropy: { label: "Entropy", hint: "bits: how undecided the router is about the patch" },
  margin: { label: "Margin", hint: "best minus second-best router probability" },
  drops: { label: "Drops", hint: "choices that an expert's capacity turned away" },
};

/**
 * State of the shared view.
 *
 * views: one or two `moevision.view/1` objects of the same model; active: the one whose patch is inspected;
 * layer: position in `layers` (0 is the first MoE layer); patch: the pinned one; hover: the one under the pointer;
 * highlight: an expert whose patches stand out; strength: opacity of a patch with gate weight 1.
 */
class ViewState {
  constructor(view, start = {}) {
    this.views = [view];
    this.active = 0;
    this.layer = 0;
    this.patch = null;
    this.hover = null;
    this.mode = "expert";
    this.highlight = null;
    this.strength = 0.65;
    this.listeners = [];
    Object.assign(this, start);
    this.settle();
  }

  subscribe(listener) { this.listeners.push(listener); }

  /** Change some fields and tell the subscribers which ones really changed. */
  set(change) {
    const before = { ...this };
    Object.assign(this, change);
    this.settle();
    const names = ["views", "active", "layer", "patch", "hover", "mode", "highlight", "strength"];
    const changed = new Set(names.filter((name) => before[name] !== this[name]));
    if (changed.size) this.listeners.forEach((listener) => listener(changed, this));
  }

  /** Bring every field into the range of the views: links and other models bring strange values. */
  settle() {
    const { layers, model } = this.views[0];
    const patches = model.grid[0] * model.grid[1];
    const inside = (value, size) => (Number.isInteger(value) && value >= 0 && value < size ? value : null);
    this.layer = inside(this.layer, layers.length) ?? layers.length - 1;
    this.patch = inside(this.patch, patches);
    this.hover = inside(this.hover, patches);
    this.active = this.views.length > 1 ? clamp(this.active, 0, 1) : 0;
    this.highlight = inside(this.highlight, model.num_experts);
    if (!(this.mode in MODES)) this.mode = "expert";
  }

  get view() { return this.views[this.active]; }
  get currentLayer() { return this.view.layers[this.layer]; }
  /** The patch to describe: the one under the pointer, else the pinned one. */
  get shown() { return this.hover ?? this.patch; }
}

/** The patch that is pinned when nobody has chosen one, so that the inspector shows what it is for. */
const centrePatch = ({ model: { grid: [rows, columns] } }) => Math.floor(rows / 2) * columns + Math.floor(columns / 2);

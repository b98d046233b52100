// Types of what the server sends and of what the page hands around; read by editors and by tsc, never by a browser.
// The schemas' homes are demo/view.py, demo/facts.py and demo/service.py.

import type { App } from "./app.js";
import type { AskError } from "./app_server.js";
import type { ViewState } from "./core_state.js";
import type { Markup } from "./core_util.js";

export type Kind = "token_choice" | "expert_choice" | "soft";
export type Mode = "regions" | "expert" | "reads" | "takers" | "entropy" | "margin" | "rests";

/** What there is to know about an MoE layer before an image is routed. */
export interface Router {
  layer: number;
  name: string;
  words: string;
  router: string;
  kind: Kind;
  learned: boolean;
  num_experts: number;
  top_k: number;
  capacity: number | null;
  slots: number | null;
  route_by: "token" | "image";
  refused: Record<string, string>;
  /** What the router does: scores, shares, kept, weights. */
  steps: Record<string, string>;
  expert_parameters: number;
  noise: "learned" | "fixed" | "jitter" | "none";
}

/** Numbers as demo/wire.py packs them: base64 of little-endian int16, times a unit. */
export interface Packed { unit: number; shape: number[]; data: string }

/** An expert that a patch chose: its weight, and whether it ran. */
export interface Choice { expert: number; weight: number; kept: boolean }

/** Some numbers of a patch's vectors: of what the router reads, each choice's network, and the stream. */
export interface Channels {
  of: number;
  hidden: number;
  index: number[];
  scale: number[] | null;
  read: number[];
  outputs: number[][];
  shared: number[] | null;
  total: number[];
  before: number[] | null;
  after: number[] | null;
}
export type PackedChannels = Pick<Channels, "of" | "hidden" | "index"> & Record<"read" | "outputs" | "total", Packed> & Record<"scale" | "shared" | "before" | "after", Packed | null>;

/** How a layer computed one patch. */
export interface Computed {
  scores: number[];
  /** What was added to them, as in training. */
  noise: number[] | null;
  /** Softmax of the scores, or sigmoids. */
  shares: number[];
  sigmoid: boolean;
  bias: number[] | null;
  choices: Choice[];
  kept: Choice[];
  channels: Channels;
  missing: string[];
}

/** Where a layer sent the patches of one image: P patches, K choices, E experts. */
export interface Layer extends Omit<Router, "refused"> {
  experts: number[][];
  weights: number[][];
  kept: boolean[][];
  probs: number[][];
  margin: number[];
  entropy: number[];
  counts: number[];
  requested: number[];
  slowest: number;
  /** demo/view.py; null where nobody listened. */
  computation: (Record<string, Packed | null> & { channels?: any }) | null;
  /** [E][P] of Soft MoE. */
  reads: number[][] | null;
  /** A moment of the training: only experts, weights and what follows from them is known. */
  past?: boolean;
}

export interface Model {
  id: string;
  title: string;
  image_size: number;
  grid: [number, number];
  layers: number[];
  routers: Router[];
  class_names: string[];
  variant: string;
  accuracy_text: string;
  data_text: string;
  num_experts: number | null;
  top_k: number | null;
  max_top_k: number;
  parameters: number;
}

export interface Picture {
  id: string | null;
  name: string;
  label: string | null;
  src: string;
  unlike: string | null;
  credit?: string | null;
  /** In an exported page: the same square in more pixels. */
  sharp?: string | null;
}

export interface Guess { class: string; p: number }

export interface Intervention {
  kind: "ablate" | "force" | "swap" | "random";
  layer: number | null;
  expert: number | null;
  /** The second of two that are swapped. */
  other?: number;
  fill: "next_best" | "zero";
  seed: number;
}

/** A `moevision.view/2` object. */
export interface View {
  schema: string;
  model: Model;
  picture: Picture;
  layers: Layer[];
  prediction: { moe: Guess[]; dense: Guess[] | null };
  /** [P] share in the first guess's logit minus the second's; null or missing where a classifier has none. */
  shares?: number[] | null;
  settings: {
    top_k: number | null;
    capacity: number | null;
    intervention: Intervention | null;
    noise?: number | null;
    /** [layer, expert] of those that are away. */
    away?: [number, number][];
    off_distribution: boolean;
    off_reason: string | null;
  };
  /** When it was, if not after the training: demo/times.py has less than a view of the trained model. */
  moment?: { step: number; total_steps: number };
}

/** Over all recorded images, at T moments: right answers, and of each layer each expert's share of the patches [T][E]. */
export interface Track { steps: number[]; right: number[]; of: number; loads: number[][][] }
/** Which images were recorded while the model was trained, and what came of it. */
export interface Recorded { images: string[]; total_steps: number; pretrained: boolean; track: Track }
/** [T][P][E] as float16. */
export interface PastLayer { layer: number; weights: { shape: number[]; data: string } }
/** The T moments of one image. */
export interface Moments extends Recorded { picture: string; steps: number[]; predictions: Guess[][]; layers: PastLayer[] }
export interface TimeSource {
  /** What was recorded of these images; a sentence if there is something to say instead, null if not. */
  about(view: View): Recorded | string | null;
  get(view: View): Promise<Moments>;
}
/** What a state starts with or changes to; a value from an address may be out of range. */
export interface Fields {
  view?: View;
  layer?: number | null;
  patch?: number | null;
  hover?: number | null;
  mode?: string;
  highlight?: number | null;
  asSeen?: boolean;
}

/** How one patch is drawn on the stage. */
export interface Look {
  colour: string;
  alpha: number;
  text: string;
  chip: number | null;
  hatched?: boolean;
  faint?: boolean;
}

/** What the `html` tag takes: other values are written as text. */
export type Fill = Markup | string | number | boolean | null | undefined | Fill[];

// ---- the app ------------------------------------------------------------------------------------------------

/** The server's functions, by name. */
export type Server = Record<string, (question: unknown) => Promise<any>>;
export type Handler = (element: any, event: Event) => unknown;
export type Handlers = Record<string, Handler>;
export type Wanted = () => boolean;
/** A router's facts as the rail needs them, or those of a view's layer. */
export type Worded = Pick<Router, "name" | "words">;

export interface BootModel extends Model {
  variants: string[];
  accuracy_texts: Record<string, string>;
  /** Whether the fewest experts that change an answer are searched for any image. */
  can_search: boolean;
  card: Record<string, any>;
  history: Recorded | null;
  shown: string;
  num_examples: number;
  examples: { id: string; name: string; label: string | null; thumb: string }[];
}

export interface Boot {
  version: string;
  local: boolean;
  models: BootModel[];
  limits: Limits;
  default: { model: string; picture: string | null };
  /** Addresses, null where there is none, and an entry for a bibliography. */
  links: { lesson: string | null; code: string | null; cite: string };
  /** Whether all models have their examples. */
  whole?: boolean;
  /** Whether the answers are made in the browser (docs/live): not everything can be asked. */
  device?: boolean;
}

export interface Limits { max_bytes: number; max_pixels: number; min_side: number; max_aspect: number; fit: "crop" | "pad" | "squash"; fill: string }

/** What is shown: an example of the model's data, a visitor's own image (`own` is its id), a page of emoji that was typed, or nothing yet. */
export interface Chosen { kind: "example" | "upload" | "page" | "none"; id?: string; text?: string; data?: string; name?: string; own?: number }
/** A visitor's image as a data address. */
export interface Own { id: number; name: string; data: string; cut?: number }

/** What an address asks for, unchecked. */
export type Wish = Partial<Record<string, string>>;

/** What the page around photo and boxes adds to them. */
export interface Opening {
  /** Whether experts can be taken away: by `take`. */
  able: boolean;
  /** What the model says with all experts; null where it isn't known. */
  usual: Guess | null;
  /** What an image of several things is called. */
  thing?: string;
  /** What a patch is called, one and several. */
  unit?: [string, string];
  take(layer: number, expert: number): unknown;
  /** Other images. */
  choices(view: View): Fill;
  /** What is said below the boxes. */
  said(view: View): Fill;
  /** What an expert is called, counted. */
  nameOf?(layer: number, expert: number): string | null;
}

/** Where the test images of a router of whole images went: [class][expert]; on how many route and answer agree. */
export interface Sorting { layer: number; classes: string[]; routes: number[][]; agree: number; images: number; photos: { id: string; expert: number; answer: string }[] }
export interface Sorted { id: string; expert: number; answer: string; thumb: string; label: string | null }

/** Whether a view isn't shown yet, and what of the page it changes; `wish`: of an address that is followed. */
export interface Pending { open: boolean; kind: string | null; wish: Wish | null }

export interface Tab {
  id: string;
  label: string;
  follows: string[];
  actions?: Handlers;
  changes?: Handlers;
  draw(panel: HTMLElement, wanted: Wanted): unknown;
}
export type Failure = AskError;

// ---- answers below the stage: demo/galleries.py, demo/atlas.py, analysis/effects.py ------------------------------

export interface GalleryPatch {
  picture: string;
  patch: number;
  crop: string;
  box: [number, number, number, number];
  label: string | null;
  credit?: string | null;
  weight: number;
}
export type ShareRow = Record<string, any> & { share: number; above: number; significant?: boolean };
export interface ExpertCard {
  expert: number;
  name: string;
  load_share: number;
  ideal_share: number;
  top: GalleryPatch[];
  random: GalleryPatch[];
  classes: ShareRow[];
  parts: ShareRow[];
  /** What stands out beyond chance: its share of that, and of everything. */
  called: { kind: "part" | "class"; name: string; share: number; overall: number } | null;
  /** What taking it away does to the logit of the true class; means over test images. */
  without: { images_per_class: number; delta_logit: number; control_delta_logit: number | null; strongest_class: string; strongest_delta_logit: number } | null;
}
export interface ExpertsAnswer { status: string; layer: number; name: string; note: string; experts: ExpertCard[] }
export interface ClassLayer {
  layer: number;
  name: string;
  share: (number | null)[][];
  excess: number[][];
  significant: boolean[][];
  threshold: number;
  load_words: string;
  answers: { answer: string; sentence: string }[];
}
export interface ClassesAnswer { status: string; note: string; n_images: number; class_names: string[]; layers: ClassLayer[] }
/** Intervals are null where the atlas alone answers. */
export interface ExpertDifference { expert: number; difference: number; significant: boolean }
export interface DifferenceLayer { layer: number; experts: ExpertDifference[] }
export interface CompareAnswer {
  class_a: string;
  class_b: string;
  n_a: number;
  n_b: number;
  sentence: string;
  layers: DifferenceLayer[];
}
export interface ClassEffect {
  n: number;
  class: string;
  delta_p: number;
  delta_logit: number;
  sd_logit: number | null;
  control_delta_logit: number | null;
}
export interface Effect {
  sentence: string;
  target: string;
  delta_p: number;
  delta_logit: number;
  /** Choices of patches, and of class and register tokens, that the change takes from their experts. */
  moved: number;
  moved_prefix: number;
  before: Guess[];
  after: Guess[];
  /** Null where as many random choices are the change itself. */
  control: { n: number; mean: number; sd: number; deltas: number[]; delta_ps: number[]; what: string } | null;
  view: View;
}

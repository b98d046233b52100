// Types of the lesson's script.

import type { Fill } from "../../moevision/demo/assets/types";

/** A photo of the lesson: the expert of each patch's first choice as one digit, by layer; and before the training. */
export interface LessonPhoto {
  name: string;
  label: string;
  credit: string;
  answer: string;
  probability: number;
  first: Record<number, string>;
  before: string;
}

/** What taking one expert away does to one image. */
export interface LessonEffect {
  name: string;
  patches: number;
  before: number;
  after: number;
  answer: string;
  answer_probability: number;
  random_mean: number;
  random_sd: number;
  draws: number;
}

/** The numbers of the lesson, as build.py measures them. */
export interface LessonNumbers {
  model: { title: string; data: string; grid: number[]; depth: number; layers: number[]; layer: number; experts: number; top_k: number; parameters: number; active_parameters: number; width: number; hidden: number };
  photos: LessonPhoto[];
  gate: { patch: number; scores: number[]; shares: number[]; experts: number[]; weights: number[] };
  classes: { images: number; names: string[]; share: number[][] };
  neighbours: { photos: number; before: number; after: number; shuffled_before: number; shuffled_after: number };
  without: {
    title: string;
    images: number;
    right_test: number;
    experts: { name: string; work: number; changed_validation: number; changed_test: number }[];
    shown: { index: number; label: string; src: string };
    telling: LessonEffect;
    quiet: LessonEffect;
  };
  game: LessonGame;
  photos_without: { photos: number; removals: number; changed: number };
  /** Of benchmarks/sparsity: after equal steps; points at equal time. */
  sparsity: { seeds: { moe: number; twin: number }; right: { moe: number; twin: number }; equal_time: { mean: number; low: number; high: number }; verdict: string };
}

/** Pieces of a photo that are given to four experts: what each adds to the score of the label [16, 4]. */
export interface LessonGame {
  photo: string;
  label: string;
  side: number;
  experts: number[];
  parts: number[][];
  bias: number;
  own: { choice: number[]; answer: number };
}

/** A step of the lesson; `right` is the place of the right choice, -1 where there is none to choose. */
export interface LessonStep {
  title: string;
  minutes: number;
  /** Of ten minutes alone. */
  alone?: number;
  /** On a projector its answer stands beside the figure, in the place of the text. */
  stays?: boolean;
  /** For a teacher. */
  note: string;
  text: Fill;
  figure: Fill;
  question: string;
  choices: string[];
  right: number;
  answer: Fill;
}

// Types of the lesson's script.

import type { Effect, Fill, Packed, View } from "../../moevision/demo/assets/types";

/** What a group's experts are missed for: accuracy before and after, on its own pages and on all others. */
export interface LessonWithout { experts: number[]; own: [number, number]; others: [number, number]; random: number; pages: number }
/** What an expert takes, over all pages that are counted. */
export interface LessonTaken { expert: number; group: string; share: number; named: boolean; of_group: number; load: number; sample: string; sample_groups: string[] }

/** What every expert makes of every emoji of the page, [P · E, D], and the classifier that reads the mean over emoji. */
export interface LessonSorting { parts: Packed; head: Packed; bias: Packed; eps: number; own: number[] }

/** The numbers of the lesson, as build.py measures them. */
export interface LessonNumbers {
  model: {
    title: string; data: string; licence: string; image_size: number; grid: [number, number]; groups: string[]; experts: number; top_k: number; width: number;
    hidden: number; parameters: number; active_parameters: number; accuracy: { moe: number; dense: number };
    accuracy_interval: { moe: [number, number]; dense: [number, number] }; test_images: number;
  };
  page: { group: string; names: string[]; groups: string[]; of_group: number[] };
  /** The page's view, and what differs from it without each expert. */
  views: { all: View; without: Pick<View, "layers" | "prediction" | "settings">[] };
  sorting: LessonSorting;
  gate: { patch: number; scores: number[]; shares: number[]; expert: number; weight: number };
  taken: { pages: number; experts: LessonTaken[] };
  /** How often an emoji's group is guessed right from its box. */
  guessed: { pages: number; trained: number; random: number; random_best: number; clusters: number; chance: number; draws: number; random_page: number[] };
  /** Accuracy on test pages: as the model is, with random experts, with one expert for everything. */
  right: { pages: number; all: number; random: number; one: number[] };
  effects: Omit<Effect, "view">[];
  without: Record<string, LessonWithout>;
  /** From how many pages the page was chosen. */
  chosen: { images: number; right: number; named: number; change: number };
  /** Of benchmarks/experts_pay, points from the strongest dense model at equal time: "+7.2 (+6.7 to +7.7)". */
  pays: { seeds: number; kinds: string; groups: string; named: string };
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

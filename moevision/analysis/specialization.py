"""Have experts learned to specialize? Information about class, position and part beside everything it must exceed.

"Above chance" is a low bar: a router that was never trained sorts patches by colour, and colour differs between
classes. So each number stands beside three comparisons, all on held-out images:

- (a) the null of `information.py`, permuted over images;
- (b) the baselines of `baselines.py`, in which no router has learned anything;
- (c) other trainings of the same recipe: the finding has to come back in each of them, above (a) and (b) as well. (A
  model needn't exceed its own siblings.) Experts of two trainings are matched before their choices are compared.

`verdict` is True, and the words "learned specialization" are used, only above all three. A comparison that wasn't made
counts as not passed, and the sentence says so. "Above a baseline" means that the interval of the difference of the two
estimates lies above 0; it is put together from their own intervals (Zou and Donner, Statistics in Medicine 27, 2008,
1693-1702, "MOVER"), as if they were independent. They rest on the same images, which makes this a little strict.

Where tokens don't choose (expert choice, Soft MoE) every expert reads equally much of every picture, which says nothing
about the class: there the class is asked of how much the patches take from each expert, and place and part of what the
experts read (`LayerTrace`). The estimators need no whole numbers, only whole pictures.

Axes: I images, P patches, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from moevision.analysis.baselines import Assignments
from moevision.analysis.information import (
    Estimate,
    choice_counts,
    class_information,
    part_information,
    position_information,
)
from moevision.analysis.similarity import match_experts
from moevision.analysis.specialization_words import sentence_of
from moevision.analysis.trace import LayerTrace, RoutingTrace
from moevision.errors import UserError

About = Literal["class", "class_given_position", "position", "part"]
ABOUTS: tuple[About, ...] = get_args(About)
_OF_PICTURES: tuple[About, ...] = ("class", "class_given_position")
_BASELINE_PERMUTATIONS = 100  # a baseline's null is only subtracted; its tail isn't needed

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class LayerSpecialization:
    """What the choice of expert in one layer tells about one thing, beside its comparisons.

    Attributes:
        layer: block index.
        about: what the experts are asked about.
        estimate: excess information with its interval.
        baselines: name -> excess in bits of each seed.
        seeds: excess in bits of each other training.
        seed_kappas: agreement of first choices with each other training, experts matched, beyond chance.
        above_null: the estimate's interval lies above 0 and its p-value is at most 0.05.
        above_baselines: it exceeds every baseline; None if there is none.
        above_seeds: every other training exceeds null and baselines too; None if there is none.
        sentence: the result in words.
    """

    layer: int
    about: About
    estimate: Estimate
    baselines: Mapping[str, tuple[float, ...]]
    seeds: tuple[float, ...]
    seed_kappas: tuple[float, ...]
    above_null: bool
    above_baselines: bool | None
    above_seeds: bool | None
    sentence: str

    @property
    def name(self) -> str:
        """The layer as it is shown, such as "L4"."""
        return f"L{self.layer}"

    @property
    def verdict(self) -> bool:
        """Whether this is learned specialization: above the null, every baseline, and in every other training."""
        return self.above_null and bool(self.above_baselines) and bool(self.above_seeds)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON primitives, the estimate's fields beside the others."""
        return {
            "layer": self.layer,
            "name": self.name,
            "about": self.about,
            **self.estimate.to_json(),
            "baselines": {name: list(values) for name, values in self.baselines.items()},
            "seeds": list(self.seeds),
            "seed_kappas": list(self.seed_kappas),
            "above": {"null": self.above_null, "baselines": self.above_baselines, "seeds": self.above_seeds},
            "verdict": self.verdict,
            "sentence": self.sentence,
        }


def specialization(
    trace: RoutingTrace,
    *,
    baselines: Mapping[str, Sequence[Assignments]] | None = None,
    seeds: Sequence[RoutingTrace] = (),
    parts: Ints | None = None,
    about: Sequence[About] = ABOUTS,
    num_permutations: int = 200,
    seed: int = 0,
) -> list[LayerSpecialization]:
    """Ask every layer about class, position, class given position, and part.

    Args:
        trace: routing of held-out pictures. Without two labelled classes nothing is asked about classes.
        baselines: from `measure_baselines` on the same trace.
        seeds: routing of other trainings on the same pictures.
        parts: [I, P] the part that each patch shows (`tables.majority_part`); negative: unknown. None: not asked.
        about: what to ask.
        num_permutations: of the nulls.
        seed: of everything drawn.

    Returns:
        One result per layer and question, in that order.

    Raises:
        UserError: another training was traced on other pictures or has other layers.
    """
    for other in seeds:
        if other.picture_names != trace.picture_names or len(other.layers) != len(trace.layers):
            raise UserError(
                "Other trainings must be of the same recipe and traced on the same pictures, in the same order: "
                "collect their traces with the same data and limit."
            )
    asked = [what for what in about if _can_ask(what, trace, parts)]
    ask = _Asker(trace, parts, num_permutations, seed)
    results = []
    for place, layer in enumerate(trace.layers):
        others = [other.layers[place] for other in seeds]
        kappas = tuple(match_experts(layer, other, seed=seed).kappa for other in others)
        for what in asked:
            own = ask.layer(what, layer)
            basis = {name: tuple(ask.baseline(what, layer.layer, each)) for name, each in (baselines or {}).items()}
            again = tuple(ask.layer(what, other) for other in others)
            results.append(_result(layer, what, own, basis, again, kappas))
    return results


def exceeds(a: Estimate, b: Estimate) -> bool:
    """Whether the interval of a - b lies above 0 (MOVER, from the two intervals)."""
    return a.value_bits - b.value_bits > math.hypot(a.value_bits - a.low, b.high - b.value_bits)


class _Asker:
    """Estimates, each computed once: most baselines are the same for every layer."""

    def __init__(self, trace: RoutingTrace, parts: Ints | None, num_permutations: int, seed: int) -> None:
        self.labels, self.grid, self.parts = np.asarray(trace.labels), trace.grid, parts
        self.num_permutations, self.seed = num_permutations, seed
        self.known: dict[tuple[About, int], Estimate] = {}

    def layer(self, about: About, layer: LayerTrace) -> Estimate:
        """Of a router."""
        amount = layer.takes if about in _OF_PICTURES else layer.reads
        counts = choice_counts(np.asarray(layer.expert_index), layer.num_experts, np.asarray(amount))
        return self._estimate(about, counts, np.arange(len(counts)), self.num_permutations)

    def baseline(self, about: About, layer: int, baselines: Sequence[Assignments]) -> Iterator[Estimate]:
        """Of the baselines that stand beside a layer."""
        for each in baselines:
            if each.layer in (None, layer):
                key = (about, id(each))
                if key not in self.known:
                    counts = each.patch_takes() if about in _OF_PICTURES else each.counts()
                    self.known[key] = self._estimate(about, counts, each.images, _BASELINE_PERMUTATIONS)
                yield self.known[key]

    def _estimate(self, about: About, counts: Floats, images: Ints, num_permutations: int) -> Estimate:
        if about == "position":
            return position_information(counts, self.grid, num_permutations=num_permutations, seed=self.seed)
        if about == "part" and self.parts is not None:
            return part_information(counts, self.parts[images], num_permutations=num_permutations, seed=self.seed)
        given = about == "class_given_position"
        labels = self.labels[images]
        return class_information(
            counts, labels, given_position=given, num_permutations=num_permutations, seed=self.seed
        )


def _can_ask(about: About, trace: RoutingTrace, parts: Ints | None) -> bool:
    if about == "part":
        return parts is not None
    labels = np.asarray(trace.labels)
    return about == "position" or len(np.unique(labels[labels >= 0])) > 1


def _result(
    layer: LayerTrace,
    about: About,
    own: Estimate,
    baselines: Mapping[str, tuple[Estimate, ...]],
    seeds: tuple[Estimate, ...],
    kappas: tuple[float, ...],
) -> LayerSpecialization:
    every = [each for estimates in baselines.values() for each in estimates]
    above_null = _above_null(own)
    above_baselines = all(exceeds(own, each) for each in every) if every else None
    again = [_above_null(other) and all(exceeds(other, each) for each in every) for other in seeds]
    bits = {name: tuple(each.value_bits for each in estimates) for name, estimates in baselines.items() if estimates}
    seed_bits = tuple(each.value_bits for each in seeds)
    above_seeds = all(again) if again else None
    passed = (above_null, above_baselines, above_seeds)
    sentence = sentence_of(layer.name, about, own, bits, seed_bits, passed, layer.kind)
    return LayerSpecialization(
        layer.layer, about, own, bits, seed_bits, kappas, above_null, above_baselines, above_seeds, sentence
    )


def _above_null(estimate: Estimate) -> bool:
    return estimate.low > 0 and estimate.p_value <= 0.05

"""Did experts learn to specialize? Information about class, position and part beside everything it must exceed.

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

Where tokens don't choose (expert choice, Soft MoE) every expert reads equally much of every image, which says nothing
about the class: there the class is asked of how much the patches take from each expert, and place and part of what the
experts read (`LayerTrace`). The estimators need no whole numbers, only whole images.

Axes: I images, P patches, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import numpy as np
import numpy.typing as npt

from moevision.analysis.agreement import match_experts
from moevision.analysis.baselines import Assignments
from moevision.analysis.information import (
    Estimate,
    choice_counts,
    class_information,
    part_information,
    position_information,
)
from moevision.analysis.trace import LayerTrace, RoutingTrace
from moevision.errors import UserError
from moevision.layers.routing import Kind as RoutingKind

About = Literal["class", "class_given_position", "position", "part"]
ABOUTS: tuple[About, ...] = get_args(About)
_OF_IMAGES: tuple[About, ...] = ("class", "class_given_position")
_BASELINE_PERMUTATIONS = 100  # a baseline's null is only subtracted; its tail isn't needed

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.integer[Any]]
Json = dict[str, Any]

FOUND, NOT_FOUND, OPEN = "found", "not_found", "open"

ABOUT_WORDS = {
    "class": "the class",
    "class_given_position": "the class, position held fixed",
    "position": "the position",
    "part": "the part, beyond what position tells",
}
BASELINE_WORDS = {
    "untrained": "the same model untrained",
    "hash": "a hash of the patch's pixels",
    "hash_position": "a hash of the patch's position",
    "kmeans_colour": "clusters of the patch's mean colour",
    "kmeans_input": "clusters of the layer's input (learned, but by no router)",
}
_SPECIALIZATION = {
    "class": "class specialization",
    "class_given_position": "class specialization at fixed positions",
    "position": "position specialization",
    "part": "part specialization beyond position",
}

Passed = tuple[bool, bool | None, bool | None]


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
        trace: routing of held-out images. Without two labelled classes nothing is asked about classes.
        baselines: from `measure_baselines` on the same trace.
        seeds: routing of other trainings on the same images.
        parts: [I, P] the part that each patch shows (`tables.majority_part`); negative: unknown. None: not asked.
        about: what to ask.
        num_permutations: of the nulls.
        seed: of everything drawn.

    Returns:
        One result per layer and question, in that order.

    Raises:
        UserError: another training was traced on other images or has other layers.
    """
    for other in seeds:
        if other.picture_names != trace.picture_names or len(other.layers) != len(trace.layers):
            raise UserError(
                "Other trainings must be of the same recipe and traced on the same images, in the same order: "
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
        amount = layer.takes if about in _OF_IMAGES else layer.reads
        counts = choice_counts(np.asarray(layer.expert_index), layer.num_experts, np.asarray(amount))
        return self._estimate(about, counts, np.arange(len(counts)), self.num_permutations)

    def baseline(self, about: About, layer: int, baselines: Sequence[Assignments]) -> Iterator[Estimate]:
        """Of the baselines that a layer is compared with."""
        for each in baselines:
            if each.layer in (None, layer):
                key = (about, id(each))
                if key not in self.known:
                    counts = each.patch_takes() if about in _OF_IMAGES else each.counts()
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


def teller(about: str, kind: RoutingKind) -> str:
    """What tells something about the class, the position or the part, as the subject of a sentence."""
    if kind == "token_choice":
        return "the choice of expert"
    if about in _OF_IMAGES:
        return "how much patches take from each expert"
    return "which expert takes a patch" if kind == "expert_choice" else "how much each expert reads"


def sentence_of(
    layer: str,
    about: str,
    estimate: Estimate,
    baselines: Mapping[str, tuple[float, ...]],
    seeds: tuple[float, ...],
    passed: Passed,
    kind: RoutingKind = "token_choice",
) -> str:
    """The result in words: bits above chance first, then what they exceed, then p.

    "Learned specialization" is said only above all comparisons; "no learned specialization" names the comparison that
    explains the number as well; where a comparison is missing the sentence says which, instead of either.

    Args:
        layer: as it is shown, such as "L4".
        about: a key of `ABOUT_WORDS`.
        estimate: of the layer.
        baselines: name -> excess in bits of each seed.
        seeds: excess in bits of other trainings.
        passed: whether the layer is above the null, the baselines and, in every other training, both.
        kind: who chooses in the layer.
    """
    above_null, above_baselines, above_seeds = passed
    value, interval = _bits(estimate.value_bits), f"95 % CI {_bits(estimate.low)} to {_bits(estimate.high)}"
    if not above_null:
        where = "" if kind == "token_choice" else f" in {teller(about, kind)}"
        return (
            f"{layer}: no {_SPECIALIZATION[about]}{where} ({value} bits above chance, {interval}, "
            f"n = {estimate.n_images:,})."
        )
    told = (
        f"{layer}: {teller(about, kind)} tells {value} bits about {ABOUT_WORDS[about]} ({interval}, "
        f"{_percent(estimate.share_of_entropy)} of the maximum, n = {estimate.n_images:,})."
    )
    if above_baselines is False:
        name, bits = max(((name, max(values)) for name, values in baselines.items()), key=lambda pair: pair[1])
        give = "give" if name.startswith("kmeans") else "gives"
        how = "as much or more" if bits >= estimate.value_bits else "too close to tell apart"
        return (
            f"{told} That is more than shuffled images give, but {BASELINE_WORDS.get(name, name)} {give} {_bits(bits)} "
            f"bits, {how}: no learned specialization."
        )
    closest = max((bits for values in baselines.values() for bits in values), default=0.0)
    if above_seeds is False:
        return (
            f"{told} That is more than shuffled images and routing without learning give (at most {_bits(closest)} "
            f"bits), but other trainings of the same recipe ({_range(seeds)} bits) do not all exceed those: no learned "
            "specialization."
        )
    compared = {"routing without learning": above_baselines, "other trainings": above_seeds}
    missing = [name for name, value in compared.items() if value is None]
    if missing:
        above = "shuffled images" if above_baselines is None else "shuffled images and routing without learning"
        return (
            f"{told} That is more than {above} give; it was not compared with {' and '.join(missing)}, so nothing is "
            "said about learned specialization."
        )
    return (
        f"{told} That is more than shuffled images (p = {estimate.p_value:.2g}) and every routing without learning "
        f"give (at most {_bits(closest)} bits), and {len(seeds)} other training{'s' if len(seeds) > 1 else ''} "
        f"repeat{'' if len(seeds) > 1 else 's'} it ({_range(seeds)} bits): learned specialization."
    )


def _bits(value: float) -> str:
    return f"{value:.3f}".replace("-", "−") if round(value, 3) else "0.000"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %".replace("-", "−") if round(100 * share, 1) else "0.0 %"


def _range(values: tuple[float, ...]) -> str:
    low, high = _bits(min(values)), _bits(max(values))
    return low if low == high else f"{low} to {high}"


HEADLINES: Final = {
    FOUND: "Learned specialization in {layers}: its routing depends on {about}",
    OPEN: "Open: {layers} passes every comparison made, but was not compared with other trainings",
    NOT_FOUND: "No learned specialization found",
}
_FOUND_WORDS: Final = (
    "Only layers count whose routing tells more than chance, than the same model untrained, than routing by a hash and "
    "than clusters of colour and of the layer's own input, and where other trainings of the recipe repeat it. It does "
    "not say that the answer needs these experts: that is measured by taking them away, further down."
)
_OPEN_WORDS: Final = (
    "The routing tells more than anything that needs no learning. Whether that comes with the recipe or by chance in "
    "this one training shows only in other trainings: train with another --seed_everything, give the runs to --seeds."
)
_NOT_FOUND_WORDS: Final = (
    "Experts do get different patches (see the galleries below), but what this tells is {reason}. This is a result, "
    "not a failure: experts add capacity to a model whether or not any of them stands for something that has a name, "
    "and a pattern that a router finds without learning is no evidence that it has learned one."
)


def verdict_of(entries: Sequence[LayerSpecialization], layer_names: Sequence[tuple[int, str]]) -> Json:
    """The answer, its headline and explanation, and sentences for each layer.

    Args:
        entries: specialization of every layer, about everything that was asked.
        layer_names: (block index, name) of every MoE layer, in order of depth.
    """
    layers = [
        {"layer": layer, "name": name, **_of_layer([entry for entry in entries if entry.layer == layer])}
        for layer, name in layer_names
    ]
    answers = [layer["answer"] for layer in layers]
    answer = next((each for each in (FOUND, OPEN) if each in answers), NOT_FOUND)
    names = [layer["name"] for layer in layers if layer["answer"] == answer]
    about = dict.fromkeys(ABOUT_WORDS[entry.about] for entry in entries if entry.verdict)
    headline = HEADLINES[answer].format(layers=listed(names), about=listed(list(about)))
    if len(names) > 1:
        headline = (
            headline.replace(": its routing", ": their routing")
            .replace(" passes ", " pass ")
            .replace("was not", "were not")
        )
    words = {FOUND: _FOUND_WORDS, OPEN: _OPEN_WORDS, NOT_FOUND: _NOT_FOUND_WORDS}[answer]
    explanation = words.format(reason=", or ".join(_reasons(entries)))
    return {"answer": answer, "headline": headline, "explanation": explanation, "layers": layers}


def _of_layer(own: Sequence[LayerSpecialization]) -> Json:
    """A layer's answer, and the sentences of what it learned or came closest to; about the class in any case."""
    learned, undecided = [entry for entry in own if entry.verdict], [entry for entry in own if is_open(entry)]
    close = [entry for entry in own if entry.above_null and entry.above_baselines]
    told = [entry for entry in own if entry.about == "class" or entry in (learned or undecided or close)] or list(own)
    sentences = [entry.sentence for entry in told] or ["Nothing was asked of this layer."]
    return {"answer": FOUND if learned else OPEN if undecided else NOT_FOUND, "sentences": sentences}


def is_open(entry: LayerSpecialization) -> bool:
    """Whether everything was passed that was looked at, and other trainings were not."""
    return entry.above_null and bool(entry.above_baselines) and entry.above_seeds is None


def _reasons(entries: Sequence[LayerSpecialization]) -> list[str]:
    """What stood in the way, in words."""
    above_null = [entry for entry in entries if entry.above_null]
    if not above_null:
        most = max((entry.estimate.high for entry in entries), default=0.0)
        return [f"no more than shuffled images give by chance (these images leave room for up to {most:.3f} bits)"]
    reasons = []
    if any(entry.above_baselines is False for entry in above_null):
        reasons.append(
            "matched by routing in which no router has learned anything, such as clusters of similar patches"
        )
    if any(entry.above_baselines is None for entry in above_null):
        reasons.append("compared with nothing that needs no learning")
    if any(entry.above_baselines and entry.above_seeds is False for entry in above_null):
        reasons.append("not repeated by other trainings of the same recipe")
    return reasons


def listed(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)

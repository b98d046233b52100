"""What the experts of one layer tell about classes and parts, read off the recorded choices, and its controls.

A reading is of a patch or of the image (the histogram of its experts, by a probe on held-out images), of the first
choice or of all choices, of all patches or, where parts are known, of object and background apart. Patches of one image
are not independent, so every interval and every shuffling is over images.

Sources: Agresti and Min, Statistics in Medicine 24 (2005) 729-740 (interval of a difference of paired proportions,
which stays wide where no image changes).

Axes: I images, P patches (1 where images are routed as a whole), K choices best first, E experts, C classes, V values
asked about, D width, p patches whose inputs are known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np
import numpy.typing as npt

from moevision.analysis.information import (
    LEVEL,
    Estimate,
    choice_counts,
    class_information,
    entropy_bits,
    halves_by_class,
    part_information,
    students_quantile,
)
from moevision.analysis.recording import Flags, Floats, Ints, RecordedLayer, Recording
from moevision.analysis.specialization import Assignments, Rule, exceeds, fit_clusters

Json = dict[str, Any]
Choices = Literal["first", "all"]

_CONTROL_PERMUTATIONS = 50  # a control's null is only subtracted
_PROBE_TOKENS = 6_000  # that a linear probe is fitted on
_PROBE_CLASSES = 100  # more take minutes to fit
_CLUSTER_TOKENS = 20_000  # that clusters are fitted on
_PRIOR = 1e-3  # of a probe's prediction: a class that it excludes costs 10 bits, not infinitely many


class Interval(NamedTuple):
    """A mean over images with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Reading:
    """What experts tell, read in one way.

    Attributes:
        of: `class` or `part`.
        unit: `patch`: the choice of one; `image`: the histogram of all its patches, by a probe on held-out images.
        choices: `first` or `all`.
        where: `everywhere`, `object` or `background`.
        guess: share guessed right from the expert, the guess of each expert coming from the other half of the images.
        chance: share of the most frequent class (part).
        bits: above shuffled images; of the image: above the class frequencies, on held-out images.
        p_value: of the shuffling; None where held-out images were used instead.
    """

    of: str
    unit: str
    choices: Choices
    where: str
    guess: Interval
    chance: float
    bits: Interval
    p_value: float | None = None

    def to_json(self) -> Json:
        """As JSON primitives."""
        return {**self.__dict__, "guess": self.guess._asdict(), "bits": self.bits._asdict()}


@dataclass(frozen=True)
class Load:
    """How evenly a layer uses its experts; a class x expert table never stands without it.

    Attributes:
        share: [E] of all choices.
        class_share: [C, E] share of each class's choices; NaN for a class without images.
    """

    share: Floats
    class_share: Floats

    @property
    def max_over_mean(self) -> float:
        """Busiest expert over the mean."""
        return float(self.share.max() * len(self.share))

    @property
    def effective(self) -> float:
        """Effective number of experts: exp of the entropy of the loads, E where all are used alike."""
        return float(2 ** entropy_bits(self.share))

    @property
    def words(self) -> str:
        """As in "max/mean load 1.20, in effect 7.6 of 8 experts"."""
        return f"max/mean load {self.max_over_mean:.2f}, in effect {self.effective:.1f} of {len(self.share)} experts"

    def to_json(self) -> Json:
        """As JSON primitives."""
        table = [[None if np.isnan(x) else float(x) for x in row] for row in self.class_share]
        return {
            "share": self.share.tolist(),
            "max_over_mean": self.max_over_mean,
            "effective_experts": self.effective,
            "class_share": table,
        }


@dataclass(frozen=True)
class Controls:
    """What the controls of a layer tell, beside the router on the same images.

    Attributes:
        readings: name of a control -> what each of its seeds tells, of a patch and of the image.
        same: name of a control -> the same of the router, on the images of that control.
        gain: bits by which the router exceeds the best of them; None where there is none.
        exceeded: whether it exceeds each of them (interval of the difference above 0).
    """

    readings: Mapping[str, Sequence[Reading]] = field(default_factory=dict)
    same: Mapping[str, tuple[Reading, Reading]] = field(default_factory=dict)
    gain: float | None = None
    exceeded: bool = True


@dataclass(frozen=True)
class LayerReadings:
    """Everything that was read off one layer of one training.

    Attributes:
        layer: the layer.
        load: how evenly its experts are used.
        why: why nothing else was read; None where it was.
        readings: that of the answers first.
        estimate: the bits of the first of them.
        probe: the same of the linear probe's balanced groups; None without inputs.
        controls: those of the layer.
        most_bits: what a probe tells, or without one what so many experts could tell at most.
    """

    layer: RecordedLayer
    load: Load
    why: str | None = None
    readings: Sequence[Reading] = ()
    estimate: Estimate | None = None
    probe: Reading | None = None
    controls: Controls = Controls()
    most_bits: float = math.nan


def read_layer(recording: Recording, place: int, *, permutations: int, cluster_seeds: int, seed: int) -> LayerReadings:
    """Read one layer of one training; the arguments are those of `three_questions`."""
    layer, labels = recording.layers[place], np.asarray(recording.labels)
    counts = {
        choices: counts_of(layer.choices, layer.amounts, layer.num_experts, choices) for choices in get_args(Choices)
    }
    load = load_of(counts["all"], labels, len(recording.class_names))
    known = labels[labels >= 0]
    if len(np.unique(known)) < 2:
        return LayerReadings(layer, load, "fewer than two classes have images")
    reader = _Reader(recording, labels, halves_by_class(labels, seed), seed)
    readings, estimate = _read(reader, layer, counts, permutations)
    probe = None
    if layer.inputs is not None and len(np.unique(labels)) <= _PROBE_CLASSES:
        target = np.broadcast_to(labels[:, None], layer.inputs.shape[:2])
        groups = probe_groups(layer.inputs, target, layer.num_experts, reader.halves, seed)
        probe, _ = reader.patch(groups, _CONTROL_PERMUTATIONS)
    controls = _compare(reader, layer, counts[_primary(layer)], permutations, cluster_seeds)
    most = probe.bits.value if probe is not None else 0.0
    if most <= 0:
        most = min(entropy_bits(np.bincount(known)), math.log2(max(2, layer.num_experts)))
    return LayerReadings(layer, load, None, readings, estimate, probe, controls, most)


def _primary(layer: RecordedLayer) -> Choices:
    """The choices that the answers are about."""
    return "first" if layer.tokens_choose else "all"


@dataclass(frozen=True)
class _Reader:
    """Reads counts of choices [I', P, E], of all images or of some.

    Attributes:
        recording: with the parts.
        labels: [I].
        halves: [I] which half an image is in.
        seed: of what is shuffled.
    """

    recording: Recording
    labels: Ints
    halves: Flags
    seed: int

    def patch(
        self, counts: Floats, permutations: int, *, of: str = "class", choices: Choices = "first",
        where: str = "everywhere", images: Ints | None = None,
    ) -> tuple[Reading, Estimate]:  # fmt: skip
        """What the choice of one patch tells."""
        rows = np.arange(len(self.labels)) if images is None else images
        if of == "part":
            target = np.asarray(self.recording.parts)[rows]
            estimate = part_information(counts, target, num_permutations=permutations, seed=self.seed)
        else:
            labels = self.labels[rows]
            target = np.broadcast_to(labels[:, None], counts.shape[:2])
            estimate = class_information(counts, labels, num_permutations=permutations, seed=self.seed)
        guess, chance = guess_from_experts(counts, target, self._halves_of(rows))
        bits = Interval(estimate.value_bits, estimate.low, estimate.high)
        return Reading(of, "patch", choices, where, guess, chance, bits, estimate.p_value), estimate

    def image(
        self, counts: Floats, *, choices: Choices = "first", where: str = "everywhere", images: Ints | None = None
    ) -> Reading:
        """What a probe reads off the histogram of the image, on held-out images."""
        rows = np.arange(len(self.labels)) if images is None else images
        known = self.labels[rows] >= 0
        sums = counts[known].sum(1)
        histogram = sums / np.maximum(sums.sum(1, keepdims=True), 1e-12)
        guess, chance, bits = probe_histogram(histogram, self.labels[rows][known], self._halves_of(rows)[known])
        return Reading("class", "image", choices, where, guess, chance, bits)

    def _halves_of(self, rows: Ints) -> Flags:
        """Halves of some images: clusters are measured on one half of all, which is divided again."""
        return self.halves if len(rows) == len(self.labels) else halves_by_class(self.labels[rows], self.seed)


def _read(
    reader: _Reader, layer: RecordedLayer, counts: Mapping[Choices, Floats], permutations: int
) -> tuple[list[Reading], Estimate]:
    """All readings, that of the answers first, and its bits."""
    primary, patches = _primary(layer), layer.choices.shape[1]
    order = [primary] if counts["first"].sum() == counts["all"].sum() else list(dict.fromkeys((primary, "all")))
    asked: list[tuple[str, Flags | None]] = [("everywhere", None)]
    objects = reader.recording.objects
    if objects is not None and patches > 1:
        asked += [("object", np.asarray(objects, bool)), ("background", ~np.asarray(objects, bool))]
    readings, estimates = [], []
    for where, mask in asked:
        for choices in order:
            own = counts[choices] if mask is None else counts[choices] * mask[..., None]
            reading, estimate = reader.patch(own, permutations, choices=choices, where=where)
            readings += [reading, reader.image(own, choices=choices, where=where)]
            estimates.append(estimate)
    parts = reader.recording.parts
    if parts is not None and patches > 1 and len(np.unique(parts[parts >= 0])) > 1:
        readings.append(reader.patch(counts[primary], permutations, of="part", choices=primary)[0])
    return readings, estimates[0]


def _compare(reader: _Reader, layer: RecordedLayer, counts: Floats, permutations: int, cluster_seeds: int) -> Controls:
    """The controls, and by how much the router exceeds the best of them."""
    choices, patches = _primary(layer), counts.shape[1]
    clusters = layer.clusters
    if clusters is None:
        clusters = cluster_choices(layer, cluster_seeds, reader.seed)
    readings: dict[str, list[Reading]] = {}
    same: dict[str, tuple[Reading, Reading]] = {}
    gains, exceeded = [], True
    known: dict[bytes, tuple[Reading, Estimate, Reading]] = {}
    for name, controls in {"before": layer.before, "untrained": layer.untrained, "clusters": clusters}.items():
        for control in controls:
            images = np.asarray(control.images)
            if (reader.labels[images] >= 0).sum() < 2:  # of the half that clusters are measured on
                continue
            some: dict[str, Any] = {"choices": choices, "images": images}
            key = images.tobytes()
            if key not in known:  # clusters are measured on half of the images, and so the router there
                mine = counts[images]
                known[key] = (*reader.patch(mine, permutations, **some), reader.image(mine, **some))
            own, own_estimate, own_image = known[key]
            same[name] = (own, own_image)
            index, amounts = (x if x is None else x[:, :patches] for x in (control.expert_index, control.takes))
            theirs = counts_of(cast(Ints, index), amounts, control.num_experts, choices)
            reading, estimate = reader.patch(theirs, _CONTROL_PERMUTATIONS, **some)
            readings[name] = [*readings.get(name, []), reading, reader.image(theirs, **some)]
            exceeded &= exceeds(own_estimate, estimate)
            gains.append(own_estimate.value_bits - estimate.value_bits)
    return Controls(readings, same, min(gains) if gains else None, exceeded)


def counts_of(choices: Ints, amounts: npt.NDArray[Any] | None, num_experts: int, which: Choices) -> Floats:
    """[I, P, E] of all choices, or of the first alone (which counts 1 where it counts at all)."""
    index = np.asarray(choices)
    amount = np.ones(index.shape, np.float32) if amounts is None else np.asarray(amounts, np.float32)
    amount = np.where(index >= 0, amount, 0)
    if which == "first":
        index, amount = index[..., :1], (amount[..., :1] > 0).astype(np.float32)
    return choice_counts(index, num_experts, amount)


def load_of(counts: Floats, labels: Ints, num_classes: int) -> Load:
    """The load of counts [I, P, E] on images of these classes [I]."""
    by_image = counts.sum(1, dtype=np.float64)  # [I, E]
    one_hot = labels[:, None] == np.arange(num_classes)
    table = one_hot.T.astype(np.float64) @ by_image
    with np.errstate(invalid="ignore"):
        return Load(by_image.sum(0) / max(by_image.sum(), 1e-12), table / table.sum(1, keepdims=True))


def guess_from_experts(counts: Floats, target: Ints, halves: Flags) -> tuple[Interval, float]:
    """How often the class (part) is right that an expert's choices mostly are of, in the other half of the images.

    Args:
        counts: [I, P, E] what each patch's choices count.
        target: [I, P] class or part of each patch; negative: left out.
        halves: [I] which half an image is in.

    Returns:
        The share guessed right, with an interval over images, and that of always guessing the most frequent value.
    """
    image, patch = (target >= 0).nonzero()
    values, ranks = np.unique(target[image, patch], return_inverse=True)
    tables = np.zeros((len(counts), len(values), counts.shape[2]))  # [I, V, E]
    np.add.at(tables, (image, ranks), counts[image, patch])
    total = tables.sum((1, 2))  # [I]
    right = np.zeros(len(total))
    for half in (True, False):
        known = tables[halves != half].sum(0)  # [V, E]
        best = np.where(known.sum(0) > 0, known.argmax(0), known.sum(1).argmax())  # [E]
        right[halves == half] = tables[halves == half][:, best, np.arange(tables.shape[2])].sum(1)
    frequency = tables.sum((0, 2))
    return ratio_interval(right, total), float(frequency.max() / max(frequency.sum(), 1e-12))


def ratio_interval(part: Floats, whole: Floats) -> Interval:
    """Sum of part [I] over sum of whole [I], with its interval over images (linearised, Student's quantile)."""
    n, total = len(part), max(float(whole.sum()), 1e-12)
    ratio = float(part.sum()) / total
    deviation = part - ratio * whole
    half = students_quantile(n - 1) * math.sqrt(n / max(1, n - 1) * float(np.square(deviation).sum())) / total
    return Interval(ratio, ratio - half, ratio + half)


def paired_interval(loss: Floats) -> Interval:
    """Mean of losses [I] between -1 and 1 (Agresti and Min's interval): no image that changes is no proof of none."""
    n, total = len(loss), float(loss.sum())
    centre = total / (n + 2)
    half = (
        NormalDist().inv_cdf((1 + LEVEL) / 2)
        * math.sqrt(max(0.0, float(np.square(loss).sum()) + 1 - total * total / (n + 2)))
        / (n + 2)
    )
    return Interval(total / n, max(-1.0, centre - half), min(1.0, centre + half))


def probe_histogram(histogram: Floats, labels: Ints, halves: Flags) -> tuple[Interval, float, Interval]:
    """What logistic regression tells from the histograms [I, E] of held-out images.

    Returns:
        The share guessed right, that of the most frequent class, and the bits about the class: the mean of log2 of
        the predicted over the prior probability of the true class.
    """
    values, ranks = np.unique(labels, return_inverse=True)
    right, bits = np.zeros(len(labels)), np.zeros(len(labels))
    for half in (True, False):
        fit, test = halves != half, halves == half
        if not (fit.any() and test.any()):
            continue
        prior = (np.bincount(ranks[fit], minlength=len(values)) + 1) / (fit.sum() + len(values))
        predicted = (1 - _PRIOR) * _predict(histogram[fit], ranks[fit], histogram[test], len(values)) + _PRIOR * prior
        right[test] = predicted.argmax(1) == ranks[test]
        bits[test] = np.log2(predicted / prior)[np.arange(test.sum()), ranks[test]]
    ones = np.ones(len(labels))
    return ratio_interval(right, ones), float(np.bincount(ranks).max() / len(ranks)), ratio_interval(bits, ones)


def probe_groups(inputs: Floats, target: Ints, num_groups: int, halves: Flags, seed: int) -> Floats:
    """The patches dealt to as many balanced groups as there are experts, by a linear probe of the layer's input.

    The probe is fitted on one half of the images and applied to the other. Its patches are put in the order of the
    class that it predicts (and of its certainty in each) and cut into groups of equal size.

    Args:
        inputs: [I, p, D].
        target: [I, p] what the probe is fitted to; negative: not fitted.
        num_groups: E.
        halves: [I].
        seed: of the patches that it is fitted on.

    Returns:
        [I, p, E] one-hot.
    """
    images, patches, width = inputs.shape
    groups = np.zeros((images, patches), np.int64)
    values, rng = np.unique(target[target >= 0]), np.random.default_rng(seed)
    for half in (True, False):
        fit, test = halves != half, halves == half
        tokens, wanted = inputs[fit].reshape(-1, width), target[fit].ravel()
        chosen = rng.permutation(np.flatnonzero(wanted >= 0))[:_PROBE_TOKENS]
        ranks = np.searchsorted(values, wanted[chosen])
        predicted = _predict(tokens[chosen], ranks, inputs[test].reshape(-1, width), len(values))
        order = np.lexsort((predicted.max(1), predicted.argmax(1)))
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order)) * num_groups // max(1, len(order))
        groups[test] = place.reshape(-1, patches)
    dealt: Floats = (groups[..., None] == np.arange(num_groups)).astype(np.float32)
    return dealt


def _predict(known: Floats, ranks: Ints, asked: Floats, num_values: int) -> Floats:
    """[N, V] probabilities by logistic regression on standardised features."""
    from sklearn.linear_model import LogisticRegression  # slow to import, and not needed for anything else here

    found = np.zeros((len(asked), num_values))
    present = np.unique(ranks)
    if len(present) < 2:
        found[:, present] = 1
        return found
    mean, spread = known.mean(0), known.std(0) + 1e-6
    probe = LogisticRegression(max_iter=200, tol=1e-3).fit((known - mean) / spread, ranks)
    found[:, probe.classes_] = probe.predict_proba((asked - mean) / spread)
    return found


def cluster_choices(layer: RecordedLayer, seeds: int, seed: int = 0) -> list[Assignments]:
    """Choices by k-means clusters of the layer's input, as many as experts.

    There are none where not all patches' inputs are known, or fewer than experts. The clusters see no label, so they
    are fitted to the same patches that they deal out.
    """
    if layer.inputs is None or layer.positions is not None or not layer.tokens_choose:
        return []
    images, patches, width = layer.inputs.shape
    if images * patches < layer.num_experts:
        return []
    tokens = layer.inputs.reshape(-1, width).astype(np.float32)
    sample = np.random.default_rng(seed).permutation(len(tokens))[:_CLUSTER_TOKENS]
    rule = Rule("token_choice", layer.num_experts, layer.choices.shape[2])
    found = []
    for number in range(seeds):
        means = fit_clusters(tokens[sample], layer.num_experts, seed + number)
        nearness = -np.square(means.transform(tokens)).reshape(images, patches, -1)
        chosen = rule.apply(nearness, 1.0).expert_index
        found.append(Assignments(None, number, chosen, np.arange(images), layer.num_experts))
    return found

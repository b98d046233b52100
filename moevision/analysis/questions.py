"""Three questions about the experts of any model whose routing was recorded, each answered beside its controls.

1. Do classes (or parts) go to different experts? How often the class is guessed right from the expert, beside the
   majority class; bits above labels shuffled over images; share of what a linear probe of the layer's input tells when
   its answers are dealt to as many balanced groups as there are experts.
2. Did training the router add to that? The same of the router before training and of k-means clusters of its own input.
   Every training stands against its own controls. A router that was started from clusters can't answer it.
3. Do the experts do different things? The swap test: on the images of class A the expert that A uses most and the one
   that a class B uses most change places, and the points of accuracy that this costs stand beside random swaps of as
   many choices of the same images.

Each answer is one of "yes", "a little", "not shown" and "not measured", and there is no verdict over all three: classes
may go to different experts without training the router having added to it, and experts that do different things may be
no experts of classes. The rules:

- 1 is shown where the bits' interval lies above 0 and at most one shuffling of twenty tells as much;
- 2 is shown where every training tells more than each of its own controls (interval of the difference above 0);
- 3 is shown where the interval of the loss lies above 0; it is "a little" where random swaps of as many choices cost
  more, so that the experts differ, and those of the classes less than others;
- 1 and 2 are "a little" where the bits (those beyond the best control) are less than `A_LITTLE` of what the probe
  tells.

They are asked of a patch and of the image (the histogram of its experts, by a probe on held-out images), of the first
choice and of all choices, of all patches and, where parts are known, of object and background apart. The answers are
about first choices of all patches; where no patch chooses (expert choice, Soft MoE) about what patches take. Patches of
one image are not independent, so every interval and every shuffling is over images.

A model that isn't ours takes part through a `Recording`: chosen experts and labels, and whatever else is known. What is
missing is said to be not measured.

Sources: Agresti and Min, Statistics in Medicine 24 (2005) 729-740 (interval of a difference of paired proportions,
which stays wide where no image changes).

Axes: I images, P patches (1 where images are routed as a whole), K choices best first, E experts, C classes, V values
asked about, D width, p patches whose inputs are known, R images that are run again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch

from moevision.analysis.collect import layer_inputs, network_input
from moevision.analysis.images import read_images
from moevision.analysis.information import Estimate, choice_counts, class_information, part_information
from moevision.analysis.intervention import Ranking, edited, numbered_layers
from moevision.analysis.specialization import Assignments, Rule, exceeds, fit_clusters, listed, percent, signed, span
from moevision.errors import UserError
from moevision.models.io import from_clusters
from moevision.models.reading import routes_read
from moevision.models.safe_files import read_json, read_yaml

if TYPE_CHECKING:
    from torch import nn

    from moevision.analysis.images import PictureSet
    from moevision.analysis.trace import RoutingTrace
    from moevision.layers import MoEMlp
    from moevision.models.io import SavedModel

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.integer[Any]]
Flags = npt.NDArray[np.bool_]
Json = dict[str, Any]
Question = Literal["experts", "training", "function"]
Choices = Literal["first", "all"]
Run = Callable[[int, Ints, Ints], npt.NDArray[Any]]
"""(place of the layer, images [R], their experts [R, P, K]) -> logits [R, C] with those routes; gates stay by rank."""

YES, A_LITTLE_WORD, NOT_SHOWN, NOT_MEASURED = "yes", "a little", "not shown", "not measured"
LEADS: Final[dict[Question, str]] = {
    "experts": "Classes go to different experts",
    "training": "Training the router added to that",
    "function": "The experts do different things",
}
_CONTROLS: Final = {
    "before": ("The router before training", "before training it told"),
    "untrained": (
        "The same model with fresh weights, in place of the router before training",
        "the same model with fresh weights tells",
    ),
    "clusters": ("Clusters of the same input", "clusters of the same input tell"),
}
A_LITTLE = 0.1
"""Below this share of what the linear probe tells, what is shown is called "a little": a convention, not a test."""

_LEVEL, _P_VALUE = 0.95, 0.05
_CONTROL_PERMUTATIONS = 50  # a control's null is only subtracted
_PROBE_TOKENS = 6_000  # that a linear probe is fitted on
_PROBE_CLASSES = 100  # more take minutes to fit
_INPUT_TOKENS = 20_000  # whose inputs are kept of each layer
_PRIOR = 1e-3  # of a probe's prediction: a class that it excludes costs 10 bits, not infinitely many
_BATCH = 32
UPCYCLE_RECORD = "upcycle.json"  # what `moevision upcycle` leaves beside a model


@dataclass(frozen=True)
class RecordedLayer:
    """What is known of one MoE layer of any model.

    Attributes:
        name: as it is shown, such as "L3".
        choices: [I, P, K] the experts of each patch, best first; P is 1 where images are routed as a whole.
        num_experts: E.
        amounts: [I, P, K] what a choice counts: whether it was kept, or what the patch takes; 1 if None.
        tokens_choose: False for expert choice and Soft MoE, which have no first choice and no route to be forced.
        by_image: all patches of an image share one choice.
        inputs: [I, p, D] what the router receives of some patches; None: no probe, no clusters.
        positions: [p] which patches those are; None: all in order.
        before: choices of the same router before training; one entry for each start that is known.
        untrained: choices of the same model with freshly drawn weights, which stands for it where that isn't known.
        clusters: choices by clusters of the layer's input; made from `inputs` if None and those are of all patches.
        cluster_start: the router was started from clusters of its input.
        read: whether any logit reads these patches: with a class-token head it doesn't read those of the last block.
    """

    name: str
    choices: Ints
    num_experts: int
    amounts: npt.NDArray[Any] | None = None
    tokens_choose: bool = True
    by_image: bool = False
    inputs: Floats | None = None
    positions: Ints | None = None
    before: Sequence[Assignments] = ()
    untrained: Sequence[Assignments] = ()
    clusters: Sequence[Assignments] | None = None
    cluster_start: bool = False
    read: bool = True


@dataclass(frozen=True)
class Recording:
    """The routing of any model on labelled images: what `three_questions` asks.

    Attributes:
        labels: [I] classes; negative: unknown.
        layers: the MoE layers, in order of depth.
        class_names: [C].
        parts: [I, P] the part that each patch shows; negative: unknown. None: not asked.
        objects: [I, P] whether a patch shows the object (background otherwise); None: not told apart.
        run: runs the model again with forced routes, for the swap test; None: not measured.

    Raises:
        UserError: arrays that don't belong together.
    """

    labels: Ints
    layers: Sequence[RecordedLayer]
    class_names: Sequence[str]
    parts: Ints | None = None
    objects: Flags | None = None
    run: Run | None = None

    def __post_init__(self) -> None:
        images = len(self.labels)
        for layer in self.layers:
            shape = np.shape(layer.choices)
            if len(shape) != 3 or shape[0] != images or np.max(layer.choices, initial=0) >= layer.num_experts:
                raise UserError(
                    f"The choices of {layer.name} are {list(shape)}: give [images, patches, choices], {images} images, "
                    f"experts 0 to {layer.num_experts - 1}."
                )
            if layer.inputs is not None and layer.inputs.shape[:2] != (images, _count(layer)):
                raise UserError(f"The inputs of {layer.name} must be [images, {_count(layer)}, width].")
        if not self.layers:
            raise UserError("A recording without a layer tells nothing: give the choices of at least one MoE layer.")


def _count(layer: RecordedLayer) -> int:
    return np.shape(layer.choices)[1] if layer.positions is None else len(layer.positions)


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
        positive = self.share[self.share > 0]
        return float(np.exp(-(positive * np.log(positive)).sum()))

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
class Swap:
    """What it costs to send the patches of classes through each other's experts.

    Attributes:
        points: accuracy lost, in percentage points.
        random: the same by random swaps of as many choices of the same images.
        more: the first minus the second, image by image.
        moved: share of the choices of those images that changed.
        n_images: images that were run.
        pairs: class, its expert, the other class, that one's expert; by name and number.
    """

    points: Interval
    random: Interval
    more: Interval
    moved: float
    n_images: int
    pairs: Sequence[tuple[str, int, str, int]]

    def to_json(self) -> Json:
        """As JSON primitives."""
        intervals = {name: getattr(self, name)._asdict() for name in ("points", "random", "more")}
        return {**intervals, "moved": self.moved, "n_images": self.n_images, "pairs": [list(p) for p in self.pairs]}


@dataclass(frozen=True)
class Answer:
    """One answer: a plain sentence, and the numbers behind it.

    Attributes:
        question: which.
        answer: `yes`, `a little`, `not shown` or `not measured`.
        detail: what stands in brackets.
        numbers: further sentences.
    """

    question: Question
    answer: str
    detail: str
    numbers: Sequence[str] = ()

    @property
    def sentence(self) -> str:
        """As in "Classes go to different experts: yes (...)."."""
        return f"{LEADS[self.question]}: {self.answer} ({self.detail})."

    def to_json(self) -> Json:
        """As JSON primitives."""
        return {
            "question": self.question,
            "answer": self.answer,
            "sentence": self.sentence,
            "detail": self.detail,
            "numbers": list(self.numbers),
        }


@dataclass(frozen=True)
class LayerAnswers:
    """The three answers about one layer, and every number behind them.

    Attributes:
        name: of the layer.
        answers: of the three questions, in order.
        load: how evenly the experts are used.
        readings: everything that was read off the choices.
        probe: the same of the linear probe's balanced groups; None without inputs.
        controls: name of a control -> what each of its seeds tells, of a patch and of the image.
        same: name of a control -> the same of the router, on the images of that control.
        trainings: by how many bits each training exceeds its own best control: this one first, then the others; None
            where that wasn't measured.
        swap: the swap test; None where it wasn't made.
    """

    name: str
    answers: Sequence[Answer]
    load: Load
    readings: Sequence[Reading] = ()
    probe: Reading | None = None
    controls: Mapping[str, Sequence[Reading]] = field(default_factory=dict)
    same: Mapping[str, Sequence[Reading]] = field(default_factory=dict)
    trainings: Sequence[float | None] = ()
    swap: Swap | None = None

    def to_json(self) -> Json:
        """As JSON primitives."""
        return {
            "name": self.name,
            "answers": [answer.to_json() for answer in self.answers],
            "load": self.load.to_json(),
            "readings": [reading.to_json() for reading in self.readings],
            "probe": None if self.probe is None else self.probe.to_json(),
            "controls": {name: [reading.to_json() for reading in each] for name, each in self.controls.items()},
            "same": {name: [reading.to_json() for reading in each] for name, each in self.same.items()},
            "trainings": list(self.trainings),
            "swap": None if self.swap is None else self.swap.to_json(),
        }


def three_questions(
    recording: Recording,
    *,
    seeds: Sequence[Recording] = (),
    permutations: int = 200,
    cluster_seeds: int = 3,
    draws: int = 3,
    swap_images: int = 400,
    seed: int = 0,
) -> list[LayerAnswers]:
    """Ask every layer the three questions.

    Args:
        recording: of the model; held-out images.
        seeds: of other trainings of the same recipe, each with its own controls.
        permutations: of the shuffled labels.
        cluster_seeds: clusterings of the input, where the recording has none.
        draws: random swaps per image.
        swap_images: how many images the swap test runs at most.
        seed: of everything drawn.

    Raises:
        UserError: another training has other layers.

    Examples:
        >>> import numpy as np
        >>> labels = np.arange(40) % 2  # cats and dogs, four patches each: class 0 goes to expert 0, class 1 to 1
        >>> layer = RecordedLayer("L1", np.tile(labels[:, None, None], (1, 4, 1)), num_experts=2)
        >>> (found,) = three_questions(Recording(labels, [layer], ["cat", "dog"]))
        >>> found.answers[0].sentence
        'Classes go to different experts: yes (the expert alone guesses 100.0 % right, chance 50.0 %).'
        >>> found.load.words
        'max/mean load 1.00, in effect 2.0 of 2 experts'
    """
    for other in seeds:
        if len(other.layers) != len(recording.layers):
            raise UserError("Other trainings must be of the same recipe: these have other MoE layers.")
    found = []
    for place, layer in enumerate(recording.layers):
        options = {"permutations": permutations, "cluster_seeds": cluster_seeds, "seed": seed}
        own = _Asked(recording, place, **options)
        others = [_Asked(other, place, **options) for other in seeds]
        swap = why = None
        if recording.run is None or not layer.tokens_choose:
            why = "routes were not forced" if layer.tokens_choose else "no patch chooses its experts here"
        elif not layer.read:
            why = "no logit reads these patches, so that no swap can cost anything"
        elif not own.asked:
            why = own.why
        else:
            swap = swap_test(recording, place, draws=draws, limit=swap_images, seed=seed)
            why = "all classes use all experts alike" if swap is None else None
        answers = (own.experts(), own.training(others), function_answer(swap, why))
        found.append(
            LayerAnswers(
                layer.name, answers, own.load, own.readings, own.probe, own.controls, own.same,
                [each.gain for each in (own, *others)], swap,
            )
        )  # fmt: skip
    return found


def headline(layers: Sequence[LayerAnswers]) -> list[Answer]:
    """One answer to each question about a whole model: the strongest of its layers, which are named."""
    found = []
    for place, question in enumerate(LEADS):
        answers = [(layer.name, layer.answers[place]) for layer in layers]
        best = next(
            word
            for word in (YES, A_LITTLE_WORD, NOT_SHOWN, NOT_MEASURED)
            if any(answer.answer == word for _, answer in answers)
        )
        names = [name for name, answer in answers if answer.answer == best]
        # The deepest of them is quoted: there experts know most about the image.
        quoted = next(answer for name, answer in reversed(answers) if name == names[-1])
        where = "" if len(layers) == 1 else f"{names[-1]}: " if len(names) == 1 else f"{listed(names)}; {names[-1]}: "
        found.append(replace(quoted, question=question, detail=where + quoted.detail))
    return found


def plainly(answers: Sequence[Answer]) -> str:
    """The answers without a number, the clearest first.

    Examples:
        >>> plainly([Answer("experts", YES, "46 %"), Answer("training", NOT_SHOWN, "0 bits")])
        'Classes go to different experts. Not shown: that training the router added to that.'
    """
    told = []
    for word in (YES, A_LITTLE_WORD, NOT_SHOWN, NOT_MEASURED):
        leads = [LEADS[answer.question] for answer in answers if answer.answer == word]
        if word == YES:
            told += [f"{lead}." for lead in leads]
        elif leads:
            clauses = listed([f"that {lead[0].lower()}{lead[1:]}" for lead in leads])
            told.append(f"{word[0].upper()}{word[1:]}: {clauses}.")
    return " ".join(told)


class _Asked:
    """What one layer of one training tells, computed once."""

    def __init__(self, recording: Recording, place: int, *, permutations: int, cluster_seeds: int, seed: int) -> None:
        self.recording, self.layer, self.seed = recording, recording.layers[place], seed
        self.labels, self.permutations = np.asarray(recording.labels), permutations
        self.readings: list[Reading] = []
        self.controls: dict[str, list[Reading]] = {}
        self.same: dict[str, tuple[Reading, Reading]] = {}
        self.probe: Reading | None = None
        self.gain: float | None = None
        self.exceeds_controls = True
        self.why, self.asked = "fewer than two classes have images", False
        counts = {choices: self.counts(choices) for choices in ("first", "all")}
        self.load = _load(counts["all"], self.labels, len(recording.class_names))
        self.primary: Choices = "first" if self.layer.tokens_choose else "all"
        self.asked = len(np.unique(self.labels[self.labels >= 0])) > 1
        if not self.asked:
            return
        self.halves = _halves(self.labels, seed)
        self._read(counts)
        self._compare(cluster_seeds)
        if self.layer.inputs is not None and len(np.unique(self.labels)) <= _PROBE_CLASSES:
            target = np.broadcast_to(self.labels[:, None], self.layer.inputs.shape[:2])
            groups = probe_groups(self.layer.inputs, target, self.layer.num_experts, self.halves, seed)
            self.probe = self._patch(groups, "class", "first", "everywhere", _CONTROL_PERMUTATIONS)[0]

    def counts(self, choices: Choices) -> Floats:
        """[I, P, E] what each patch's choices count."""
        return _counts(self.layer.choices, self.layer.amounts, self.layer.num_experts, choices)

    def experts(self) -> Answer:
        """The first question."""
        if not self.asked:
            return Answer("experts", NOT_MEASURED, self.why)
        reading, estimate = self.readings[0], self.estimate
        share = self.share(estimate.value_bits)
        told = "the expert alone" if self.layer.tokens_choose else "how much is taken from each expert"
        detail = f"{told} guesses {percent(reading.guess.value)} right, chance {percent(reading.chance)}"
        if self.probe is not None and self.layer.by_image:
            detail += f", a linear probe of the same input in {self.layer.num_experts} groups " + percent(
                self.probe.guess.value
            )
        if not (estimate.low > 0 and estimate.p_value <= _P_VALUE):
            return Answer("experts", NOT_SHOWN, detail, self._told())
        return Answer("experts", A_LITTLE_WORD if share < A_LITTLE else YES, detail, self._told())

    def share(self, bits: float) -> float:
        """Bits over what the probe tells; without a probe over what so many experts could tell at most."""
        if self.probe is not None and self.probe.bits.value > 0:
            return bits / self.probe.bits.value
        known = self.labels[self.labels >= 0]
        shares = np.bincount(known) / len(known)
        entropy = float(-(shares[shares > 0] * np.log2(shares[shares > 0])).sum())
        return bits / min(entropy, math.log2(max(2, self.layer.num_experts)))

    def _told(self) -> list[str]:
        """The readings in words."""
        reading = self.readings[0]
        probe = "" if self.probe is None else (
            f", {percent(self.share(reading.bits.value))} of the {self.probe.bits.value:.3f} bits of a linear probe "
            f"in {self.layer.num_experts} balanced groups"
        )  # fmt: skip
        told = [f"{self.layer.name}: {_bits_words(reading)}{probe}; {self.load.words}."]
        told += [_reading_words(each) for each in self.readings[1:]]
        return told

    def training(self, others: Sequence[_Asked]) -> Answer:
        """The second question."""
        if not self.asked:
            return Answer("training", NOT_MEASURED, self.why)
        numbers = [self._control_words(name) for name in self.controls]
        if self.layer.cluster_start:
            return Answer("training", NOT_SHOWN, "the router started from clusters, which is no training", numbers)
        if "clusters" not in self.controls:
            what = "not compared with clusters of the same input"
            return Answer("training", NOT_MEASURED if not self.controls else NOT_SHOWN, what, numbers)
        if not {"before", "untrained"} & set(self.controls):
            numbers.append("The router before training: not recorded.")
        trainings = [self, *others]
        above = [each.gain is not None and each.exceeds_controls and not each.layer.cluster_start for each in trainings]
        gains = [each.gain for each in trainings if each.gain is not None]
        if others:
            numbers.append(
                f"Beyond the best of its own controls, by training: {', '.join(signed(gain) for gain in gains)} bits."
            )
        else:
            numbers.append("One training; other trainings of the recipe were not compared.")
        name, reading = max(
            ((name, each) for name, readings in self.controls.items() for each in readings if each.unit == "patch"),
            key=lambda pair: pair[1].bits.value,
        )
        own = self.same[name][0]
        detail = f"{_CONTROLS[name][1]} {reading.bits.value:.3f} bits about the class, the router {own.bits.value:.3f}"
        if len(above) > 1:
            detail += f"; {sum(above)} of {len(above)} trainings tell more than their own controls"
        if not all(above):
            return Answer("training", NOT_SHOWN, detail, numbers)
        return Answer("training", A_LITTLE_WORD if self.share(min(gains)) < A_LITTLE else YES, detail, numbers)

    def _read(self, counts: Mapping[str, Floats]) -> None:
        """All readings; that of the answers first."""
        order: list[Choices] = [self.primary, "all"] if counts["first"].sum() != counts["all"].sum() else [self.primary]
        asked: list[tuple[str, Flags | None]] = [("everywhere", None)]
        objects = self.recording.objects
        if objects is not None and self.layer.choices.shape[1] > 1:
            asked += [("object", np.asarray(objects, bool)), ("background", ~np.asarray(objects, bool))]
        for where, mask in asked:
            for choices in dict.fromkeys(order):
                own = counts[choices] if mask is None else counts[choices] * mask[..., None]
                reading, estimate = self._patch(own, "class", choices, where, self.permutations)
                if not self.readings:
                    self.estimate = estimate
                self.readings += [reading, self._image(own, choices, where)]
        parts = self.recording.parts
        if parts is not None and self.layer.choices.shape[1] > 1 and len(np.unique(parts[parts >= 0])) > 1:
            own = counts[self.primary]
            self.readings.append(self._patch(own, "part", self.primary, "everywhere", self.permutations)[0])

    def _patch(
        self, counts: Floats, of: str, choices: Choices, where: str, permutations: int, images: Ints | None = None
    ) -> tuple[Reading, Estimate]:
        """One reading of patches [I', P, E], of some images."""
        rows = np.arange(len(self.labels)) if images is None else np.asarray(images)
        labels = self.labels[rows]
        if of == "part":
            target = np.asarray(self.recording.parts)[rows]
            estimate = part_information(counts, target, num_permutations=permutations, seed=self.seed)
        else:
            target = np.broadcast_to(labels[:, None], counts.shape[:2])
            estimate = class_information(counts, labels, num_permutations=permutations, seed=self.seed)
        guess, chance = guess_from_experts(counts, target, self.halves[rows])
        bits = Interval(estimate.value_bits, estimate.low, estimate.high)
        return Reading(of, "patch", choices, where, guess, chance, bits, estimate.p_value), estimate

    def _image(self, counts: Floats, choices: Choices, where: str, images: Ints | None = None) -> Reading:
        """What a probe reads off the histogram of the image, on held-out images."""
        rows = np.arange(len(self.labels)) if images is None else np.asarray(images)
        known = self.labels[rows] >= 0
        sums = counts[known].sum(1)
        histogram = sums / np.maximum(sums.sum(1, keepdims=True), 1e-12)
        guess, chance, bits = probe_histogram(histogram, self.labels[rows][known], self.halves[rows][known])
        return Reading("class", "image", choices, where, guess, chance, bits)

    def _compare(self, cluster_seeds: int) -> None:
        """The controls, and by how much the router exceeds the best of them."""
        clusters = self.layer.clusters
        if clusters is None:
            clusters = cluster_choices(self.layer, cluster_seeds, self.seed)
        own_counts = self.counts(self.primary)
        gains: list[float] = []
        known: dict[bytes, tuple[Reading, Estimate, Reading]] = {}
        for name, controls in zip(_CONTROLS, (self.layer.before, self.layer.untrained, clusters), strict=True):
            for control in controls:
                images = np.asarray(control.images)
                key = images.tobytes()
                if key not in known:  # clusters are measured on half of the images, and so the router there
                    mine = own_counts[images]
                    known[key] = (
                        *self._patch(mine, "class", self.primary, "everywhere", self.permutations, images),
                        self._image(mine, self.primary, "everywhere", images),
                    )
                own, own_estimate, own_image = known[key]
                self.same[name] = (own, own_image)
                patches = own_counts.shape[1]
                index, amounts = (x if x is None else x[:, :patches] for x in (control.expert_index, control.takes))
                counts = _counts(cast(Ints, index), amounts, control.num_experts, self.primary)
                reading, estimate = self._patch(
                    counts, "class", self.primary, "everywhere", _CONTROL_PERMUTATIONS, images
                )
                image = self._image(counts, self.primary, "everywhere", images)
                self.controls[name] = [*self.controls.get(name, []), reading, image]
                self.exceeds_controls &= exceeds(own_estimate, estimate)
                gains.append(own_estimate.value_bits - estimate.value_bits)
        self.gain = min(gains) if gains else None

    def _control_words(self, name: str) -> str:
        bits, image = ([r.bits.value for r in self.controls[name] if r.unit == unit] for unit in ("patch", "image"))
        guess = [reading.guess.value for reading in self.controls[name] if reading.unit == "patch"]
        own, own_image = self.same[name]
        return (
            f"{_CONTROLS[name][0]}: {span(bits)} bits (router {signed(own.bits.value)}), guess right "
            f"{_percents(guess)} (router {percent(own.guess.value)}); histogram of the image {span(image)} bits on "
            f"held-out images (router {signed(own_image.bits.value)})."
        )


def _counts(choices: Ints, amounts: npt.NDArray[Any] | None, num_experts: int, which: Choices) -> Floats:
    """[I, P, E] of all choices, or of the first alone (which counts 1 where it counts at all)."""
    index = np.asarray(choices)
    amount = np.ones(index.shape, np.float32) if amounts is None else np.asarray(amounts, np.float32)
    amount = np.where(index >= 0, amount, 0)
    if which == "first":
        index, amount = index[..., :1], (amount[..., :1] > 0).astype(np.float32)
    return choice_counts(index, num_experts, amount)


def _load(counts: Floats, labels: Ints, num_classes: int) -> Load:
    by_image = counts.sum(1, dtype=np.float64)  # [I, E]
    one_hot = labels[:, None] == np.arange(num_classes)
    table = one_hot.T.astype(np.float64) @ by_image
    with np.errstate(invalid="ignore"):
        return Load(by_image.sum(0) / max(by_image.sum(), 1e-12), table / table.sum(1, keepdims=True))


def _halves(labels: Ints, seed: int) -> Flags:
    """[I] a random half of the images of every class."""
    half, rng = np.zeros(len(labels), bool), np.random.default_rng(seed)
    start = 0
    for label in np.unique(labels):
        images = rng.permutation(np.flatnonzero(labels == label))
        half[images[start::2]] = True
        start = (start + len(images)) % 2  # classes of odd size take turns in giving one more
    return half


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
    half = _quantile(n - 1) * math.sqrt(n / max(1, n - 1) * float(np.square(deviation).sum())) / total
    return Interval(ratio, ratio - half, ratio + half)


def paired_interval(loss: Floats) -> Interval:
    """Mean of losses [I] between -1 and 1 (Agresti and Min's interval): no image that changes is no proof of none."""
    n, total = len(loss), float(loss.sum())
    centre = total / (n + 2)
    half = (
        NormalDist().inv_cdf((1 + _LEVEL) / 2)
        * math.sqrt(max(0.0, float(np.square(loss).sum()) + 1 - total * total / (n + 2)))
        / (n + 2)
    )
    return Interval(total / n, max(-1.0, centre - half), min(1.0, centre + half))


def _quantile(freedom: int) -> float:
    """Student's (Abramowitz and Stegun 26.7.5, first term)."""
    z = NormalDist().inv_cdf((1 + _LEVEL) / 2)
    return z * (1 + (z * z + 1) / (4 * max(1, freedom)))


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
    """Choices by k-means clusters of the layer's input, as many as experts; none where not all patches' are known.

    The clusters see no label, so they are fitted to the same patches that they deal out.
    """
    if layer.inputs is None or layer.positions is not None or not layer.tokens_choose:
        return []
    images, patches, width = layer.inputs.shape
    tokens = layer.inputs.reshape(-1, width).astype(np.float32)
    sample = np.random.default_rng(seed).permutation(len(tokens))[:_INPUT_TOKENS]
    rule = Rule("token_choice", layer.num_experts, layer.choices.shape[2])
    found = []
    for number in range(seeds):
        means = fit_clusters(tokens[sample], layer.num_experts, seed + number)
        nearness = -np.square(means.transform(tokens)).reshape(images, patches, -1)
        chosen = rule.apply(nearness, 1.0).expert_index
        found.append(Assignments(None, number, chosen, np.arange(images), layer.num_experts))
    return found


def swap_test(recording: Recording, place: int, *, draws: int = 3, limit: int = 400, seed: int = 0) -> Swap | None:
    """Send the patches of each class through the expert of another class, and count the images that this breaks.

    A class's expert is the one that its patches choose first most often (where that is the same for all classes, the
    one that it uses most beyond the mean class); its partner is the class with another expert whose use of the experts
    differs most. On the images of the class both experts change places, with the gates of their rank. The random swaps
    change as many choices of the same images; each goes to an expert drawn by the layer's loads, which the patch hasn't
    chosen.

    Args:
        recording: with `run`.
        place: of the layer.
        draws: random swaps per image.
        limit: images at most, as many of each class.
        seed: of images and swaps.

    Returns:
        None where all classes use all experts alike.
    """
    run, layer = cast(Run, recording.run), recording.layers[place]
    labels, choices = np.asarray(recording.labels), np.asarray(layer.choices)
    first = _load(_counts(choices, layer.amounts, layer.num_experts, "first"), labels, len(recording.class_names))
    present = np.unique(labels[labels >= 0])
    shares = first.class_share[present]
    if len(set(shares.argmax(1))) == 1:
        shares = shares - shares.mean(0)
    expert = {int(c): int(share.argmax()) for c, share in zip(present, shares, strict=True)}
    partner: dict[int, int] = {}
    for c in expert:
        others = [d for d in expert if expert[d] != expert[c]]
        if others:
            far = [np.abs(first.class_share[c] - first.class_share[d]).sum() for d in others]
            partner[c] = others[int(np.argmax(far))]
    if not partner:
        return None
    rng = np.random.default_rng(seed)
    each = max(1, limit // len(partner))
    images = np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:each] for c in partner])
    own, target = choices[images], labels[images]
    swapped = own.copy()
    for c, d in partner.items():
        rows = target == c
        a, b = expert[c], expert[d]
        swapped[rows] = np.where(own[rows] == a, b, np.where(own[rows] == b, a, own[rows]))
    moved = swapped != own

    def right(experts: Ints) -> Floats:
        correct: Floats = (np.asarray(run(place, images, experts)).argmax(1) == target).astype(np.float64)
        return correct

    before = right(own)
    loss = before - right(swapped)
    with np.errstate(divide="ignore"):
        log_load = np.log(first.share)
    random = np.mean([before - right(_random_swap(own, moved, log_load, rng)) for _ in range(draws)], axis=0)
    names = recording.class_names
    return Swap(
        _points(paired_interval(loss)),
        _points(paired_interval(random)),
        _points(paired_interval(np.clip(loss - random, -1, 1))),
        float(moved.mean()),
        len(images),
        [(names[c], expert[c], names[d], expert[d]) for c, d in partner.items()],
    )


def _random_swap(own: Ints, moved: Flags, log_load: Floats, rng: np.random.Generator) -> Ints:
    """As many choices of every image changed as `moved` says, each to another expert drawn by the loads."""
    images, patches, top_k = own.shape
    order = rng.random((images, patches * top_k)).argsort(1).argsort(1)
    drawn = (order < moved.sum((1, 2))[:, None]).reshape(own.shape)
    changed = own.copy()
    for choice in range(top_k):
        taken = (changed[..., None] == np.arange(len(log_load))).any(2)  # [I, P, E]
        scores = np.where(taken, -np.inf, log_load + rng.gumbel(size=taken.shape))
        able = drawn[..., choice] & np.isfinite(scores).any(-1)
        changed[..., choice] = np.where(able, scores.argmax(-1), changed[..., choice])
    return changed


def function_answer(swap: Swap | None, why: str | None) -> Answer:
    """The third question's answer; `why` it wasn't measured."""
    if swap is None:
        return Answer("function", NOT_MEASURED, why or "the swap test was not made")
    points, random = swap.points, swap.random
    detail = (
        f"a class's patches sent through another class's expert cost {signed(points.value, 1)} points of accuracy, "
        f"{_interval(points, 1)}; random swaps of as many choices {signed(random.value, 1)}"
    )
    beside = "more than" if swap.more.low > 0 else "less than" if swap.more.high < 0 else "not told apart from"
    numbers = [
        f"Swap: {beside} random swaps ({_interval(random, 1)}); {percent(swap.moved)} of the choices "
        f"of {swap.n_images:,} images changed."
    ]
    answer = NOT_SHOWN if points.low <= 0 else A_LITTLE_WORD if swap.more.high < 0 else YES
    return Answer("function", answer, detail, numbers)


def answers_from_sums(
    name: str,
    estimate: Estimate,
    share: Floats,
    n_images: Ints,
    loads: Floats,
    controls: Mapping[str, Sequence[float]],
    above_controls: bool | None,
) -> LayerAnswers:
    """The answers as far as sums over images go: no probe, no histogram of the image, no swap test.

    For what was summed up before there were three questions, and where they would take too long. The guess comes from
    the same images that it is tried on.

    Args:
        name: of the layer.
        estimate: bits of all choices about the class.
        share: [C, E] share of each class's choices; NaN for a class without images.
        n_images: [C].
        loads: [E].
        controls: name of a baseline -> its bits.
        above_controls: whether the layer exceeds them all; None: not compared.
    """
    weights = np.nan_to_num(share) * n_images[:, None]
    total = max(float(weights.sum()), 1e-12)
    load = Load(loads / max(loads.sum(), 1e-12), share)
    guess, chance = float(weights.max(0).sum()) / total, float(n_images.max()) / max(1, n_images.sum())
    detail = f"all choices guess {percent(guess)} right, chance {percent(chance)}"
    shown = estimate.low > 0 and estimate.p_value <= _P_VALUE
    answer = NOT_SHOWN if not shown else YES if estimate.share_of_entropy >= A_LITTLE else A_LITTLE_WORD
    bits = Interval(estimate.value_bits, estimate.low, estimate.high)
    numbers = [
        f"{name}: {signed(bits.value)} bits above shuffled labels ({_interval(bits)}), "
        f"{percent(estimate.share_of_entropy)} of the maximum; {load.words}."
    ]
    experts = Answer("experts", answer, detail, numbers)
    known = {
        words: max(controls[key])
        for key, words in (("kmeans_input", "clusters of the same input tell"), ("untrained", "an untrained one tells"))
        if controls.get(key)
    }
    if above_controls is None or not known:
        training = Answer("training", NOT_MEASURED, "not compared with clusters of the same input")
    else:
        words, closest = max(known.items(), key=lambda pair: pair[1])
        told = f"{words} {signed(closest)} bits about the class, the router {signed(bits.value)}"
        training = Answer("training", YES if above_controls else NOT_SHOWN, told)
    return LayerAnswers(name, (experts, training, function_answer(None, None)), load)


def recording_of(
    model: SavedModel,
    pictures: PictureSet,
    trace: RoutingTrace,
    *,
    baselines: Mapping[str, Sequence[Assignments]] | None = None,
    before: RoutingTrace | None = None,
    parts: Ints | None = None,
    part_names: Sequence[str] = (),
    swap: bool = True,
    cluster_start: bool = False,
    seed: int = 0,
) -> Recording:
    """The recording of a model of ours.

    Args:
        model: the model, in eval mode.
        pictures: the images, in the order of the trace.
        trace: their routing.
        baselines: from `measure_baselines`: `untrained` stands for the router before training, `kmeans_input` for the
            clusters.
        before: routing of the same images by the model before it was trained, in place of `untrained`.
        parts: [I, P] the part that each patch shows.
        part_names: names of the parts; `background` is told apart from the object.
        swap: whether the swap test can be made.
        cluster_start: from `cluster_started`; a model that says so of itself needs none.
        seed: of the patches whose inputs are kept.

    Raises:
        UserError: `before` has other layers or is about other images.
    """
    if before is not None and (before.picture_names != trace.picture_names or len(before.layers) != len(trace.layers)):
        raise UserError("The model before training must have the same MoE layers, and be traced on the same images.")
    patches = trace.grid[0] * trace.grid[1]
    kept = min(patches, max(1, _INPUT_TOKENS // max(1, len(trace))))
    positions = np.sort(np.random.default_rng(seed).permutation(patches)[:kept])
    inputs, some = _inputs(model, pictures, trace, positions), None if kept == patches else positions
    found = baselines or {}
    layers = []
    for place, (layer, read) in enumerate(zip(trace.layers, routes_read(model.net), strict=True)):
        one = slice(None, 1) if layer.route_by == "image" else slice(None)
        mine = {
            name: [each for each in found.get(name, ()) if each.layer in (None, layer.layer)]
            for name in ("untrained", "kmeans_input")
        }
        old = []
        if before is not None:
            ago = before.layers[place]
            index = np.asarray(ago.expert_index)
            takes = np.asarray(ago.takes)
            old = [Assignments(layer.layer, 0, index, np.arange(len(before)), ago.num_experts, None, takes)]
        layers.append(
            RecordedLayer(
                layer.name,
                np.asarray(layer.expert_index)[:, one],
                layer.num_experts,
                np.asarray(layer.takes)[:, one],
                tokens_choose=layer.kind == "token_choice",
                by_image=layer.route_by == "image",
                inputs=inputs[layer.layer],
                positions=None if layer.route_by == "image" else some,
                before=old,
                untrained=() if old else mine["untrained"],
                clusters=mine["kmeans_input"] or None,
                cluster_start=cluster_start or from_clusters(model.net),
                read=read,
            )
        )
    objects = None
    if parts is not None and "background" in part_names:
        objects = np.asarray(parts) != list(part_names).index("background")
    run = None
    if swap and trace.accuracy is not None:
        run = partial(run_forced, model, pictures, [layer.layer for layer in trace.layers])
    return Recording(np.asarray(trace.labels), layers, trace.class_names, parts, objects, run)


def cluster_started(address: str | Path) -> bool:
    """Whether a model's record, or that of the weights it was trained from, says that its routers began as clusters.

    For folders of earlier versions: a model that is saved now says it in its own config.json.

    Args:
        address: a run folder, or a model's folder.
    """
    folder = Path(address)
    run = folder.parent if folder.name == "model" else folder
    try:
        config = read_yaml(run / "config.yaml")
        chosen, source = config.get("router_start"), config["model"]["arch"]["pretrained"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        chosen, source = None, None  # no run folder
    origin = [Path(str(source).removeprefix("local-dir:"))] if source else []
    clusters = chosen == "cluster" and bool(source)  # earlier versions ignored it without pretrained weights
    return clusters or any(_has_cluster_start(place) for place in (folder, run, *origin))


def _has_cluster_start(folder: Path) -> bool:
    try:
        record = read_json(folder / UPCYCLE_RECORD)
    except (OSError, ValueError):
        return False  # not upcycled
    return isinstance(record, dict) and bool(record.get("router_start"))


def _inputs(model: SavedModel, pictures: PictureSet, trace: RoutingTrace, positions: Ints) -> dict[int, Floats]:
    """Block -> [I, p, D] what each layer receives of those patches; [I, 1, D] their mean where images are routed."""
    found: dict[int, list[Floats]] = {layer.layer: [] for layer in trace.layers}
    whole = {layer.layer for layer in trace.layers if layer.route_by == "image"}
    for start in range(0, len(trace), _BATCH):
        rows = range(start, min(start + _BATCH, len(trace)))
        for block, tokens in layer_inputs(model.net, network_input(model, read_images(pictures, rows))).items():
            taken = tokens.mean(1, keepdim=True) if block in whole else tokens[:, torch.from_numpy(positions)]
            found[block].append(taken.float().cpu().numpy())
    return {block: np.concatenate(each) for block, each in found.items()}


@torch.inference_mode()
def run_forced(
    model: SavedModel, pictures: PictureSet, blocks: Sequence[int], place: int, images: Ints, experts: Ints
) -> npt.NDArray[np.float32]:
    """Logits [R, C] of images [R] whose patches go to these experts [R, P, K] in one layer; see `Run`."""
    layer = numbered_layers(model.net)[blocks[place]]
    prefix = int(getattr(model.net, "num_prefix_tokens", 0))
    logits = []
    for start in range(0, len(images), _BATCH):
        part = slice(start, start + _BATCH)
        pixels = network_input(model, read_images(pictures, images[part]))
        logits.append(forced_logits(model.net, layer, pixels, experts[part], prefix))
    return np.concatenate(logits)


@torch.inference_mode()
def forced_logits(
    net: nn.Module, layer: MoEMlp, inputs: torch.Tensor, experts: Ints, prefix: int = 0
) -> npt.NDArray[np.float32]:
    """Logits [R, C] of what `net` takes [R, ...] while the patches go to these experts [R, P, K] in one of its layers.

    Args:
        net: in eval mode.
        layer: the layer.
        inputs: what `net` is called with.
        experts: best first.
        prefix: tokens before the patches, which stay where they are.
    """
    wanted = torch.from_numpy(experts.astype(np.int64)).to(inputs.device)
    with edited(net, {layer: partial(_choose, experts=wanted, prefix=prefix)}):
        logits: npt.NDArray[np.float32] = net(inputs).float().cpu().numpy()
    return logits


def _choose(decision: Ranking, experts: torch.Tensor, prefix: int) -> Ranking:
    return decision.choose(experts, prefix)


def _percents(shares: Sequence[float]) -> str:
    low, high = percent(min(shares)), percent(max(shares))
    return low if low == high else f"{low} to {high}"


def _interval(interval: Interval, digits: int = 3) -> str:
    return f"95 % CI {signed(interval.low, digits)} to {signed(interval.high, digits)}"


def _bits_words(reading: Reading) -> str:
    return f"{signed(reading.bits.value)} bits above shuffled labels ({_interval(reading.bits)})"


def _points(interval: Interval) -> Interval:
    return Interval(*(100 * value for value in interval))


def _reading_words(reading: Reading) -> str:
    """A reading as a sentence of numbers."""
    which = {"first": "First choices", "all": "All choices"}[reading.choices]
    where = "" if reading.where == "everywhere" else f", {reading.where} only"
    unit = " as a histogram of the image" if reading.unit == "image" else ""
    told = f"{which}{where}{unit}"
    if reading.of == "part":
        told += ", about the part beyond position"
    return (
        f"{told}: guess right {percent(reading.guess.value)} (chance {percent(reading.chance)}), "
        f"{signed(reading.bits.value)} bits ({_interval(reading.bits)})."
    )

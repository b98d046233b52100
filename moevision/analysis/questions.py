"""Three questions about the experts of any model whose routing was recorded, each answered beside its controls.

1. Do classes (or parts) go to different experts?
2. Did training the router add to that? A router that was started from clusters can't answer it.
3. Do the experts do different things? The swap test, below.

What this module owns: the swap test (the only measurement here, since it runs the model again) and the answers' rules
and sentences. The other numbers come from `readings`, their statistics from `information`.

How each is measured: docs/concepts/evidence.md.

Each answer is "yes", "a little", "not shown" or "not measured", the third also "the layer contributes nothing". There
is no verdict over all three. The rules:

- 1 is shown where the bits' interval lies above 0 and at most one shuffling of twenty tells as much;
- 2 is shown where every training tells more than each of its own controls (interval of the difference above 0);
- 3: the layer contributes nothing where neither log-loss nor accuracy is lost without it (intervals reach 0), and then
  nothing else is said. It is "yes" where exchanging the favourite costs more log-loss than any two others (interval of
  the difference above 0; with two experts: costs any), and "a little" where that is shown of a layer without which no
  accuracy is lost, or where exchanging experts costs log-loss, and the favourite no more than others;
- 1 and 2 are "a little" where the bits (those beyond the best control) are less than `A_LITTLE` of what the probe
  tells, and 1 also where the expert guesses right less than `SKILL` of what the majority class gets wrong.

The answers are about first choices of all patches; where no patch chooses (expert choice, Soft MoE) about what patches
take. What is missing of a recording is said to be not measured.

Axes: I images, P patches, K choices best first, E experts, C classes, R images that are run, V variants of routes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Literal, cast

import numpy as np
from scipy.special import log_softmax

from moevision.analysis.information import (
    Interval,
    JsonDataclass,
    halves_by_class,
    paired_interval,
    ratio_interval,
)
from moevision.analysis.readings import (
    Controls,
    LayerReadings,
    Load,
    Reading,
    RecordedLayer,
    Recording,
    Run,
    measure_layer,
)
from moevision.errors import UserError
from moevision.types import Flags, Floats, Ints, Json
from moevision.words import percent, signed

Question = Literal["experts", "training", "function"]

YES = "yes"
A_LITTLE_WORD = "a little"
NOT_SHOWN = "not shown"
NOT_MEASURED = "not measured"
NOTHING = "the layer contributes nothing"
_STRONGEST_FIRST = (YES, A_LITTLE_WORD, NOT_SHOWN, NOTHING, NOT_MEASURED)
LEADS: dict[Question, str] = {
    "experts": "Classes go to different experts",
    "training": "Training the router added to that",
    "function": "The experts do different things",
}
_CONTROLS = {
    "before": ("The router before training", "before training it told"),
    "untrained": (
        "The same model with fresh weights, in place of the router before training",
        "the same model with fresh weights tells",
    ),
    "clusters": ("Clusters of the same input", "clusters of the same input tell"),
}
A_LITTLE = 0.1
"""Below this share of what the linear probe tells, what is shown is called "a little": a convention, not a test."""

SKILL = 0.02
"""Below this part of the images that the majority class gets wrong, guessing by the expert is "a little", too."""

_HOW_TO_MEASURE = "`moevision analyze MODEL` measures it"
_NOTHING = "The layer contributes nothing, so what its experts do can't show"
_P_VALUE = 0.05


@dataclass(frozen=True)
class Answer(JsonDataclass):
    """One answer: a plain sentence, and the numbers behind it."""

    question: Question
    answer: str  # `yes`, `a little`, `not shown`, `not measured` or, of the third, `the layer contributes nothing`
    detail: str  # what stands in brackets
    numbers: Sequence[str] = ()  # further sentences

    @property
    def sentence(self) -> str:
        """As in "Classes go to different experts: yes (...)."."""
        if self.answer == NOTHING:
            return f"{_NOTHING} ({self.detail})."
        return f"{LEADS[self.question]}: {self.answer} ({self.detail})."

    def to_json(self) -> Json:
        """The fields, and all of it in a sentence."""
        return {**super().to_json(), "sentence": self.sentence}


@dataclass(frozen=True)
class LayerAnswers(JsonDataclass):
    """The three answers about one layer, and every number behind them."""

    name: str
    answers: Sequence[Answer]  # of the three questions, in order
    load: Load  # how evenly the experts are used
    readings: Sequence[Reading] = ()  # everything that was read off the choices
    probe: Reading | None = None  # of the linear probe's balanced groups; None without inputs
    # name of a control -> what each of its seeds tells, of a patch and of the image
    controls: Mapping[str, Sequence[Reading]] = field(default_factory=dict)
    # name of a control -> the same of the router, on the images of that control
    same: Mapping[str, Sequence[Reading]] = field(default_factory=dict)
    # by how many bits each training exceeds its own best control: this one first, then the others; None where that
    # wasn't measured
    trainings: Sequence[float | None] = ()
    swap: Swap | None = None  # the swap test; None where it wasn't made


def three_questions(
    recording: Recording,
    *,
    seeds: Sequence[Recording] = (),
    permutations: int = 200,
    cluster_seeds: int = 3,
    draws: int = 2,
    swap_images: int = 2000,
    seed: int = 0,
) -> list[LayerAnswers]:
    """Ask every layer the three questions.

    Args:
        recording: of the model; held-out images.
        seeds: of other trainings of the same recipe, each with its own controls.
        permutations: of the shuffled labels.
        cluster_seeds: clusterings of the input, where the recording has none.
        draws: exchanges per image in the swap test, each with experts drawn anew.
        swap_images: how many images the swap test runs at most.
        seed: of everything drawn.

    Raises:
        UserError: another training has other layers.

    Examples:
        >>> import numpy as np
        >>> from moevision.analysis import RecordedLayer, Recording
        >>> labels = np.arange(40) % 2  # cats and dogs, four patches each: class 0 goes to expert 0, class 1 to 1
        >>> layer = RecordedLayer("L1", np.tile(labels[:, None, None], (1, 4, 1)), num_experts=2)
        >>> (answered,) = three_questions(Recording(labels, [layer], ["cat", "dog"]))
        >>> answered.answers[0].sentence
        'Classes go to different experts: yes (the expert alone guesses 100.0 % right, chance 50.0 %).'
        >>> answered.load.words
        'max/mean load 1.00, in effect 2.0 of 2 experts'
    """
    for other in seeds:
        if len(other.layers) != len(recording.layers):
            raise UserError(
                "Other trainings must be of the same recipe: these have other MoE layers."
            )
    answered = []
    for index, layer in enumerate(recording.layers):
        trainings = [
            measure_layer(
                training, index, permutations=permutations, cluster_seeds=cluster_seeds, seed=seed
            )
            for training in (recording, *seeds)
        ]
        readings = trainings[0]

        swap = None
        reason = _why_no_swap(recording, layer, readings)
        if reason is None:
            swap = swap_test(recording, index, draws=draws, limit=swap_images, seed=seed)
            reason = "no exchange moves a patch, which have all chosen all experts"

        answered.append(
            LayerAnswers(
                layer.name,
                (
                    experts_answer(readings),
                    training_answer(readings, trainings[1:]),
                    function_answer(swap, reason),
                ),
                readings.load,
                readings.readings,
                readings.probe,
                readings.controls.readings,
                readings.controls.same,
                [training.controls.gain for training in trainings],
                swap,
            )
        )
    return answered


def _why_no_swap(recording: Recording, layer: RecordedLayer, readings: LayerReadings) -> str | None:
    """Why the swap test can't be made, as the end of a sentence; None where it can."""
    if not layer.tokens_choose:
        return "no patch chooses its experts here"
    if recording.run is None:
        return recording.why_no_run
    if not layer.read:
        return "no logit reads these patches, so that no swap can cost anything"
    if readings.reason is not None:
        return readings.reason
    if layer.num_experts < 2:
        return "it has one expert"
    labels = recording.labels
    if np.bincount(labels[labels >= 0]).max() < 2:
        return "it takes two images of a class: give more images, --limit"
    return None


def summary_lines(layers: Sequence[LayerAnswers]) -> list[Answer]:
    """One answer to each question about a whole model: the strongest of its layers, which are named."""
    summary = []
    for index, question in enumerate(LEADS):
        answers = {layer.name: layer.answers[index] for layer in layers}
        strongest = min((answer.answer for answer in answers.values()), key=_STRONGEST_FIRST.index)
        names = [name for name, answer in answers.items() if answer.answer == strongest]
        # The deepest of them is quoted: there experts know most about the image.
        deepest = names[-1]
        quoted = answers[deepest]

        detail = quoted.detail
        if len(layers) > 1:
            detail = f"{deepest}: {detail}"
        if len(names) > 1:
            detail = f"{join_with_and(names)}; {detail}"
        if len(names) < len(layers) and strongest in (YES, A_LITTLE_WORD):
            detail = f"{len(names)} of {len(layers)} layers, each tested at 5 %; {detail}"
        summary.append(replace(quoted, question=question, detail=detail))
    return summary


def plain_answer(answers: Sequence[Answer]) -> str:
    """The answers without a number, the clearest first.

    Examples:
        >>> plain_answer([Answer("experts", YES, "46 %"), Answer("training", NOT_SHOWN, "0 bits")])
        'Classes go to different experts. Not shown: that training the router added to that.'
    """
    sentences = []
    for strength in _STRONGEST_FIRST:
        leads = [LEADS[answer.question] for answer in answers if answer.answer == strength]
        if not leads:
            continue
        if strength == NOTHING:
            sentences.append(f"{_NOTHING}.")
        elif strength == YES:
            sentences += [f"{lead}." for lead in leads]
        else:
            clauses = join_with_and([f"that {lead[0].lower()}{lead[1:]}" for lead in leads])
            sentences.append(f"{strength.capitalize()}: {clauses}.")
    return " ".join(sentences)


def experts_answer(readings: LayerReadings) -> Answer:
    """The first question's answer."""
    if readings.reason is not None:
        return Answer("experts", NOT_MEASURED, readings.reason)
    layer = readings.layer
    probe = readings.probe
    reading = readings.readings[0]
    bits = reading.bits

    predictor = "the expert alone"
    if not layer.tokens_choose:
        predictor = "how much is taken from each expert"
    detail = f"{predictor} guesses {percent(reading.guess.value)} right, chance {percent(reading.chance)}"
    numbers = f"{layer.name}: {signed(bits.value)} bits above shuffled labels ({_interval(bits)})"
    if probe is not None and layer.by_image:
        detail += (
            f", a linear probe of the same input in {layer.num_experts} groups "
            f"{percent(probe.guess.value)}"
        )
    if probe is not None and probe.bits.value > 0:
        numbers += (
            f", {percent(bits.value / probe.bits.value)} of the {signed(probe.bits.value)} bits of a linear probe in "
            f"{layer.num_experts} balanced groups"
        )
    numbers += f"; {readings.load.words}."
    sentences = [numbers, *map(_reading_sentence, readings.readings[1:])]

    p_value = cast(float, reading.p_value)
    if bits.low <= 0 or p_value > _P_VALUE:
        answer = NOT_SHOWN
    elif reading.guess.value - reading.chance < SKILL * (1 - reading.chance):
        answer = A_LITTLE_WORD
    else:
        answer = _yes_or_a_little(bits.value, readings)
    return Answer("experts", answer, detail, sentences)


def _yes_or_a_little(bits: float, readings: LayerReadings) -> str:
    return A_LITTLE_WORD if bits / readings.most_bits < A_LITTLE else YES


def training_answer(readings: LayerReadings, others: Sequence[LayerReadings]) -> Answer:
    """The second question's answer; `others` are other trainings, each beside its own controls."""
    if readings.reason is not None:
        return Answer("training", NOT_MEASURED, readings.reason)
    controls = readings.controls
    numbers = [_control_sentence(name, controls) for name in controls.readings]
    if readings.layer.cluster_start:
        started = "the router started from clusters, which is no training"
        return Answer("training", NOT_SHOWN, started, numbers)
    if "clusters" not in controls.readings:
        answer = NOT_SHOWN if controls.readings else NOT_MEASURED
        missing = _HOW_TO_MEASURE
        if readings.layer.inputs is not None:
            missing = "not compared with clusters of the same input"
        return Answer("training", answer, missing, numbers)

    trainings = [readings, *others]
    gains = [training.controls.gain for training in trainings if training.controls.gain is not None]
    if not {"before", "untrained"} & set(controls.readings):
        numbers.append("The router before training: not recorded.")
    if others:
        numbers.append(
            f"Beyond the best of its own controls, by training: {', '.join(map(signed, gains))} bits."
        )
    else:
        numbers.append("One training; other trainings of the recipe were not compared.")

    name, best = _best_control(controls)
    router, _ = controls.same[name]
    detail = (
        f"{_CONTROLS[name][1]} {signed(best.bits.value)} bits about the class, "
        f"the router {signed(router.bits.value)}"
    )
    num_above = sum(map(_exceeds_controls, trainings))
    if others:
        detail += f"; {num_above} of {len(trainings)} trainings tell more than their own controls"
    answer = NOT_SHOWN
    if num_above == len(trainings):
        answer = _yes_or_a_little(min(gains), readings)
    return Answer("training", answer, detail, numbers)


def _exceeds_controls(training: LayerReadings) -> bool:
    """Whether a training tells more than each of its own controls."""
    controls = training.controls
    return controls.gain is not None and controls.exceeded and not training.layer.cluster_start


def _best_control(controls: Controls) -> tuple[str, Reading]:
    """Name and reading of the control whose single choice tells most."""
    named = [
        (name, reading)
        for name, readings in controls.readings.items()
        for reading in readings
        if reading.unit == "patch"
    ]
    return max(named, key=lambda pair: pair[1].bits.value)


def function_answer(swap: Swap | None, reason: str | None) -> Answer:
    """The third question's answer; `reason` says why it wasn't measured."""
    if swap is None:
        return Answer("function", NOT_MEASURED, reason or _HOW_TO_MEASURE)
    numbers = [_swap_sentence(swap)]
    without = swap.without
    lost = f"{signed(without.points.value, 1)} points of accuracy, {_interval(without.points, 1)}"
    if not without.significant and without.points.low <= 0:
        nats = f"{signed(without.log_loss.value)} of log-loss, {_interval(without.log_loss)}"
        return Answer("function", NOTHING, f"without it {lost}; {nats}", numbers)

    points = swap.whole.points
    detail = (
        f"exchanging a class's favourite expert with any other costs {signed(points.value, 1)} points of "
        f"accuracy, {_interval(points, 1)}; "
    )
    if swap.favourite is None or swap.any_two is None:
        detail += "there are no two other experts to compare it with"
    else:
        detail += (
            f"where {percent(swap.any_two.moved)} of the choices change, that costs "
            f"{signed(swap.favourite.points.value, 1)} and exchanging any two other experts "
            f"{signed(swap.any_two.points.value, 1)}"
        )

    # The favourite costs more than any two others; with two experts: costs anything.
    compared = swap.more or swap.whole
    beyond = swap.beyond_patches
    if compared.significant:
        if beyond is not None and beyond.significant:
            detail += f"; on the same patches {signed(beyond.log_loss.value)} of log-loss more than their other choice"
        if without.points.low <= 0:
            detail = f"in log-loss alone: without the layer {lost}, so nothing shown; {detail}"
            return Answer("function", A_LITTLE_WORD, detail, numbers)

    detail += f"; leaving the layer out costs {signed(without.points.value, 1)}"
    if compared.significant:
        return Answer("function", YES, detail, numbers)
    if swap.whole.significant or (swap.any_two is not None and swap.any_two.significant):
        detail = f"a class's favourite no more than others: {detail}"
        return Answer("function", A_LITTLE_WORD, detail, numbers)
    return Answer("function", NOT_SHOWN, detail, numbers)


def _swap_sentence(swap: Swap) -> str:
    """Log-loss of every change."""
    costs = {
        "without the layer": swap.without,
        "routes of another image": swap.routes,
        "favourite exchanged": swap.whole,
        "thinned to as many choices": swap.favourite,
        "as many of any two others": swap.any_two,
        "the difference": swap.more,
        "on the same patches a third expert in the favourite's place": swap.same_patches,
        "in their other choice's": swap.their_other,
        "that difference": swap.beyond_patches,
    }
    phrases = []
    for name, cost in costs.items():
        if cost is None:
            continue
        nats = cost.log_loss
        moved = f"; {percent(cost.moved)}" if cost.moved else ""
        phrases.append(
            f"{name} {signed(nats.value)} ({signed(nats.low)} to {signed(nats.high)}{moved})"
        )
    return (
        f"Log-loss by changed routes (95 % CI; choices changed), {swap.n_images:,} images: "
        f"{', '.join(phrases)}."
    )


def _control_sentence(name: str, controls: Controls) -> str:
    patches = [reading for reading in controls.readings[name] if reading.unit == "patch"]
    images = [reading for reading in controls.readings[name] if reading.unit == "image"]
    bits = _range([reading.bits.value for reading in patches])
    guess = _range([reading.guess.value for reading in patches], percent)
    image_bits = _range([reading.bits.value for reading in images])
    router, router_image = controls.same[name]
    return (
        f"{_CONTROLS[name][0]}: {bits} bits (router {signed(router.bits.value)}), guess right "
        f"{guess} (router {percent(router.guess.value)}); histogram of the image "
        f"{image_bits} bits on held-out images (router {signed(router_image.bits.value)})."
    )


def _range(values: Sequence[float], form: Callable[[float], str] = signed) -> str:
    """`0.123 to 0.456`; one number where both are the same."""
    low = form(min(values))
    high = form(max(values))
    return low if low == high else f"{low} to {high}"


def join_with_and(items: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    if len(items) < 2:
        return "".join(items)
    return f"{', '.join(items[:-1])} and {items[-1]}"


def _interval(interval: Interval, digits: int = 3) -> str:
    return f"95 % CI {signed(interval.low, digits)} to {signed(interval.high, digits)}"


def _reading_sentence(reading: Reading) -> str:
    """A reading as a sentence of numbers."""
    subject = {"first": "First choices", "all": "All choices"}[reading.choices]
    if reading.where != "everywhere":
        subject += f", {reading.where} only"
    if reading.unit == "image":
        subject += " as a histogram of the image"
    if reading.of == "part":
        subject += ", about the part beyond position"
    return (
        f"{subject}: guess right {percent(reading.guess.value)} (chance {percent(reading.chance)}), "
        f"{signed(reading.bits.value)} bits ({_interval(reading.bits)})."
    )


# ---- the swap test: do the experts of a layer do different things? Forward passes with other routes
#
# Changes of the routes of one layer, and what images lose by them in log-loss (nats) and accuracy (points):
# - `without`: no routed expert computes anything; the residual stays. What the layer contributes, and so what can show;
# - `favourite`: a class's favourite expert changes places with any other expert. The favourite is the one that the
#   class chooses first most often, found on the half of the images on which the swap is not measured;
# - `any_two`: any two experts other than the favourite change places. Both are thinned to as many tokens of each class,
#   since a favourite has more tokens than others; `whole` is the favourite's exchange before that;
# - `same_patches`: is a favourite dear because of its patches? A third expert takes its place on patches that chose it
#   and an expert in common, and, on the very same patches, the place of that expert (`their_other`);
# - `routes`: every patch goes where the patch at the same place of another image goes.
# All changes are coherent: in one image all moved tokens of an expert go to the same other one, since scattered errors
# average out. Gates stay with the rank. Which other experts take part is drawn for each image, as images don't meet.


@dataclass(frozen=True)
class Cost(JsonDataclass):
    """What a change of routes costs."""

    points: Interval  # accuracy lost, in percentage points; mean over images with its 95 % interval
    log_loss: Interval  # log-loss gained, in nats
    moved: float  # share of the choices that changed

    @classmethod
    def of(cls, loss: Loss) -> Cost:
        """The mean over images."""
        points = paired_interval(np.clip(loss.correct, -1, 1))
        percentage = Interval(*(100 * end for end in points))
        return cls(percentage, ratio_interval(loss.log_loss), loss.moved)

    @property
    def significant(self) -> bool:
        """Whether the interval of the log-loss lies above 0."""
        return self.log_loss.low > 0


@dataclass(frozen=True, kw_only=True)
class Swap(JsonDataclass):
    """What changes of the routes of one layer cost; see above."""

    without: Cost  # the layer left out
    routes: Cost  # those of other images
    whole: Cost  # a class's favourite changes places with another expert, all their tokens
    # the same with as many tokens as in `any_two`; None where there are no two other experts to exchange
    favourite: Cost | None = None
    any_two: Cost | None = None  # two other experts change places
    more: Cost | None = None  # `favourite` minus `any_two`, image by image
    # a third expert in the favourite's place; None where no patches can show it
    same_patches: Cost | None = None
    their_other: Cost | None = None  # on the same patches, in the place of their other choice
    beyond_patches: Cost | None = None  # `same_patches` minus `their_other`, image by image
    n_images: int  # images that were run
    # class, its favourite expert in either half of the images
    favourites: Sequence[tuple[str, int, int]]

    def to_json(self) -> Json:
        """As JSON primitives; `points`, `log_loss` and `moved` are those of `whole`."""
        fields = super().to_json()
        return {**fields.pop("whole"), **fields}


def swap_test(
    recording: Recording, index: int, *, draws: int = 2, limit: int = 2000, seed: int = 0
) -> Swap | None:
    """Change the routes of the layer of this index and measure what that costs; None where no exchange moves a token.

    `recording` needs its `run`. An image has `draws` exchanges, each with experts drawn anew. At most `limit` images
    are run, as many of each class; of more classes than that, one image of as many.
    """
    num_experts = recording.layers[index].num_experts
    rng = np.random.default_rng(seed)
    sample = SwapSample.draw(recording, index, limit, seed, rng)

    variants = _exchanges(sample, num_experts, draws, rng)
    if not any((routes != sample.routes).any() for routes in variants["whole"]):
        return None
    order = rng.permutation(len(sample.images))
    other_image = np.empty_like(order)
    other_image[order] = np.roll(order, 1)
    same_patches, their_other = _on_same_patches(sample, num_experts, rng)
    losses = measure_losses(
        recording,
        index,
        sample,
        {
            "without": [~np.maximum(sample.routes, 0)],
            "routes": [sample.routes[other_image]],
            **variants,
            "same_patches": [same_patches],
            "their_other": [their_other],
        },
    )

    costs = {name: Cost.of(losses[name]) for name in ("without", "routes", "whole")}
    for name, control, difference in (
        ("favourite", "any_two", "more"),
        ("same_patches", "their_other", "beyond_patches"),
    ):
        if name in losses and losses[name].moved:
            costs[name] = Cost.of(losses[name])
            costs[control] = Cost.of(losses[control])
            costs[difference] = Cost.of(losses[name].minus(losses[control]))
    classes = np.unique(sample.labels)
    favourites = [
        (recording.class_names[label], *sample.favourites[:, label].tolist()) for label in classes
    ]
    return Swap(**costs, n_images=len(sample.images), favourites=favourites)


@dataclass(frozen=True)
class SwapSample:
    """The images that are run, as many of each class that has a favourite."""

    images: Ints  # [R]
    labels: Ints  # [R]
    routes: Ints  # [R, P, K] their own
    favourites: (
        Ints  # [2, C] each class's favourite, for images of either half; found on the other half
    )
    favourite: Ints  # [R] that of each image's class and half

    @classmethod
    def draw(
        cls, recording: Recording, index: int, limit: int, seed: int, rng: np.random.Generator
    ) -> SwapSample:
        """At most `limit` images; `seed` divides all images into halves."""
        layer = recording.layers[index]
        labels = recording.labels
        halves = halves_by_class(labels, seed)
        first = layer.counts("first")
        num_classes = len(recording.class_names)
        favourites = np.stack(
            [
                _favourite_experts(first[half], labels[half], num_classes)
                for half in (halves, ~halves)
            ]
        )  # [2, C]

        classes = np.flatnonzero((favourites >= 0).all(0))
        if len(classes) > limit:
            classes = np.sort(rng.permutation(classes)[:limit])
        images: list[int] = []
        for label in classes:
            of_class = rng.permutation(np.flatnonzero(labels == label))
            images.extend(of_class[: limit // len(classes)])
        rows = np.array(images, int)
        return cls(
            images=rows,
            labels=labels[rows],
            routes=layer.choices[rows],
            favourites=favourites,
            favourite=favourites[halves[rows].astype(int), labels[rows]],
        )


def _favourite_experts(first: Floats, labels: Ints, num_classes: int) -> Ints:
    """[C] the expert that each class chooses first most often; -1 for a class without images.

    Where that is the same for all classes it is the expert that the class uses most beyond the mean class.
    """
    shares = Load.of(first, labels, num_classes).class_share
    present = np.isfinite(shares).all(1)
    shares = shares[present]
    best = shares.argmax(1)
    if len(set(best)) == 1:
        best = (shares - shares.mean(0)).argmax(1)
    favourites = np.full(num_classes, -1)
    favourites[present] = best
    return favourites


def _other_experts(favourite: Ints, num_experts: int, rng: np.random.Generator) -> Ints:
    """[R, E - 1] the experts other than the favourite [R] in random order."""
    order = rng.random((len(favourite), num_experts))
    order[np.arange(len(favourite)), favourite] = np.inf
    return order.argsort(1)[:, :-1]


def _exchanges(
    sample: SwapSample, num_experts: int, draws: int, rng: np.random.Generator
) -> dict[str, list[Ints]]:
    """Routes [R, P, K] of each draw: the favourite exchanged, and thinned beside as many of any two others."""
    variants: dict[str, list[Ints]] = {"whole": []}
    if num_experts > 2:
        variants |= {"favourite": [], "any_two": []}
    for _ in range(draws):
        others = _other_experts(sample.favourite, num_experts, rng)
        favourite = _Exchange.of(sample.routes, sample.favourite, others[:, 0])
        variants["whole"].append(favourite.apply(sample.routes))
        if num_experts <= 2:
            continue

        others = _other_experts(sample.favourite, num_experts, rng)
        any_two = _Exchange.of(sample.routes, others[:, 0], others[:, 1])
        # As many tokens of each class.
        for label in np.unique(sample.labels):
            of_class = sample.labels == label
            count = min(favourite.moves[of_class].sum(), any_two.moves[of_class].sum())
            favourite = favourite.thinned(of_class, count, rng)
            any_two = any_two.thinned(of_class, count, rng)
        variants["favourite"].append(favourite.apply(sample.routes))
        variants["any_two"].append(any_two.apply(sample.routes))
    return variants


def _on_same_patches(
    sample: SwapSample, num_experts: int, rng: np.random.Generator
) -> tuple[Ints, Ints]:
    """Routes [R, P, K] with a third expert in place of the favourite, and in place of the other expert.

    The other one is chosen beside the favourite by most patches of the image. Of these patches as many are changed
    that chose the favourite first as that chose the other one first: a first choice weighs more.
    """
    routes = sample.routes
    rows = np.arange(len(routes))
    others = _other_experts(sample.favourite, num_experts, rng)  # [R, E - 1]
    is_favourite = routes == sample.favourite[:, None, None]  # [R, P, K]
    is_chosen = (routes[..., None] == others[:, None, None]).any(2)  # [R, P, E - 1]
    has_favourite = is_favourite.any(-1, keepdims=True)  # [R, P, 1]
    beside = is_chosen & has_favourite

    index = beside.sum(1).argmax(1)  # [R]
    other = others[rows, index]
    third = others[rows, index - 1]
    chose_other = beside[rows, :, index]  # [R, P]
    chose_third = beside[rows, :, index - 1]
    movable = chose_other & ~chose_third

    favourite_rank = is_favourite.argmax(-1)
    other_rank = (routes == other[:, None, None]).argmax(-1)
    favourite_first = movable & (favourite_rank < other_rank)
    other_first = movable & ~favourite_first
    count = np.minimum(favourite_first.sum(1), other_first.sum(1))  # [R]
    moves = _random_patches(favourite_first, count, rng)
    moves |= _random_patches(other_first, count, rng)
    return (
        _Exchange(sample.favourite, third, moves).apply(routes),
        _Exchange(other, third, moves).apply(routes),
    )


def _random_patches(patches: Flags, count: Ints, rng: np.random.Generator) -> Flags:
    """As many of these patches [R, P] of each image as `count` [R] says, at random."""
    # They come in random order before all others of the image, which are 0.
    order = (patches * -rng.random(patches.shape)).argsort(1)
    rank = order.argsort(1)
    return patches & (rank < count[:, None])


@dataclass(frozen=True)
class _Exchange:
    """Experts a [R] and b [R] change places for the tokens `moves` [R, P], which have chosen one of them."""

    a: Ints
    b: Ints
    moves: Flags

    @classmethod
    def of(cls, routes: Ints, a: Ints, b: Ints) -> _Exchange:
        """All tokens; those that have chosen both would be computed by the same two, and stay."""
        chose_a = (routes == a[:, None, None]).any(-1)
        chose_b = (routes == b[:, None, None]).any(-1)
        return cls(a, b, chose_a ^ chose_b)

    def apply(self, routes: Ints) -> Ints:
        """[R, P, K] after the exchange."""
        a = self.a[:, None, None]
        b = self.b[:, None, None]
        exchanged = np.where(routes == a, b, np.where(routes == b, a, routes))
        return np.where(self.moves[..., None], exchanged, routes)

    def thinned(self, images: Flags, count: int, rng: np.random.Generator) -> _Exchange:
        """With only `count` of the tokens of some images [R]."""
        moves = self.moves.copy()
        tokens = np.flatnonzero(moves & images[:, None])
        moves.reshape(-1)[rng.permutation(tokens)[count:]] = False
        return replace(self, moves=moves)


@dataclass(frozen=True)
class Loss:
    """What each image loses by changed routes, the mean over draws."""

    log_loss: Floats  # [R] gained
    correct: Floats  # [R] correctness lost, -1 to 1
    moved: float  # share of the choices that changed

    def minus(self, other: Loss) -> Loss:
        """The difference, image by image."""
        return Loss(
            self.log_loss - other.log_loss,
            self.correct - other.correct,
            self.moved - other.moved,
        )


def measure_losses(
    recording: Recording, index: int, sample: SwapSample, variants: Mapping[str, list[Ints]]
) -> dict[str, Loss]:
    """What each variant of the routes, [R, P, K] of every draw, costs; an image whose routes stay isn't run again."""
    variants = {"own": [sample.routes], **variants}
    names = np.repeat(list(variants), [len(draws) for draws in variants.values()])
    routes = np.stack(list(chain.from_iterable(variants.values())), 1)  # [R, 1 + V, P, K]
    changed = (routes != routes[:, :1]).any((2, 3))  # [R, 1 + V]
    changed[:, 0] = True

    # All variants of an image follow each other, so that they share the blocks before the layer.
    row, variant = changed.nonzero()
    run = cast(Run, recording.run)
    logits = run(index, sample.images[row], routes[row, variant])
    log_p = log_softmax(np.asarray(logits, np.float64), axis=1)  # [rows, C]
    truth = sample.labels[row]
    log_loss = np.zeros(changed.shape)
    log_loss[row, variant] = -log_p[np.arange(len(row)), truth]
    correct = np.zeros(changed.shape)
    correct[row, variant] = log_p.argmax(1) == truth

    # What isn't changed costs nothing.
    gained = np.where(changed, log_loss - log_loss[:, :1], 0)
    lost = np.where(changed, correct[:, :1] - correct, 0)
    moved = (routes != routes[:, :1]).mean((0, 2, 3))  # [1 + V]
    losses = {}
    for name in variants:
        draws = names == name
        losses[name] = Loss(
            log_loss=gained[:, draws].mean(1),
            correct=lost[:, draws].mean(1),
            moved=float(moved[draws].mean()),
        )
    return losses

"""Three questions about the experts of any model whose routing was recorded, each answered beside its controls.

1. Do classes (or parts) go to different experts?
2. Did training the router add to that? A router that was started from clusters can't answer it.
3. Do the experts do different things? The swap test, below.

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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal, cast

import numpy as np
from scipy.special import log_softmax

from moevision.analysis.information import (
    Estimate,
    Flags,
    Floats,
    Ints,
    Json,
    Numbers,
    halves_by_class,
)
from moevision.analysis.readings import (
    Controls,
    Interval,
    LayerReadings,
    Load,
    Reading,
    Recording,
    Run,
    counts_of,
    join_words,
    load_of,
    measure_layer,
    paired_interval,
    range_words,
    ratio_interval,
)
from moevision.errors import UserError
from moevision.words import percent, signed

Question = Literal["experts", "training", "function"]

YES, A_LITTLE_WORD, NOT_SHOWN, NOT_MEASURED = "yes", "a little", "not shown", "not measured"
NOTHING = "the layer contributes nothing"
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

SKILL = 0.02
"""Below this part of the images that the majority class gets wrong, guessing by the expert is "a little", too."""

_MEASURES = "`moevision analyze MODEL` measures it"
_NOTHING = "The layer contributes nothing, so what its experts do can't show"
_P_VALUE = 0.05


@dataclass(frozen=True)
class Answer(Numbers):
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
class LayerAnswers(Numbers):
    """The three answers about one layer, and every number behind them."""

    name: str
    answers: Sequence[Answer]  # of the three questions, in order
    load: Load  # how evenly the experts are used
    readings: Sequence[Reading] = ()  # everything that was read off the choices
    probe: Reading | None = (
        None  # the same of the linear probe's balanced groups; None without inputs
    )
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
        >>> (found,) = three_questions(Recording(labels, [layer], ["cat", "dog"]))
        >>> found.answers[0].sentence
        'Classes go to different experts: yes (the expert alone guesses 100.0 % right, chance 50.0 %).'
        >>> found.load.words
        'max/mean load 1.00, in effect 2.0 of 2 experts'
    """
    for other in seeds:
        if len(other.layers) != len(recording.layers):
            raise UserError(
                "Other trainings must be of the same recipe: these have other MoE layers."
            )
    found = []
    for place, layer in enumerate(recording.layers):
        options = {"permutations": permutations, "cluster_seeds": cluster_seeds, "seed": seed}
        own, *others = (measure_layer(each, place, **options) for each in (recording, *seeds))
        swap = why = None
        if recording.run is None or not layer.tokens_choose:
            why = (
                "routes were not forced"
                if layer.tokens_choose
                else "no patch chooses its experts here"
            )
        elif not layer.read:
            why = "no logit reads these patches, so that no swap can cost anything"
        elif own.why is not None:
            why = own.why
        elif layer.num_experts < 2:
            why = "it has one expert"
        else:
            swap = swap_test(recording, place, draws=draws, limit=swap_images, seed=seed)
            why = "no exchange moves a patch, which have all chosen all experts"
            if swap is None and not len(images_to_run(recording, place, swap_images, seed)[0]):
                why = "it takes two images of a class: give more images, --limit"
        answers = (experts_answer(own), training_answer(own, others), function_answer(swap, why))
        gains = [each.controls.gain for each in (own, *others)]
        found.append(
            LayerAnswers(
                layer.name,
                answers,
                own.load,
                own.readings,
                own.probe,
                own.controls.readings,
                own.controls.same,
                gains,
                swap,
            )
        )
    return found


def summary_lines(layers: Sequence[LayerAnswers]) -> list[Answer]:
    """One answer to each question about a whole model: the strongest of its layers, which are named."""
    found = []
    for place, question in enumerate(LEADS):
        answers = [(layer.name, layer.answers[place]) for layer in layers]
        best = next(
            word
            for word in (YES, A_LITTLE_WORD, NOT_SHOWN, NOTHING, NOT_MEASURED)
            if any(answer.answer == word for _, answer in answers)
        )
        names = [name for name, answer in answers if answer.answer == best]
        # The deepest of them is quoted: there experts know most about the image.
        quoted = next(answer for name, answer in reversed(answers) if name == names[-1])
        where = (
            ""
            if len(layers) == 1
            else f"{names[-1]}: "
            if len(names) == 1
            else f"{join_words(names)}; {names[-1]}: "
        )
        if len(names) < len(layers) and best in (YES, A_LITTLE_WORD):
            where = f"{len(names)} of {len(layers)} layers, each tested at 5 %; {where}"
        found.append(replace(quoted, question=question, detail=where + quoted.detail))
    return found


def plain_answer(answers: Sequence[Answer]) -> str:
    """The answers without a number, the clearest first.

    Examples:
        >>> plainly([Answer("experts", YES, "46 %"), Answer("training", NOT_SHOWN, "0 bits")])
        'Classes go to different experts. Not shown: that training the router added to that.'
    """
    told = []
    for word in (YES, A_LITTLE_WORD, NOT_SHOWN, NOTHING, NOT_MEASURED):
        leads = [LEADS[answer.question] for answer in answers if answer.answer == word]
        if word == NOTHING and leads:
            told.append(f"{_NOTHING}.")
        elif word == YES:
            told += [f"{lead}." for lead in leads]
        elif leads:
            clauses = join_words([f"that {lead[0].lower()}{lead[1:]}" for lead in leads])
            told.append(f"{word[0].upper()}{word[1:]}: {clauses}.")
    return " ".join(told)


def experts_answer(found: LayerReadings) -> Answer:
    """The first question's answer."""
    if found.why is not None:
        return Answer("experts", NOT_MEASURED, found.why)
    layer, reading, estimate = found.layer, found.readings[0], cast(Estimate, found.estimate)
    told = "the expert alone" if layer.tokens_choose else "how much is taken from each expert"
    detail = (
        f"{told} guesses {percent(reading.guess.value)} right, chance {percent(reading.chance)}"
    )
    if found.probe is not None and layer.by_image:
        probe = percent(found.probe.guess.value)
        detail += f", a linear probe of the same input in {layer.num_experts} groups {probe}"
    most = 0.0 if found.probe is None else found.probe.bits.value
    beside = (
        ""
        if most <= 0
        else (
            f", {percent(reading.bits.value / most)} of the {signed(most)} bits of a linear probe in "
            f"{layer.num_experts} balanced groups"
        )
    )
    bits = f"{signed(reading.bits.value)} bits above shuffled labels ({_interval(reading.bits)})"
    numbers = [f"{layer.name}: {bits}{beside}; {found.load.words}."]
    numbers += [_reading_words(each) for each in found.readings[1:]]
    if not (estimate.low > 0 and estimate.p_value <= _P_VALUE):
        return Answer("experts", NOT_SHOWN, detail, numbers)
    few = reading.guess.value - reading.chance < SKILL * (1 - reading.chance)
    return Answer(
        "experts", A_LITTLE_WORD if few else _yes(estimate.value_bits, found), detail, numbers
    )


def _yes(bits: float, found: LayerReadings) -> str:
    return A_LITTLE_WORD if bits / found.most_bits < A_LITTLE else YES


def training_answer(found: LayerReadings, others: Sequence[LayerReadings]) -> Answer:
    """The second question's answer; `others` are other trainings, each beside its own controls."""
    if found.why is not None:
        return Answer("training", NOT_MEASURED, found.why)
    controls = found.controls
    numbers = [_control_words(name, controls) for name in controls.readings]
    if found.layer.cluster_start:
        return Answer(
            "training", NOT_SHOWN, "the router started from clusters, which is no training", numbers
        )
    if "clusters" not in controls.readings:
        what = (
            "not compared with clusters of the same input"
            if found.layer.inputs is not None
            else _MEASURES
        )
        return Answer("training", NOT_SHOWN if controls.readings else NOT_MEASURED, what, numbers)
    if not {"before", "untrained"} & set(controls.readings):
        numbers.append("The router before training: not recorded.")
    trainings = [found, *others]
    above = [
        each.controls.gain is not None and each.controls.exceeded and not each.layer.cluster_start
        for each in trainings
    ]
    gains = [each.controls.gain for each in trainings if each.controls.gain is not None]
    if others:
        numbers.append(
            f"Beyond the best of its own controls, by training: {', '.join(signed(gain) for gain in gains)} bits."
        )
    else:
        numbers.append("One training; other trainings of the recipe were not compared.")
    name, reading = max(
        (
            (name, each)
            for name, readings in controls.readings.items()
            for each in readings
            if each.unit == "patch"
        ),
        key=lambda pair: pair[1].bits.value,
    )
    own = controls.same[name][0]
    detail = f"{_CONTROLS[name][1]} {signed(reading.bits.value)} bits about the class, "
    detail += f"the router {signed(own.bits.value)}"
    if len(above) > 1:
        detail += f"; {sum(above)} of {len(above)} trainings tell more than their own controls"
    return Answer("training", _yes(min(gains), found) if all(above) else NOT_SHOWN, detail, numbers)


def function_answer(swap: Swap | None, why: str | None) -> Answer:
    """The third question's answer; `why` it wasn't measured."""
    if swap is None:
        return Answer("function", NOT_MEASURED, why or _MEASURES)
    without, whole, favourite, two, more = (
        swap.without,
        swap.whole,
        swap.favourite,
        swap.any_two,
        swap.more,
    )
    numbers = _swap_words(swap)
    lost = f"{signed(without.points.value, 1)} points of accuracy, {_interval(without.points, 1)}"
    if not without.shown and without.points.low <= 0:
        nats = f"{signed(without.log_loss.value)} of log-loss, {_interval(without.log_loss)}"
        return Answer("function", NOTHING, f"without it {lost}; {nats}", numbers)
    detail = (
        f"exchanging a class's favourite expert with any other costs {signed(whole.points.value, 1)} points of "
        f"accuracy, {_interval(whole.points, 1)}; "
    )
    if favourite is None or two is None:
        detail += "there are no two other experts to compare it with"
    else:
        detail += (
            f"at the same share of moved choices, {percent(two.moved)}, {signed(favourite.points.value, 1)}, any two "
            f"other experts {signed(two.points.value, 1)}"
        )
    answer = YES if (whole if more is None else more).shown else NOT_SHOWN
    beyond = swap.beyond_patches
    if answer == YES and beyond is not None and beyond.shown:
        detail += f"; on the same patches {signed(beyond.log_loss.value)} of log-loss more than their other choice"
    if answer == YES and without.points.low <= 0:
        detail = f"in log-loss alone: without the layer {lost}, so nothing shown; {detail}"
        return Answer("function", A_LITTLE_WORD, detail, numbers)
    detail += f"; without the layer {signed(without.points.value, 1)}"
    if answer == NOT_SHOWN and (whole.shown or (two is not None and two.shown)):
        return Answer(
            "function", A_LITTLE_WORD, f"a class's favourite no more than others: {detail}", numbers
        )
    return Answer("function", answer, detail, numbers)


def _swap_words(swap: Swap) -> list[str]:
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
    told = [
        f"{name} {signed(cost.log_loss.value)} ({signed(cost.log_loss.low)} to {signed(cost.log_loss.high)}"
        + (f"; {percent(cost.moved)})" if cost.moved else ")")
        for name, cost in costs.items()
        if cost is not None
    ]
    return [
        f"Log-loss by changed routes (95 % CI; choices changed), {swap.n_images:,} images: {', '.join(told)}."
    ]


def _control_words(name: str, controls: Controls) -> str:
    of = controls.readings[name]
    bits, image = (
        [reading.bits.value for reading in of if reading.unit == unit]
        for unit in ("patch", "image")
    )
    guess = [reading.guess.value for reading in of if reading.unit == "patch"]
    own, own_image = controls.same[name]
    return (
        f"{_CONTROLS[name][0]}: {range_words(bits)} bits (router {signed(own.bits.value)}), guess right "
        f"{range_words(guess, percent)} (router {percent(own.guess.value)}); histogram of the image "
        f"{range_words(image)} bits on held-out images (router {signed(own_image.bits.value)})."
    )


def _interval(interval: Interval, digits: int = 3) -> str:
    return f"95 % CI {signed(interval.low, digits)} to {signed(interval.high, digits)}"


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
class Cost(Numbers):
    """What a change of routes costs."""

    points: Interval  # accuracy lost, in percentage points; mean over images with its 95 % interval
    log_loss: Interval  # log-loss gained, in nats
    moved: float  # share of the choices that changed

    @property
    def shown(self) -> bool:
        """Whether the interval of the log-loss lies above 0."""
        return self.log_loss.low > 0


@dataclass(frozen=True)
class Swap(Numbers):
    """What changes of the routes of one layer cost; see above."""

    without: Cost  # the layer left out
    routes: Cost  # those of other images
    whole: Cost  # a class's favourite changes places with another expert, all their tokens
    # the same with as many tokens as in `any_two`; None where there are no two other experts to exchange
    favourite: Cost | None
    any_two: Cost | None  # two other experts change places
    more: Cost | None  # `favourite` minus `any_two`, image by image
    same_patches: (
        Cost | None
    )  # a third expert in the favourite's place; None where no patches can show it
    their_other: Cost | None  # on the same patches, in the place of their other choice
    beyond_patches: Cost | None  # `same_patches` minus `their_other`, image by image
    n_images: int  # images that were run
    favourites: Sequence[
        tuple[str, int, int]
    ]  # class, its favourite expert in either half of the images

    def to_json(self) -> Json:
        """As JSON primitives; `points`, `log_loss` and `moved` are those of `whole`."""
        found = super().to_json()
        return {**found.pop("whole"), **found}


def swap_test(
    recording: Recording, place: int, *, draws: int = 2, limit: int = 2000, seed: int = 0
) -> Swap | None:
    """Change the routes of the layer at `place` and measure what that costs; None where no exchange moves a token.

    `recording` needs its `run`. An image has `draws` exchanges, each with experts drawn anew. At most `limit` images
    are run, as many of each class; of more classes than that, one image of as many.
    """
    layer = recording.layers[place]
    images, own, target, half, favourite, rng = images_to_run(recording, place, limit, seed)
    liked = favourite[half, target]  # [R]

    exchanged, thinned = [], []
    for _ in range(draws):
        others = _others(liked, layer.num_experts, rng)  # [R, E - 1]
        moves = _Exchange.of(own, liked, others[:, 0])
        exchanged.append(moves.routes(own))
        if layer.num_experts > 2:
            others = _others(liked, layer.num_experts, rng)
            two = _Exchange.of(own, others[:, 0], others[:, 1])
            for label in np.unique(target):  # as many tokens of each class
                of_class = target == label
                count = min(int(each.moves[of_class].sum()) for each in (moves, two))
                moves, two = moves.thinned(of_class, count, rng), two.thinned(of_class, count, rng)
            thinned.append([moves.routes(own), two.routes(own)])
    if not any((routes != own).any() for routes in exchanged):
        return None
    order = rng.permutation(len(own))
    other_image = np.empty_like(order)
    other_image[order] = np.roll(order, 1)
    variants = [
        ~own,
        own[other_image],
        *exchanged,
        *(routes for pair in thinned for routes in pair),
    ]
    variants += _on_same_patches(own, liked, layer.num_experts, rng)
    loss, right = lost_by(recording, place, images, own, target, variants)
    moved = np.array([(routes != own).mean() for routes in variants])

    def cost(rows: slice, minus: slice | None = None) -> Cost:
        """Of the mean of some variants, minus that of others."""
        away = [0 if minus is None else x[minus].mean(0) for x in (right, loss, moved)]
        points, nats = right[rows].mean(0) - away[0], loss[rows].mean(0) - away[1]
        return Cost(
            Interval(*(100 * x for x in paired_interval(np.clip(points, -1, 1)))),
            ratio_interval(nats, np.ones(len(nats))),
            float(moved[rows].mean() - away[2]),
        )

    whole, favourites, twos = slice(2, 2 + draws), slice(2 + draws, -2, 2), slice(3 + draws, -2, 2)
    same, other = slice(-2, -1), slice(-1, None)
    compared, has_same = moved[2 + draws : -2].any(), moved[same].any()
    return Swap(
        without=cost(slice(0, 1)),
        routes=cost(slice(1, 2)),
        whole=cost(whole),
        favourite=cost(favourites) if compared else None,
        any_two=cost(twos) if compared else None,
        more=cost(favourites, twos) if compared else None,
        same_patches=cost(same) if has_same else None,
        their_other=cost(other) if has_same else None,
        beyond_patches=cost(same, other) if has_same else None,
        n_images=len(images),
        favourites=[
            (recording.class_names[c], *favourite[:, c].tolist()) for c in np.unique(target)
        ],
    )


def images_to_run(
    recording: Recording, place: int, limit: int, seed: int
) -> tuple[Ints, Ints, Ints, Ints, Ints, np.random.Generator]:
    """Images [R], as many of each class with a favourite, their choices, classes and halves; favourites [2, C].

    A favourite is found in the other half. What drew the images draws on.
    """
    rng = np.random.default_rng(seed)
    layer = recording.layers[place]
    labels, choices = np.asarray(recording.labels), np.asarray(layer.choices)
    halves = halves_by_class(labels, seed)
    first = counts_of(choices, layer.amounts, layer.num_experts, "first")
    favourite = np.stack(
        [
            _favourites(first[other], labels[other], len(recording.class_names))
            for other in (halves, ~halves)
        ]
    )
    classes = np.flatnonzero((favourite >= 0).all(0))
    if len(classes) > limit:
        classes = np.sort(rng.permutation(classes)[:limit])
    of_class = [np.flatnonzero(labels == c) for c in classes]
    images = np.array(
        [i for each in of_class for i in rng.permutation(each)[: limit // classes.size]], int
    )
    return images, choices[images], labels[images], halves[images].astype(int), favourite, rng


def _favourites(first: Floats, labels: Ints, num_classes: int) -> Ints:
    """[C] the expert that each class chooses first most often; -1 for a class without images.

    Where that is the same for all classes it is the expert that the class uses most beyond the mean class.
    """
    shares = load_of(first, labels, num_classes).class_share
    known = np.isfinite(shares).all(1)
    found = np.full(num_classes, -1)
    if known.any():
        found[known] = shares[known].argmax(1)
        if len(set(found[known])) == 1:
            found[known] = (shares[known] - shares[known].mean(0)).argmax(1)
    return found


def _others(liked: Ints, num_experts: int, rng: np.random.Generator) -> Ints:
    """[R, E - 1] the experts other than `liked` [R] in random order."""
    order = rng.random((len(liked), num_experts))
    order[np.arange(len(liked)), liked] = np.inf
    return order.argsort(1)[:, :-1]


def _on_same_patches(
    own: Ints, liked: Ints, num_experts: int, rng: np.random.Generator
) -> list[Ints]:
    """Routes [R, P, K] with a third expert in place of the favourite, and in place of the other expert.

    The other one is chosen beside the favourite by most patches of the image. Of these patches as many are changed
    that chose the favourite first as that chose the other one first: a first choice weighs more.
    """
    order, row = _others(liked, num_experts, rng), np.arange(len(own))
    is_liked = own == liked[:, None, None]  # [R, P, K]
    beside = (own[..., None] == order[:, None, None]).any(2) & is_liked.any(
        -1, keepdims=True
    )  # [R, P, E - 1]
    place = beside.sum(1).argmax(1)
    other, third = order[row, place], order[row, place - 1]
    both = beside[row, :, place] & ~beside[row, :, place - 1]
    liked_first = is_liked.argmax(-1) < (own == other[:, None, None]).argmax(-1)
    parts = [both & liked_first, both & ~liked_first]
    fewer = np.minimum(*(part.sum(1, keepdims=True) for part in parts))
    # A part's patches in random order, before all others of the image, which are 0.
    ranks = [(part * -rng.random(part.shape)).argsort(1).argsort(1) for part in parts]
    moves = parts[0] & (ranks[0] < fewer) | parts[1] & (ranks[1] < fewer)
    return [_Exchange(expert, third, moves).routes(own) for expert in (liked, other)]


@dataclass(frozen=True)
class _Exchange:
    """Experts a [R] and b [R] change places for the tokens `moves` [R, P], which have chosen one of them."""

    a: Ints
    b: Ints
    moves: Flags

    @classmethod
    def of(cls, own: Ints, a: Ints, b: Ints) -> _Exchange:
        """All tokens; those that have chosen both would be computed by the same two, and stay."""
        return cls(a, b, (own == a[:, None, None]).any(-1) ^ (own == b[:, None, None]).any(-1))

    def routes(self, own: Ints) -> Ints:
        """[R, P, K] after the exchange."""
        a, b = self.a[:, None, None], self.b[:, None, None]
        return np.where(
            self.moves[..., None], np.where(own == a, b, np.where(own == b, a, own)), own
        )

    def thinned(self, images: Flags, count: int, rng: np.random.Generator) -> _Exchange:
        """With only `count` of the tokens of some images [R]."""
        moves = self.moves.copy()
        drawn = rng.permutation(np.flatnonzero(moves & images[:, None]))[count:]
        moves.reshape(-1)[drawn] = False
        return _Exchange(self.a, self.b, moves)


def lost_by(
    recording: Recording,
    place: int,
    images: Ints,
    own: Ints,
    target: Ints,
    variants: Sequence[Ints],
) -> tuple[Floats, Floats]:
    """Log-loss gained and correctness lost [V, R] by other routes [R, P, K]; what isn't changed isn't run."""
    routes = np.stack([own, *variants], 1)  # [R, 1 + V, P, K]
    changed = (routes != own[:, None]).any((2, 3))
    changed[:, 0] = True
    row, variant = changed.nonzero()
    log_p = log_softmax(
        np.asarray(cast(Run, recording.run)(place, images[row], routes[row, variant]), np.float64),
        axis=1,
    )
    values = np.stack(
        [-log_p[np.arange(len(row)), target[row]], -(log_p.argmax(1) == target[row]).astype(float)]
    )
    lost = np.zeros((2, *changed.shape))
    lost[:, row, variant] = values - values[:, variant == 0][:, row]
    loss, right = lost[:, :, 1:].swapaxes(1, 2)
    return loss, right

"""Three questions about the experts of any model whose routing was recorded, each answered beside its controls.

1. Do classes (or parts) go to different experts? How often the class is guessed right from the expert, beside the
   majority class; bits above labels shuffled over images; share of what a linear probe of the layer's input tells when
   its answers are dealt to as many balanced groups as there are experts.
2. Did training the router add to that? The same of the router before training and of k-means clusters of its own input.
   Every training stands against its own controls. A router that was started from clusters can't answer it.
3. Do the experts do different things? The swap test (`swap`): the layer left out; a class's favourite expert exchanged
   with any other, beside any two other experts at the same share of moved choices; routes of other images; every expert
   away. In log-loss and points of accuracy.

Each answer is one of "yes", "a little", "not shown" and "not measured", the third also "the layer contributes nothing".
There is no verdict over all three: classes may go to different experts without training the router having added to it,
and experts that do different things may be no experts of classes. The rules:

- 1 is shown where the bits' interval lies above 0 and at most one shuffling of twenty tells as much;
- 2 is shown where every training tells more than each of its own controls (interval of the difference above 0);
- 3: the layer contributes nothing where neither log-loss nor accuracy is lost without it (intervals reach 0), and then
  nothing else is said. It is "yes" where exchanging the favourite costs more log-loss than any two others (interval of
  the difference above 0; with two experts: costs any), and "a little" where that is shown of a layer without which no
  accuracy is lost, or where exchanging experts costs log-loss, and the favourite no more than others;
- 1 and 2 are "a little" where the bits (those beyond the best control) are less than `A_LITTLE` of what the probe
  tells, and 1 also where the expert guesses right less than `SKILL` of what the majority class gets wrong.

The answers are about first choices of all patches; where no patch chooses (expert choice, Soft MoE) about what patches
take. What is missing of a recording is said to be not measured. What is recorded and read off it is
in `readings`, the third question's test in `swap`.

Axes: C classes, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal, cast

from moevision.analysis.information import Estimate, Json, Numbers
from moevision.analysis.readings import (
    Controls,
    Interval,
    LayerReadings,
    Load,
    Reading,
    Recording,
    listed,
    read_layer,
    span,
)
from moevision.analysis.swap import Swap, swap_test
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
    probe: Reading | None = None  # the same of the linear probe's balanced groups; None without inputs
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
            raise UserError("Other trainings must be of the same recipe: these have other MoE layers.")
    found = []
    for place, layer in enumerate(recording.layers):
        options = {"permutations": permutations, "cluster_seeds": cluster_seeds, "seed": seed}
        own, *others = (read_layer(each, place, **options) for each in (recording, *seeds))
        swap = why = None
        if recording.run is None or not layer.tokens_choose:
            why = "routes were not forced" if layer.tokens_choose else "no patch chooses its experts here"
        elif not layer.read:
            why = "no logit reads these patches, so that no swap can cost anything"
        elif own.why is not None:
            why = own.why
        else:
            swap = swap_test(recording, place, draws=draws, limit=swap_images, permutations=permutations, seed=seed)
            why = "no exchange moves a patch, which have all chosen all experts" if swap is None else None
        answers = (experts_answer(own), training_answer(own, others), function_answer(swap, why))
        gains = [each.controls.gain for each in (own, *others)]
        found.append(
            LayerAnswers(
                layer.name, answers, own.load, own.readings, own.probe, own.controls.readings, own.controls.same, gains,
                swap,
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
            for word in (YES, A_LITTLE_WORD, NOT_SHOWN, NOTHING, NOT_MEASURED)
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
    for word in (YES, A_LITTLE_WORD, NOT_SHOWN, NOTHING, NOT_MEASURED):
        leads = [LEADS[answer.question] for answer in answers if answer.answer == word]
        if word == NOTHING and leads:
            told.append(f"{_NOTHING}.")
        elif word == YES:
            told += [f"{lead}." for lead in leads]
        elif leads:
            clauses = listed([f"that {lead[0].lower()}{lead[1:]}" for lead in leads])
            told.append(f"{word[0].upper()}{word[1:]}: {clauses}.")
    return " ".join(told)


def experts_answer(found: LayerReadings) -> Answer:
    """The first question's answer."""
    if found.why is not None:
        return Answer("experts", NOT_MEASURED, found.why)
    layer, reading, estimate = found.layer, found.readings[0], cast(Estimate, found.estimate)
    told = "the expert alone" if layer.tokens_choose else "how much is taken from each expert"
    detail = f"{told} guesses {percent(reading.guess.value)} right, chance {percent(reading.chance)}"
    if found.probe is not None and layer.by_image:
        probe = percent(found.probe.guess.value)
        detail += f", a linear probe of the same input in {layer.num_experts} groups {probe}"
    beside = "" if found.probe is None else (
        f", {percent(reading.bits.value / found.most_bits)} of the {signed(found.probe.bits.value)} bits of a linear "
        f"probe in {layer.num_experts} balanced groups"
    )  # fmt: skip
    numbers = [f"{layer.name}: {_bits_words(reading)}{beside}; {found.load.words}."]
    numbers += [_reading_words(each) for each in found.readings[1:]]
    if not (estimate.low > 0 and estimate.p_value <= _P_VALUE):
        return Answer("experts", NOT_SHOWN, detail, numbers)
    few = reading.guess.value - reading.chance < SKILL * (1 - reading.chance)
    return Answer("experts", A_LITTLE_WORD if few else _yes(estimate.value_bits, found), detail, numbers)


def _yes(bits: float, found: LayerReadings) -> str:
    return A_LITTLE_WORD if bits / found.most_bits < A_LITTLE else YES


def training_answer(found: LayerReadings, others: Sequence[LayerReadings]) -> Answer:
    """The second question's answer; `others` are other trainings, each beside its own controls."""
    if found.why is not None:
        return Answer("training", NOT_MEASURED, found.why)
    controls = found.controls
    numbers = [_control_words(name, controls) for name in controls.readings]
    if found.layer.cluster_start:
        return Answer("training", NOT_SHOWN, "the router started from clusters, which is no training", numbers)
    if "clusters" not in controls.readings:
        what = "not compared with clusters of the same input" if found.layer.inputs is not None else _MEASURES
        return Answer("training", NOT_SHOWN if controls.readings else NOT_MEASURED, what, numbers)
    if not {"before", "untrained"} & set(controls.readings):
        numbers.append("The router before training: not recorded.")
    trainings = [found, *others]
    above = [
        each.controls.gain is not None and each.controls.exceeded and not each.layer.cluster_start for each in trainings
    ]
    gains = [each.controls.gain for each in trainings if each.controls.gain is not None]
    if others:
        numbers.append(
            f"Beyond the best of its own controls, by training: {', '.join(signed(gain) for gain in gains)} bits."
        )
    else:
        numbers.append("One training; other trainings of the recipe were not compared.")
    name, reading = max(
        ((name, each) for name, readings in controls.readings.items() for each in readings if each.unit == "patch"),
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
    without, whole, favourite, two, more = swap.without, swap.whole, swap.favourite, swap.any_two, swap.more
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
    if answer == YES and without.points.low <= 0:
        detail = f"in log-loss alone: without the layer {lost}, so nothing shown; {detail}"
        return Answer("function", A_LITTLE_WORD, detail, numbers)
    detail += f"; without the layer {signed(without.points.value, 1)}"
    if answer == NOT_SHOWN and (whole.shown or (two is not None and two.shown)):
        return Answer("function", A_LITTLE_WORD, f"a class's favourite no more than others: {detail}", numbers)
    return Answer("function", answer, detail, numbers)


def _swap_words(swap: Swap) -> list[str]:
    """Log-loss of every change, and the knock-outs."""
    costs = {
        "without the layer": swap.without,
        "routes of another image": swap.routes,
        "favourite exchanged": swap.whole,
        "thinned to as many choices": swap.favourite,
        "as many of any two others": swap.any_two,
        "the difference": swap.more,
    }
    told = [
        f"{name} {signed(cost.log_loss.value)} ({signed(cost.log_loss.low)} to {signed(cost.log_loss.high)}"
        + (f"; {percent(cost.moved)})" if cost.moved else ")")
        for name, cost in costs.items()
        if cost is not None
    ]
    numbers = [f"Log-loss by changed routes (95 % CI; choices changed), {swap.n_images:,} images: {', '.join(told)}."]
    away = swap.knock_out
    if away.p_value == away.p_value:  # not NaN
        numbers.append(
            f"An expert away, log-loss per 100 of its choices: a class's favourite {signed(100 * away.own)} on its own "
            f"images, {signed(100 * away.others)} on others' (p = {away.p_value:.3f}, images permuted between classes)."
        )
    return numbers


def _control_words(name: str, controls: Controls) -> str:
    of = controls.readings[name]
    bits, image = ([reading.bits.value for reading in of if reading.unit == unit] for unit in ("patch", "image"))
    guess = [reading.guess.value for reading in of if reading.unit == "patch"]
    own, own_image = controls.same[name]
    return (
        f"{_CONTROLS[name][0]}: {span(bits)} bits (router {signed(own.bits.value)}), guess right "
        f"{span(guess, percent)} (router {percent(own.guess.value)}); histogram of the image {span(image)} bits on "
        f"held-out images (router {signed(own_image.bits.value)})."
    )


def _interval(interval: Interval, digits: int = 3) -> str:
    return f"95 % CI {signed(interval.low, digits)} to {signed(interval.high, digits)}"


def _bits_words(reading: Reading) -> str:
    return f"{signed(reading.bits.value)} bits above shuffled labels ({_interval(reading.bits)})"


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

"""`moevision audit`: a model from elsewhere is opened, and every suspicion about its routers gets one sentence.

The three questions are asked of it as of our own runs (`questions`). What is added here are findings, each with its
numbers. Dead experts, constant routes, a leaked label and permuted experts are accusations: each is made where chance
would make it in less than one of a hundred models with a healthy router. Load and knock-outs are numbers only.

Axes: I images, P patches, K choices best first, E experts, R images that are run.
"""

from __future__ import annotations

import math
import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import numpy as np
from scipy.special import ndtri, stdtr
from torch import nn

from moevision.analysis.collect import Hook, hooked, own_code
from moevision.analysis.information import (
    CONFIDENCE_LEVEL,
    Interval,
    JsonDataclass,
    paired_interval,
    ratio_interval,
)
from moevision.analysis.questions import (
    Cost,
    LayerAnswers,
    Loss,
    SwapSample,
    join_with_and,
    measure_losses,
)
from moevision.analysis.readings import RecordedLayer, Recording
from moevision.analysis.trace import RoutingTrace
from moevision.errors import UserError
from moevision.models.io import SavedModel
from moevision.types import Floats, Ints, Json
from moevision.words import percent, signed

_CHANCE = 0.01  # of an accusation, in one model
_CONSTANT = 0.95  # share of the choices from which on routes are called constant
_FEWEST = 20  # images on which an expert is compared with another
Pairs = dict[tuple[int, int], Floats]
"""(expert, the one that took over) -> [R] log-loss that images gained."""


# ---- the model


@dataclass(frozen=True)
class Audited:
    """What the function that `moevision audit FILE.py:FUNCTION` calls returns.

    Attributes:
        model: the net, in eval mode, with its class names, image size, mean and std.
        routings: the hook that tells what its MoE blocks decided.
        untrained: the same net before it was trained, to compare with.
    """

    model: SavedModel
    routings: Hook
    untrained: nn.Module | None = None


def open_audited(address: str) -> SavedModel:
    """The model that FILE.py:FUNCTION returns, with its hook. The file's code is run.

    Raises:
        UserError: there is no such file or function, it fails, or it returns anything but an `Audited`.
    """
    file, _, name = address.rpartition(":")
    if not file.endswith(".py") or not Path(file).is_file():
        raise UserError(
            f"{address} names no function of a Python file that is there: give FILE.py:FUNCTION, such as "
            "my_model.py:audited."
        )
    # As `python FILE.py` does, so that the file can import what lies beside it.
    sys.path.insert(0, str(Path(file).resolve().parent))
    with own_code(file):
        function = runpy.run_path(file).get(name)
    if not callable(function):
        raise UserError(f"{file} has no function {name}: define it there, or give another name.")

    with own_code(f"{name}()"):
        audited = function()
    fits = isinstance(audited, Audited) and isinstance(audited.model, SavedModel)
    if not fits or not callable(audited.routings):
        raise UserError(
            f"{name}() returned {type(audited).__name__}: return Audited(SavedModel(...), routings), whose routings is "
            "a function (net, images, forced=None)."
        )
    return hooked(audited.model, audited.routings, audited.untrained)


# ---- findings


@dataclass(frozen=True)
class Finding(JsonDataclass):
    """One suspicion about one layer: whether it is found, and what with."""

    layer: str
    what: str
    found: bool | None  # None: not measured, or no accusation
    detail: str
    costs: Sequence[Cost] = ()  # of the knock-outs: of each expert

    def to_json(self) -> Json:
        """The fields, and a sentence such as "L0: dead experts: not found: none of 8, on 300 images."."""
        verdict = {True: "found: ", False: "not found: ", None: ""}[self.found]
        sentence = f"{self.layer}: {self.what}: {verdict}{self.detail}."
        return {**super().to_json(), "sentence": sentence}


def find(
    recording: Recording,
    answered: Sequence[LayerAnswers],
    trace: RoutingTrace,
    *,
    runs: int = 4000,
    seed: int = 0,
) -> list[Finding]:
    """All findings about each layer.

    Args:
        recording: of the model.
        answered: its layers' answers to the three questions.
        trace: has its answers.
        runs: how many images are run again for each layer, at most about.
        seed: of everything drawn.
    """
    right = None
    if trace.accuracy is not None:
        correct = trace.predictions == trace.labels
        right = ratio_interval(correct[trace.labels >= 0])
    findings = []
    tests = len(recording.layers)
    for index, layer in enumerate(recording.layers):
        answers = answered[index]
        findings += [
            dead_experts(layer, tests),
            constant_routes(layer),
            Finding(layer.name, "load", None, answers.load.words),
            label_leak(answers, right, tests),
        ]
        why = answers.answers[2].detail
        if answers.swap is None:
            findings.append(
                Finding(layer.name, "knock-out, permuted experts", None, f"not measured ({why})")
            )
            continue
        losses, pairs = remove_each(recording, index, runs, seed)
        findings += [knock_out(layer, losses), permuted_experts(layer, pairs, tests)]
    return findings


def dead_experts(layer: RecordedLayer, tests: int = 1) -> Finding:
    """Experts that no image chose, though all would be chosen by a router that takes as many an image evenly.

    With s the mean share of the experts that an image uses, an even router leaves an expert out of all I images with
    probability (1 - s)^I, and any of E experts in `tests` layers with at most tests · E times that.
    """
    present = layer.counts("all").sum(1) > 0  # [I, E]
    images, num_experts = present.shape
    dead = np.flatnonzero(~present.any(0))
    chance = tests * num_experts * (1 - present.mean()) ** images
    found = len(dead) > 0 and bool(chance < _CHANCE)
    detail = f"{_names(dead) or 'none'} of {num_experts}, on {images:,} images"
    if len(dead) and not found:
        detail += ", so few that chance may leave experts out: give more, --limit"
    return Finding(layer.name, "dead experts", found, detail)


def _names(experts: Ints) -> str:
    return join_with_and([f"E{expert}" for expert in experts])


def constant_routes(layer: RecordedLayer) -> Finding:
    """Whether practically every patch goes to the same experts as the patches at its place in other images."""
    used = layer.counts("all") > 0  # [I, P, E]
    if used.all() or not layer.tokens_choose:
        return Finding(layer.name, "constant routes", None, "not asked, since no patch chooses")
    tokens = used.reshape(-1, used.shape[-1])
    sets, numbers = np.unique(tokens, axis=0, return_inverse=True)
    numbers = numbers.reshape(used.shape[:2])  # [I, P] which set of experts
    usual = np.array([np.bincount(place).argmax() for place in numbers.T])  # [P]
    unusual = paired_interval((numbers != usual).mean(1))

    detail = f"{percent(1 - unusual.value)} of the patches go where most at their place do"
    if len(set(usual)) == 1:
        experts = np.flatnonzero(sets[usual[0]])
        detail += f", everywhere to {_names(experts)}"
    found = unusual.high < 1 - _CONSTANT
    if unusual.value < 1 - _CONSTANT and not found:
        detail += "; too few images to be sure: give more, --limit"
    return Finding(layer.name, "constant routes", found, detail)


def label_leak(answers: LayerAnswers, right: Interval | None, tests: int = 1) -> Finding:
    """Whether the experts of an image tell its class better than the model does, and better than chance."""
    experts = next((reading for reading in answers.readings if reading.unit == "image"), None)
    if experts is None or right is None:
        why = "not measured (it takes two classes, and logits of them)"
        return Finding(answers.name, "label leak", None, why)
    guess = experts.guess
    # Intervals are of 95 %; an accusation takes more, of several layers still more.
    wider = ndtri(1 - _CHANCE / tests) / ndtri((1 + CONFIDENCE_LEVEL) / 2)
    error = guess.value - guess.low
    beyond_model = guess.value - right.value > wider * math.hypot(error, right.high - right.value)
    found = beyond_model and guess.value - experts.chance > wider * error
    detail = (
        f"the experts alone guess {percent(guess.value)} of the images right, the model {percent(right.value)}, chance "
        f"{percent(experts.chance)}"
    )
    return Finding(answers.name, "label leak", bool(found), detail)


# ---- removals: each expert gives way on all patches of an image, to another one that is drawn for the image


def remove_each(recording: Recording, index: int, runs: int, seed: int) -> tuple[list[Loss], Pairs]:
    """What each expert's removal costs, and the same by the expert that took over, where enough images show it.

    In the first a patch's next choice takes over, if it names one.
    """
    num_experts = recording.layers[index].num_experts
    experts = range(num_experts)
    rng = np.random.default_rng(seed)
    sample = SwapSample.draw(recording, index, max(2, runs // num_experts), seed, rng)
    routes = sample.routes
    steps = rng.integers(1, num_experts, (len(routes), num_experts))
    others = (np.arange(num_experts) + steps) % num_experts  # [R, E]

    removed = {}
    for way, takers in enumerate(_takers(routes, others)):
        for expert in experts:
            taker = takers[..., expert, None]
            has_taker = (routes == taker).any(-1, keepdims=True)
            instead = np.where(has_taker, ~expert, taker)
            changed = np.where(routes == expert, instead, routes)
            removed[f"{way} {expert}"] = [changed]
    # The first is that of the own routes.
    _, *losses = measure_losses(recording, index, sample, removed).values()

    pairs = {}
    for expert, other in permutations(experts, 2):
        used = (routes == expert).any((1, 2))  # [R]
        images = used & (others[:, expert] == other)
        if images.sum() >= _FEWEST:
            pairs[expert, other] = losses[expert].log_loss[images]
    return losses[-num_experts:], pairs


def _takers(routes: Ints, others: Ints) -> list[Ints]:
    """Who takes over from each expert, [R, P, E]: who is drawn; and next choices, if routes [R, P, K] name any."""
    drawn = np.repeat(others[:, None], routes.shape[1], 1)
    # A choice that isn't computed, and is no copy of one that is, is the next.
    ranked = ~routes
    is_new = (ranked[..., None] != routes[..., None, :]).all(-1)  # [R, P, K]
    is_next = is_new & (ranked >= 0)
    if not is_next.any():
        return [drawn]
    best = is_next.argmax(-1)[..., None]
    following = np.take_along_axis(ranked, best, -1)  # [R, P, 1]
    has_next = is_next.any(-1, keepdims=True)
    return [drawn, np.where(has_next, following, drawn)]


def knock_out(layer: RecordedLayer, losses: Sequence[Loss]) -> Finding:
    """What is lost without each expert."""
    costs = [Cost.of(loss) for loss in losses]
    dearest = int(np.argmax([cost.log_loss.value for cost in costs]))
    points = costs[dearest].points
    nats = costs[dearest].log_loss
    detail = (
        f"{sum(cost.significant for cost in costs)} of {len(costs)} experts cost log-loss when removed, each tested "
        f"at 5 %; most E{dearest}, {signed(points.value, 1)} points of accuracy ({signed(points.low, 1)} to "
        f"{signed(points.high, 1)}) and {signed(nats.value)} of log-loss ({signed(nats.low)} to {signed(nats.high)})"
    )
    return Finding(layer.name, "knock-out", None, detail, costs)


def permuted_experts(layer: RecordedLayer, pairs: Pairs, tests: int = 1) -> Finding:
    """Whether an expert's patches do better at another expert: Student's t over images, corrected for all pairs."""
    if not pairs:
        why = f"not measured (no expert meets another on {_FEWEST} images: give more, --limit)"
        return Finding(layer.name, "permuted experts", None, why)
    better = {}
    for pair, gained in pairs.items():
        error = max(gained.std(ddof=1) / len(gained) ** 0.5, 1e-12)
        chance = stdtr(len(gained) - 1, gained.mean() / error)
        if chance * len(pairs) * tests < _CHANCE:
            better[pair] = gained.mean()
    detail = f"patches do clearly better at the other expert in {len(better)} of {len(pairs)} pairs"
    if better:
        nats, (expert, other) = min((nats, pair) for pair, nats in better.items())
        detail += f"; most those of E{expert} at E{other}, {signed(nats)} of log-loss"
    return Finding(layer.name, "permuted experts", bool(better), detail)

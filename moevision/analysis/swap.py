"""The swap test: do the experts of a layer do different things? Answered by forward passes with other routes.

Changes of the routes of one layer, and what images lose by them in log-loss (nats) and accuracy (points):

- `without`: no routed expert computes anything; the residual stays. What the layer contributes, and so what can show;
- `favourite`: a class's favourite expert changes places with any other expert. The favourite is the one that the class
  chooses first most often, found on the half of the images on which the swap is not measured;
- `any_two`: any two experts other than the favourite change places. Both are thinned to as many tokens of each class,
  since a favourite has more tokens than others; `whole` is the favourite's exchange before that;
- `routes`: every patch goes where the patch at the same place of another image goes;
- `knock_out`: one expert computes nothing. What that costs a class per choice that is taken away is a matrix [C, E].

All changes are coherent: in one image all moved tokens of an expert go to the same other one, since scattered errors
average out. Gates stay with the rank. Which other experts take part is drawn for each image, as images don't meet.

Sources: Shallice, From Neuropsychology to Mental Structure (1988), ch. 10 (double dissociation); Chung and Romano,
Annals of Statistics 41 (2013) 484-507 (studentised permutations, exact in large samples where groups differ in spread).

Axes: I images, P patches, K choices best first, E experts, C classes, R images that are run, V variants of their
routes, G groups of images: a class in a half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from scipy.special import log_softmax

from moevision.analysis.information import Flags, Floats, Ints, Json, Numbers, halves_by_class
from moevision.analysis.readings import (
    Interval,
    Recording,
    Run,
    counts_of,
    load_of,
    paired_interval,
    ratio_interval,
)


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
class KnockOut(Numbers):
    """What taking each expert away costs the images of each class, per choice that is taken away."""

    log_loss: Floats  # [C, E] nats; NaN where the class never chose the expert
    points: Floats  # [C, E] percentage points
    removed: Ints  # [C, E] choices that were taken away
    # nats per choice that a class loses without its favourite: mean over pairs of classes with two favourites
    own: float
    others: float  # nats per choice that the other class of the pair loses without it; both are NaN without such a pair
    p_value: float  # of `own` above `others`, by permuting the images of a half between its classes


@dataclass(frozen=True)
class Swap(Numbers):
    """What changes of the routes of one layer cost; see the head of this module."""

    without: Cost  # the layer left out
    routes: Cost  # those of other images
    whole: Cost  # a class's favourite changes places with another expert, all their tokens
    # the same with as many tokens as in `any_two`; None where there are no two other experts to exchange
    favourite: Cost | None
    any_two: Cost | None  # two other experts change places
    more: Cost | None  # `favourite` minus `any_two`, image by image
    knock_out: KnockOut  # one expert away
    n_images: int  # images that were run
    favourites: Sequence[tuple[str, int, int]]  # class, its favourite expert in either half of the images

    def to_json(self) -> Json:
        """As JSON primitives; `points`, `log_loss` and `moved` are those of `whole`."""
        found = super().to_json()
        return {**found.pop("whole"), **found}


def swap_test(
    recording: Recording, place: int, *, draws: int = 2, limit: int = 2000, permutations: int = 200, seed: int = 0
) -> Swap | None:
    """Change the routes of one layer and measure what that costs.

    Args:
        recording: with `run`.
        place: of the layer.
        draws: exchanges per image, each with experts drawn anew.
        limit: images at most, as many of each class; of more classes than that, one image of as many.
        permutations: of the knock-outs' p-value.
        seed: of everything drawn.

    Returns:
        None where no exchange moves a token: patches choose all experts.
    """
    layer = recording.layers[place]
    labels, choices = np.asarray(recording.labels), np.asarray(layer.choices)
    halves = halves_by_class(labels, seed)
    first = counts_of(choices, layer.amounts, layer.num_experts, "first")
    favourite = np.stack(  # [2, C] found in the other half
        [_favourites(first[halves != half], labels[halves != half], len(recording.class_names)) for half in (0, 1)]
    )
    classes = np.flatnonzero((favourite >= 0).all(0))
    rng = np.random.default_rng(seed)
    if len(classes) > limit:
        classes = np.sort(rng.permutation(classes)[:limit])
    if not len(classes):
        return None
    each = limit // len(classes)
    images = np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:each] for c in classes])
    own, target, half = choices[images], labels[images], halves[images].astype(int)
    liked = favourite[half, target]  # [R]

    exchanged, thinned = [], []
    for _ in range(draws):
        others = _others(liked, layer.num_experts, rng)  # [R, E - 1]
        moves = _Exchange.of(own, liked, others[:, 0])
        exchanged.append(moves.routes(own))
        if layer.num_experts > 2:
            others = _others(liked, layer.num_experts, rng)
            two = _Exchange.of(own, others[:, 0], others[:, 1])
            thinned.append([every.routes(own) for every in _as_many(moves, two, target, rng)])
    if not any((routes != own).any() for routes in exchanged):
        return None
    wrong = np.roll(np.arange(len(own)), 1) if len(own) > 1 else np.zeros(1, int)
    order = rng.permutation(len(own))
    other_image = np.empty(len(own), int)
    other_image[order] = order[wrong]
    knocked = [np.where(own == expert, ~own, own) for expert in range(layer.num_experts)]
    variants = [~own, own[other_image], *knocked, *exchanged, *(routes for pair in thinned for routes in pair)]
    loss, right = _run(cast(Run, recording.run), place, images, own, target, variants)  # [V, R] each: lost by each
    moved = np.array([(routes != own).mean() for routes in variants])
    start = 2 + layer.num_experts

    def cost(rows: slice, minus: slice | None = None) -> Cost:
        """Of the mean of some variants, minus that of others."""
        away = [0 if minus is None else x[minus].mean(0) for x in (right, loss, moved)]
        points, nats = right[rows].mean(0) - away[0], loss[rows].mean(0) - away[1]
        return Cost(
            Interval(*(100 * x for x in paired_interval(np.clip(points, -1, 1)))),
            ratio_interval(nats, np.ones(len(nats))),
            float(moved[rows].mean() - away[2]),
        )

    whole, favourites, twos = (
        slice(start, start + draws),
        slice(start + draws, None, 2),
        slice(start + draws + 1, None, 2),
    )
    compared = any((routes != own).any() for pair in thinned for routes in pair)
    names = recording.class_names
    removed = (own[..., None] == np.arange(layer.num_experts)).sum((1, 2))  # [R, E]
    return Swap(
        without=cost(slice(0, 1)),
        routes=cost(slice(1, 2)),
        whole=cost(whole),
        favourite=cost(favourites) if compared else None,
        any_two=cost(twos) if compared else None,
        more=cost(favourites, twos) if compared else None,
        knock_out=_knock_out(
            loss[2:start].T, 100 * right[2:start].T, removed, target, half, favourite, rng, permutations
        ),
        n_images=len(images),
        favourites=[(names[int(c)], int(favourite[0, c]), int(favourite[1, c])) for c in classes],
    )


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
    others: Ints = order.argsort(1)[:, :-1]
    return others


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
        return np.where(self.moves[..., None], np.where(own == a, b, np.where(own == b, a, own)), own)

    def thinned(self, images: Flags, count: int, rng: np.random.Generator) -> _Exchange:
        """With only `count` of the tokens of some images [R]."""
        moves = self.moves.copy()
        drawn = rng.permutation(np.flatnonzero(moves & images[:, None]))[count:]
        moves.reshape(-1)[drawn] = False
        return _Exchange(self.a, self.b, moves)


def _as_many(one: _Exchange, two: _Exchange, target: Ints, rng: np.random.Generator) -> tuple[_Exchange, _Exchange]:
    """Both exchanges with as many tokens of each class."""
    for label in np.unique(target):
        images = target == label
        count = min(int(each.moves[images].sum()) for each in (one, two))
        one, two = one.thinned(images, count, rng), two.thinned(images, count, rng)
    return one, two


def _run(
    run: Run, place: int, images: Ints, own: Ints, target: Ints, variants: Sequence[Ints]
) -> tuple[Floats, Floats]:
    """Log-loss gained and correctness lost [V, R] by other routes; what isn't changed isn't run."""
    routes = np.stack([own, *variants], 1)  # [R, 1 + V, P, K]
    changed = (routes != own[:, None]).any((2, 3))
    changed[:, 0] = True
    row, variant = changed.nonzero()
    log_p = log_softmax(np.asarray(run(place, images[row], routes[row, variant]), np.float64), axis=1)
    values = np.stack([-log_p[np.arange(len(row)), target[row]], -(log_p.argmax(1) == target[row]).astype(float)])
    lost = np.zeros((2, *changed.shape))
    lost[:, row, variant] = values - values[:, variant == 0][:, row]
    loss, right = lost[:, :, 1:].swapaxes(1, 2)
    return loss, right


def _knock_out(
    loss: Floats, points: Floats, removed: Ints, target: Ints, half: Ints, favourite: Ints, rng: np.random.Generator,
    permutations: int,
) -> KnockOut:  # fmt: skip
    """From what each image [R] loses without each expert [R, E], and its choices that this takes away."""
    num_classes = favourite.shape[1]
    counts = _sums(removed, target, num_classes)
    with np.errstate(invalid="ignore", divide="ignore"):
        by_loss, by_points = (_sums(each, target, num_classes) / counts for each in (loss, points))
    own, others, t = _dissociation(loss, removed, target, half, favourite)
    p_value = np.nan
    if np.isfinite(t):
        shuffled = target.copy()
        above = 0
        for _ in range(permutations):
            for side in (0, 1):
                shuffled[half == side] = rng.permutation(target[half == side])
            above += not _dissociation(loss, removed, shuffled, half, favourite)[2] < t
        p_value = (1 + above) / (1 + permutations)
    return KnockOut(by_loss, by_points, counts.astype(int), own, others, p_value)


def _dissociation(loss: Floats, removed: Ints, target: Ints, half: Ints, favourite: Ints) -> tuple[float, float, float]:
    """Loss per removed choice of classes without their own and without each other's favourite, and Student's t.

    Over all pairs of classes of a half whose favourites differ, both ways round, so that neither a class that is easily
    hurt nor an expert that matters to all makes a difference.

    Returns:
        The means of both, and their difference over its standard error; NaN where there is no pair.
    """
    num_classes = favourite.shape[1]
    group = half * num_classes + target
    totals, counts = (_sums(each, group, 2 * num_classes) for each in (loss, removed))  # [G, E]
    with np.errstate(invalid="ignore", divide="ignore"):
        table = totals / counts
    liked, side = favourite.reshape(-1), np.repeat([0, 1], num_classes)
    cross = table[:, liked]  # [G, G] what group g loses without the favourite of group h
    known = np.isfinite(cross)
    own_known = known.diagonal()
    pairs = (
        (side[:, None] == side) & (liked[:, None] != liked) & (liked >= 0) & (liked >= 0)[:, None]
        & known & known.T & own_known & own_known[:, None]
    )  # fmt: skip
    if not pairs.any():
        return np.nan, np.nan, np.nan
    number = pairs.sum()
    own = float(cross.diagonal()[pairs.any(0)] @ pairs.sum(0)[pairs.any(0)] / number)
    others = float(cross[pairs].mean())
    weight = np.zeros_like(table)  # of each mean of a group in own - others
    np.add.at(weight, (np.arange(len(liked)), liked), pairs.sum(0) / number)
    h, g = pairs.nonzero()
    np.add.at(weight, (h, liked[g]), -1 / number)
    used = weight != 0
    scaled = np.divide(weight, counts, out=np.zeros_like(weight), where=used)
    mean = np.where(used, table, 0)
    deviation = ((loss - mean[group] * removed) * scaled[group]).sum(1)  # linearised, as for any ratio
    error = np.sqrt(np.square(deviation).sum())
    return own, others, (own - others) / error if error > 0 else np.nan


def _sums(values: Floats | Ints, group: Ints, number: int) -> Floats:
    """[number, E] sums of values [R, E] by group."""
    sums = np.zeros((number, values.shape[1]))
    np.add.at(sums, group, values)
    return sums

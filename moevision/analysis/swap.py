"""The swap test: what it costs to send the patches of a class through the expert of another class.

Axes: I images, P patches, K choices best first, E experts, C classes, R images that are run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from moevision.analysis.readings import Interval, counts_of, load_of, paired_interval
from moevision.analysis.recording import Flags, Floats, Ints, Recording, Run

Json = dict[str, Any]


@dataclass(frozen=True)
class Swap:
    """What it costs to send the patches of classes through each other's experts.

    Attributes:
        points: accuracy lost, in percentage points.
        random: the same by random swaps of as many choices of the same images; None where patches had no other expert
            to go to, since they had chosen all that are used.
        more: the first minus the second, image by image; None with `random`.
        moved: share of the choices of those images that changed.
        n_images: images that were run.
        pairs: class, its expert, the other class, that one's expert; by name and number.
    """

    points: Interval
    random: Interval | None
    more: Interval | None
    moved: float
    n_images: int
    pairs: Sequence[tuple[str, int, str, int]]

    def to_json(self) -> Json:
        """As JSON primitives."""
        found = {"points": self.points, "random": self.random, "more": self.more}
        intervals = {name: each and each._asdict() for name, each in found.items()}
        return {**intervals, "moved": self.moved, "n_images": self.n_images, "pairs": [list(p) for p in self.pairs]}


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
        limit: images at most, as many of each class; of more classes than that, one image of as many.
        seed: of images and swaps.

    Returns:
        None where all classes use all experts alike.
    """
    run, layer = cast(Run, recording.run), recording.layers[place]
    labels, choices = np.asarray(recording.labels), np.asarray(layer.choices)
    first = load_of(counts_of(choices, layer.amounts, layer.num_experts, "first"), labels, len(recording.class_names))
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
    if len(partner) > limit:
        partner = {int(c): partner[int(c)] for c in np.sort(rng.permutation(list(partner))[:limit])}
    each = limit // len(partner)
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
    drawn = [_random_swap(own, moved, log_load, rng) for _ in range(draws)]
    random = more = None
    if all(((experts != own).sum((1, 2)) == moved.sum((1, 2))).all() for experts in drawn):
        lost = np.mean([before - right(experts) for experts in drawn], axis=0)
        random, more = _points(paired_interval(lost)), _points(paired_interval(np.clip(loss - lost, -1, 1)))
    names = recording.class_names
    return Swap(
        _points(paired_interval(loss)),
        random,
        more,
        float(moved.mean()),
        len(images),
        [(names[c], expert[c], names[d], expert[d]) for c, d in partner.items()],
    )


def _random_swap(own: Ints, moved: Flags, log_load: Floats, rng: np.random.Generator) -> Ints:
    """As many choices of every image changed as `moved` says, each to another expert drawn by the loads.

    A choice stays where its patch has chosen every expert that is used.
    """
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


def _points(interval: Interval) -> Interval:
    return Interval(*(100 * value for value in interval))

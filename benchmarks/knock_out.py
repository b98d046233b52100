"""One expert of a layer computes nothing: what that costs the images of each class, per choice that is taken away.

Beside the swap test of `moevision analyze`, for studies. `log_loss` (nats) and `points` of accuracy are [C, E], None
where a class never chose the expert; `removed` are the choices taken away. `own` is what a class loses without its
favourite expert, `others` what the other class of a pair loses without it, and `p_value` that of `own` above `others`,
by permuting the images of a half between its classes.

Sources: Shallice, From Neuropsychology to Mental Structure (1988), ch. 10 (double dissociation); Chung and Romano,
Annals of Statistics 41 (2013) 484-507 (studentised permutations, exact in large samples where groups differ in spread).

Axes: P patches, K choices best first, E experts, C classes, R images that are run, G groups: a class in a half.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moevision.analysis.information import Floats, Ints
from moevision.analysis.questions import images_to_run, lost_by
from moevision.analysis.readings import Recording

Json = dict[str, Any]


def knock_out(recording: Recording, place: int, *, limit: int = 2000, permutations: int = 200, seed: int = 0) -> Json:
    """The costs of one layer, of at most `limit` images, as many of each class."""
    number = recording.layers[place].num_experts
    images, own, target, half, favourite, rng = images_to_run(recording, place, limit, seed)
    knocked = [np.where(own == expert, ~own, own) for expert in range(number)]
    loss, right = lost_by(recording, place, images, own, target, knocked)  # [E, R]
    removed = (own[..., None] == np.arange(number)).sum((1, 2))  # [R, E]
    return _knock_out(loss.T, 100 * right.T, removed, target, half, favourite, rng, permutations)


def _knock_out(
    loss: Floats, points: Floats, removed: Ints, target: Ints, half: Ints, favourite: Ints, rng: np.random.Generator,
    permutations: int,
) -> Json:  # fmt: skip
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
    found = {"log_loss": by_loss, "points": by_points, "removed": counts.astype(int)}
    shown = {
        name: [[None if np.isnan(one) else one for one in row] for row in table.tolist()]
        for name, table in found.items()
    }
    each = {"own": own, "others": others, "p_value": float(p_value)}
    return shown | {name: None if np.isnan(value) else value for name, value in each.items()}


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

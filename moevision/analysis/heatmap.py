"""Which classes use which expert, and which cells of that table are more than the noise of the picture sample.

Labels are permuted over images, since patches of one image are not independent. A table of C x E cells invites one to
look at its largest cell, so a cell counts only if it is further from the mean than the *largest* cell of 95 % of the
permuted tables (the max-statistic: Westfall and Young 1993; Nichols and Holmes, Hum. Brain Mapp. 15, 2002, 1-25). The
chance that a table without any pattern shows a single coloured cell is then 5 %.

Axes: I images, C classes, E experts, R permutations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moevision.analysis.trace import RoutingTrace
from moevision.errors import UserError

Floats = npt.NDArray[np.float64]
_PERMUTATIONS = 1000
_CHUNK_CELLS = 1 << 22


@dataclass(frozen=True)
class ClassExpertMap:
    """Shares of one layer's experts in the choices of each class.

    Attributes:
        layer: block index.
        class_names: [C] rows of the table.
        n_images: [C] images of each class.
        share: [C, E] expert e's share of the kept choices in an image (of the weights, where tokens don't choose),
            averaged over the images of class c; nan for a class without images.
        mean_share: [E] the same, averaged over all images.
        excess: [C, E] `share` minus `mean_share`.
        threshold: how large an excess the largest cell of a table reaches by chance (`level` of the permuted tables).
        significant: [C, E] bool, cells whose excess is larger than that in absolute value.
        p_value: [C, E] corrected for the whole table.
        level: 1 minus the family-wise error.
    """

    layer: int
    class_names: tuple[str, ...]
    n_images: npt.NDArray[np.int64]
    share: Floats
    mean_share: Floats
    excess: Floats
    threshold: float
    significant: npt.NDArray[np.bool_]
    p_value: Floats
    level: float = 0.95

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON primitives; null stands for a class without images."""
        return {
            "layer": self.layer,
            "name": f"L{self.layer}",
            "class_names": list(self.class_names),
            "n_images": self.n_images.tolist(),
            "share": _jsonable(self.share),
            "mean_share": self.mean_share.tolist(),
            "excess": _jsonable(self.excess),
            "threshold": self.threshold,
            "significant": self.significant.tolist(),
            "p_value": _jsonable(self.p_value),
            "level": self.level,
        }


def class_expert_map(
    trace: RoutingTrace, layer: int, *, num_permutations: int | None = None, seed: int = 0, level: float = 0.95
) -> ClassExpertMap:
    """The class x expert table of one layer with its max-statistic threshold.

    Args:
        trace: the routing.
        layer: block index of the MoE layer.
        num_permutations: R; 1000 if None.
        seed: of the permutations.
        level: 1 minus the chance of any false cell in the table.

    Raises:
        UserError: that block has no MoE layer, or there are fewer than two labelled images.
    """
    shares = image_shares(trace.layer(layer).image_takes())
    labels = np.asarray(trace.labels)
    known = labels >= 0
    if known.sum() < 2:
        raise UserError(
            "A map of classes and experts needs at least two pictures with a known class: give more pictures."
        )
    shares, labels, num_classes = shares[known], labels[known], len(trace.class_names)
    overall = shares.mean(0)
    n_images = np.bincount(labels, minlength=num_classes)
    largest = _largest_of_permuted(shares - overall, labels, n_images, num_permutations or _PERMUTATIONS, seed)
    with np.errstate(invalid="ignore"):  # 0 / 0: a class without images has no share
        share = _class_sums(shares, labels[None], num_classes)[0] / n_images[:, None]
    excess = share - overall
    threshold = float(np.quantile(largest, level, method="higher"))
    above = (largest >= np.abs(np.nan_to_num(excess))[..., None] - 1e-12).sum(-1)
    p_value = np.where(np.isnan(excess), np.nan, (1 + above) / (1 + len(largest)))
    significant = np.abs(np.nan_to_num(excess)) > threshold + 1e-12
    return ClassExpertMap(
        layer, tuple(trace.class_names), n_images, share, overall, excess, threshold, significant, p_value, level
    )


def image_shares(takes: npt.NDArray[Any]) -> Floats:
    """[I, E] each expert's share of what an image takes (`LayerTrace.image_takes`); equal shares where that is 0."""
    total = takes.sum(1, keepdims=True)
    shares: Floats = np.where(total > 0, takes / np.where(total > 0, total, 1), 1 / takes.shape[1])
    return shares


def _class_sums(shares: Floats, labels: npt.NDArray[np.int64], num_classes: int) -> Floats:
    """Sums [R, C, E] of shares [I, E] over the images of each class, for labellings [R, I]."""
    one_hot = (labels[:, None, :] == np.arange(num_classes)[:, None]).astype(np.float64)
    sums: Floats = np.asarray(one_hot.reshape(-1, len(shares)) @ shares).reshape(len(labels), num_classes, -1)
    return sums


def _largest_of_permuted(
    centred: Floats, labels: npt.NDArray[np.int64], n_images: npt.NDArray[np.int64], num_permutations: int, seed: int
) -> Floats:
    """[R] the largest absolute excess in each permuted table."""
    rng, present = np.random.default_rng(seed), n_images > 0
    chunk = max(1, _CHUNK_CELLS // (len(n_images) * len(labels)))
    largest = []
    for start in range(0, num_permutations, chunk):
        size = min(chunk, num_permutations - start)
        permuted = rng.permuted(np.tile(labels, (size, 1)), axis=1)
        tables = _class_sums(centred, permuted, len(n_images))[:, present] / n_images[present, None]
        largest.append(np.abs(tables).max((1, 2)))
    return np.concatenate(largest)


def _jsonable(values: Floats) -> list[Any]:
    return [[None if np.isnan(value) else float(value) for value in row] for row in values]

"""Which classes use which experts: the class x expert table of a layer, and two classes against each other.

Both rest on shares per *image*, since patches of one image are not independent.

`class_expert_map`: labels are permuted over images. A table of C x E cells invites one to look at its largest cell, so
a cell counts only if it is further from the mean than the *largest* cell of 95 % of the permuted tables (the
max-statistic: Westfall and Young 1993; Nichols and Holmes, Hum. Brain Mapp. 15, 2002, 1-25). The chance that a table
without any pattern shows a single coloured cell is then 5 %.

`compare_classes`: intervals come from resampling the images of each class (percentile bootstrap, which is sound for a
difference of means), p-values from permuting the two labels over the images, and over all layers and experts the false
discovery rate is held (Benjamini and Hochberg 1995).

Axes: I images, C classes, L MoE layers, E experts, R resamples or permutations.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moevision.analysis.trace import RoutingTrace
from moevision.errors import UserError

Floats = npt.NDArray[np.float64]

MIN_IMAGES = 20
"""Fewer images a side make intervals that are not to be trusted."""

_PERMUTATIONS = 1000
_ENDS = ((1 - 0.95) / 2, (1 + 0.95) / 2)  # quantiles of a 95 % interval
_LEVEL = 0.95  # of a map: 1 minus the chance of any false cell
_RATE = 0.05  # of false discoveries, over all experts of a comparison
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
    level: float = _LEVEL

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
    trace: RoutingTrace, layer: int, *, num_permutations: int | None = None, seed: int = 0
) -> ClassExpertMap:
    """The class x expert table of one layer with its max-statistic threshold.

    Args:
        trace: the routing.
        layer: block index of the MoE layer.
        num_permutations: R; 1000 if None.
        seed: of the permutations.

    Raises:
        UserError: that block has no MoE layer, or there are fewer than two labelled images.
    """
    shares = image_shares(trace.layer(layer).image_takes())
    labels = np.asarray(trace.labels)
    known = labels >= 0
    if known.sum() < 2:
        raise UserError("A map of classes and experts needs at least two images with a known class: give more images.")
    shares, labels, num_classes = shares[known], labels[known], len(trace.class_names)
    overall = shares.mean(0)
    n_images = np.bincount(labels, minlength=num_classes)
    largest = _largest_of_permuted(shares - overall, labels, n_images, num_permutations or _PERMUTATIONS, seed)
    with np.errstate(invalid="ignore"):  # 0 / 0: a class without images has no share
        share = _class_sums(shares, labels[None], num_classes)[0] / n_images[:, None]
    excess = share - overall
    threshold = float(np.quantile(largest, _LEVEL, method="higher"))
    above = (largest >= np.abs(np.nan_to_num(excess))[..., None] - 1e-12).sum(-1)
    p_value = np.where(np.isnan(excess), np.nan, (1 + above) / (1 + len(largest)))
    significant = np.abs(np.nan_to_num(excess)) > threshold + 1e-12
    return ClassExpertMap(
        layer, tuple(trace.class_names), n_images, share, overall, excess, threshold, significant, p_value
    )


def image_shares(takes: npt.NDArray[Any]) -> Floats:
    """[I, E] each expert's share of what an image takes (`LayerTrace.image_takes`); equal shares where that is 0."""
    total = takes.sum(1, keepdims=True)
    shares: Floats = np.where(total > 0, takes / np.where(total > 0, total, 1), 1 / takes.shape[1])
    return shares


def _class_sums(shares: Floats, labels: npt.NDArray[np.int64], num_classes: int) -> Floats:
    """Sums [R, C, E] of shares [I, E] over the images of each class, for labellings [R, I]."""
    one_hot = (labels[:, None, :] == np.arange(num_classes)[:, None]).astype(np.float64)  # [R, C, I]
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


@dataclass(frozen=True)
class ExpertDifference:
    """One expert's share in class a minus its share in class b.

    Attributes:
        expert: index of the expert.
        difference: of mean shares of the kept choices (weights, where tokens don't choose), between -1 and 1.
        low: lower end of the 95 % interval.
        high: upper end.
        p_value: of "both classes use it alike", two-sided.
        q: the p-value corrected for all layers and experts (false discovery rate).
        significant: whether q is at most 0.05.
    """

    expert: int
    difference: float
    low: float
    high: float
    p_value: float
    q: float
    significant: bool


@dataclass(frozen=True)
class LayerDifference:
    """The differences of one layer's experts."""

    layer: int
    experts: tuple[ExpertDifference, ...]

    @property
    def name(self) -> str:
        """The layer as it is shown, such as "L4"."""
        return f"L{self.layer}"


@dataclass(frozen=True)
class ClassComparison:
    """Two classes side by side.

    Attributes:
        class_a: name of the first class.
        class_b: name of the second.
        n_a: images of class a.
        n_b: images of class b.
        layers: in order of depth.
        sentence: the result in words.
    """

    class_a: str
    class_b: str
    n_a: int
    n_b: int
    layers: tuple[LayerDifference, ...]
    sentence: str

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON primitives."""
        layers = [
            {"name": layer.name, **asdict(layer), "experts": [asdict(e) for e in layer.experts]}
            for layer in self.layers
        ]
        return {**asdict(self), "layers": layers}


def compare_classes(
    trace: RoutingTrace,
    a: str | int,
    b: str | int,
    *,
    num_resamples: int = 2000,
    seed: int = 0,
) -> ClassComparison:
    """Differences of expert use between two classes, in all layers.

    Args:
        trace: the routing.
        a: a class, by name or label.
        b: another one.
        num_resamples: R, of the bootstrap and of the permutations.
        seed: of both.

    Raises:
        UserError: there is no such class, the two are one, or a side has fewer than 20 images.
    """
    (name_a, label_a), (name_b, label_b) = _class(trace, a), _class(trace, b)
    if label_a == label_b:
        raise UserError("Choose two different classes to compare.")
    side_a, side_b = (np.flatnonzero(np.asarray(trace.labels) == label) for label in (label_a, label_b))
    for name, side in ((name_a, side_a), (name_b, side_b)):
        if len(side) < MIN_IMAGES:
            raise UserError(
                f"A comparison needs at least {MIN_IMAGES} images of each class, and there are {len(side)} of "
                f"{name}: give more images."
            )
    shares = np.concatenate([image_shares(layer.image_takes()) for layer in trace.layers], axis=1)  # [I, sum of E]
    x, y = shares[side_a], shares[side_b]  # [images of a or b, sum of E]
    rng = np.random.default_rng(seed)
    difference = x.mean(0) - y.mean(0)
    resampled = _bootstrap_means(x, num_resamples, rng) - _bootstrap_means(y, num_resamples, rng)
    low, high = np.quantile(resampled, _ENDS, axis=0)
    p_value = _permutation_p(x, y, num_resamples, rng)
    from scipy.stats import false_discovery_control

    q = false_discovery_control(p_value)
    numbers = np.stack([difference, low, high, p_value, q], axis=-1).tolist()  # [sum of E, 5]
    layers, first = [], 0
    for layer in trace.layers:
        experts = tuple(
            ExpertDifference(expert, change, least, most, p, corrected, corrected <= _RATE)
            for expert, (change, least, most, p, corrected) in enumerate(numbers[first : first + layer.num_experts])
        )
        first += layer.num_experts
        layers.append(LayerDifference(layer.layer, experts))
    sentence = _sentence(name_a, name_b, layers, len(x), len(y))
    return ClassComparison(name_a, name_b, len(x), len(y), tuple(layers), sentence)


def _class(trace: RoutingTrace, which: str | int) -> tuple[str, int]:
    names = trace.class_names
    if isinstance(which, str) and which in names:
        return which, names.index(which)
    if not isinstance(which, str) and 0 <= which < len(names):
        return names[which], int(which)
    raise UserError(f"There is no class {which!r}: choose two of {', '.join(names)}.")


def _bootstrap_means(shares: Floats, num_resamples: int, rng: np.random.Generator) -> Floats:
    """[R, cells] means of images drawn with replacement."""
    n = len(shares)
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=num_resamples)  # [R, I] how often each image is drawn
    means: Floats = drawn @ shares / n
    return means


def _permutation_p(x: Floats, y: Floats, num_permutations: int, rng: np.random.Generator) -> Floats:
    """Two-sided p-value of each cell [cells], the two labels permuted over images."""
    both = np.concatenate([x, y])
    weight = np.concatenate([np.full(len(x), 1 / len(x)), np.full(len(y), -1 / len(y))])
    permuted = np.abs(rng.permuted(np.tile(weight, (num_permutations, 1)), axis=1) @ both)
    # Differences below the rounding of a sum are ties.
    as_large = (permuted >= np.abs(weight @ both) - 1e-12).sum(0)
    result: Floats = (1 + as_large) / (1 + num_permutations)
    return result


def _sentence(a: str, b: str, layers: list[LayerDifference], n_a: int, n_b: int) -> str:
    found = [(layer.name, e) for layer in layers for e in layer.experts if e.significant]
    pictures = f"({n_a:,} and {n_b:,} images)"
    total = sum(len(layer.experts) for layer in layers)
    if not found:
        return (
            f"No expert is used differently by {a} and {b} as far as these images can tell {pictures}: a router need "
            "not tell classes apart for the model to do so."
        )
    name, most = max(found, key=lambda pair: abs(pair[1].difference))
    more, less = (a, b) if most.difference > 0 else (b, a)
    size, ends = abs(most.difference), sorted(abs(end) for end in (most.low, most.high))
    return (
        f"{len(found)} of {total} experts are used differently by {a} and {b} {pictures}; the largest difference is "
        f"{name}·E{most.expert}, which takes {100 * size:.1f} percentage points more of {more} than of {less} "
        f"({100 * ends[0]:.1f} to {100 * ends[1]:.1f})."
    )

"""Do the pictures of two classes use different experts?

Every number is a difference of mean shares over *images*. Intervals come from resampling the images of each class
(percentile bootstrap, which is sound for a difference of means), p-values from permuting the two labels over the
images, and with all layers and experts on show the false discovery rate is held (Benjamini and Hochberg 1995). Where
nothing stands out the sentence says so.

Axes: I images, L MoE layers, E experts, R resamples.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moevision.analysis.heatmap import image_shares
from moevision.analysis.trace import RoutingTrace
from moevision.errors import UserError

Floats = npt.NDArray[np.float64]
MIN_IMAGES = 20
"""Fewer images a side make intervals that are not to be trusted."""


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
        significant: whether q is at most the rate asked for.
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
    rate: float = 0.05,
    level: float = 0.95,
    seed: int = 0,
) -> ClassComparison:
    """Differences of expert use between two classes, in all layers.

    Args:
        trace: the routing.
        a: a class, by name or label.
        b: another one.
        num_resamples: R, of the bootstrap and of the permutations.
        rate: false discovery rate.
        level: of the intervals (each for itself).
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
                f"A comparison needs at least {MIN_IMAGES} pictures of each class, and there are {len(side)} of "
                f"{name}: give more pictures."
            )
    shares = np.concatenate([image_shares(layer.image_takes()) for layer in trace.layers], axis=1)  # [I, sum of E]
    x, y = shares[side_a], shares[side_b]
    rng = np.random.default_rng(seed)
    difference = x.mean(0) - y.mean(0)
    resampled = _bootstrap_means(x, num_resamples, rng) - _bootstrap_means(y, num_resamples, rng)
    low, high = np.quantile(resampled, ((1 - level) / 2, (1 + level) / 2), axis=0)
    p_value = _permutation_p(x, y, num_resamples, rng)
    from scipy.stats import false_discovery_control

    q = false_discovery_control(p_value)
    layers, first = [], 0
    for layer in trace.layers:
        cells = range(first, first + layer.num_experts)
        first += layer.num_experts
        experts = tuple(
            ExpertDifference(
                place,
                float(difference[c]),
                float(low[c]),
                float(high[c]),
                float(p_value[c]),
                float(q[c]),
                bool(q[c] <= rate),
            )
            for place, c in enumerate(cells)
        )
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
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=num_resamples)
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
    pictures = f"({n_a:,} and {n_b:,} pictures)"
    total = sum(len(layer.experts) for layer in layers)
    if not found:
        return (
            f"No expert is used differently by {a} and {b} as far as these pictures can tell {pictures}: a router need "
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

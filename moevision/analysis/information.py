"""Statistics over images: mutual information between experts and what a patch shows, and intervals of means.

This module has functions of arrays only, no models and no texts. `readings` applies them to recordings of layers, and
`questions` turns readings into answers.

Patches of one image are not independent: a test that permutes patches takes routing that merely differs from image to
image for "specialised by class". Here whole images are permuted:

- class: labels are permuted over images; each image keeps its routing map. The test is exact, since under the null
  hypothesis images are exchangeable.
- part: an image's routing map is paired with the part map of another image. What the position of a patch explains is
  thus part of the null.

The estimate is the excess: the plug-in estimate minus the mean of its null distribution (the null). Counts may be
weights: plug-in information depends on shares only, and null, bias and interval on whole images.

**The interval** of the true excess θ:

- For small effects plug-in mutual information is a quadratic form |x|² of Gaussian deviations x whose mean has length
  √θ. So its mean is θ + b and its variance v0 + κ θ; b and v0 are those of the null, where θ = 0.
- The delta method over images estimates the variance κ |x|², so that this divided by the plug-in estimates κ.
- The interval holds every θ whose score ``(estimate - θ)² / (v0 + κ θ)`` is at most z², the form of Wilson's interval
  of a proportion.

It doesn't become too short where the estimate happens to be small, and at θ = 0 it agrees with a test against the null.
A percentile bootstrap takes the noise of the image sample for signal (`benchmarks/analysis/coverage.py` measures them
all).

The null's mean overstates the bias under an effect: shuffled images differ by their classes too. The second-order delta
method gives the difference (`null_bias_surplus`), but in sparse tables it can't be trusted far, so one end of the
interval is taken with it and the other without. It matters for few images per class.

Sources: Wilson, JASA 22 (1927) 209-212; van der Vaart, Asymptotic Statistics (1998), chapters 3 and 20; Agresti and
Min, Statistics in Medicine 24 (2005) 729-740 (interval of a difference of paired proportions, which stays wide where no
image changes); Zou and Donner, Statistics in Medicine 27 (2008) 1693-1702 (interval of a difference of two estimates).

Axes: I images, P patches (row-major), K choices, E experts, V values of what the experts are asked about,
R permutations of the same images (R' in one chunk of them).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from statistics import NormalDist
from typing import Any, NamedTuple, cast

import numpy as np

from moevision.errors import UserError
from moevision.types import Array, Flags, Floats, Ints, Json

_CHUNK_NUMBERS = 1 << 22  # numbers per chunk of permuted labels or tables: 16 MiB of float32
CONFIDENCE_LEVEL = 0.95  # of all intervals
_BIAS_PERMUTATIONS = 32  # few are enough: the bias varies far less between them than the plug-in


def class_information(
    patch_counts: Floats | Ints, labels: Ints, *, num_permutations: int = 200, seed: int = 0
) -> Estimate:
    """I(expert; class) of counts [I, P, E] of kept choices (or weights), against labels [I] permuted over images.

    Images with a negative label are left out.
    """
    labelled = labels >= 0
    # Classes are numbered anew, so that those without an image cost nothing.
    _, classes = np.unique(labels[labelled], return_inverse=True)
    images_of_class = np.bincount(classes)  # [V] numbers of images
    num_classes = len(images_of_class)
    image_counts = _as_float_counts(patch_counts[labelled]).sum(1)  # [I, E]

    # The null: the plug-in for every permutation, and its bias for the first ones.
    null_bits: list[Floats] = []
    null_bias: list[float] = []
    # The largest array of `sums_by_class`: one-hot classes [V, I] or the table [V, E].
    numbers = num_classes * max(image_counts.shape)
    for permuted_classes in permuted_labels(classes, num_permutations, numbers, seed):
        tables = sums_by_class(permuted_classes, image_counts, num_classes)  # [R', V, E]
        null_bits.append(mutual_information_bits(tables))
        num_missing = _BIAS_PERMUTATIONS - len(null_bias)
        if num_missing > 0:
            null_bias.extend(
                _bias_of_labels(permuted_classes[:num_missing], image_counts, images_of_class)
            )

    (table,) = sums_by_class(classes[None], image_counts, num_classes)  # [V, E]
    plug_in = float(mutual_information_bits(table))
    bits_above_mean = pointwise_bits(table)[classes] - plug_in  # [I, E]
    bias = _bias_of_labels(classes[None], image_counts, images_of_class)
    return excess_estimate(
        plug_in,
        np.concatenate(null_bits),
        (image_counts * bits_above_mean).sum(1) / image_counts.sum(),
        null_bias_surplus=float(np.mean(null_bias) - bias[0]),
        num_means=num_classes,
    )


def sums_by_class(labels: Ints, values: Floats, num_classes: int) -> Floats:
    """Sums [R, V, E] of values [I, E] over the images of each class, for labellings [R, I]."""
    one_hot = labels[:, None, :] == np.arange(num_classes)[:, None]  # [R, V, I]
    flat = one_hot.reshape(-1, len(values)).astype(values.dtype)
    sums: Floats = flat @ values  # [R · V, E]
    return sums.reshape(len(labels), num_classes, -1)


def _bias_of_labels(labels: Ints, counts: Floats, images_of_class: Ints) -> Floats:
    """[R] bias of the plug-in of counts [I, E], for labellings [R, I]."""
    num_classes = len(images_of_class)
    sums = sums_by_class(labels, counts, num_classes)
    squares = sums_by_class(labels, np.square(counts), num_classes)
    return second_order_bias(sums, squares, images_of_class)


def part_information(
    patch_counts: Floats | Ints, parts: Ints, *, num_permutations: int = 200, seed: int = 0
) -> Estimate:
    """I(expert; part) of counts [I, P, E] and the parts [I, P], against maps paired with the parts of another image.

    Patches with a negative part are left out.
    """
    routing_maps = _as_float_counts(patch_counts)
    values = np.unique(parts[parts >= 0])
    if not len(values):
        raise UserError("No patch has a part: give images with part masks, such as synthetic_pets.")
    is_part = (parts[..., None] == values).astype(np.float32)  # [I, P, V]

    # The null: each routing map with the part map of another image.
    rng = np.random.default_rng(seed)
    null_bits = []
    for _ in range(num_permutations):
        order = rng.permutation(len(routing_maps))
        null_bits.append(mutual_information_bits(_part_table(is_part[order], routing_maps)))

    # The mean of the null is near the information of another table of the same images: that of the mean part map and
    # the mean routing map, averaged over images at each position. So it varies with the images too.
    table = _part_table(is_part, routing_maps)
    mean_map = routing_maps.mean(0)  # [P, E]
    mean_part = is_part.mean(0)  # [P, V]
    pointwise = pointwise_bits(table)  # [V, E]
    null_pointwise_bits = pointwise_bits(np.einsum("pv,pe->ve", mean_part, mean_map))  # [V, E]

    # Influence of each image on the plug-in minus the mean of the null, [I]. The derivative of mutual information by a
    # table's counts is its pointwise information, up to a constant, which `excess_estimate` removes by centring. The
    # null's table is mean_partᵀ · mean_map: by the product rule an image enters it twice.
    table_influence = np.einsum("ipv,ve,ipe->i", is_part, pointwise, routing_maps, optimize=True)
    null_influence = np.einsum(
        "ipv,ve,pe->i", is_part, null_pointwise_bits, mean_map, optimize=True
    )
    null_influence += np.einsum(
        "pv,ve,ipe->i", mean_part, null_pointwise_bits, routing_maps, optimize=True
    )
    return excess_estimate(
        float(mutual_information_bits(table)),
        np.array(null_bits),
        (table_influence - null_influence) / table.sum(),
        null_keeps_effect=True,
    )


def _part_table(is_part: Floats, maps: Floats) -> Floats:
    """[V, E] from one-hot parts [I, P, V] and routing maps [I, P, E]."""
    return is_part.reshape(-1, is_part.shape[-1]).T @ maps.reshape(-1, maps.shape[-1])


def _as_float_counts(patch_counts: Array) -> Floats:
    """The counts as float32 [I, P, E], which sums integers exactly up to 2 ** 24; a UserError for too few images."""
    if patch_counts.ndim != 3 or len(patch_counts) < 2:
        raise UserError(
            "Statistics over images need at least two images with a known class: give more images."
        )
    return np.ascontiguousarray(patch_counts, dtype=np.float32)


def halves_by_class(labels: Ints, seed: int) -> Flags:
    """Boolean mask [I] of a random half of the images, which has half of every class and of the unlabelled (negative).

    Of classes of odd size it has alternately the larger and the smaller part.
    """
    rng = np.random.default_rng(seed)
    in_half = np.zeros(len(labels), bool)
    offset = 0
    for label in np.unique(labels):
        images = rng.permutation(np.flatnonzero(labels == label))
        in_half[images[offset::2]] = True
        offset = (offset + len(images)) % 2
    return in_half


def permuted_labels(labels: Ints, count: int, numbers_per_order: int, seed: int) -> Iterator[Ints]:
    """`count` random orders of labels [I], in chunks [R', I].

    `numbers_per_order` is how many numbers the caller keeps at once for one order; it determines R'.
    """
    rng = np.random.default_rng(seed)
    chunk_size = max(1, _CHUNK_NUMBERS // numbers_per_order)
    for start in range(0, count, chunk_size):
        rows = min(chunk_size, count - start)
        yield rng.permuted(np.tile(labels, (rows, 1)), axis=1)


def choice_counts(expert_index: Ints, num_experts: int, amount: Array | None = None) -> Floats:
    """[I, P, E] float32: how many of the choices [I, P, K] of each patch fall on each expert.

    A choice counts as its `amount` [I, P, K]: whether it was kept, or a weight. None: 1 each.
    """
    counts = np.zeros((*expert_index.shape[:2], num_experts), np.float32)
    for rank in range(expert_index.shape[2]):
        added = expert_index[:, :, rank, None] == np.arange(num_experts)  # [I, P, E]
        if amount is not None:
            added = added * amount[:, :, rank, None]
        counts += added
    return counts


def mutual_information_bits(table: Floats | Ints) -> Floats:
    """Plug-in mutual information of contingency tables [..., V, E], in bits; [...]; 0 for an empty table.

    ``(sum(n log n) - sum(r log r) - sum(c log c) + N log N) / N`` for cells n, row sums r, column sums c, total N.
    """
    table = np.asarray(table, dtype=np.float64)
    total = table.sum((-2, -1))
    cells = _n_log2_n(table).sum((-2, -1))
    rows = _n_log2_n(table.sum(-1)).sum(-1)
    columns = _n_log2_n(table.sum(-2)).sum(-1)
    bits = cells + _n_log2_n(total) - (rows + columns)
    return np.maximum(_ratio(bits, total), 0.0)


def entropy_bits(counts: Floats | Ints) -> float:
    """Entropy of a distribution given by counts [V], in bits."""
    counts = np.asarray(counts, dtype=np.float64)
    total = counts.sum()
    return float(_ratio(_n_log2_n(total) - _n_log2_n(counts).sum(), total))


def second_order_bias(sums: Floats, squares: Floats, images_of_class: Ints) -> Floats:
    """Bias of the plug-in, in bits, by the second-order delta method over images; [R].

    It is ``sum(variance / sum) / (2 N ln 2)`` over the cells, minus the same over the experts' columns (a column's
    variance is the sum of its cells'); N is the sum of all cells. In sparse tables it is itself biased, so only
    differences between labellings of the same images are used.

    Args:
        sums: [R, V, E] sums, over the images of each class, of an image's choices.
        squares: [R, V, E] sums of the squares of the same.
        images_of_class: [V] number of images of each class.
    """
    sums = np.asarray(sums, np.float64)
    num_images = images_of_class[:, None]  # [V, 1]
    squared_deviations = np.maximum(squares - np.square(sums) / num_images, 0)
    variance = squared_deviations * (num_images / np.maximum(1, num_images - 1))

    cell_terms = _ratio(variance, sums).sum((1, 2))  # [R]
    expert_variance = variance.sum(1)  # [R, E]
    expert_terms = _ratio(expert_variance, sums.sum(1)).sum(1)
    total = sums[0].sum()
    result: Floats = (cell_terms - expert_terms) / (2 * math.log(2) * total)
    return result


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    """The quotient; where the denominator is 0, the numerator, which is 0 there too."""
    return numerator / np.where(denominator > 0, denominator, 1.0)


def _n_log2_n(n: Floats) -> Floats:
    """The terms n log2 n, which are 0 where n is 0."""
    return n * np.log2(np.where(n > 0, n, 1.0))


def pointwise_bits(tables: Floats) -> Floats:
    """Pointwise mutual information [..., V, E] of the cells of tables [..., V, E]; 0 in empty cells.

    The derivative of the plug-in by a cell's count is (this - MI) / N, where MI is the plug-in and N the total.
    """
    tables = np.asarray(tables, dtype=np.float64)
    rows = tables.sum(-1, keepdims=True)
    columns = tables.sum(-2, keepdims=True)
    total = rows.sum(-2, keepdims=True)
    ratio = _ratio(tables * total, rows * columns)
    return np.log2(np.where(ratio > 0, ratio, 1.0))


def as_json(value: Any) -> Any:
    """Nested values as JSON primitives: dataclasses by fields, NumPy arrays as lists, NaN and infinity as None."""
    if hasattr(value, "to_json"):
        return value.to_json()
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {str(name): as_json(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return as_json(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


class JsonDataclass:
    """A dataclass that can be written as JSON."""

    def to_json(self) -> Json:
        """The fields as JSON primitives."""
        return {field.name: as_json(getattr(self, field.name)) for field in fields(cast(Any, self))}


@dataclass(frozen=True)
class Estimate:
    """Excess mutual information of one layer, over images."""

    value_bits: float  # plug-in mutual information minus the mean of its null
    # lower end of the 95 % interval of the true value, in bits; may be below 0, which means "not told from 0"
    low: float
    high: float  # upper end
    null_mean: float  # mean of the plug-in under the null, in bits: what chance alone gives with this number of images
    p_value: float  # one-sided, ``(1 + null values at least as large) / (1 + permutations)``


def excess_estimate(
    plug_in: float,
    null: Floats,
    influence: Floats,
    *,
    null_keeps_effect: bool = False,
    null_bias_surplus: float = 0.0,
    num_means: int = 1,
) -> Estimate:
    """The excess of a plug-in (bits) over its null [R], with its interval.

    Args:
        plug_in: the plug-in estimate.
        null: [R] the plug-in under the null.
        influence: [I] first-order contribution of each image to the plug-in, in bits; it is centred here.
        null_keeps_effect: the null still has a part of the effect, as that of positions in `part_information`. Then
            the score interval, whose variance at θ = 0 is the null's, doesn't apply: the interval is excess ± margin.
        null_bias_surplus: bits by which the null's mean overstates the bias of the plug-in.
        num_means: number of means (of classes) that deviations of images are taken from; it lowers the degrees of
            freedom.
    """
    null_mean = float(null.mean())
    null_variance = float(null.var(ddof=1))
    excess = plug_in - null_mean

    images = len(influence)
    degrees_of_freedom = max(1, images - num_means)
    t = students_quantile(degrees_of_freedom)
    squares = float(np.square(influence - influence.mean()).sum())
    delta_variance = squares * images / degrees_of_freedom

    if null_keeps_effect:
        # For small effects the delta method gives almost 0; the variance isn't below that of the null.
        margin = t * math.sqrt(max(null_variance, delta_variance))
        low = excess - margin
        high = excess + margin
    else:
        kappa = delta_variance / plug_in if plug_in > 0 else 0.0
        # The surplus is itself uncertain: all that lies in the interval with it or in the one without it, or between.
        low, _ = score_interval(excess + min(0.0, null_bias_surplus), null_variance, kappa, t)
        _, high = score_interval(excess + max(0.0, null_bias_surplus), null_variance, kappa, t)
        # If the excess is negative, the interval may lie above it.
        low = min(low, excess)

    # Null values that are smaller by rounding errors only count as equal.
    as_large = int((null >= plug_in - 1e-9).sum())
    p_value = (1 + as_large) / (1 + len(null))
    return Estimate(excess, low, high, null_mean, p_value)


def students_quantile(degrees_of_freedom: int) -> float:
    """Quantile of Student's t for a two-sided interval, with at least one degree of freedom."""
    # Imported here, so that traces and images, which import this module, open without SciPy.
    from scipy.special import stdtrit

    return float(stdtrit(max(1, degrees_of_freedom), (1 + CONFIDENCE_LEVEL) / 2))


def score_interval(excess: float, variance: float, kappa: float, z: float) -> tuple[float, float]:
    """All θ with (excess - θ)² <= z² (variance + κ θ), the roots of a quadratic equation.

    If no θ satisfies this, since the excess is far below 0, both ends are the θ that comes nearest.
    """
    z2 = z * z
    centre = excess + z2 * kappa / 2
    squared_half = z2 * (kappa * excess + z2 * kappa * kappa / 4 + variance)
    half = math.sqrt(max(0.0, squared_half))
    return centre - half, centre + half


# ---- means over images


class Interval(NamedTuple):
    """A mean over images with its 95 % interval."""

    value: float
    low: float
    high: float

    def significantly_above(self, other: Interval) -> bool:
        """Whether the interval of the difference of two means lies above 0.

        The interval is combined from both intervals as if the means were independent (MOVER: Zou and Donner). They are
        of the same images, which makes this a little too strict.
        """
        margin = math.hypot(self.value - self.low, other.high - other.value)
        return self.value - other.value > margin


def ratio_interval(numerator: Floats, denominator: Floats | None = None) -> Interval:
    """Sum of the numerators [I] over that of the denominators [I] (None: 1 each), with its interval over images.

    By linearisation of the ratio and Student's quantile.
    """
    if denominator is None:
        denominator = np.ones(len(numerator))
    images = len(numerator)
    total = max(float(denominator.sum()), 1e-12)
    ratio = float(numerator.sum()) / total

    squares = float(np.square(numerator - ratio * denominator).sum())
    error = math.sqrt(images / max(1, images - 1) * squares)
    margin = students_quantile(images - 1) * error / total
    return Interval(ratio, ratio - margin, ratio + margin)


def paired_interval(change: Floats) -> Interval:
    """Mean of changes [I] between -1 and 1, with Agresti and Min's interval: it has a width even if all are 0.

    A change is how much less often an image is right than in the other condition: -1, 0 or 1, or a mean of several.
    """
    images = len(change)
    total = float(change.sum())
    z = NormalDist().inv_cdf((1 + CONFIDENCE_LEVEL) / 2)

    # Agresti and Min add two images: half a one with change 1, half a one with -1, one with 0. The sum stays, and the
    # sum of squares grows by 1.
    centre = total / (images + 2)
    squares = float(np.square(change).sum()) + 1
    variance = max(0.0, squares - total * centre)
    margin = z * math.sqrt(variance) / (images + 2)
    return Interval(total / images, max(-1.0, centre - margin), min(1.0, centre + margin))

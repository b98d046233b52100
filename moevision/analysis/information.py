"""Statistics over images: mutual information between experts and what a patch shows, and intervals of means.

What this module owns: functions of arrays alone. It knows no model, no recording and no sentence; `readings` applies it
to what is recorded of a layer, and `questions` turns readings into answers.

Patches of one image are not independent: shuffling patches calls routing that merely differs from image to image
"specialised by class". Here everything is permuted over whole images:

- class: labels are permuted over images; each image keeps its routing map. Exact, since images are exchangeable.
- part: an image's routing map is paired with the part map of another image. What position explains is then in the null.

The estimate is the excess: the plug-in minus the mean of the null. Counts may be weights: plug-in information depends
on shares only, every null moves whole images, and bias and interval come from the spread over images.

**The interval.** For small effects plug-in mutual information is a quadratic form |x|² of Gaussian deviations x whose
mean has length √θ: its mean is θ + b and its variance v0 + κ θ, with b and v0 those of the null (θ = 0); the delta
method over images estimates κ |x|², so that its variance over the plug-in estimates κ. The interval holds every θ whose
score ``(estimate - θ)² / (v0 + κ θ)`` is at most z², the form of Wilson's interval of a proportion. It doesn't become
too short where the estimate happens to be small, and at θ = 0 it agrees with a test against the null. A percentile
bootstrap takes the noise of the image sample for signal (`benchmarks/analysis/coverage.py` measures them all).

The null's mean overstates the bias under an effect: shuffled images differ by their classes too. The second-order delta
method gives the difference (`bias_surplus`), but in sparse tables it can't be trusted far, so one end of the interval
is taken with it and the other without. It matters for few images per class.

Sources: Wilson, JASA 22 (1927) 209-212; van der Vaart, Asymptotic Statistics (1998), chapters 3 and 20; Agresti and
Min, Statistics in Medicine 24 (2005) 729-740 (interval of a difference of paired proportions, which stays wide where no
image changes); Zou and Donner, Statistics in Medicine 27 (2008) 1693-1702 (interval of a difference of two estimates).

Axes: I images, P patches (row-major), K choices, E experts, V values of what the experts are asked about,
R permutations of the same images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from statistics import NormalDist
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from moevision.errors import UserError

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.integer[Any]]
Flags = npt.NDArray[np.bool_]
Pixels = npt.NDArray[np.uint8]
Json = dict[str, Any]

_CHUNK_CELLS = 1 << 22  # of a block of permuted labels or tables: 16 MiB of float32
LEVEL = 0.95  # of all intervals
_BIAS_PERMUTATIONS = 32  # the mean bias varies far less than the plug-in


def class_information(
    patch_counts: Floats | Ints, labels: Ints, *, num_permutations: int = 200, seed: int = 0
) -> Estimate:
    """I(expert; class) of counts [I, P, E] of kept choices (or weights), against labels [I] permuted over images.

    Images with a negative label are left out.
    """
    labels = np.asarray(labels)
    labelled = labels >= 0
    # Classes are numbered anew, so that those without an image cost nothing.
    _, classes = np.unique(labels[labelled], return_inverse=True)
    images_of_class = np.bincount(classes)  # [V]
    num_classes = len(images_of_class)
    counts = _checked(np.asarray(patch_counts)[labelled]).sum(1)  # [I, E]

    # The null of the plug-in, and of the first permutations its bias.
    null: list[Floats] = []
    null_bias: list[float] = []
    cells = num_classes * max(counts.shape)
    for permuted in permuted_labels(classes, num_permutations, cells, seed):
        tables = sums_by_class(permuted, counts, num_classes)  # [R', V, E]
        null.append(mutual_information_bits(tables))
        missing = _BIAS_PERMUTATIONS - len(null_bias)
        if missing > 0:
            null_bias.extend(_bias_of_labels(permuted[:missing], counts, images_of_class))

    (table,) = sums_by_class(classes[None], counts, num_classes)  # [V, E]
    plug_in = float(mutual_information_bits(table))
    above_mean = pointwise_bits(table)[classes] - plug_in  # [I, E]
    bias = _bias_of_labels(classes[None], counts, images_of_class)
    return excess_estimate(
        plug_in,
        np.concatenate(null),
        (counts * above_mean).sum(1) / counts.sum(),
        bias_surplus=float(np.mean(null_bias) - bias[0]),
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
    maps = _checked(np.asarray(patch_counts))
    parts = np.asarray(parts)
    values = np.unique(parts[parts >= 0])
    if not len(values):
        raise UserError("No patch has a part: give images with part masks, such as synthetic_pets.")
    is_part = (parts[..., None] == values).astype(np.float32)  # [I, P, V]

    # The null: each routing map with the part map of another image.
    rng = np.random.default_rng(seed)
    null = []
    for _ in range(num_permutations):
        order = rng.permutation(len(maps))
        null.append(mutual_information_bits(_part_table(is_part[order], maps)))

    # The null's own mean is a statistic of the images: maps and parts averaged apart, position by position.
    table = _part_table(is_part, maps)
    mean_map = maps.mean(0)  # [P, E]
    mean_part = is_part.mean(0)  # [P, V]
    bits = pointwise_bits(table)  # [V, E]
    bits_apart = pointwise_bits(np.einsum("pv,pe->ve", mean_part, mean_map))  # [V, E]

    # Influence of each image, [I].
    together = np.einsum("ipv,ve,ipe->i", is_part, bits, maps, optimize=True)
    separately = np.einsum("ipv,ve,pe->i", is_part, bits_apart, mean_map, optimize=True)
    separately += np.einsum("pv,ve,ipe->i", mean_part, bits_apart, maps, optimize=True)
    return excess_estimate(
        float(mutual_information_bits(table)),
        np.array(null),
        (together - separately) / table.sum(),
        keeps_effect=True,
    )


def _part_table(is_part: Floats, maps: Floats) -> Floats:
    """[V, E] from one-hot parts [I, P, V] and routing maps [I, P, E]."""
    return is_part.reshape(-1, is_part.shape[-1]).T @ maps.reshape(-1, maps.shape[-1])


def _checked(patch_counts: Array) -> Floats:
    """The routing maps as float32 [I, P, E]: sums of whole numbers stay exact up to 2 ** 24 choices per cell."""
    if patch_counts.ndim != 3 or len(patch_counts) < 2:
        raise UserError(
            "Statistics over images need at least two images with a known class: give more images."
        )
    return np.ascontiguousarray(patch_counts, dtype=np.float32)


def halves_by_class(labels: Ints, seed: int) -> Flags:
    """[I] a random half of the images of every class, and of those without one (negative labels)."""
    rng = np.random.default_rng(seed)
    half = np.zeros(len(labels), bool)
    first = 0
    for label in np.unique(labels):
        images = rng.permutation(np.flatnonzero(labels == label))
        half[images[first::2]] = True
        # Classes of odd size take turns in giving one more.
        first = (first + len(images)) % 2
    return half


def permuted_labels(labels: Ints, count: int, cells: int, seed: int) -> Iterator[Ints]:
    """Labels [I] in `count` random orders, in chunks [R', I]; `cells` is what one of them takes in memory."""
    rng = np.random.default_rng(seed)
    size = max(1, _CHUNK_CELLS // cells)
    for start in range(0, count, size):
        rows = min(size, count - start)
        yield rng.permuted(np.tile(labels, (rows, 1)), axis=1)


def choice_counts(expert_index: Ints, num_experts: int, amount: Array | None = None) -> Floats:
    """[I, P, E] float32: how many of the choices [I, P, K] of each patch fall on each expert.

    A choice counts its amount [I, P, K]: whether it was kept, or a weight; 1 if None.
    """
    expert_index = np.asarray(expert_index)
    counts = np.zeros((*expert_index.shape[:2], num_experts), np.float32)
    for rank in range(expert_index.shape[2]):
        hits = expert_index[:, :, rank, None] == np.arange(num_experts)  # [I, P, E]
        if amount is not None:
            hits = hits * np.asarray(amount[:, :, rank, None], np.float32)
        counts += hits
    return counts


def mutual_information_bits(table: Floats | Ints) -> Floats:
    """Plug-in mutual information of contingency tables [..., V, E], in bits; [...]; 0 for an empty table.

    ``sum(n log n) - sum(row log row) - sum(column log column) + N log N``, over N.
    """
    table = np.asarray(table, dtype=np.float64)
    total = table.sum((-2, -1))
    cells = _n_log2_n(table).sum((-2, -1))
    rows = _n_log2_n(table.sum(-1)).sum(-1)
    columns = _n_log2_n(table.sum(-2)).sum(-1)
    bits = cells + _n_log2_n(total) - (rows + columns)
    return cast(Floats, np.maximum(_ratio(bits, total), 0.0))


def entropy_bits(counts: Floats | Ints) -> float:
    """Entropy of a distribution given by counts [V], in bits."""
    counts = np.asarray(counts, dtype=np.float64)
    total = counts.sum()
    return float(_ratio(_n_log2_n(total) - _n_log2_n(counts).sum(), total))


def second_order_bias(sums: Floats, squares: Floats, images: Ints) -> Floats:
    """Bias of the plug-in, in bits, by the second-order delta method over images; [R].

    From [R, V, E] sums of choices, and of those of each image squared, and the images [V] of each class. It is
    ``sum(variance / count) / (2 N ln 2)`` over the cells, minus the same over the sums of each expert. In sparse tables
    it is itself biased, so only differences between labellings of the same images are used.
    """
    sums = np.asarray(sums, np.float64)
    count = images[:, None]  # [V, 1]
    deviations = np.maximum(squares - np.square(sums) / count, 0)
    variance = deviations * (count / np.maximum(1, count - 1))

    cell_terms = _ratio(variance, sums).sum((1, 2))
    expert_variance = variance.sum(1)  # [R, E]
    expert_terms = _ratio(expert_variance, sums.sum(1)).sum(1)
    total = sums[0].sum()
    return cast(Floats, (cell_terms - expert_terms) / (2 * math.log(2) * total))


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    """The quotient; the numerator itself where the denominator is 0."""
    return numerator / np.where(denominator > 0, denominator, 1.0)


def _n_log2_n(n: Floats) -> Floats:
    return n * np.log2(np.where(n > 0, n, 1.0))


def pointwise_bits(tables: Floats) -> Floats:
    """Pointwise mutual information [..., V, E] of the cells of tables [..., V, E]; 0 in empty cells.

    It is the derivative of the plug-in by a cell's count, but for the factor 1 / N and the constant -MI.
    """
    tables = np.asarray(tables, dtype=np.float64)
    rows = tables.sum(-1, keepdims=True)
    columns = tables.sum(-2, keepdims=True)
    total = rows.sum(-2, keepdims=True)
    ratio = _ratio(tables * total, rows * columns)
    return np.log2(np.where(ratio > 0, ratio, 1.0))


def as_json(value: Any) -> Any:
    """`Numbers` by their fields, NumPy scalars and arrays as JSON primitives; NaN and infinity become null."""
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


class Numbers:
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
    keeps_effect: bool = False,
    bias_surplus: float = 0.0,
    num_means: int = 1,
) -> Estimate:
    """The excess of a plug-in (bits) over its null [R], with its interval.

    `influence` [I] is what each image adds to the plug-in to first order, in bits; it is centred here. Where the null
    `keeps_effect`, a part of it, it has a first-order variance of its own, and the interval is a normal one. The null's
    mean overstates the bias of the plug-in by `bias_surplus` bits. `num_means`, how many means (classes) the images
    were compared with, is for the degrees of freedom.
    """
    null_mean = float(null.mean())
    null_variance = float(null.var(ddof=1))
    excess = plug_in - null_mean

    images = len(influence)
    freedom = max(1, images - num_means)
    z = students_quantile(freedom)
    squares = float(np.square(influence - influence.mean()).sum())
    delta_variance = squares * images / freedom

    if keeps_effect:
        margin = z * math.sqrt(max(null_variance, delta_variance))
        low = excess - margin
        high = excess + margin
    else:
        kappa = delta_variance / plug_in if plug_in > 0 else 0.0
        low, _ = score_interval(excess + min(0.0, bias_surplus), null_variance, kappa, z)
        _, high = score_interval(excess + max(0.0, bias_surplus), null_variance, kappa, z)
        # Of a negative excess the lower end may lie above it.
        low = min(low, excess)

    # A difference below the rounding of the sums is no evidence.
    as_large = int((null >= plug_in - 1e-9).sum())
    p_value = (1 + as_large) / (1 + len(null))
    return Estimate(excess, low, high, null_mean, p_value)


def students_quantile(freedom: int) -> float:
    """Student's quantile of a two-sided interval; where no degree of freedom is left, that of one."""
    # Traces and images, which import this module, are opened without SciPy.
    from scipy.special import stdtrit

    return float(stdtrit(max(1, freedom), (1 + LEVEL) / 2))


def score_interval(excess: float, variance: float, kappa: float, z: float) -> tuple[float, float]:
    """All θ with (excess - θ)² <= z² (variance + κ θ), the roots of a quadratic equation.

    Where the estimate is so far below 0 that no θ fits, both ends are the θ that fits best.
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
        """Whether the interval of the difference lies above 0.

        It is put together from both intervals as if the two were independent. They rest on the same images, which makes
        this a little strict (MOVER: Zou and Donner).
        """
        margin = math.hypot(self.value - self.low, other.high - other.value)
        return self.value - other.value > margin


def ratio_interval(part: Floats, whole: Floats | None = None) -> Interval:
    """Sum of part [I] over sum of whole [I], which is 1 of each image if None; with its interval over images.

    The ratio is linearised, the quantile Student's.
    """
    if whole is None:
        whole = np.ones(len(part))
    images = len(part)
    total = max(float(whole.sum()), 1e-12)
    ratio = float(part.sum()) / total

    squares = float(np.square(part - ratio * whole).sum())
    error = math.sqrt(images / max(1, images - 1) * squares)
    margin = students_quantile(images - 1) * error / total
    return Interval(ratio, ratio - margin, ratio + margin)


def paired_interval(loss: Floats) -> Interval:
    """Mean of losses [I] between -1 and 1 (Agresti and Min's interval): no image that changes is no proof of none."""
    images = len(loss)
    total = float(loss.sum())
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)

    # As if one image more were won, and one lost.
    centre = total / (images + 2)
    squares = float(np.square(loss).sum()) + 1
    variance = max(0.0, squares - total * centre)
    margin = z * math.sqrt(variance) / (images + 2)
    return Interval(total / images, max(-1.0, centre - margin), min(1.0, centre + margin))

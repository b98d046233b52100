"""Mutual information between experts and what a patch shows, with images, not patches, as the units of evidence.

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

Sources: Wilson, JASA 22 (1927) 209-212; van der Vaart, Asymptotic Statistics (1998), chapters 3 and 20.

Axes: I images, P patches (row-major), K choices, E experts, V values of what the experts are asked about,
R permutations of the same images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, cast

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
    labelled = np.asarray(labels) >= 0
    _, values = np.unique(
        np.asarray(labels)[labelled], return_inverse=True
    )  # classes without an image cost nothing
    flat = _checked(np.asarray(patch_counts)[labelled]).sum(1)  # [I, E]
    images, num_classes = len(flat), int(values.max()) + 1
    rng = np.random.default_rng(seed)

    def sums(classes: Ints, of: Floats) -> Floats:  # [R', I] -> [R', V, E]
        one_hot = (classes[:, None, :] == np.arange(num_classes)[:, None]).astype(
            np.float32
        )  # [R', V, I]
        result: Floats = (one_hot.reshape(-1, images) @ of).reshape(-1, num_classes, of.shape[1])
        return result

    def bias(classes: Ints) -> Floats:
        return second_order_bias(
            sums(classes, flat), sums(classes, np.square(flat)), np.bincount(values)
        )

    null: list[Floats] = []
    null_bias = np.empty(0)
    for size in chunks(
        num_permutations, max(1, _CHUNK_CELLS // (num_classes * max(images, flat.shape[1])))
    ):
        classes = rng.permuted(np.tile(values, (size, 1)), axis=1)  # [size, I]
        null.append(mutual_information_bits(sums(classes, flat)))
        null_bias = np.append(
            null_bias, bias(classes[: max(0, _BIAS_PERMUTATIONS - len(null_bias))])
        )
    table = sums(values[None], flat)[0]  # [V, E]
    plug_in = float(mutual_information_bits(table))
    return excess_estimate(
        plug_in,
        np.concatenate(null),
        (flat * (pointwise_bits(table)[values] - plug_in)).sum(1) / flat.sum(),
        bias_surplus=float(null_bias.mean() - bias(values[None])[0]),
        num_means=num_classes,
    )


def part_information(
    patch_counts: Floats | Ints, parts: Ints, *, num_permutations: int = 200, seed: int = 0
) -> Estimate:
    """I(expert; part) of counts [I, P, E] and the parts [I, P], against maps paired with the parts of another image.

    Patches with a negative part are left out.
    """
    maps = _checked(np.asarray(patch_counts))
    if not (np.asarray(parts) >= 0).any():
        raise UserError("No patch has a part: give images with part masks, such as synthetic_pets.")
    images, _, experts = maps.shape
    shown = (np.asarray(parts)[..., None] == np.unique(parts[parts >= 0])).astype(
        np.float32
    )  # [I, P, V]
    flat_maps = maps.reshape(-1, experts)

    def table_of(one_hot: Floats) -> Floats:
        return one_hot.reshape(-1, shown.shape[-1]).T @ flat_maps

    rng = np.random.default_rng(seed)
    null = np.array(
        [
            mutual_information_bits(table_of(shown[rng.permutation(images)]))
            for _ in range(num_permutations)
        ]
    )
    table = table_of(shown)
    # The null's own mean is a statistic of the images: maps and parts averaged apart, position by position.
    mean_map, mean_shown = maps.mean(0), shown.mean(0)  # [P, E], [P, V]
    apart = np.einsum("pv,pe->ve", mean_shown, mean_map)  # [V, E]
    bits, bits_apart = pointwise_bits(table), pointwise_bits(apart)
    # Influence of each image, [I].
    together = np.einsum("ipv,ve,ipe->i", shown, bits, maps, optimize=True)
    separately = np.einsum("ipv,ve,pe->i", shown, bits_apart, mean_map, optimize=True)
    separately += np.einsum("pv,ve,ipe->i", mean_shown, bits_apart, maps, optimize=True)
    return excess_estimate(
        float(mutual_information_bits(table)),
        null,
        (together - separately) / table.sum(),
        keeps_effect=True,
    )


def _checked(patch_counts: Array) -> Floats:
    """The routing maps as float32 [I, P, E]: sums of whole numbers stay exact up to 2 ** 24 choices per cell."""
    if patch_counts.ndim != 3 or len(patch_counts) < 2:
        raise UserError(
            "Statistics over images need at least two images with a known class: give more images."
        )
    return np.ascontiguousarray(patch_counts, dtype=np.float32)


def halves_by_class(labels: Ints, seed: int) -> Flags:
    """[I] a random half of the images of every class, and of those without one (negative labels)."""
    half, rng = np.zeros(len(labels), bool), np.random.default_rng(seed)
    start = 0
    for label in np.unique(labels):
        images = rng.permutation(np.flatnonzero(labels == label))
        half[images[start::2]] = True
        start = (start + len(images)) % 2  # classes of odd size take turns in giving one more
    return half


def chunks(total: int, size: int) -> Iterator[int]:
    """Sizes of at most `size` that sum to `total`."""
    for start in range(0, total, size):
        yield min(size, total - start)


def choice_counts(expert_index: Ints, num_experts: int, amount: Array | None = None) -> Floats:
    """[I, P, E] float32: how many of the choices [I, P, K] of each patch fall on each expert.

    A choice counts its amount [I, P, K]: whether it was kept, or a weight; 1 if None.
    """
    chosen = np.asarray(expert_index)
    counts = np.zeros((*chosen.shape[:2], num_experts), np.float32)
    for choice in range(chosen.shape[2]):
        hit = chosen[:, :, choice, None] == np.arange(num_experts)
        counts += (
            hit if amount is None else hit * np.asarray(amount[:, :, choice, None], np.float32)
        )
    return counts


def mutual_information_bits(table: Floats | Ints) -> Floats:
    """Plug-in mutual information of contingency tables [..., V, E], in bits; [...]; 0 for an empty table.

    ``sum(n log n) - sum(row log row) - sum(column log column) + N log N``, over N.
    """
    table = np.asarray(table, dtype=np.float64)
    total = table.sum((-2, -1))
    bits = _n_log2_n(table).sum((-2, -1)) + _n_log2_n(total)
    bits -= _n_log2_n(table.sum(-1)).sum(-1) + _n_log2_n(table.sum(-2)).sum(-1)
    result: Floats = np.maximum(bits / np.where(total > 0, total, 1.0), 0.0)
    return result


def entropy_bits(counts: Floats | Ints) -> float:
    """Entropy of a distribution given by counts [V], in bits."""
    counts = np.asarray(counts, dtype=np.float64)
    total = float(counts.sum())
    return (
        float((_n_log2_n(np.asarray(total)) - _n_log2_n(counts).sum()) / total)
        if total > 0
        else 0.0
    )


def second_order_bias(sums: Floats, squares: Floats, images: Ints) -> Floats:
    """Bias of the plug-in, in bits, by the second-order delta method over images; [R].

    From [R, V, E] sums of choices, and of those of each image squared, and the images [V] of each class. It is
    ``sum(variance / count) / (2 N ln 2)`` over the cells, minus the same over the sums of each expert. In sparse tables
    it is itself biased, so only differences between labellings of the same images are used.
    """
    if not len(sums):
        return np.empty(0)
    sums, count = np.asarray(sums, np.float64), images[:, None]
    variance = np.maximum(squares - np.square(sums) / count, 0) * (count / np.maximum(1, count - 1))
    per_cell = _ratio(variance, sums).sum((1, 2))
    per_expert = _ratio(variance.sum(1), sums.sum(1)).sum(1)
    result: Floats = (per_cell - per_expert) / (2 * math.log(2) * sums[0].sum())
    return result


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    return numerator / np.where(denominator > 0, denominator, 1.0)


def _n_log2_n(n: Floats) -> Floats:
    return n * np.log2(np.where(n > 0, n, 1.0))


def pointwise_bits(tables: Floats) -> Floats:
    """Pointwise mutual information [..., V, E] of the cells of tables [..., V, E]; 0 in empty cells.

    It is the derivative of the plug-in by a cell's count, but for the factor 1 / N and the constant -MI.
    """
    tables = np.asarray(tables, dtype=np.float64)
    product = tables.sum(-1, keepdims=True) * tables.sum(-2, keepdims=True)
    ratio = tables * tables.sum((-2, -1), keepdims=True) / np.where(product > 0, product, 1.0)
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
    mean, variance = float(null.mean()), float(null.var(ddof=1))
    excess, n = plug_in - mean, len(influence)
    freedom = max(1, n - num_means)
    delta_variance = float(np.square(influence - influence.mean()).sum() * n / freedom)
    z = students_quantile(freedom)
    if keeps_effect:
        half = z * math.sqrt(max(variance, delta_variance))
        low, high = excess - half, excess + half
    else:
        kappa = delta_variance / plug_in if plug_in > 0 else 0.0
        low = score_interval(excess + min(0.0, bias_surplus), variance, kappa, z)[0]
        high = score_interval(excess + max(0.0, bias_surplus), variance, kappa, z)[1]
        low = min(low, excess)  # of a negative excess it may lie above
    # A difference below the rounding of the sums is no evidence.
    p_value = (1 + int((null >= plug_in - 1e-9).sum())) / (1 + len(null))
    return Estimate(excess, low, high, mean, p_value)


def students_quantile(freedom: int) -> float:
    """Student's quantile of a two-sided interval; where no degree of freedom is left, that of one."""
    from scipy.special import (
        stdtrit,
    )  # traces and images, which import this module, are opened without SciPy

    return float(stdtrit(max(1, freedom), (1 + LEVEL) / 2))


def score_interval(excess: float, variance: float, kappa: float, z: float) -> tuple[float, float]:
    """All θ with (excess - θ)² <= z² (variance + κ θ), the roots of a quadratic equation.

    Where the estimate is so far below 0 that no θ fits, both ends are the θ that fits best.
    """
    centre = excess + z * z * kappa / 2
    half = math.sqrt(max(0.0, z * z * (kappa * excess + z * z * kappa * kappa / 4 + variance)))
    return centre - half, centre + half

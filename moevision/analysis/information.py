"""Mutual information between experts and what a patch shows, with images, not patches, as the units of evidence.

Patches of one image are not independent. Shuffling patches (or the Miller-Madow correction, or scikit-learn's adjusted
mutual information) therefore calls routing that merely differs from image to image "specialised by class". Here
everything is permuted over whole images:

- class: labels are permuted over images; each image keeps its routing map. Exact, since images are exchangeable.
- class given position: the same permutation; positions stay where they are, so what position alone explains is in the
  null as well as in the observation.
- position: all images share their positions, so there is nothing to permute. Each image's deviation from the mean map
  gets a random sign (the wild or multiplier bootstrap: Wu, Annals of Statistics 14, 1986, 1261-1295; Mammen 1993) and
  the sum is added to the table in which position tells nothing. Whatever hangs together inside an image, clumps
  included, does so in the null. Shuffling single patches would destroy that and call clumps a preference; shifting each
  map on the torus would destroy clumps that lie at the same places in all images (it rejected 12 % of true nulls).
- part: an image's routing map is paired with the part map of another image. What position explains (background lies
  at the rim) is then in the null; the excess is what *this* picture's parts explain beyond it.

The estimate is the excess, plug-in minus the mean of the null; `estimate.py` says how its interval comes about.

Counts may be weights (how much of a patch an expert reads, how much a patch takes from it): plug-in information depends
on shares only, every null moves whole images, and bias and interval come from the spread over images, so none of them
needs whole numbers. Corrections that do need them (Miller-Madow) aren't used.

Axes: I images, P patches (row-major), E experts, G strata (positions that are conditioned on, or 1), V values of what
the experts are asked about, R permutations.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from moevision.analysis.contingency import (
    Floats,
    Ints,
    choice_counts,
    conditional_information_bits,
    entropy_bits,
    mutual_information_bits,
    pointwise_bits,
    second_order_bias,
)
from moevision.analysis.estimate import Estimate, excess_estimate
from moevision.errors import UserError

__all__ = [
    "Estimate",
    "choice_counts",
    "class_information",
    "conditional_information_bits",
    "entropy_bits",
    "mutual_information_bits",
    "part_information",
    "position_information",
]

_CHUNK_CELLS = 1 << 22  # of a block of permuted labels or tables: 16 MiB of float32
_BIAS_PERMUTATIONS = 32  # the mean bias varies far less than the plug-in


def class_information(
    patch_counts: Floats | Ints,
    labels: Ints,
    *,
    given_position: bool = False,
    num_permutations: int = 200,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """I(expert; class), or I(expert; class | position), against labels permuted over images.

    Args:
        patch_counts: [I, P, E] kept choices (or weights) of each patch.
        labels: [I] classes; images with a negative label are left out.
        given_position: condition on the position of the patch.
        num_permutations: R.
        seed: of the permutations.
        level: of the interval.

    Raises:
        UserError: there are fewer than two labelled images.
    """
    labelled = np.asarray(labels) >= 0
    values = _ranks(np.asarray(labels)[labelled])
    maps = _checked(np.asarray(patch_counts)[labelled])
    if not given_position:
        maps = maps.sum(1, keepdims=True)
    images, strata, experts = maps.shape
    flat, num_classes = maps.reshape(images, -1), int(values.max()) + 1
    rng = np.random.default_rng(seed)

    def sums(classes: Ints, of: Floats) -> Floats:  # [R', I] -> [R', G, V, E]
        one_hot = (classes[:, None, :] == np.arange(num_classes)[:, None]).astype(np.float32)
        by_class = (one_hot.reshape(-1, images) @ of).reshape(-1, num_classes, strata, experts)
        result: Floats = by_class.swapaxes(1, 2)
        return result

    def bias(classes: Ints) -> Floats:
        return second_order_bias(sums(classes, flat), sums(classes, np.square(flat)), np.bincount(values))

    null: list[Floats] = []
    null_bias = np.empty(0)
    for size in _chunks(num_permutations, max(1, _CHUNK_CELLS // (num_classes * max(images, flat.shape[1])))):
        classes = rng.permuted(np.tile(values, (size, 1)), axis=1)
        null.append(conditional_information_bits(sums(classes, flat)))
        null_bias = np.append(null_bias, bias(classes[: max(0, _BIAS_PERMUTATIONS - len(null_bias))]))
    table = sums(values[None], flat)[0]
    plug_in = float(conditional_information_bits(table))
    pointwise = pointwise_bits(table)[:, values].swapaxes(0, 1)  # [I, G, E]
    return excess_estimate(
        plug_in,
        np.concatenate(null),
        (maps * (pointwise - plug_in)).sum((1, 2)) / maps.sum(),
        bias_surplus=float(null_bias.mean() - bias(values[None])[0]),
        entropy=entropy_bits(np.bincount(values)),
        num_means=num_classes,
        level=level,
    )


def position_information(
    patch_counts: Floats | Ints,
    grid: tuple[int, int],
    *,
    num_permutations: int = 200,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """I(expert; position), against random signs of each image's deviation from the mean map.

    Args:
        patch_counts: [I, P, E] kept choices (or weights) of each patch, row-major over the grid.
        grid: (rows, columns), P = rows x columns.
        num_permutations: R, draws of the signs.
        seed: of the signs.
        level: of the interval.

    Raises:
        UserError: there are fewer than two images, or the grid doesn't have P patches.
    """
    maps = _checked(np.asarray(patch_counts))
    images, patches, _ = maps.shape
    rows, columns = grid
    if rows * columns != patches:
        raise UserError(f"A grid of {rows} x {columns} doesn't have the {patches} patches of the routing maps.")
    flat = maps.reshape(images, -1)
    table = maps.sum(0)
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    deviations = (flat - flat.mean(0)) * np.float32(np.sqrt(images / (images - 1)))
    rng = np.random.default_rng(seed)
    null = []
    for size in _chunks(num_permutations, max(1, _CHUNK_CELLS // max(images, flat.shape[1]))):
        signs = rng.integers(2, size=(size, images)).astype(np.float32) * 2 - 1
        # A nearly empty cell may fall below 0, where a count can't.
        null.append(mutual_information_bits(np.maximum(expected + (signs @ deviations).reshape(size, *table.shape), 0)))
    plug_in = float(mutual_information_bits(table))
    return excess_estimate(
        plug_in,
        np.concatenate(null),
        (maps * (pointwise_bits(table) - plug_in)).sum((1, 2)) / maps.sum(),
        entropy=entropy_bits(table.sum(1)),
        level=level,
    )


def part_information(
    patch_counts: Floats | Ints, parts: Ints, *, num_permutations: int = 200, seed: int = 0, level: float = 0.95
) -> Estimate:
    """I(expert; part), against routing maps paired with the part map of another image.

    Args:
        patch_counts: [I, P, E] kept choices (or weights) of each patch.
        parts: [I, P] the part that each patch shows; patches with a negative part are left out.
        num_permutations: R.
        seed: of the pairing.
        level: of the interval.

    Raises:
        UserError: there are fewer than two images, or no patch has a part.
    """
    maps = _checked(np.asarray(patch_counts))
    if not (np.asarray(parts) >= 0).any():
        raise UserError("No patch has a part: give pictures with part masks, such as synthetic_pets.")
    images, _, experts = maps.shape
    shown = (np.asarray(parts)[..., None] == np.unique(parts[parts >= 0])).astype(np.float32)  # [I, P, V]
    flat_maps = maps.reshape(-1, experts)

    def table_of(one_hot: Floats) -> Floats:
        result: Floats = one_hot.reshape(-1, shown.shape[-1]).T @ flat_maps
        return result

    rng = np.random.default_rng(seed)
    null = np.array(
        [mutual_information_bits(table_of(shown[rng.permutation(images)])) for _ in range(num_permutations)]
    )
    table = table_of(shown)
    # The null's own mean is a statistic of the images: maps and parts averaged apart, position by position.
    mean_map, mean_shown = maps.mean(0), shown.mean(0)
    apart = np.einsum("pv,pe->ve", mean_shown, mean_map)
    bits, bits_apart = pointwise_bits(table), pointwise_bits(apart)
    together = np.einsum("ipv,ve,ipe->i", shown, bits, maps, optimize=True)
    separately = np.einsum("ipv,ve,pe->i", shown, bits_apart, mean_map, optimize=True)
    separately += np.einsum("pv,ve,ipe->i", mean_shown, bits_apart, maps, optimize=True)
    return excess_estimate(
        float(mutual_information_bits(table)),
        null,
        (together - separately) / table.sum(),
        keeps_effect=True,
        entropy=entropy_bits(shown.sum((0, 1))),
        level=level,
    )


def _checked(patch_counts: npt.NDArray[Any]) -> Floats:
    """The routing maps as float32 [I, P, E]: sums of whole numbers stay exact up to 2 ** 24 choices per cell."""
    if patch_counts.ndim != 3 or len(patch_counts) < 2:
        raise UserError("Statistics over images need at least two pictures with a known class: give more pictures.")
    return np.ascontiguousarray(patch_counts, dtype=np.float32)


def _ranks(values: Ints) -> Ints:
    """Values renumbered 0 .. V - 1, so that classes without an image cost nothing."""
    ranks: Ints = np.unique(values, return_inverse=True)[1]
    return ranks


def _chunks(total: int, size: int) -> Iterator[int]:
    for start in range(0, total, size):
        yield min(size, total - start)

"""Counts and shares behind the figures: co-activation, position, gate weights, parts. Pure NumPy.

They describe and test nothing: whether a pattern is more than chance is asked in `specialization.py`, over images.
All count *requested* choices, what the router wants, before any capacity.

Axes: I images, P patches (row-major in a grid of rows x columns), K choices best first, E experts, S pixels of a side.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moevision.errors import UserError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.integer]

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Of the gate weights: median, the middle half and the middle nine tenths."""


def co_activation(expert_index: Ints, num_experts: int) -> npt.NDArray[np.int64]:
    """How many patches chose both of two experts, for *every* pair among the K that were chosen.

    Pairs of neighbours in rank alone (which some published scripts count) miss a pair such as first and third.

    Args:
        expert_index: [I, P, K] chosen experts, different ones for one patch.
        num_experts: E.

    Returns:
        [E, E] symmetric counts N_ij; the diagonal is N_i, the patches that chose expert i at all. The share of
        expert i's patches that also chose j is `counts[i, j] / counts[i, i]` (OLMoE, arXiv:2409.02060).
    """
    chosen = _checked(expert_index, num_experts).reshape(-1, expert_index.shape[-1])
    counts = np.zeros((num_experts, num_experts), dtype=np.int64)
    for first in range(chosen.shape[1]):
        for second in range(chosen.shape[1]):
            pair = chosen[:, first].astype(np.int64) * num_experts + chosen[:, second]
            counts += np.bincount(pair, minlength=num_experts**2).reshape(num_experts, num_experts)
    return counts


def expected_co_activation(counts: Ints, steps: int = 500) -> Floats:
    """The pair counts that the loads alone would give: experts pair up without preferring one another.

    Quasi-independence for a symmetric table without diagonal (Bishop, Fienberg & Holland, "Discrete Multivariate
    Analysis", 1975, ch. 5 and 8): N_ij = a_i a_j for i ≠ j, with the row sums that were counted. With equal loads
    it is (K - 1) / (E - 1) of N_i for each pair.

    Args:
        counts: [E, E] from `co_activation`.
        steps: rounds of the fit; a dozen suffice unless one expert is in nearly every pair.

    Returns:
        [E, E], the diagonal as counted.
    """
    pairs = np.array(counts, dtype=np.float64)
    np.fill_diagonal(pairs, 0.0)
    sums = pairs.sum(1)
    factor = sums / max(1.0, np.sqrt(sums.sum()))
    for _ in range(steps):
        others = factor.sum() - factor
        wanted = np.divide(sums, others, out=np.zeros_like(sums), where=others > 0)
        factor = np.sqrt(factor * wanted)  # the geometric mean damps the swing of the plain update
    expected = np.outer(factor, factor)
    np.fill_diagonal(expected, np.diagonal(counts))
    return expected


def position_share(expert_index: Ints, num_experts: int) -> Floats:
    """[E, P]: which share of the choices made at a grid position falls on each expert; columns sum to 1.

    Args:
        expert_index: [I, P, K] chosen experts.
        num_experts: E.
    """
    chosen = _checked(expert_index, num_experts)
    images, patches, choices = chosen.shape
    cell = chosen.astype(np.int64) * patches + np.arange(patches)[None, :, None]
    counts = np.bincount(cell.ravel(), minlength=num_experts * patches).reshape(num_experts, patches)
    share: Floats = counts / (images * choices)
    return share


def gate_weight_quantiles(combine_weight: npt.NDArray[np.floating], quantiles: Sequence[float] = QUANTILES) -> Floats:
    """[Q, K]: quantiles over all patches of the weight of the 1st .. Kth choice (linear interpolation).

    Args:
        combine_weight: [I, P, K] weight of each choice in the output, best choice first.
        quantiles: Q numbers in [0, 1].
    """
    weights = np.asarray(combine_weight, dtype=np.float64)
    if weights.ndim != 3 or weights.size == 0:
        raise UserError(f"Gate weights need the axes [images, patches, choices], all filled; got {weights.shape}.")
    return np.quantile(weights.reshape(-1, weights.shape[-1]), quantiles, axis=0)


def part_fractions(part_masks: npt.NDArray[np.uint8], grid: tuple[int, int], num_parts: int) -> npt.NDArray[np.float32]:
    """[I, P, parts]: which share of each patch's pixels belongs to each part; sums to 1 over the parts.

    Args:
        part_masks: [I, S, S] part of each pixel, 0..num_parts - 1, as `PictureSet.part_mask` gives them.
        grid: (rows, columns) of patches; each divides S.
        num_parts: number of parts.
    """
    masks = np.asarray(part_masks)
    rows, columns = grid
    if masks.ndim != 3 or masks.shape[1] % rows or masks.shape[2] % columns:
        raise UserError(f"Part masks need the axes [images, S, S] with S a multiple of the grid {grid}; {masks.shape}.")
    images, height, width = masks.shape
    tiles = masks.reshape(images, rows, height // rows, columns, width // columns).swapaxes(2, 3)
    pixels = tiles.reshape(images, rows * columns, -1)
    return np.stack([(pixels == part).mean(-1, dtype=np.float32) for part in range(num_parts)], axis=-1)


def majority_part(fractions: npt.NDArray[np.floating]) -> npt.NDArray[np.int16]:
    """[I, P]: the part with most pixels in each patch (the lower number of two that tie), from `part_fractions`."""
    majority: npt.NDArray[np.int16] = np.asarray(fractions).argmax(-1).astype(np.int16)
    return majority


def part_expert_table(expert_index: Ints, fractions: npt.NDArray[np.floating], num_experts: int) -> Floats:
    """[parts, E]: patches of each part that went to each expert; a patch counts for its parts by their area.

    Each of a patch's K choices carries 1/K of it, so the table sums to I · P and the row sums are each part's area
    in patches. Divide a row by its sum for the share of that part's area that each expert received.

    Args:
        expert_index: [I, P, K] chosen experts.
        fractions: [I, P, parts] from `part_fractions`, or one-hot majority parts.
        num_experts: E.
    """
    chosen = _checked(expert_index, num_experts)
    share = np.asarray(fractions)
    if share.shape[:2] != chosen.shape[:2]:
        raise UserError(f"Parts {share.shape[:2]} and routing {chosen.shape[:2]} are of other images or patches.")
    table: Floats = np.zeros((share.shape[2], num_experts))
    for choice in range(chosen.shape[2]):
        for part in range(share.shape[2]):
            weights = share[:, :, part].ravel()
            table[part] += np.bincount(chosen[:, :, choice].ravel(), weights=weights, minlength=num_experts)
    table /= chosen.shape[2]
    return table


def _checked(expert_index: Ints, num_experts: int) -> Ints:
    """`expert_index` as an array [I, P, K] whose experts exist."""
    chosen = np.asarray(expert_index)
    if chosen.ndim != 3 or chosen.size == 0:
        raise UserError(f"Chosen experts need the axes [images, patches, choices], all filled; got {chosen.shape}.")
    if chosen.min() < 0 or chosen.max() >= num_experts:
        raise UserError(f"Chosen experts must lie in 0..{num_experts - 1}, got {chosen.min()}..{chosen.max()}.")
    return chosen

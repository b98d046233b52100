"""Counts and shares behind the figures: co-activation, position, gate weights, parts. Pure NumPy.

They describe and test nothing: whether a pattern is more than chance is asked in `specialization.py`, over images.
All count *requested* choices, what the router wants, before any capacity. Where tokens don't choose, `expert_index`
names all experts and `amount` ([I, P, K], `LayerTrace.wanted`) says what each counts: whether it took the patch, or how
much of it it reads.

Axes: I images, P patches (row-major in a grid of rows x columns), K choices best first, E experts, S pixels of a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moevision.analysis.contingency import choice_counts
from moevision.errors import UserError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.integer]
Flags = npt.NDArray[np.bool_]
Amounts = npt.NDArray[Any]
_ROWS = 1 << 16  # patches that are multiplied at once

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Of the gate weights: median, the middle half and the middle nine tenths."""


def co_activation(expert_index: Ints, num_experts: int, kept: Flags | None = None) -> npt.NDArray[np.int64]:
    """How many patches chose both of two experts, for *every* pair among the K that were chosen.

    Pairs of neighbours in rank alone (which some published scripts count) miss a pair such as first and third.

    Args:
        expert_index: [I, P, K] chosen experts, different ones for one patch.
        num_experts: E.
        kept: [I, P, K] which of them count; all if None.

    Returns:
        [E, E] symmetric counts N_ij; the diagonal is N_i, the patches that chose expert i at all. The share of
        expert i's patches that also chose j is `counts[i, j] / counts[i, i]` (OLMoE, arXiv:2409.02060).
    """
    chosen = _checked(expert_index, num_experts)
    one_hot = choice_counts(chosen, num_experts, kept).reshape(-1, num_experts)
    counts = np.zeros((num_experts, num_experts))
    for start in range(0, len(one_hot), _ROWS):
        part = one_hot[start : start + _ROWS]
        counts += part.T @ part
    return counts.round().astype(np.int64)


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


def position_share(expert_index: Ints, num_experts: int, amount: Amounts | None = None) -> Floats:
    """[E, P]: which share of the choices made at a grid position falls on each expert; columns sum to 1.

    Args:
        expert_index: [I, P, K] chosen experts.
        num_experts: E.
        amount: [I, P, K] what each counts; 1 if None. Where nothing is counted at a position, its column is 0.
    """
    chosen = _checked(expert_index, num_experts)
    patches = chosen.shape[1]
    cell = chosen.astype(np.int64) * patches + np.arange(patches)[None, :, None]
    weights = None if amount is None else np.asarray(amount, np.float64).ravel()
    counts = np.bincount(cell.ravel(), weights, minlength=num_experts * patches).reshape(num_experts, patches)
    total = counts.sum(0)
    share: Floats = counts / np.where(total > 0, total, 1)
    return share


def gate_weight_quantiles(
    combine_weight: npt.NDArray[np.floating], quantiles: Sequence[float] = QUANTILES, kept: Flags | None = None
) -> Floats:
    """[Q, K]: quantiles over all patches of the weight of the 1st .. Kth choice (linear interpolation).

    Args:
        combine_weight: [I, P, K] weight of each choice in the output, best choice first.
        quantiles: Q numbers in [0, 1].
        kept: [I, P, K] which of them count; all if None. Of a rank that no patch has the result is nan.
    """
    weights = np.asarray(combine_weight, dtype=np.float64)
    if weights.ndim != 3 or weights.size == 0:
        raise UserError(f"Gate weights need the axes [images, patches, choices], all filled; got {weights.shape}.")
    by_rank = weights.reshape(-1, weights.shape[-1])
    if kept is None:
        return np.quantile(by_rank, quantiles, axis=0)
    counted = np.asarray(kept).reshape(by_rank.shape)
    columns = [values[mask] for values, mask in zip(by_rank.T, counted.T, strict=True)]
    nothing = np.full(len(quantiles), np.nan)
    return np.stack([np.quantile(values, quantiles) if len(values) else nothing for values in columns], axis=-1)


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


def part_expert_table(
    expert_index: Ints, fractions: npt.NDArray[np.floating], num_experts: int, amount: Amounts | None = None
) -> Floats:
    """[parts, E]: patches of each part that went to each expert; a patch counts for its parts by their area.

    Each of a patch's K choices carries 1/K of it, so the table sums to I · P and the row sums are each part's area
    in patches. Divide a row by its sum for the share of that part's area that each expert received. With amounts a
    choice carries its amount, and row sums are what all experts read of a part.

    Args:
        expert_index: [I, P, K] chosen experts.
        fractions: [I, P, parts] from `part_fractions`, or one-hot majority parts.
        num_experts: E.
        amount: [I, P, K] what each choice carries; 1/K if None.
    """
    chosen = _checked(expert_index, num_experts)
    share = np.asarray(fractions)
    if share.shape[:2] != chosen.shape[:2]:
        raise UserError(f"Parts {share.shape[:2]} and routing {chosen.shape[:2]} are of other images or patches.")
    if amount is None:
        amount = np.full(chosen.shape, 1 / chosen.shape[2])
    table: Floats = np.zeros((share.shape[2], num_experts))
    for choice in range(chosen.shape[2]):
        for part in range(share.shape[2]):
            weights = (share[:, :, part] * amount[:, :, choice]).ravel()
            table[part] += np.bincount(chosen[:, :, choice].ravel(), weights=weights, minlength=num_experts)
    return table


def _checked(expert_index: Ints, num_experts: int) -> Ints:
    """`expert_index` as an array [I, P, K] whose experts exist."""
    chosen = np.asarray(expert_index)
    if chosen.ndim != 3 or chosen.size == 0:
        raise UserError(f"Chosen experts need the axes [images, patches, choices], all filled; got {chosen.shape}.")
    if chosen.min() < 0 or chosen.max() >= num_experts:
        raise UserError(f"Chosen experts must lie in 0..{num_experts - 1}, got {chosen.min()}..{chosen.max()}.")
    return chosen

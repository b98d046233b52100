"""Plug-in information of contingency tables, its derivatives, and its bias.

Axes: I images, P patches, K choices, G strata (positions that are conditioned on, or 1), V values of what the experts
are asked about, E experts, R labellings of the same images.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.integer[Any]]


def choice_counts(expert_index: Ints, num_experts: int, amount: npt.NDArray[Any] | None = None) -> Floats:
    """[I, P, E] float32: how many choices of each patch fall on each expert.

    Args:
        expert_index: [I, P, K].
        num_experts: E.
        amount: [I, P, K] what a choice counts: whether it was kept, or a weight; 1 if None.
    """
    chosen = np.asarray(expert_index)
    counts = np.zeros((*chosen.shape[:2], num_experts), np.float32)
    for choice in range(chosen.shape[2]):
        hit = chosen[:, :, choice, None] == np.arange(num_experts)
        counts += hit if amount is None else hit * np.asarray(amount[:, :, choice, None], np.float32)
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


def conditional_information_bits(tables: Floats | Ints) -> Floats:
    """Plug-in I(experts; value | stratum) of tables [..., G, V, E], in bits; [...]."""
    tables = np.asarray(tables, dtype=np.float64)
    weight = tables.sum((-2, -1))
    total = weight.sum(-1)
    result: Floats = (mutual_information_bits(tables) * weight).sum(-1) / np.where(total > 0, total, 1.0)
    return result


def entropy_bits(counts: Floats | Ints) -> float:
    """Entropy of a distribution given by counts [V], in bits."""
    counts = np.asarray(counts, dtype=np.float64)
    total = float(counts.sum())
    return float((_n_log2_n(np.asarray(total)) - _n_log2_n(counts).sum()) / total) if total > 0 else 0.0


def second_order_bias(sums: Floats, squares: Floats, images: Ints) -> Floats:
    """Bias of the plug-in, in bits, by the second-order delta method over images; [R].

    It is ``sum(variance / count) / (2 N ln 2)`` over the cells, minus the same over the sums of each expert. In sparse
    tables it is itself biased, so only differences between labellings of the same images are used.

    Args:
        sums: [R, G, V, E] choices.
        squares: [R, G, V, E] sums of the squares of each image's choices.
        images: [V] images of each class.
    """
    if not len(sums):
        return np.empty(0)
    sums, count = np.asarray(sums, np.float64), images[:, None]
    variance = np.maximum(squares - np.square(sums) / count, 0) * (count / np.maximum(1, count - 1))
    per_cell = _ratio(variance, sums).sum((1, 2, 3))
    per_expert = _ratio(variance.sum(2), sums.sum(2)).sum((1, 2))
    result: Floats = (per_cell - per_expert) / (2 * math.log(2) * sums[0].sum())
    return result


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    result: Floats = numerator / np.where(denominator > 0, denominator, 1.0)
    return result


def _n_log2_n(n: Floats) -> Floats:
    result: Floats = n * np.log2(np.where(n > 0, n, 1.0))
    return result


def pointwise_bits(tables: Floats) -> Floats:
    """Pointwise mutual information [..., V, E] of the cells of tables [..., V, E]; 0 in empty cells.

    It is the derivative of the plug-in by a cell's count, but for the factor 1 / N and the constant -MI.
    """
    tables = np.asarray(tables, dtype=np.float64)
    product = tables.sum(-1, keepdims=True) * tables.sum(-2, keepdims=True)
    ratio = tables * tables.sum((-2, -1), keepdims=True) / np.where(product > 0, product, 1.0)
    result: Floats = np.log2(np.where(ratio > 0, ratio, 1.0))
    return result

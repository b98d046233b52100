"""Averages of experts, after their hidden units were brought into one order.

An MLP computes the same whatever the order of its hidden units, so two experts that do alike things may hold them in
different orders, and the plain average of their weights is then neither. Each expert is first permuted to come as close
as possible to a reference expert.

Sources
    Ainsworth et al. 2023 (Git Re-Basin), arXiv:2209.04836: matching hidden units by their weights is a linear
    assignment problem.
    Li et al. 2024 (M-SMoE), arXiv:2310.01334: experts are aligned, then averaged with their use as weights.

Axes: E experts, H hidden units of one, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

State = dict[str, Tensor]
"""State of an `Experts` module: fc1.weight [E, H, D], fc1.bias [E, H], fc2.weight [E, D, H], fc2.bias [E, D]; biases
only where there are some."""


def expert_of(experts: State, index: int) -> State:
    """The weights of one expert, named as those of a timm Mlp."""
    return {name: packed[index] for name, packed in experts.items()}


def matching_units(expert: State, reference: State) -> Tensor:
    """The order of an expert's hidden units that brings them closest to those of another expert.

    A unit is its incoming weights, its bias and its outgoing weights. The sum of squared distances between matched
    units is smallest where the sum of their inner products is largest, since an order changes no length.

    Returns:
        [H] int64: unit i of `reference` corresponds to unit `order[i]` of `expert`.
    """
    from scipy.optimize import linear_sum_assignment  # not at import: it takes half a second

    products = _units(reference) @ _units(expert).T
    _, order = linear_sum_assignment(products.cpu().numpy(), maximize=True)
    return torch.as_tensor(order, device=products.device)


def _units(expert: State) -> Tensor:
    """[H, features] in float64."""
    parts = [expert["fc1.weight"], expert["fc2.weight"].T]
    if "fc1.bias" in expert:
        parts.append(expert["fc1.bias"].unsqueeze(1))
    return torch.cat(parts, dim=1).double()


def reordered(expert: State, order: Tensor) -> State:
    """The same expert with its hidden units in another order: it computes the same."""
    permuted = {**expert, "fc1.weight": expert["fc1.weight"][order], "fc2.weight": expert["fc2.weight"][:, order]}
    if "fc1.bias" in expert:
        permuted["fc1.bias"] = expert["fc1.bias"][order]
    return permuted


def average_experts(experts: State, members: Sequence[int], weights: Tensor, *, align: bool = True) -> State:
    """One expert out of several.

    Args:
        experts: all experts of a layer.
        members: those to average; the first one with the largest weight is the reference of the alignment.
        weights: [len(members)] not negative; see `shares`.
        align: bring hidden units into the reference's order first.

    Returns:
        Its weights, in the dtype of `experts`.
    """
    chosen = [expert_of(experts, member) for member in members]
    reference = chosen[int(weights.argmax())]
    if align:
        chosen = [one if one is reference else reordered(one, matching_units(one, reference)) for one in chosen]
    # Summed in float64, so that the average of equal weights is that weight, bit for bit.
    total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in reference.items()}
    for part, one in zip(shares(weights).tolist(), chosen, strict=True):
        for name, value in one.items():
            total[name] += part * value.double()
    return {name: value.to(reference[name].dtype) for name, value in total.items()}


def shares(weights: Tensor) -> Tensor:
    """Weights over their sum, in float64; equal ones where all are 0."""
    weights = weights.double()
    return weights / weights.sum() if weights.sum() > 0 else torch.full_like(weights, 1 / len(weights))

"""Capacity: how many choices an expert computes at most, and which ones it keeps when more fall on it.

- capacity and its order of filling: GShard (arXiv:2006.16668), algorithm 1; Switch (arXiv:2101.03961), eq. 3.
- batch priority routing: V-MoE (arXiv:2106.05974), §4.1.

Axes: B images, N tokens of an image, K choices of a token, E experts.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def capacity_of(factor: float, tokens: int, top_k: int, num_experts: int) -> int:
    """ceil(factor · tokens · K / E) choices."""
    # Less a hair: 1.1 times 10 is 11.000000000000002 in floating point, and no reason for a 12th place.
    return math.ceil(factor * tokens * top_k / num_experts - 1e-9)


def within_capacity(
    index: Tensor,
    weight: Tensor,
    kept: Tensor,
    num_experts: int,
    factor: float,
    *,
    priority: bool = True,
    whole_batch: bool = False,
) -> Tensor:
    """Which choices remain if an expert computes at most `capacity_of` choices of one group.

    All first choices come before all second ones. Among those, earlier tokens come first; with `priority` tokens with
    a larger first gate (of equal ones the earlier). A dropped choice goes nowhere else.

    Args:
        index: [B, N, K] chosen experts.
        weight: [B, N, K] their gates, best choice first.
        kept: [B, N, K] bool; choices that are dropped already take no room.
        num_experts: E.
        factor: capacity over the load of perfect balance.
        priority: V-MoE's batch priority routing.
        whole_batch: a group is the whole batch, so that a prediction depends on its batch-mates; else one image.

    Returns:
        [B, N, K] bool.
    """
    shape = kept.shape
    if whole_batch:
        index, weight, kept = (x.flatten(0, 1).unsqueeze(0) for x in (index, weight, kept))
    tokens, top_k = kept.shape[1:]
    # The queue of a group [B, K·N]: first choices of all tokens, then second ones, ...
    expert, alive = index.mT.flatten(1), kept.mT.flatten(1)
    if priority:
        by_gate = weight.amax(-1).argsort(dim=1, descending=True, stable=True)
        order = (by_gate.unsqueeze(1) + tokens * torch.arange(top_k, device=index.device).view(-1, 1)).flatten(1)
        expert, alive = expert.gather(1, order), alive.gather(1, order)
    # int32 one-hot of B·N·K·E numbers, which is what a queue place per expert costs.
    ahead = (F.one_hot(expert, num_experts).to(torch.int32) * alive.unsqueeze(-1)).cumsum(1, dtype=torch.int32)
    place = ahead.gather(-1, expert.unsqueeze(-1)).squeeze(-1)
    fits = alive & (place <= capacity_of(factor, tokens, top_k, num_experts))
    if priority:
        fits = torch.zeros_like(fits).scatter(1, order, fits)
    return fits.view(fits.shape[0], top_k, tokens).mT.reshape(shape)  # not len(): it would fix the size of an export

"""The whole MoE layer in plain, slow PyTorch. Read this first, then `moe.py`, which computes the same faster.

It is Shazeer's noisy top-k layer (arXiv:1701.06538), whose router is the default of `MoEMlp`.
tests/layers/test_reference.py tests that both have the same output, losses and gradients.

Axes: T tokens, D width, H hidden width of an expert, E experts, K experts per token, R tokens of one expert.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Choice(NamedTuple):
    """Which experts compute each token, with which weight, and the scores that decided it."""

    expert: Tensor  # [T, K] int64, best first
    gate: Tensor  # [T, K], sums to 1 over K (except for K = 1)
    logits: Tensor  # [T, E] clean scores
    noisy_logits: Tensor  # [T, E] scores with noise, of which the best K are chosen
    noise_std: Tensor | None  # [T, E], standard deviation of the noise, None without noise


class NoisyTopKRouter(nn.Module):
    """Scores every expert for every token and keeps the best K (eq. 3-5)."""

    def __init__(self, dim: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.zeros(num_experts, dim))
        self.noise_weight = nn.Parameter(torch.zeros(num_experts, dim))

    def forward(self, x: Tensor) -> Choice:
        """Choose K experts for each token of x [T, D]; noise in training only."""
        logits = F.linear(x, self.weight)  # [T, E]
        noisy = logits
        std = None
        if self.training:
            # The size of the noise is learned, for each token and expert.
            std = F.softplus(F.linear(x, self.noise_weight))  # [T, E]
            noisy = logits + torch.randn_like(logits) * std

        best_scores, expert = noisy.topk(self.top_k, dim=-1)  # [T, K] each
        gate = best_scores.softmax(-1)  # [T, K]
        if self.top_k == 1:
            # That softmax is the constant 1 and has no gradient: take the probability among all experts.
            gate = noisy.softmax(-1).gather(-1, expert)  # [T, 1]
        return Choice(expert, gate, logits, noisy, std)


class Expert(nn.Module):
    """An ordinary MLP of two layers."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map rows [R, D] -> [R, D]."""
        result: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return result


class ReferenceMoE(nn.Module):
    """y = Σ over the K chosen experts of gate · expert(x) (eq. 1)."""

    def __init__(self, dim: int, hidden: int, num_experts: int = 8, top_k: int = 2) -> None:
        super().__init__()
        self.router = NoisyTopKRouter(dim, num_experts, top_k)
        self.experts = nn.ModuleList(Expert(dim, hidden) for _ in range(num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Choice]:
        """Mix the experts' outputs for tokens x [..., D]; the choice is returned for the losses."""
        tokens = x.flatten(0, -2)  # [T, D]
        choice: Choice = self.router(tokens)
        y = torch.zeros_like(tokens)  # [T, D]
        for index, expert in enumerate(self.experts):
            # The tokens that chose this expert, and which of their K choices it is.
            token, rank = torch.where(choice.expert == index)  # [R] each
            gate = choice.gate[token, rank].unsqueeze(-1)  # [R, 1]
            y = y.index_add(0, token, gate * expert(tokens[token]))
        return y.view_as(x), choice


def importance_loss(choice: Choice) -> Tensor:
    """CV² of the experts' summed gates (eq. 6-7): 0 when all experts have the same total weight."""
    importance = choice.gate.new_zeros(choice.logits.shape[-1])  # [E]
    importance = importance.index_add(0, choice.expert.flatten(), choice.gate.flatten())
    return importance.var(correction=0) / importance.mean() ** 2


def load_loss(choice: Choice) -> Tensor:
    """CV² of the number of tokens that each expert is expected to get (eq. 8-11); needs noise, and K < E.

    That number sums, over tokens, the chance that the expert is chosen if its own noise alone is drawn again: that its
    score then exceeds the K-th best score of the *other* experts.
    """
    assert choice.noise_std is not None
    noisy = choice.noisy_logits  # [T, E]
    top_k = choice.expert.shape[-1]

    thresholds = []
    for expert in range(noisy.shape[-1]):
        others = torch.cat([noisy[:, :expert], noisy[:, expert + 1 :]], dim=-1)  # [T, E - 1]
        best_others = others.topk(top_k, dim=-1).values  # [T, K]
        thresholds.append(best_others[:, -1])  # [T]
    threshold = torch.stack(thresholds, dim=-1)  # [T, E]

    chance: Tensor = torch.special.ndtr((choice.logits - threshold) / choice.noise_std)  # [T, E]
    load = chance.sum(0)  # [E]
    return load.var(correction=0) / load.mean() ** 2

"""Decisions of experts that choose tokens (expert choice) or mix them (Soft MoE), and what interventions do to them.

- expert choice: each expert has a list of all tokens of the image, the best first, and takes the first C. An expert
  that is taken away takes none, and nobody takes its place: the others have chosen what suits them already.
- Soft MoE: each expert reads P slots, weighted means of all tokens. An expert that is taken away is one that tokens no
  longer take from; their weights over the other slots then sum to 1 again (`removed`) or stay (`silenced`).

Axes: B images, N tokens of an image (prefix tokens first), E experts, C tokens that an expert takes, P slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor

from moevision.analysis.decision import Decision, draw_orders, routing_kind
from moevision.analysis.ranking import Ranking
from moevision.layers import ExpertChoiceRouting, Routing, SoftRouting, capacity_of


@dataclass(frozen=True)
class TokenLists(Decision):
    """What a layer in which experts choose their tokens is about to decide.

    Attributes:
        order: [B, E, N] int64, all tokens of the image for each expert, best first.
        scores: [B, E, N] the affinity that stands at each rank and becomes the weight.
        top_k: K, experts per token on average.
        factor: C is ceil(factor · N · K / E).
    """

    per_image: ClassVar[tuple[str, ...]] = ("removed", "silenced", "order", "scores")

    order: Tensor
    scores: Tensor
    top_k: int
    factor: float = 1.0

    @classmethod
    def of(cls, router: Any, routing: ExpertChoiceRouting) -> Self:
        """The lists whose heads are `routing`."""
        affinity = routing.noisy_logits.softmax(-1).mT
        order = affinity.argsort(dim=-1, descending=True, stable=True)
        nobody = torch.zeros_like(routing.logits, dtype=torch.bool)
        scores = affinity.gather(-1, order)
        return cls(router, routing, nobody, nobody, order=order, scores=scores, top_k=router.top_k)

    def settle(self) -> Routing:
        """Each expert takes the first C of its list; weights are the router's own rule."""
        tokens = self.order.shape[-1]
        count = min(tokens, capacity_of(self.factor, tokens, self.top_k, self.routing.num_experts))
        index, weight = self.order[..., :count], self.scores[..., :count]
        removed, silenced = (mask.mT.gather(-1, index) for mask in (self.removed, self.silenced))
        weight = weight.masked_fill(removed, 0.0)
        by_expert = torch.zeros_like(self.scores)
        if self.router.options.normalize_gates:
            taken = by_expert.scatter(-1, index, weight).sum(1, keepdim=True)
            weight = (weight / taken.expand_as(by_expert).gather(-1, index)).masked_fill(removed, 0.0)
        weight = weight.masked_fill(silenced, 0.0)
        computed = by_expert.scatter(-1, index, (~removed & ~silenced).to(by_expert.dtype)).mT
        weights = by_expert.scatter(-1, index, weight).mT
        view = _token_view(weights, computed.bool(), order=weights + computed)
        return replace(cast(ExpertChoiceRouting, self.routing), token_index=index, token_weight=weight, **view)

    def exchange(self, a: int, b: int) -> Self:
        """Let each of two experts take the other's tokens, with the other's weights."""
        order, scores = (_swapped(x, a, b, 1) for x in (self.order, self.scores))
        return replace(self, order=order, scores=scores)

    def shuffle(self, key: Sequence[int]) -> Self:
        """Let every expert take the tokens at positions drawn at random; weights stay with the rank."""
        _, num_experts, tokens = self.order.shape
        return replace(self, order=draw_orders(key, num_experts, tokens, self.order.device).expand_as(self.order))

    def at_top_k(self, top_k: int) -> Self:
        """As many tokens per expert as a model built with this K takes."""
        return replace(self, top_k=top_k)

    def at_capacity(self, factor: float) -> Self:
        """`factor` times as many tokens per expert."""
        return replace(self, factor=factor)


@dataclass(frozen=True)
class SlotWeights(Decision):
    """What a Soft MoE layer is about to decide.

    Attributes:
        reads: [B, N, E, P] what each slot reads.
        takes: [B, N, E, P] what each token takes of each slot.
    """

    per_image: ClassVar[tuple[str, ...]] = ("removed", "silenced", "reads", "takes")

    reads: Tensor
    takes: Tensor

    @classmethod
    def of(cls, router: Any, routing: SoftRouting) -> Self:
        """The weights as they are."""
        nobody = torch.zeros_like(routing.logits, dtype=torch.bool)
        return cls(router, routing, nobody, nobody, reads=routing.dispatch_weight, takes=routing.slot_weight)

    def settle(self) -> Routing:
        """The weights without what is taken away."""
        left = self.takes.masked_fill(self.removed.unsqueeze(-1), 0.0)
        # A token that lost nothing keeps its weights to the bit: their sum is only about 1.
        total = left.flatten(2).sum(-1)[..., None, None]
        lost = self.removed.any(-1)[..., None, None] & (total > 0)
        takes = torch.where(lost, left / torch.where(lost, total, 1.0), left)
        takes = takes.masked_fill(self.silenced.unsqueeze(-1), 0.0)
        computed = ~(self.removed | self.silenced)
        weights = takes.sum(-1)
        view = _token_view(weights, computed, order=weights.masked_fill(~computed, -1.0))
        return replace(cast(SoftRouting, self.routing), dispatch_weight=self.reads, slot_weight=takes, **view)

    def exchange(self, a: int, b: int) -> Self:
        """Let each of two experts compute the other's slots."""
        return replace(self, reads=_swapped(self.reads, a, b, 2), takes=_swapped(self.takes, a, b, 2))

    def shuffle(self, key: Sequence[int]) -> Self:
        """Deal all E · P slots out to the experts at random, P to each; what a slot reads and gives stays the same."""
        slots = self.takes.shape[2] * self.takes.shape[3]
        order = draw_orders(key, 1, slots, self.takes.device)[0]
        reads, takes = (x.flatten(2)[..., order].view_as(x) for x in (self.reads, self.takes))
        return replace(self, reads=reads, takes=takes)


def decision_of(router: Any, routing: Routing) -> Decision:
    """A router's decision in the form of its kind."""
    kinds: dict[str, type[Decision]] = {"token_choice": Ranking, "expert_choice": TokenLists, "soft": SlotWeights}
    return kinds[routing_kind(router)].of(router, routing)


def _token_view(weights: Tensor, computed: Tensor, order: Tensor) -> dict[str, Any]:
    """The token's view of `Routing`: all experts, the largest `order` first.

    Args:
        weights: [B, N, E].
        computed: [B, N, E] bool.
        order: [B, N, E].
    """
    index = order.argsort(dim=-1, descending=True, stable=True)
    return {
        "expert_index": index,
        "combine_weight": weights.gather(-1, index),
        "kept": computed.gather(-1, index),
    }


def _swapped(x: Tensor, a: int, b: int, dim: int) -> Tensor:
    """The same with two entries of an axis exchanged."""
    order = torch.arange(x.shape[dim], device=x.device)
    order[a], order[b] = b, a
    return x.index_select(dim, order)

"""Token choice as a ranked list of experts for each token, and what an intervention may do to that list.

A router's choice is the head of a list: all E experts, the K chosen ones first, the others by the score that the router
chooses by. Taking an expert away, forcing one or choosing another k are edits of the list, so they compose;
`Ranking.settle` reads the decision off it, with the gates of the router's own rule and within its own capacity.

Axes: B images, N tokens of an image (prefix tokens first), E experts, K choices of a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from moevision.analysis.decision import Decision, draw_orders
from moevision.layers import Routing, TopKRouter, within_capacity


@dataclass(frozen=True)
class Capacity:
    """How many choices an expert computes at most, see `moevision.layers.within_capacity`.

    Attributes:
        factor: over the load of perfect balance.
        priority: V-MoE's batch priority routing: tokens with larger first gates come first.
        whole_batch: the limit is one of the whole batch instead of one image.
    """

    factor: float
    priority: bool = True
    whole_batch: bool = False

    @classmethod
    def own(cls, router: Any) -> Capacity | None:
        """What a router itself applies in its present mode; None for no limit."""
        if not isinstance(router, TopKRouter):
            return None
        options = router.options
        factor = options.capacity_factor if router.training else options.eval_capacity_factor
        return None if factor is None else cls(factor, bool(options.batch_priority), options.capacity_group == "batch")


@dataclass(frozen=True)
class Ranking(Decision):
    """What a layer in which tokens choose their experts is about to decide.

    An expert that is `removed` for a token is replaced by its next-best one.

    Attributes:
        order: [B, N, E] int64, all experts of a token, best first, no expert twice.
        scores: [B, N, E] what stands at each rank and makes its gate (`router.gate_logits`, which needn't be what the
            router chooses by). It is the expert's own, unless an edit put another expert at that rank: weights then
            stay with the rank.
        top_k: K.
        capacity: applied last, to whatever the edits have left; None for no limit.
    """

    per_image: ClassVar[tuple[str, ...]] = ("removed", "silenced", "order", "scores")

    order: Tensor
    scores: Tensor
    top_k: int
    capacity: Capacity | None = None

    @classmethod
    def of(cls, router: Any, routing: Routing) -> Self:
        """The list whose head is `routing`."""
        nobody = torch.zeros_like(routing.logits, dtype=torch.bool)
        chosen = nobody.scatter(-1, routing.expert_index, True)
        # The router's own order of the chosen is kept: among equal scores topk and sort may disagree.
        others = routing.noisy_logits.masked_fill(chosen, -math.inf).argsort(dim=-1, descending=True, stable=True)
        order = torch.cat([routing.expert_index, others[..., : routing.num_experts - routing.top_k]], -1)
        capacity = Capacity.own(router)
        # What the router's capacity dropped is no property of the choice: it is found again after the edits.
        dropped = nobody if capacity else nobody.scatter(-1, routing.expert_index, ~routing.kept)
        return cls(
            router=router,
            routing=routing,
            removed=nobody,
            silenced=dropped,
            order=order,
            scores=router.gate_logits(routing).gather(-1, order),
            top_k=routing.top_k,
            capacity=capacity,
        )

    def settle(self) -> Routing:
        """The decision: the first K experts that aren't removed, as far as the capacity allows.

        A token left with fewer than K experts has choices with kept = False and weight 0.
        """
        gone = self.removed.gather(-1, self.order)
        place = gone.to(torch.uint8).argsort(dim=-1, stable=True)[..., : self.top_k]
        index, exists = self.order.gather(-1, place), ~gone.gather(-1, place)
        top_scores = self.scores.gather(-1, place).masked_fill(~exists, -math.inf)
        gate_logits = self.router.gate_logits(self.routing)
        weight = self.router.gates(gate_logits, top_scores).masked_fill(~exists, 0.0)
        kept = exists & ~self.silenced.gather(-1, index)
        if self.capacity is not None:
            by = weight
            if isinstance(self.router, TopKRouter):
                by = self.router.priority(gate_logits, top_scores).masked_fill(~exists, 0.0)
            kept = within_capacity(
                index,
                by,
                kept,
                self.routing.num_experts,
                self.capacity.factor,
                priority=self.capacity.priority,
                whole_batch=self.capacity.whole_batch,
            )
        return replace(self.routing, expert_index=index, combine_weight=weight, kept=kept)

    def put_first(self, expert: int) -> Self:
        """Put an expert first for every token; the others follow in their old order, weights stay with the rank."""
        back = (self.order != expert).to(torch.uint8)
        return replace(self, order=self.order.gather(-1, back.argsort(dim=-1, stable=True)))

    def exchange(self, a: int, b: int) -> Self:
        """Give expert a's tokens to expert b, with the weight that they gave a, and the other way round."""
        order = self.order
        return replace(self, order=order.masked_fill(order == a, b).masked_fill(order == b, a))

    def shuffle(self, key: Sequence[int]) -> Self:
        """Send the token at each position to experts drawn at random, K different ones; weights stay with the rank.

        The draw depends on the key and the position only: every image is sent the same way, alone or in any batch.
        """
        _, tokens, num_experts = self.order.shape
        return replace(self, order=draw_orders(key, tokens, num_experts, self.order.device).expand_as(self.order))

    def at_top_k(self, top_k: int) -> Self:
        """The first `top_k` of the list."""
        return replace(self, top_k=top_k)

    def at_capacity(self, factor: float) -> Self:
        """A limit per image with batch priority, in place of any other."""
        return replace(self, capacity=Capacity(factor))

    def apart(self) -> Self:
        """Every image limited by itself, whatever the router shares a capacity over."""
        return replace(self, capacity=self.capacity and replace(self.capacity, whole_batch=False))

"""A layer's decision as something that interventions can change, in the form of its kind of router.

- Token choice (`Ranking`): each token has a list of all E experts, the K chosen first, the others by the score that the
  router chooses by. Taking an expert away, forcing one or choosing another k are edits of the list, so they compose.
- Expert choice (`TokenLists`): each expert has a list of all tokens of the image, best first, and takes the first C. An
  expert that is taken away takes none, and no other takes its place: the others have already chosen.
- Soft MoE (`SlotWeights`): each expert reads slots, weighted means of all tokens. An expert that is taken away is one
  that tokens no longer take from; their weights over the other slots then sum to 1 again (`removed`) or stay
  (`silenced`).

`settle` reads the edited decision off, with the gates of the router's own rule and within its own capacity. Every edit
is a pure function of one image's own tokens: nothing depends on what else is in the batch.

Axes: B images, N tokens of an image (prefix tokens first), E experts, K choices of a token, C tokens that an expert
takes, P slots of an expert.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self, cast

import numpy as np
import torch
from torch import Tensor

from moevision.layers import (
    ExpertChoiceRouter,
    ExpertChoiceRouting,
    Routing,
    SoftRouter,
    SoftRouting,
    TopKRouter,
    capacity_of,
    within_capacity,
)
from moevision.layers.routing import Kind as RoutingKind


@dataclass(frozen=True)
class Decision(ABC):
    """What an MoE layer is about to decide.

    Attributes:
        router: whose rule gives the weights.
        routing: what the router itself decided; its scores and probabilities stay as they are.
        removed: [B, N, E] bool, experts that are away for a token; what takes their place depends on the kind.
        silenced: [B, N, E] bool, experts that don't compute a token; nothing takes the place, other weights stay.
    """

    per_image: ClassVar[tuple[str, ...]] = ("removed", "silenced")
    """Fields whose first axis is B."""

    router: Any
    routing: Routing
    removed: Tensor
    silenced: Tensor

    @classmethod
    @abstractmethod
    def of(cls, router: Any, routing: Any) -> Self:
        """The decision that, settled at once, is `routing` bit for bit."""

    @abstractmethod
    def settle(self) -> Routing:
        """What the layer will compute."""

    @abstractmethod
    def exchange(self, a: int, b: int) -> Self:
        """Give to expert b what is expert a's, with its weights, and the other way round."""

    @abstractmethod
    def shuffle(self, key: Sequence[int]) -> Self:
        """Replace the router's choice by one drawn at random, the same for every image; weights stay with the rank."""

    def put_first(self, expert: int) -> Self:
        """Make an expert every token's first choice."""
        raise NotImplementedError(f"{type(self).__name__} has no first choice")

    def at_top_k(self, top_k: int) -> Self:
        """Choose as with another K."""
        raise NotImplementedError(f"{type(self).__name__} has no choice of K experts")

    def at_capacity(self, factor: float) -> Self:
        """Let an expert compute at most `factor` times its fair share of one image."""
        raise NotImplementedError(f"{type(self).__name__} has no capacity")

    def remove(self, expert: int) -> Self:
        """Take an expert away."""
        return replace(self, removed=self.removed | self._is(expert))

    def silence(self, expert: int) -> Self:
        """Set an expert's output to zero; the weights of the others stay as they are."""
        return replace(self, silenced=self.silenced | self._is(expert))

    def row(self, image: int) -> Self:
        """The decision about one image of the batch, B = 1."""
        one = slice(image, image + 1)
        tensors: dict[str, Any] = {
            field.name: value[one]
            for field in fields(self.routing)
            if isinstance(value := getattr(self.routing, field.name), Tensor)
        }
        if self.routing.noise_std is not None:
            tensors["noise_std"] = self.routing.noise_std.expand_as(self.routing.logits)[one]
        own: dict[str, Any] = {name: getattr(self, name)[one] for name in self.per_image}
        return replace(self, routing=replace(self.routing, **tensors), **own)

    def _is(self, expert: int) -> Tensor:
        return torch.arange(self.routing.num_experts, device=self.routing.logits.device) == expert


Edit = Callable[[Any], Any]
"""Of a decision, to one of the same kind."""


def each_row(edits: Sequence[Edit]) -> Edit:
    """An edit that treats every image of a batch by its own edit; those must leave K and the capacity alone."""

    def edit(decision: Decision) -> Decision:
        rows = [own(decision.row(image)) for image, own in enumerate(edits)]
        joined: dict[str, Any] = {name: torch.cat([getattr(row, name) for row in rows]) for name in decision.per_image}
        return replace(decision, **joined)

    return edit


def computed_pairs(routing: Routing) -> Tensor:
    """[B, N, E] bool: which expert computes which token; of Soft MoE: from which expert a token takes anything."""
    return torch.zeros_like(routing.logits, dtype=torch.bool).scatter(-1, routing.expert_index, routing.kept)


def draw_orders(key: Sequence[int], rows: int, length: int, device: torch.device) -> Tensor:
    """[rows, length] int64: random orders of 0 .. length - 1, the same for the same key on every machine."""
    drawn = np.random.default_rng(tuple(key)).random((rows, length)).argsort(-1)
    return torch.from_numpy(drawn).to(device)


def routing_kind(router: Any) -> RoutingKind:
    """Who chooses: tokens their experts, experts their tokens, or nobody (Soft MoE)."""
    if isinstance(router, ExpertChoiceRouter):
        return "expert_choice"
    return "soft" if isinstance(router, SoftRouter) else "token_choice"


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
        gone = self.removed.gather(-1, self.order)  # [B, N, E] by rank
        place = gone.to(torch.uint8).argsort(dim=-1, stable=True)[..., : self.top_k]  # [B, N, K] the first K ranks left
        index, exists = self.order.gather(-1, place), ~gone.gather(-1, place)  # [B, N, K]
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
        back = (self.order != expert).to(torch.uint8)  # [B, N, E] 0 for the expert, which a stable sort puts first
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
        affinity = routing.noisy_logits.softmax(-1).mT  # [B, E, N]
        order = affinity.argsort(dim=-1, descending=True, stable=True)
        nobody = torch.zeros_like(routing.logits, dtype=torch.bool)
        scores = affinity.gather(-1, order)
        return cls(router, routing, nobody, nobody, order=order, scores=scores, top_k=router.top_k)

    def settle(self) -> Routing:
        """Each expert takes the first C of its list; weights are the router's own rule."""
        tokens = self.order.shape[-1]
        count = min(tokens, capacity_of(self.factor, tokens, self.top_k, self.routing.num_experts))
        index, weight = self.order[..., :count], self.scores[..., :count]  # [B, E, C]
        removed, silenced = (mask.mT.gather(-1, index) for mask in (self.removed, self.silenced))
        weight = weight.masked_fill(removed, 0.0)
        by_expert = torch.zeros_like(self.scores)  # [B, E, N]
        if self.router.options.normalize_gates:
            taken = by_expert.scatter(-1, index, weight).sum(1, keepdim=True)  # [B, 1, N]
            weight = (weight / taken.expand_as(by_expert).gather(-1, index)).masked_fill(removed, 0.0)
        weight = weight.masked_fill(silenced, 0.0)
        computed = by_expert.scatter(-1, index, (~removed & ~silenced).to(by_expert.dtype)).mT
        weights = by_expert.scatter(-1, index, weight).mT  # [B, N, E]
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
        total = left.flatten(2).sum(-1)[..., None, None]  # [B, N, 1, 1]
        lost = self.removed.any(-1)[..., None, None] & (total > 0)
        takes = torch.where(lost, left / torch.where(lost, total, 1.0), left)
        takes = takes.masked_fill(self.silenced.unsqueeze(-1), 0.0)
        computed = ~(self.removed | self.silenced)
        weights = takes.sum(-1)  # [B, N, E]
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

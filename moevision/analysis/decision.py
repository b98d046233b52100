"""A layer's decision as something that interventions can change, whatever kind of router made it.

Each kind of routing has its own form (`ranking.py`: a token's list of experts; `slot_decision.py`: an expert's list of
tokens, and the weights of Soft MoE's slots). What they share stands here: edits that compose, taking assignments of
tokens to experts away, and a batch of which every image has its own edit.

Every edit is a pure function of one image's own tokens: nothing depends on what else is in the batch.

Axes: B images, N tokens of an image (prefix tokens first), E experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from moevision.layers import ExpertChoiceRouter, Routing, SoftRouter
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

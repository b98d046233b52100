"""A layer's decision as a ranked list of experts for each token, and what an intervention may do to that list.

A router's choice is the head of a list: all E experts, the K chosen ones first, the others by their score. Taking an
expert away, forcing one or choosing another k are edits of the list, so they compose; `Ranking.settle` reads the
decision off it, with the gates of the router's own rule.

Every edit is a pure function of one image's own tokens: nothing depends on what else is in the batch.

Axes: B images, N tokens of an image (prefix tokens first), E experts, K choices of a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moevision.layers import Routing, TopKRouter


@dataclass(frozen=True)
class Ranking:
    """What an MoE layer is about to decide.

    Attributes:
        router: whose rule gives the gates.
        routing: what the router itself decided; its scores and probabilities stay as they are.
        order: [B, N, E] int64, all experts of a token, best first, no expert twice.
        scores: [B, N, E] the noisy logit that stands at each rank and makes its gate. It is the expert's own, unless
            an edit put another expert at that rank: weights then stay with the rank.
        removed: [B, N, E] bool, experts that a token can't choose; its next-best one takes the place.
        silenced: [B, N, E] bool, experts that a token may choose but that don't compute it; nothing takes the place.
        top_k: K.
        capacity_factor: limits what one expert computes of one image (see `within_capacity`); None for no limit.
    """

    router: TopKRouter
    routing: Routing
    order: Tensor
    scores: Tensor
    removed: Tensor
    silenced: Tensor
    top_k: int
    capacity_factor: float | None = None

    @classmethod
    def of(cls, router: TopKRouter, routing: Routing) -> Ranking:
        """The list whose head is `routing`: settled at once, it gives the same decision bit for bit."""
        nobody = torch.zeros_like(routing.logits, dtype=torch.bool)
        chosen = nobody.scatter(-1, routing.expert_index, True)
        # The router's own order of the chosen is kept: among equal scores topk and sort may disagree.
        others = routing.noisy_logits.masked_fill(chosen, -math.inf).argsort(dim=-1, descending=True, stable=True)
        order = torch.cat([routing.expert_index, others[..., : routing.num_experts - routing.top_k]], -1)
        return cls(
            router=router,
            routing=routing,
            order=order,
            scores=routing.noisy_logits.gather(-1, order),
            removed=nobody,
            silenced=nobody.scatter(-1, routing.expert_index, ~routing.kept),
            top_k=routing.top_k,
        )

    def settle(self) -> Routing:
        """The decision: the first K experts that aren't removed.

        A token left with fewer than K experts has choices with kept = False and weight 0.
        """
        gone = self.removed.gather(-1, self.order)
        place = gone.to(torch.uint8).argsort(dim=-1, stable=True)[..., : self.top_k]
        index, exists = self.order.gather(-1, place), ~gone.gather(-1, place)
        top_scores = self.scores.gather(-1, place).masked_fill(~exists, -math.inf)
        weight = self.router.gates(self.routing.noisy_logits, top_scores).masked_fill(~exists, 0.0)
        kept = exists & ~self.silenced.gather(-1, index)
        if self.capacity_factor is not None:
            kept = within_capacity(index, weight, kept, self.routing.num_experts, self.capacity_factor)
        return replace(self.routing, expert_index=index, combine_weight=weight, kept=kept)

    def row(self, image: int) -> Ranking:
        """The ranking of one image of the batch, B = 1."""
        one = slice(image, image + 1)
        routing, noise_std = self.routing, self.routing.noise_std
        cut = replace(
            routing,
            logits=routing.logits[one],
            noisy_logits=routing.noisy_logits[one],
            probs=routing.probs[one],
            noise_std=None if noise_std is None else noise_std.expand_as(routing.logits)[one],
            expert_index=routing.expert_index[one],
            combine_weight=routing.combine_weight[one],
            kept=routing.kept[one],
        )
        return replace(
            self,
            routing=cut,
            order=self.order[one],
            scores=self.scores[one],
            removed=self.removed[one],
            silenced=self.silenced[one],
        )


Edit = Callable[[Ranking], Ranking]


def remove(ranking: Ranking, expert: int) -> Ranking:
    """Take an expert away; its tokens go to their next-best expert, with that one's own gate."""
    return replace(ranking, removed=ranking.removed | _is(expert, ranking))


def silence(ranking: Ranking, expert: int) -> Ranking:
    """Set an expert's output to zero; the gates of the others stay as they are."""
    return replace(ranking, silenced=ranking.silenced | _is(expert, ranking))


def put_first(ranking: Ranking, expert: int) -> Ranking:
    """Make an expert every token's first choice; the others follow in their old order, weights stay with the rank."""
    back = (ranking.order != expert).to(torch.uint8)
    return replace(ranking, order=ranking.order.gather(-1, back.argsort(dim=-1, stable=True)))


def exchange(ranking: Ranking, a: int, b: int) -> Ranking:
    """Give expert a's tokens to expert b, with the weight that they gave a, and the other way round."""
    order = ranking.order
    return replace(ranking, order=order.masked_fill(order == a, b).masked_fill(order == b, a))


def shuffle(ranking: Ranking, key: Sequence[int]) -> Ranking:
    """Send the token at each position to experts drawn at random, K different ones; weights stay with the rank.

    The draw depends on the key and the position only: every image is sent the same way, alone or in any batch.
    """
    _, tokens, num_experts = ranking.order.shape
    drawn = np.random.default_rng(tuple(key)).random((tokens, num_experts)).argsort(-1)
    order = torch.from_numpy(drawn).to(ranking.order.device)
    return replace(ranking, order=order.expand_as(ranking.order))


def each_row(edits: Sequence[Edit]) -> Edit:
    """An edit that treats every image of a batch by its own edit; those must leave top_k and the capacity alone."""

    def edit(ranking: Ranking) -> Ranking:
        rows = [own(ranking.row(image)) for image, own in enumerate(edits)]
        return replace(
            ranking,
            order=torch.cat([row.order for row in rows]),
            scores=torch.cat([row.scores for row in rows]),
            removed=torch.cat([row.removed for row in rows]),
            silenced=torch.cat([row.silenced for row in rows]),
        )

    return edit


def within_capacity(index: Tensor, weight: Tensor, kept: Tensor, num_experts: int, factor: float) -> Tensor:
    """Which choices remain if an expert computes at most ceil(factor · N · K / E) choices of ONE image.

    Where more choose it, those with the largest gate weight stay (earlier tokens where weights are equal), as in
    V-MoE's batch priority routing (arXiv:2106.05974, §4) but within an image. A dropped choice goes nowhere else.

    Args:
        index: [B, N, K] chosen experts.
        weight: [B, N, K] their gates.
        kept: [B, N, K] bool; choices that are dropped already take no room.
        num_experts: E.
        factor: capacity over the load of perfect balance.

    Returns:
        [B, N, K] bool.
    """
    shape = kept.shape
    capacity = capacity_of(factor, shape[1], shape[2], num_experts)
    by_weight = weight.flatten(1).argsort(dim=1, descending=True, stable=True)
    expert, alive = index.flatten(1).gather(1, by_weight), kept.flatten(1).gather(1, by_weight)
    taken = (F.one_hot(expert, num_experts) * alive.unsqueeze(-1)).cumsum(1)
    fits = alive & (taken.gather(-1, expert.unsqueeze(-1)).squeeze(-1) <= capacity)
    return torch.zeros_like(fits).scatter(1, by_weight, fits).view(shape)


def capacity_of(factor: float, tokens: int, top_k: int, num_experts: int) -> int:
    """ceil(factor · N · K / E) choices."""
    # Less a hair: 1.1 times 10 is 11.000000000000002 in floating point, and no reason for a 12th place.
    return math.ceil(factor * tokens * top_k / num_experts - 1e-9)


def _is(expert: int, ranking: Ranking) -> Tensor:
    return torch.arange(ranking.routing.num_experts, device=ranking.order.device) == expert

"""Routing where experts choose or mix tokens instead of being chosen: each expert has a fixed number of slots.

- expert choice (Zhou et al. 2022, arXiv:2202.09368): a slot holds one token of the image, which the expert chose.
- Soft MoE (Puigcerver et al. 2023, arXiv:2308.00951): a slot holds a weighted mean of all tokens of the image.

Both carry the token's view of `Routing` too: all E experts of a token, the one with the largest weight first. So
everything that reads `expert_index`, `combine_weight`, `kept` or `expert_weights()` works unchanged.

Axes: B images, N tokens of an image, E experts, C tokens that an expert takes of one image, P slots of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from moevision.layers.routing import Kind, Routing


@dataclass(frozen=True)
class ExpertChoiceRouting(Routing):
    """Each expert takes the C tokens of every image that suit it best; a token has between 0 and E experts.

    In the token's view (K = E) `kept` is True where an expert took the token.

    Attributes:
        token_index: [B, E, C] int64, tokens that each expert takes, best first.
        token_weight: [B, E, C] weight of each of them in the output of its token.
    """

    kind: ClassVar[Kind] = "expert_choice"
    token_index: Tensor = field(kw_only=True)
    token_weight: Tensor = field(kw_only=True)

    @classmethod
    def of(
        cls,
        logits: Tensor,
        noisy_logits: Tensor,
        noise_std: Tensor | None,
        token_index: Tensor,
        token_weight: Tensor,
    ) -> ExpertChoiceRouting:
        """The decision with its token's view.

        Args:
            logits: [B, N, E] clean scores.
            noisy_logits: [B, N, E] the scores that the choice was made on.
            noise_std: their standard deviation, or None.
            token_index: [B, E, C].
            token_weight: [B, E, C].
        """
        by_expert = logits.new_zeros(logits.mT.shape)
        weights = by_expert.scatter(-1, token_index, token_weight).mT
        taken = by_expert.scatter(-1, token_index, 1.0).mT
        # Taken ones first even where their weight has underflowed to 0; equal weights in the order of experts.
        expert_index = torch.where(taken > 0, weights, -1.0).argsort(dim=-1, descending=True, stable=True)
        return cls(
            logits=logits,
            noisy_logits=noisy_logits,
            probs=logits.softmax(-1),
            noise_std=noise_std,
            expert_index=expert_index,
            combine_weight=weights.gather(-1, expert_index),
            kept=taken.gather(-1, expert_index).bool(),
            token_index=token_index,
            token_weight=token_weight,
        )

    def requested_counts(self) -> Tensor:
        """[E] int64: as `counts()`; experts take exactly what they compute."""
        return self.counts()


@dataclass(frozen=True)
class SoftRouting(Routing):
    """Each slot reads a weighted mean of all tokens of its image, each token a weighted mean of all slots.

    In the token's view (K = E, all kept) an expert's weight is the sum over its slots.

    Attributes:
        dispatch_weight: [B, N, E, P] what each slot reads; sums to 1 over the tokens.
        slot_weight: [B, N, E, P] what each token takes; sums to 1 over all slots.
    """

    kind: ClassVar[Kind] = "soft"
    dispatch_weight: Tensor = field(kw_only=True)
    slot_weight: Tensor = field(kw_only=True)

    @classmethod
    def of(cls, slot_logits: Tensor, noisy_slot_logits: Tensor | None = None) -> SoftRouting:
        """The decision that slot logits [B, N, E, P] make, with its token's view.

        An expert's logit is the log of the sum over its slots, so that `probs` are the softmax of `logits`.
        """
        made_on = slot_logits if noisy_slot_logits is None else noisy_slot_logits
        slot_weight = made_on.flatten(2).softmax(-1).view_as(made_on)
        weights = slot_weight.sum(-1)
        expert_index = weights.argsort(dim=-1, descending=True, stable=True)
        logits = slot_logits.logsumexp(-1)
        return cls(
            logits=logits,
            noisy_logits=logits if noisy_slot_logits is None else made_on.logsumexp(-1),
            probs=logits.softmax(-1),
            noise_std=None,
            expert_index=expert_index,
            combine_weight=weights.gather(-1, expert_index),
            kept=torch.ones_like(expert_index, dtype=torch.bool),
            dispatch_weight=made_on.softmax(1),
            slot_weight=slot_weight,
        )

    def counts(self) -> Tensor:
        """[E] int64: slots that each expert computes, the same for all."""
        images, _, num_experts, slots = self.slot_weight.shape
        return torch.full((num_experts,), images * slots, dtype=torch.int64, device=self.logits.device)

    def image_counts(self) -> Tensor:
        """[B, E] int64: slots that each expert computes in each image, the same everywhere."""
        images, _, num_experts, slots = self.slot_weight.shape
        return torch.full((images, num_experts), slots, dtype=torch.int64, device=self.logits.device)

    def requested_counts(self) -> Tensor:
        """[E] int64: as `counts()`; no slot is ever dropped."""
        return self.counts()

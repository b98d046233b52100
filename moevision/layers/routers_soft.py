"""Routers in which experts choose tokens, or mix them: each expert has a fixed number of slots per image.

- expert choice (Zhou et al. 2022, arXiv:2202.09368): a slot holds one token of the image, which the expert chose.
- Soft MoE (Puigcerver et al. 2023, arXiv:2308.00951): a slot holds a weighted mean of all tokens of the image.

Both are balanced by construction and need no balance loss. Tokens compete within one image only, so a prediction never
depends on the other images of the batch. Their `Routing` also holds the "token's view" (`token_view`), the fields of
token choice with K = E: for each token all E experts, the one with the largest weight first. So everything that reads
`expert_index`, `combine_weight`, `kept` or `expert_weights()` works unchanged.

Axes: B images, N tokens of an image, T = B · N tokens, D width, E experts, K experts per token on average,
C = ceil(N · K / E) tokens that an expert takes of an image, P slots of an expert in an image, R rows that are computed:
E · B · C (expert choice) or E · B · P (Soft MoE).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moevision.config import Noise, RouterOptions
from moevision.errors import UserError
from moevision.layers.experts import Experts
from moevision.layers.routing import (
    Dispatched,
    Kind,
    Router,
    Routing,
    at_least_float32,
    capacity_of,
    full_precision,
)
from moevision.layers.words import by_experts, by_slots

_EPS = 1e-6  # added to the squared norm before the root, as in Soft MoE's released code


def token_view(weights: Tensor, computed: Tensor) -> dict[str, Any]:
    """The token's view: fields of a `Routing` in which every token chose all E experts, sorted by weight.

    Args:
        weights: [B, N, E] weight of each expert in the output of each token.
        computed: [B, N, E] bool, whether the expert computes the token. Such experts come first even if a weight has
            underflowed to 0; equal weights are sorted by expert.
    """
    # [B, N, E] experts of each token, by rank
    index = weights.masked_fill(~computed, -1.0).argsort(dim=-1, descending=True, stable=True)
    return {
        "expert_index": index,
        "combine_weight": weights.gather(-1, index),
        "kept": computed.gather(-1, index),
    }


@dataclass(frozen=True)
class ExpertChoiceRouting(Routing):
    """Each expert takes the C tokens of every image with its highest scores; a token gets between 0 and E experts.

    In the token's view `kept` is True if the expert took the token.
    """

    kind: ClassVar[Kind] = "expert_choice"
    # [B, E, C] int64, the tokens (0 to N - 1) that each expert takes of each image, best first
    token_index: Tensor = field(kw_only=True)
    # [B, E, C] weight of the expert in the output of each of these tokens
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
        """Build the routing, with its token's view: logits [B, N, E], tokens and weights of the experts [B, E, C]."""
        zeros = logits.new_zeros(logits.mT.shape)  # [B, E, N]
        weights = zeros.scatter(-1, token_index, token_weight).mT  # [B, N, E]
        taken = zeros.scatter(-1, token_index, 1.0).mT > 0  # [B, N, E]

        return cls(
            logits=logits,
            noisy_logits=noisy_logits,
            probs=logits.softmax(-1),
            noise_std=noise_std,
            token_index=token_index,
            token_weight=token_weight,
            **token_view(weights, taken),
        )

    def requested_counts(self) -> Tensor:
        """[E] int64: the same as `counts()`, since an expert computes every token that it takes."""
        return self.counts()

    def dispatch(self, x: Tensor, *, pad: bool = True) -> Dispatched:
        """Rows [R, D] for the experts: copies of the tokens x [T, D] that each one took, sorted by expert, then image.

        All experts get equally many rows, so nothing is padded.
        """
        images, tokens, num_experts = self.logits.shape
        first_token = torch.arange(images, device=x.device).view(-1, 1, 1) * tokens  # [B, 1, 1]
        token = _by_expert(self.token_index + first_token)  # [R], 0 to T - 1
        rows_per_expert = token.numel() // num_experts
        counts = torch.full((num_experts,), rows_per_expert, device=x.device)
        return Dispatched(x.index_select(0, token), counts, token)

    def combine(self, rows: Tensor, dispatched: Dispatched) -> Tensor:
        """Weighted sum [T, D] of the rows [R, D] that are copies of each token; 0 for a token that no expert took."""
        assert dispatched.token is not None
        images, tokens, _ = self.logits.shape
        weight = _by_expert(self.token_weight).to(rows.dtype).unsqueeze(-1)  # [R, 1]
        out = rows.new_zeros(images * tokens, rows.shape[-1])  # [T, D]
        return out.index_add(0, dispatched.token, rows * weight)


def _by_expert(x: Tensor) -> Tensor:
    """[B, E, C] -> [R], sorted by expert, then image."""
    return x.transpose(0, 1).flatten()


class ExpertChoiceRouter(Router):
    """`S = softmax over experts(x W + ε)`; expert i takes its C best tokens by S[:, i], and S is their weight.

    The noise ε ~ N(0, 1/E²), in training only, is that of V-MoE's released code; the paper has none. K is how many
    experts a token has on average (the paper's capacity factor). With `normalize_gates` a token's weights sum to 1 if
    any expert took it. `noise` is `fixed` or `none`, else a UserError. `placement` are device and dtype.
    """

    kind = "expert_choice"
    explain = by_experts

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        options: RouterOptions = RouterOptions(),  # noqa: B008 (never changed)
        **placement: Any,
    ) -> None:
        super().__init__()
        if options.noise in ("learned", "jitter"):
            raise UserError(
                "The router 'expert_choice' has no such noise: use noise 'fixed' or 'none'."
            )
        self.dim = dim
        self.num_experts = num_experts
        self.top_k = top_k
        self.options = options
        self.noise: Noise = options.noise or "fixed"
        self.weight = nn.Parameter(torch.empty(num_experts, dim, **placement))
        self.reset_parameters()

    @property
    def losses(self) -> frozenset[str]:
        """Only the z-loss: the router is balanced by construction."""
        return frozenset({"z"})

    def reset_parameters(self) -> None:
        """LeCun normal."""
        nn.init.normal_(self.weight, std=self.dim**-0.5)

    def forward(self, x: Tensor) -> ExpertChoiceRouting:
        """Let every expert choose among the tokens x [B, N, D] of each image."""
        with full_precision(x):
            x = at_least_float32(x)
            logits = F.linear(x, self.weight.to(x.dtype))  # [B, N, E]

            noisy_logits = logits
            noise_std = None
            if self.training and self.noise == "fixed":
                noise_std = logits.new_full((1, 1, 1), 1 / self.num_experts)  # [1, 1, 1]
                noisy_logits = logits + torch.randn_like(logits) * noise_std

            # A stable sort, not topk: among equal scores (bf16 inputs, zero images) the earlier token wins everywhere.
            tokens = x.shape[1]
            capacity = min(tokens, capacity_of(1.0, tokens, self.top_k, self.num_experts))  # C
            affinity = noisy_logits.softmax(-1).mT  # [B, E, N]
            order = affinity.argsort(dim=-1, descending=True, stable=True)  # [B, E, N]
            token_index = order[..., :capacity]  # [B, E, C]

            token_weight = affinity.gather(-1, token_index)  # [B, E, C]
            if self.options.normalize_gates:
                token_weight = shares_of_token(token_weight, token_index, tokens)
            return ExpertChoiceRouting.of(
                logits, noisy_logits, noise_std, token_index, token_weight
            )


def shares_of_token(weight: Tensor, token_index: Tensor, tokens: int) -> Tensor:
    """Normalise weights [B, E, C] so that those of each token, one of N = `tokens`, sum to 1 over the experts.

    `token_index` [B, E, C] says which token a weight is for. If a token's weights have all underflowed, they stay 0.
    """
    images, num_experts, _ = weight.shape
    zeros = weight.new_zeros(images, num_experts, tokens)
    all_weights = zeros.scatter(-1, token_index, weight)  # [B, E, N]

    total = all_weights.sum(1, keepdim=True)  # [B, 1, N]
    total = total.clamp_min(torch.finfo(weight.dtype).tiny)
    return weight / total.expand(-1, num_experts, -1).gather(-1, token_index)


@dataclass(frozen=True)
class SoftRouting(Routing):
    """A slot is a weighted mean of all tokens of its image; a token's output is a weighted mean of all slots' outputs.

    In the token's view every expert is kept, and its weight is the sum over its slots.
    """

    kind: ClassVar[Kind] = "soft"
    # [B, N, E, P] weight of each token in each slot; sums to 1 over the tokens
    dispatch_weight: Tensor = field(kw_only=True)
    # [B, N, E, P] weight of each slot in each token's output; sums to 1 over all E · P slots
    slot_weight: Tensor = field(kw_only=True)

    @classmethod
    def of(cls, slot_logits: Tensor) -> SoftRouting:
        """Build the routing from slot logits [B, N, E, P], with its token's view.

        An expert's logit is the log-sum-exp over its slots, so that softmax(`logits`) is the sum of its slots' weights.
        """
        slot_weight = slot_logits.flatten(2).softmax(-1)  # [B, N, E·P]
        slot_weight = slot_weight.view_as(slot_logits)  # [B, N, E, P]
        logits = slot_logits.logsumexp(-1)  # [B, N, E]
        all_kept = torch.ones_like(logits, dtype=torch.bool)
        return cls(
            logits=logits,
            noisy_logits=logits,
            probs=logits.softmax(-1),
            noise_std=None,
            dispatch_weight=slot_logits.softmax(1),
            slot_weight=slot_weight,
            **token_view(slot_weight.sum(-1), all_kept),
        )

    def image_counts(self) -> Tensor:
        """[B, E] int64: P everywhere, since each expert computes all its slots of each image."""
        images, _, num_experts, slots = self.slot_weight.shape
        return torch.full(
            (images, num_experts), slots, dtype=torch.int64, device=self.logits.device
        )

    def dispatch(self, x: Tensor, *, pad: bool = True) -> Dispatched:
        """Rows [R, D] for the experts: their slots, weighted means of the tokens x [T, D]. Nothing is padded."""
        weight = self.dispatch_weight.to(x.dtype)  # [B, N, E, P]
        images, tokens, _, _ = weight.shape
        x = x.view(images, tokens, x.shape[-1])  # [B, N, D]
        slots = torch.einsum("bnd,bnep->ebpd", x, weight)  # [E, B, P, D]
        return Dispatched(slots.flatten(0, 2), self.counts())

    def combine(self, rows: Tensor, dispatched: Dispatched) -> Tensor:
        """Weighted mean [T, D] of the slots' outputs [R, D], for each token over the slots of its image."""
        images, _, num_experts, slots = self.slot_weight.shape
        weight = self.slot_weight.to(rows.dtype)  # [B, N, E, P]
        rows = rows.view(num_experts, images, slots, rows.shape[-1])  # [E, B, P, D]
        return torch.einsum("bnep,ebpd->bnd", weight, rows).flatten(0, 1)

    def mix_densely(self, x: Tensor, experts: Experts) -> Tensor:
        """Like `Routing.mix_densely`, but an expert computes its own slots only: they are sorted by expert already."""
        dispatched = self.dispatch(x.to(experts.compute_dtype(x)))
        slots = dispatched.rows.view(self.num_experts, -1, x.shape[-1])  # [E, B·P, D]
        rows = experts.on_slots(slots).flatten(0, 1)  # [R, out]
        return self.combine(rows, dispatched)


class SoftRouter(Router):
    """Slot logits are scaled cosines of tokens and learned slot directions (§2.3, "normalization", and appendix E).

    `logits = scale · l2(x) · l2(Φ)`, Φ is `mu`. A softmax over the tokens gives their weights in a slot, a softmax over
    all E · P slots the weights of the slots in a token's output. K = E · P / N is how many slots there are per token.
    The option `slots_per_expert` is P; if it isn't given, a model sets it to K · N / E, and the router alone has P = 1.
    `placement` are device and dtype.
    """

    kind = "soft"
    explain = by_slots

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        options: RouterOptions = RouterOptions(),  # noqa: B008 (never changed)
        **placement: Any,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.num_experts = num_experts
        self.top_k = top_k
        self.options = options
        slots = options.slots_per_expert or 1
        self.mu = nn.Parameter(torch.empty(dim, num_experts, slots, **placement))
        # One element, not a scalar: FSDP2 shards no scalars.
        self.scale = nn.Parameter(torch.empty(1, **placement))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """LeCun normal directions, scale 1."""
        nn.init.normal_(self.mu, std=self.dim**-0.5)
        nn.init.ones_(self.scale)

    def forward(self, x: Tensor) -> SoftRouting:
        """Weights of all slots for the tokens x [B, N, D] of each image."""
        with full_precision(x):
            x = at_least_float32(x)
            direction = _unit(self.mu.to(x.dtype), 0)  # [D, E, P]
            direction = direction * self.scale.to(x.dtype)
            logits = torch.einsum("bnd,dep->bnep", _unit(x, -1), direction)  # [B, N, E, P]
            return SoftRouting.of(logits)


def _unit(x: Tensor, dim: int) -> Tensor:
    """Scale x to length 1 along `dim`."""
    return x * torch.rsqrt(x.square().sum(dim, keepdim=True) + _EPS)

"""Routers that learn nothing: baselines for those that do.

- `hash`: each position has fixed experts (Roller et al. 2021, arXiv:2106.04426; images have no vocabulary, so the
  position is what is hashed). `random`: experts drawn anew for every token in training, by position in evaluation.
- `position`, `colour`: what a person would try. Bands of the image; clusters of the patches' mean colour.

Their choice has no gradient, all gates are 1/K, and no loss balances them. With K > 1 a token's further experts are the
next ones in cyclic order.

Axes: B images, N tokens of an image (prefix tokens first), E experts, K choices, P patches.
"""

from __future__ import annotations

from functools import partialmethod
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from moevision.errors import UserError
from moevision.layers.routing import Router, Routing, at_least_float32, check_top_k
from moevision.layers.words import by_rule

_CERTAINTY = 10.0  # a chosen expert's logit stands this much above the cyclic order of all
_GOLDEN_RATIO = 2_654_435_769  # 2³² / φ: Fibonacci hashing (Knuth, TAOCP 3, §6.4) spreads consecutive numbers evenly
_UINT32 = 2**32 - 1
_MAX_COLOURS = 20_000  # patches that k-means sees


class HandmadeRouter(Router):
    """Experts by a rule; subclasses say which one a token gets first.

    `logits` are not learned either: minus the rank in cyclic order, and 10 more for the chosen experts, so that every
    expert has a rank, which interventions work on.
    """

    explain = by_rule

    def __init__(self, dim: int, num_experts: int, top_k: int, **_: Any) -> None:
        super().__init__()
        check_top_k(top_k, num_experts)
        self.num_experts = num_experts
        self.top_k = top_k

    def first_expert(self, x: Tensor) -> Tensor:
        """[B, N] (or broadcastable) int64: the first expert of each token of x [B, N, D]."""
        raise NotImplementedError

    def order(self, x: Tensor) -> Tensor:
        """[B, N, E] int64: all experts of each token, in the order of choice."""
        first = self.first_expert(x).expand(x.shape[:2]).unsqueeze(-1)  # [B, N, 1]
        step = torch.arange(self.num_experts, device=x.device)  # [E]
        return (first + step) % self.num_experts

    def forward(self, x: Tensor) -> Routing:
        """Route tokens x [B, N, D]."""
        order = self.order(x)  # [B, N, E]
        expert_index = order[..., : self.top_k]  # [B, N, K]

        rank = torch.arange(self.num_experts, device=x.device, dtype=at_least_float32(x).dtype)
        score_of_rank = _CERTAINTY * (rank < self.top_k) - rank  # [E]
        zeros = rank.new_zeros(order.shape)
        logits = zeros.scatter(-1, order, score_of_rank.expand(order.shape))  # [B, N, E]

        return Routing(
            logits=logits,
            noisy_logits=logits,
            probs=logits.softmax(-1),
            noise_std=None,
            expert_index=expert_index,
            combine_weight=torch.full_like(expert_index, 1 / self.top_k, dtype=logits.dtype),
            kept=torch.ones_like(expert_index, dtype=torch.bool),
        )

    def gate_logits(self, routing: Routing) -> Tensor:
        """[B, N, E]: the scores that give the rank."""
        return routing.noisy_logits

    def gates(self, gate_logits: Tensor, top_logits: Tensor) -> Tensor:
        """1/k for each of k experts, whatever their scores."""
        return torch.full_like(top_logits, 1 / top_logits.shape[-1])

    priority = gates


class HashRouter(HandmadeRouter):
    """The position decides: neighbours get different experts, all experts equally many positions (± 1)."""

    explain = partialmethod(by_rule, rule="A hash of the patch's position")

    def first_expert(self, x: Tensor) -> Tensor:
        """By the rank of a Fibonacci hash of the position: cut into E equal parts, the hashes alone are uneven."""
        position = torch.arange(x.shape[1], device=x.device)
        rank = (position * _GOLDEN_RATIO & _UINT32).argsort().argsort()
        return rank * self.num_experts // x.shape[1]


class RandomRouter(HandmadeRouter):
    """K different experts at random for every token; in evaluation a fixed draw by position, so that it repeats."""

    explain = partialmethod(
        by_rule, rule="A draw that is fixed for each position (in training a new one each time)"
    )

    def order(self, x: Tensor) -> Tensor:
        """A random order of all experts."""
        if self.training:
            return torch.rand(*x.shape[:2], self.num_experts, device=x.device).argsort(-1)
        images, tokens, _ = x.shape
        number = torch.arange(tokens * self.num_experts, device=x.device)
        random = _scramble(number).view(1, tokens, self.num_experts)
        return random.argsort(dim=-1, stable=True).expand(images, -1, -1)


class PositionRouter(HandmadeRouter):
    """Bands of the image from top to bottom: each expert has P / E consecutive patches in row-major order."""

    explain = partialmethod(by_rule, rule="The patch's place, from top to bottom,")

    def first_expert(self, x: Tensor) -> Tensor:
        """Prefix tokens belong to the first band."""
        tokens = x.shape[1]
        num_patches = tokens - self.num_prefix_tokens
        patch = torch.arange(tokens, device=x.device) - self.num_prefix_tokens  # [N]
        return patch.clamp_min(0) * self.num_experts // max(num_patches, 1)


class ColourRouter(HandmadeRouter):
    """The nearest of E colours; k-means finds them in the first training batch, before that they are shades of grey.

    A hook on the model's patch embedding shows it the image, since a layer's tokens no longer have a colour.
    """

    explain = partialmethod(by_rule, rule="The nearest of a few colours")
    sees_image = True
    centroids: Tensor
    fitted: Tensor

    def __init__(
        self, dim: int, num_experts: int, top_k: int, *, device: Any = None, **_: Any
    ) -> None:
        super().__init__(dim, num_experts, top_k)
        grey = torch.linspace(-2, 2, num_experts, device=device)  # [E]
        self.register_buffer("centroids", grey.unsqueeze(1).repeat(1, 3))  # [E, 3]
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool, device=device))
        self._colours: Tensor | None = None

    def look(self, patch_embed: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        """Remember the mean colour of every patch; a forward pre-hook of timm's `PatchEmbed`."""
        image = arguments[0].detach().float()  # [B, 3, H, W]
        patch_means = F.adaptive_avg_pool2d(image, tuple(cast(Any, patch_embed).grid_size))
        self._colours = patch_means.flatten(2).mT  # [B, P, 3]
        if self.training and not self._colours.is_meta and not self.fitted:
            self._fit(self._colours)

    def _fit(self, colours: Tensor) -> None:
        from sklearn.cluster import KMeans

        sample = colours.flatten(0, 1)[:_MAX_COLOURS].cpu().numpy()
        centroids = torch.full_like(self.centroids, torch.nan)
        if len(np.unique(sample, axis=0)) >= self.num_experts:
            kmeans = KMeans(self.num_experts, n_init=4, random_state=0).fit(sample)
            centroids.copy_(torch.from_numpy(kmeans.cluster_centers_))

        # Every process saw other images, perhaps with too few colours.
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(centroids, 0)

        if centroids.isnan().any():
            return  # a batch of few or blank images: the next one decides
        self.centroids.copy_(centroids)
        self.fitted.fill_(True)

    def first_expert(self, x: Tensor) -> Tensor:
        """The nearest colour of each patch; a prefix token has the image's mean colour."""
        images, tokens, _ = x.shape
        patches = tokens - self.num_prefix_tokens
        colours = self._colours
        if colours is None or colours.shape[:2] != (images, patches):
            raise UserError(
                "The router 'colour' needs the image of these tokens: use it in a converted timm ViT."
            )
        mean = colours.mean(1, keepdim=True).expand(-1, self.num_prefix_tokens, -1)
        token_colours = torch.cat([mean, colours], 1)  # [B, N, 3]
        return torch.cdist(token_colours, self.centroids.float()).argmin(-1)

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle carries no images along."""
        return {**super().__getstate__(), "_colours": None}  # type: ignore[no-untyped-call]


def _scramble(number: Tensor) -> Tensor:
    """Integers that look random, the same for the same number (the 32-bit finalizer of MurmurHash3)."""
    bits = (number + 1) & _UINT32
    bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B) & _UINT32
    bits = ((bits ^ (bits >> 13)) * 0xC2B2AE35) & _UINT32
    return bits ^ (bits >> 16)

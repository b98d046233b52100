"""Routers without learned weights: baselines for the learned ones.

- `hash`: a hash of the token's position decides (Roller et al. 2021, arXiv:2106.04426, hash the token's id in the
  vocabulary, which patches don't have).
- `random`: experts are drawn for every token of every pass in training; in evaluation they are fixed by position.
- `position`: horizontal bands of the image.
- `colour`: clusters of the patches' mean colour.

Their choice has no gradient, all gates are 1/K, and no loss balances them. With K > 1 the other experts of a token are
those that follow its first one in cyclic order (`random`: further random ones).

Shapes: B images, N tokens of an image (prefix tokens first), D width, E experts, K choices, P patches.
"""

from __future__ import annotations

from functools import partialmethod
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moevision.errors import UserError
from moevision.layers.routing import Router, Routing, at_least_float32
from moevision.layers.words import by_rule
from moevision.types import TimmModel

_CHOSEN_BONUS = 10.0  # added to the logits of the chosen experts
_GOLDEN_RATIO = 2_654_435_769  # 2³² / φ: Fibonacci hashing (Knuth, TAOCP 3, §6.4) spreads consecutive numbers evenly
_UINT32 = 2**32 - 1
_MAX_COLOURS = 20_000  # patches in the k-means fit


class HandmadeRouter(Router):
    """Base class of routers by a rule; subclasses define `first_expert`, or the whole `order`.

    An expert's logit is minus its rank in the token's order, plus 10 if it is among the K chosen ones. Interventions
    need such a ranking of all experts.
    """

    explain = by_rule

    def __init__(self, dim: int, num_experts: int, top_k: int, **_: Any) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.top_k = top_k

    def first_expert(self, x: Tensor) -> Tensor:
        """First expert of each token of x [B, N, D]: int64, [B, N] or [N] if it is the same for all images."""
        raise NotImplementedError

    def order(self, x: Tensor) -> Tensor:
        """[B, N, E] int64: all experts, ordered by each token's preference; the first K are chosen."""
        first = self.first_expert(x).expand(x.shape[:2]).unsqueeze(-1)  # [B, N, 1]
        offset = torch.arange(self.num_experts, device=x.device)  # [E]
        return (first + offset) % self.num_experts

    def forward(self, x: Tensor) -> Routing:
        """Route tokens x [B, N, D]."""
        order = self.order(x)  # [B, N, E]
        expert_index = order[..., : self.top_k]  # [B, N, K]

        rank = torch.arange(self.num_experts, device=x.device, dtype=at_least_float32(x).dtype)
        logit_of_rank = _CHOSEN_BONUS * (rank < self.top_k) - rank  # [E], by rank
        zeros = rank.new_zeros(order.shape)
        logits = zeros.scatter(-1, order, logit_of_rank.expand(order.shape))  # [B, N, E], by expert

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
        """[B, N, E]: the scores by which interventions rank the experts."""
        return routing.noisy_logits

    def gates(self, gate_logits: Tensor, top_logits: Tensor) -> Tensor:
        """Weights [B, N, k] of chosen experts with `top_logits` [B, N, k]: 1/k, whatever the scores."""
        return torch.full_like(top_logits, 1 / top_logits.shape[-1])

    priority = gates  # equal for all tokens, so that batch priority prefers none


class HashRouter(HandmadeRouter):
    """A hash of the position: neighbours get different experts, all experts equally many positions (± 1)."""

    explain = partialmethod(by_rule, rule="A hash of the patch's position")

    def first_expert(self, x: Tensor) -> Tensor:
        """[N]: positions are sorted by their Fibonacci hash, and every expert gets N / E consecutive ones.

        Cutting the range of the hashes instead would give experts unequal numbers of positions.
        """
        num_tokens = x.shape[1]
        position = torch.arange(num_tokens, device=x.device)
        hashes = (position * _GOLDEN_RATIO) & _UINT32
        rank = hashes.argsort().argsort()  # the inverse of the sorting permutation
        return rank * self.num_experts // num_tokens


class RandomRouter(HandmadeRouter):
    """K different random experts for every token; in evaluation fixed by position, so that results are reproducible."""

    explain = partialmethod(
        by_rule, rule="A draw that is fixed for each position (in training a new one each time)"
    )

    def order(self, x: Tensor) -> Tensor:
        """[B, N, E]: a random permutation of the experts for each token."""
        if self.training:
            return torch.rand(*x.shape[:2], self.num_experts, device=x.device).argsort(-1)

        batch_size, num_tokens, _ = x.shape
        counter = torch.arange(num_tokens * self.num_experts, device=x.device)
        keys = _scramble(counter).view(1, num_tokens, self.num_experts)  # [1, N, E]
        return keys.argsort(dim=-1, stable=True).expand(batch_size, -1, -1)


class PositionRouter(HandmadeRouter):
    """Bands of the image from top to bottom: each expert gets P / E consecutive patches in row-major order."""

    explain = partialmethod(by_rule, rule="The patch's place, from top to bottom,")

    def first_expert(self, x: Tensor) -> Tensor:
        """[N]: the band of each token; prefix tokens belong to the first one."""
        num_tokens = x.shape[1]
        num_patches = num_tokens - self.num_prefix_tokens
        patch_index = torch.arange(num_tokens, device=x.device) - self.num_prefix_tokens  # [N]
        return patch_index.clamp_min(0) * self.num_experts // max(num_patches, 1)


class ColourRouter(HandmadeRouter):
    """The nearest of E centroid colours, which k-means fits to the first training batch; until then, shades of grey.

    Tokens no longer tell the colour: `look`, a hook on the model's patch embedding, gets the image itself.
    """

    explain = partialmethod(by_rule, rule="The nearest of a few colours")
    sees_image = True
    centroids: Tensor
    fitted: Tensor

    def __init__(
        self, dim: int, num_experts: int, top_k: int, *, device: Any = None, **_: Any
    ) -> None:
        super().__init__(dim, num_experts, top_k)
        grey = torch.linspace(-2, 2, num_experts, device=device)  # [E]; pixels are standardized
        self.register_buffer("centroids", grey.unsqueeze(1).repeat(1, 3))  # [E, 3]
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool, device=device))
        self._colours: Tensor | None = None

    def look(self, patch_embed: TimmModel, arguments: tuple[Tensor, ...]) -> None:
        """Store the mean colour of every patch; a forward pre-hook of timm's `PatchEmbed`."""
        images = arguments[0].detach().float()  # [B, 3, H, W]
        grid_size = tuple(patch_embed.grid_size)
        patch_means = F.adaptive_avg_pool2d(images, grid_size)  # [B, 3, rows, columns]
        self._colours = patch_means.flatten(2).mT  # [B, P, 3]
        if self.training and not self._colours.is_meta and not self.fitted:
            self._fit(self._colours)

    def _fit(self, colours: Tensor) -> None:
        """Fit the centroids to colours [B, P, 3]."""
        from sklearn.cluster import KMeans

        sample = colours.flatten(0, 1)[:_MAX_COLOURS].cpu().numpy()  # [<= B·P, 3]
        kmeans = KMeans(self.num_experts, n_init=4, random_state=0).fit(sample)
        self.centroids.copy_(torch.from_numpy(kmeans.cluster_centers_))

        # Each process has other images: all take the result of rank 0.
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(self.centroids, 0)
        self.fitted.fill_(True)

    def first_expert(self, x: Tensor) -> Tensor:
        """[B, N]: the nearest centroid of each patch's colour; a prefix token counts as the image's mean colour."""
        batch_size, num_tokens, _ = x.shape
        num_patches = num_tokens - self.num_prefix_tokens
        colours = self._colours  # [B, P, 3] of this pass, if `look` was called
        if colours is None or colours.shape[:2] != (batch_size, num_patches):
            raise UserError(
                "The router 'colour' needs the image of these tokens: use it in a converted timm ViT."
            )

        prefix_colours = colours.mean(1, keepdim=True).expand(-1, self.num_prefix_tokens, -1)
        token_colours = torch.cat([prefix_colours, colours], 1)  # [B, N, 3]
        return torch.cdist(token_colours, self.centroids.float()).argmin(-1)

    def __getstate__(self) -> dict[str, Any]:
        """State for a copy or a pickle, without the stored colours."""
        return {**super().__getstate__(), "_colours": None}  # type: ignore[no-untyped-call]


def _scramble(number: Tensor) -> Tensor:
    """Pseudo-random integers, a function of `number` alone (the 32-bit finalizer of MurmurHash3)."""
    bits = (number + 1) & _UINT32
    bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B) & _UINT32
    bits = ((bits ^ (bits >> 13)) * 0xC2B2AE35) & _UINT32
    return bits ^ (bits >> 16)

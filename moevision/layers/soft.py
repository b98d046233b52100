"""Soft MoE: no choice at all; slots are weighted means of tokens (Puigcerver et al. 2023, arXiv:2308.00951).

Fully differentiable, balanced by construction, without noise or balance losses. The means are taken within one image.

Axes: B images, N tokens, D width, E experts, P slots of an expert.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moevision.layers.options import RouterOptions
from moevision.layers.precision import at_least_float32, full_precision
from moevision.layers.slots import SoftRouting
from moevision.layers.top_k import check_top_k

_EPS = 1e-6  # under the root, as in the released code


class SoftRouter(nn.Module):
    """Slot logits are scaled cosines of tokens and learned slot directions (§2.3, "normalization", and appendix E).

    `logits = scale · l2(x) · l2(Φ)`; a slot reads the tokens by a softmax over tokens, a token takes the slots by a
    softmax over all E · P slots.

    Args:
        dim: D.
        num_experts: E.
        top_k: K, rows that are computed per token on average, K = E · P / N: what the slots cost.
        options: `slots_per_expert` P; 1 outside a model, K · N / E in one.
        device: where the parameters live.
        dtype: dtype of the parameters.

    Raises:
        UserError: if top_k is not between 1 and num_experts.
    """

    losses: frozenset[str] = frozenset()

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        options: RouterOptions = RouterOptions(),  # noqa: B008 (never changed)
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_top_k(top_k, num_experts)
        self.dim, self.num_experts, self.top_k, self.options = dim, num_experts, top_k, options
        self.default_losses: dict[str, float] = {}
        slots = options.slots_per_expert or 1
        self.mu = nn.Parameter(torch.empty(dim, num_experts, slots, device=device, dtype=dtype))
        self.scale = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """LeCun normal directions, scale 1."""
        nn.init.normal_(self.mu, std=self.dim**-0.5)
        nn.init.ones_(self.scale)

    def forward(self, x: Tensor) -> SoftRouting:
        """Weights of all slots for the tokens x [B, N, D] of each image."""
        with full_precision(x):
            x = at_least_float32(x)
            direction = _unit(self.mu.to(x.dtype), 0)
            logits = torch.einsum("bnd,dep->bnep", _unit(x, -1), direction * self.scale.to(x.dtype))
            return SoftRouting.of(logits)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{self.dim}, num_experts={self.num_experts}, slots_per_expert={self.mu.shape[-1]}"


def _unit(x: Tensor, dim: int) -> Tensor:
    return x * torch.rsqrt(x.square().sum(dim, keepdim=True) + _EPS)

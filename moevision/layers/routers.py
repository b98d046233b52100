"""Routers: from tokens to a `Routing`, each exactly as its source defines it.

- `noisy_top_k`: Shazeer et al. 2017, arXiv:1701.06538, §2.1 and appendix A.
- `vmoe_top_k`: Riquelme et al. 2021 (V-MoE), arXiv:2106.05974, §2 and its released code.

Axes: B images, N tokens, D width, E experts, K choices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moevision.errors import UserError
from moevision.layers.routing import Routing

Noise = Literal["learned", "fixed", "none"]


class Router(Protocol):
    """What an MoE layer needs of a router."""

    num_experts: int
    top_k: int

    @property
    def losses(self) -> frozenset[str]:
        """Names of the balance losses that this router's `Routing` can supply."""

    def __call__(self, x: Tensor) -> Routing:
        """Route tokens x [B, N, D]."""


class TopKRouter(nn.Module):
    """Each token chooses its K best experts by a linear score plus noise (noise in training only).

    With `softmax_over="kept"` this is Shazeer's noisy top-k gating (eq. 3-5): `H = x W_gate + N(0, 1) ·
    softplus(x W_noise)`, `gates = softmax(keep_top_k(H))`. With k = 1 that softmax is the constant 1 and the router
    would never learn, so the gate is then the full-softmax probability of the noisy logits (our deviation).

    With `softmax_over="all"` and `noise="fixed"` this is V-MoE's `TOP_k(softmax(x W + ε))`, ε ~ N(0, 1/E²): the
    softmax comes before the choice and is not renormalised.

    The scores are computed in at least float32 whatever autocast says, since a near tie decided in bfloat16 sends
    tokens to arbitrary experts (Switch Transformer, arXiv:2101.03961, §2.4); float64 stays float64.

    Args:
        dim: D, the width of a token.
        num_experts: E.
        top_k: K, between 1 and E.
        noise: `learned` (a second linear map gives each token's noise), `fixed` (σ = 1/E), or `none`.
        softmax_over: `kept` (after the choice, sums to 1) or `all` (before the choice).
        device: where the parameters live.
        dtype: dtype of the parameters.

    Raises:
        UserError: if top_k is not between 1 and num_experts.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        noise: Noise = "learned",
        softmax_over: Literal["kept", "all"] = "kept",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise UserError(
                f"top_k={top_k} does not fit num_experts={num_experts}: choose top_k between 1 and {num_experts}."
            )
        self.dim, self.num_experts, self.top_k = dim, num_experts, top_k
        self.noise, self.softmax_over = noise, softmax_over
        self.weight = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))
        self.noise_weight = (
            nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype)) if noise == "learned" else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zeros where noise is learned (Shazeer, appendix A: "no signal and some noise"); else LeCun normal.

        A router without learned noise must not start at zero: exact ties would send every token to the same experts.
        """
        if self.noise_weight is None:
            nn.init.normal_(self.weight, std=self.dim**-0.5)
        else:
            nn.init.zeros_(self.weight)
            nn.init.zeros_(self.noise_weight)

    @property
    def losses(self) -> frozenset[str]:
        """Names of the balance losses this router can supply; the load loss needs noise."""
        names = {"importance", "load_balancing", "z"}
        return frozenset(names if self.noise == "none" else names | {"load"})

    def forward(self, x: Tensor) -> Routing:
        """Route tokens x [B, N, D]."""
        device_type = x.device.type
        if torch.amp.is_autocast_available(device_type):
            with torch.autocast(device_type, enabled=False):
                return self._route(at_least_float32(x))
        return self._route(at_least_float32(x))

    def _route(self, x: Tensor) -> Routing:
        logits, noise_std = self._scores(x)
        noisy_logits = logits if noise_std is None else logits + torch.randn_like(logits) * noise_std
        top_logits, expert_index = noisy_logits.topk(self.top_k, dim=-1)
        return Routing(
            logits=logits,
            noisy_logits=noisy_logits,
            probs=logits.softmax(-1),
            noise_std=noise_std,
            expert_index=expert_index,
            combine_weight=self.gates(noisy_logits, top_logits),
            kept=torch.ones_like(expert_index, dtype=torch.bool),
        )

    def _scores(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Clean logits [B, N, E] and the standard deviation of their noise."""
        weight = self.weight.to(x.dtype)
        if not self.training or self.noise == "none":
            return F.linear(x, weight), None
        if self.noise_weight is None:
            logits = F.linear(x, weight)
            return logits, logits.new_full((1, 1, 1), 1 / self.num_experts)
        # One matrix product for both maps: x is read once.
        both = F.linear(x, torch.cat([weight, self.noise_weight.to(x.dtype)]))
        logits, raw_std = both.split(self.num_experts, dim=-1)
        return logits, F.softplus(raw_std)

    def gates(self, noisy_logits: Tensor, top_logits: Tensor) -> Tensor:
        """Combine weights of chosen experts, by this router's rule.

        Args:
            noisy_logits: [B, N, E] the scores that the choice is made on.
            top_logits: [B, N, k] those of the chosen experts; k is `top_k` unless an intervention chose otherwise.

        Returns:
            [B, N, k].
        """
        if self.softmax_over == "kept" and top_logits.shape[-1] > 1:
            return top_logits.softmax(-1)
        return (top_logits - noisy_logits.logsumexp(-1, keepdim=True)).exp()

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{self.dim}, num_experts={self.num_experts}, top_k={self.top_k}, noise={self.noise!r}"


def at_least_float32(x: Tensor) -> Tensor:
    """Promote float16 and bfloat16 to float32; leave float32 and float64 alone."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _noisy_top_k(
    dim: int, num_experts: int, top_k: int, device: torch.device | str | None, dtype: torch.dtype | None
) -> TopKRouter:
    return TopKRouter(dim, num_experts, top_k, noise="learned", softmax_over="kept", device=device, dtype=dtype)


def _vmoe_top_k(
    dim: int, num_experts: int, top_k: int, device: torch.device | str | None, dtype: torch.dtype | None
) -> TopKRouter:
    return TopKRouter(dim, num_experts, top_k, noise="fixed", softmax_over="all", device=device, dtype=dtype)


RouterFactory = Callable[[int, int, int, torch.device | str | None, torch.dtype | None], TopKRouter]
ROUTERS: dict[str, RouterFactory] = {"noisy_top_k": _noisy_top_k, "vmoe_top_k": _vmoe_top_k}


def build_router(
    name: str,
    dim: int,
    num_experts: int,
    top_k: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> TopKRouter:
    """The router of that name.

    Raises:
        UserError: if there is no router of that name, or top_k does not fit num_experts.
    """
    if name not in ROUTERS:
        raise UserError(f"There is no router {name!r}; choose one of {', '.join(ROUTERS)}.")
    return ROUTERS[name](dim, num_experts, top_k, device, dtype)

"""Token choice by a linear score: every token picks its K best experts.

- `noisy_top_k`: Shazeer et al. 2017, arXiv:1701.06538, §2.1 and appendix A.
- `vmoe_top_k`: Riquelme et al. 2021 (V-MoE), arXiv:2106.05974, §2 and its released code.
- `switch`: Fedus et al. 2021, arXiv:2101.03961, §2.1.

Axes: B images, N tokens, D width, E experts, K choices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moevision.errors import UserError
from moevision.layers.capacity import within_capacity
from moevision.layers.options import Noise, RouterOptions
from moevision.layers.precision import at_least_float32, full_precision
from moevision.layers.routing import Routing

JITTER = 0.01  # Switch Transformer, table 1 and its released code


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
        noise: `learned` (a second linear map gives each token's noise), `fixed` (σ = 1/E), `jitter` or `none`.
        softmax_over: `kept` (after the choice, sums to 1) or `all` (before the choice).
        options: capacity, its priority and group, `normalize_gates` (over either softmax); `noise` in it wins.
        default_losses: weights of the balance losses where the user gives none.
        device: where the parameters live.
        dtype: dtype of the parameters.

    Raises:
        UserError: if top_k is not between 1 and num_experts.
    """

    noise_weight: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        noise: Noise = "learned",
        softmax_over: Literal["kept", "all"] = "kept",
        options: RouterOptions = RouterOptions(),  # noqa: B008 (never changed)
        default_losses: Mapping[str, float] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_top_k(top_k, num_experts)
        self.dim, self.num_experts, self.top_k = dim, num_experts, top_k
        self.noise, self.softmax_over, self.options = options.noise or noise, softmax_over, options
        self._default_losses = dict(default_losses or {})
        self._make_parameters(device, dtype)
        self.reset_parameters()

    def _make_parameters(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        def matrix() -> nn.Parameter:
            return nn.Parameter(torch.empty(self.num_experts, self.dim, device=device, dtype=dtype))

        self.weight = matrix()
        self.noise_weight = matrix() if self.noise == "learned" else None

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
        """Names of the balance losses this router can supply; the load loss needs Gaussian noise."""
        names = {"importance", "load_balancing", "z"}
        return frozenset(names | {"load"} if self.noise in ("learned", "fixed") else names)

    @property
    def default_losses(self) -> dict[str, float]:
        """Weights of the balance losses where the user gives none."""
        return {name: weight for name, weight in self._default_losses.items() if name in self.losses}

    def forward(self, x: Tensor) -> Routing:
        """Route tokens x [B, N, D]."""
        with full_precision(x):
            return self._route(at_least_float32(x))

    def _route(self, x: Tensor) -> Routing:
        logits, noise_std = self._scores(x)
        scores = logits if noise_std is None else logits + torch.randn_like(logits) * noise_std
        noisy_logits, probs = self._affinity(scores, logits)
        top_scores, expert_index = _best(noisy_logits, self.top_k)
        gate_logits, top_logits = self._gate_logits(noisy_logits, top_scores, logits, expert_index)
        return Routing(
            logits=logits,
            noisy_logits=noisy_logits,
            probs=probs,
            noise_std=noise_std,
            expert_index=expert_index,
            combine_weight=self.gates(gate_logits, top_logits),
            kept=self._within_capacity(expert_index, gate_logits, top_logits),
        )

    def _scores(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Clean logits [B, N, E] and the standard deviation of their Gaussian noise."""
        weight = self.weight.to(x.dtype)
        if not self.training or self.noise == "none":
            return F.linear(x, weight), None
        if self.noise == "jitter":  # the input's noise: no clean logits are computed
            return F.linear(x * torch.empty_like(x).uniform_(1 - JITTER, 1 + JITTER), weight), None
        if self.noise_weight is None:
            logits = F.linear(x, weight)
            return logits, logits.new_full((1, 1, 1), 1 / self.num_experts)
        # One matrix product for both maps: x is read once.
        both = F.linear(x, torch.cat([weight, self.noise_weight.to(x.dtype)]))
        logits, raw_std = both.split(self.num_experts, dim=-1)
        return logits, F.softplus(raw_std)

    def _affinity(self, scores: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """What the choice is made on, and the clean affinities that sum to 1."""
        return scores, softmax_over_experts(logits)

    def _gate_logits(
        self, noisy_logits: Tensor, top_scores: Tensor, logits: Tensor, expert_index: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What gates are made of, of all experts and of the chosen ones."""
        return noisy_logits, top_scores

    def gate_logits(self, routing: Routing) -> Tensor:
        """[B, N, E]: the scores that this router makes gates of, which needn't be those that it chooses by."""
        return routing.noisy_logits

    def gates(self, gate_logits: Tensor, top_logits: Tensor) -> Tensor:
        """Combine weights of chosen experts, by this router's rule.

        Args:
            gate_logits: [B, N, E] see `gate_logits`.
            top_logits: [B, N, k] those of the chosen experts; k is `top_k` unless an intervention chose otherwise.

        Returns:
            [B, N, k].
        """
        if not self._normalizes(top_logits.shape[-1]):
            return self._shares(gate_logits, top_logits)
        if top_logits.shape[-1] == 1:
            return straight_through(self._shares(gate_logits, top_logits))
        return self._normalized(top_logits)

    @torch.no_grad()
    def priority(self, gate_logits: Tensor, top_logits: Tensor) -> Tensor:
        """[B, N, k]: by what batch priority routing orders tokens; arguments as for `gates`.

        The gates before normalisation, as in Tutel: .9 beside .09 is surer than .5 beside .01, and a normalised gate of
        one expert is always 1.
        """
        return self._shares(gate_logits, top_logits)

    def _shares(self, gate_logits: Tensor, top_logits: Tensor) -> Tensor:
        """Gates as they are before any normalisation: probabilities of the softmax over all experts."""
        return (top_logits - gate_logits.logsumexp(-1, keepdim=True)).exp()

    def _normalized(self, top_logits: Tensor) -> Tensor:
        return top_logits.softmax(-1)

    def _normalizes(self, top_k: int) -> bool:
        asked = self.options.normalize_gates
        return (self.softmax_over == "kept" and top_k > 1) if asked is None else asked

    def _within_capacity(self, expert_index: Tensor, gate_logits: Tensor, top_logits: Tensor) -> Tensor:
        kept = torch.ones_like(expert_index, dtype=torch.bool)
        options = self.options
        factor = options.capacity_factor if self.training else options.eval_capacity_factor
        if factor is None:
            return kept
        return within_capacity(
            expert_index,
            self.priority(gate_logits, top_logits),
            kept,
            self.num_experts,
            factor,
            priority=bool(options.batch_priority),
            whole_batch=options.capacity_group == "batch",
        )

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        given = "".join(f", {name}={value!r}" for name, value in self.options.given().items() if name != "noise")
        return f"{self.dim}, num_experts={self.num_experts}, top_k={self.top_k}, noise={self.noise!r}{given}"


def straight_through(probability: Tensor) -> Tensor:
    """The value 1 with the gradient of `probability`: what k = 1 needs to sum to 1 and still learn."""
    return probability + (1 - probability).detach()


def check_top_k(top_k: int, num_experts: int) -> None:
    """Raise a UserError unless 1 <= top_k <= num_experts."""
    if not 1 <= top_k <= num_experts:
        raise UserError(
            f"top_k={top_k} does not fit num_experts={num_experts}: choose top_k between 1 and {num_experts}."
        )


def softmax_over_experts(logits: Tensor) -> Tensor:
    """Softmax of logits [B, N, E] over E; on a CPU across tokens, since E numbers don't fill a vector register."""
    if logits.device.type != "cpu":
        return logits.softmax(-1)
    return logits.mT.contiguous().softmax(-2).mT


def _best(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The K highest of the last dimension and their indices, best first."""
    if top_k == 1:  # a third to a fifth of topk's time on a CPU
        best = scores.max(dim=-1, keepdim=True)
        return best.values, best.indices
    top = scores.topk(top_k, dim=-1)
    return top.values, top.indices

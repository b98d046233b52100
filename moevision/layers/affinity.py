"""Token choice by other affinities than a softmax over linear scores.

- `cosine`: Chi et al. 2022 (X-MoE), arXiv:2204.09179, §3.2, with the numbers of Swin-MoE (Tutel).
- `sigmoid`, `bias_balanced`: DeepSeek-V3, arXiv:2412.19437, §2.1.2; the bias is Wang et al. 2024, arXiv:2408.15664.

Axes: B images, N tokens, D width, E experts, K choices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moevision.errors import UserError
from moevision.layers.options import RouterOptions
from moevision.layers.routing import Routing
from moevision.layers.top_k import JITTER, TopKRouter

_MAX_SCALE = 100.0  # Tutel clamps the learned logit scale at ln 100


class CosineRouter(TopKRouter):
    """Scores are scaled cosines between a projection of the token and one embedding per expert.

    `logits_i = min(exp(temperature), 100) · cos(x P + b, e_i)`, then as V-MoE. The projection has min(256, D)
    features and the scale starts at 2, as in Swin-MoE.
    """

    def _make_parameters(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        if self.noise == "learned":
            raise UserError("The router 'cosine' has no learned noise: use noise 'fixed', 'jitter' or 'none'.")
        self.noise_weight = None
        features = min(256, self.dim)
        self.proj = nn.Linear(self.dim, features, device=device, dtype=dtype)
        self.expert_embedding = nn.Parameter(torch.empty(self.num_experts, features, device=device, dtype=dtype))
        self.temperature = nn.Parameter(torch.empty((), device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Embeddings drawn small (only their direction counts), scale 2."""
        self.proj.reset_parameters()
        nn.init.normal_(self.expert_embedding, std=0.01)
        nn.init.constant_(self.temperature, math.log(2))

    def _scores(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.training and self.noise == "jitter":
            x = x * torch.empty_like(x).uniform_(1 - JITTER, 1 + JITTER)
        bias = self.proj.bias.to(x.dtype)
        query = F.normalize(F.linear(x, self.proj.weight.to(x.dtype), bias), dim=-1)
        embedding = F.normalize(self.expert_embedding.to(x.dtype), dim=-1)
        logits = F.linear(query, embedding) * self.temperature.to(x.dtype).exp().clamp_max(_MAX_SCALE)
        fixed = self.training and self.noise == "fixed"
        return logits, logits.new_full((1, 1, 1), 1 / self.num_experts) if fixed else None


class SigmoidRouter(TopKRouter):
    """Affinities are sigmoids, each on its own, instead of one softmax: experts don't compete for the score.

    `s = sigmoid(x W)`; the K best by s + b; gates are the chosen s over their sum (s itself for k = 1). Without a bias
    rate b is absent. With one, b is DeepSeek-V3's: it takes part in the choice only, has no gradient, and
    `update_router_bias` moves it after an optimizer step, up for experts with less than the mean load.

    Args:
        dim: D.
        num_experts: E.
        top_k: K.
        bias_rate: γ, the step of the bias; None for no bias.
        options: as for `TopKRouter`; no noise.
        default_losses: as for `TopKRouter`.
        device: where the parameters live.
        dtype: dtype of the parameters.
    """

    bias: Tensor | None

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        bias_rate: float | None = None,
        options: RouterOptions = RouterOptions(),  # noqa: B008 (never changed)
        default_losses: Mapping[str, float] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim,
            num_experts,
            top_k,
            noise="none",
            options=options,
            default_losses=default_losses,
            device=device,
            dtype=dtype,
        )
        self.bias_rate = bias_rate
        bias = None if bias_rate is None else torch.zeros(num_experts, device=device, dtype=torch.float32)
        self.register_buffer("bias", bias)

    def _affinity(self, scores: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        affinity = logits.sigmoid()
        chosen_by = affinity if self.bias is None else affinity + self.bias.to(affinity.dtype)
        return chosen_by, affinity / affinity.sum(-1, keepdim=True)

    def _gate_logits(
        self, noisy_logits: Tensor, top_scores: Tensor, logits: Tensor, expert_index: Tensor
    ) -> tuple[Tensor, Tensor]:
        return logits, logits.gather(-1, expert_index)

    def gate_logits(self, routing: Routing) -> Tensor:
        """[B, N, E]: the clean logits; the bias never reaches a gate."""
        return routing.logits

    def _shares(self, gate_logits: Tensor, top_logits: Tensor) -> Tensor:
        return top_logits.sigmoid()

    def _normalized(self, top_logits: Tensor) -> Tensor:
        affinity = top_logits.sigmoid()
        return affinity / affinity.sum(-1, keepdim=True)

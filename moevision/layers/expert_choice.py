"""Expert choice: every expert takes the tokens of an image that suit it best (Zhou et al. 2022, arXiv:2202.09368).

Balance is perfect by construction and needs no loss. The choice is made within one image, so that a prediction never
depends on batch-mates; it does depend on all tokens of the image.

Axes: B images, N tokens, D width, E experts, K experts per token on average, C = ceil(N · K / E) tokens per expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moevision.layers.capacity import capacity_of
from moevision.layers.options import Noise, RouterOptions
from moevision.layers.precision import at_least_float32, full_precision
from moevision.layers.slots import ExpertChoiceRouting
from moevision.layers.top_k import check_top_k


class ExpertChoiceRouter(nn.Module):
    """`S = softmax over experts(x W + ε)`; expert i takes its C best tokens by S[:, i], and S is their weight.

    The noise ε ~ N(0, 1/E²), in training only, is that of V-MoE's released code; the paper has none.

    Args:
        dim: D.
        num_experts: E.
        top_k: K, how many experts a token has on average (the paper's capacity factor).
        options: `noise` (`fixed` or `none`) and `normalize_gates` (a token's weights sum to 1 if any expert took it).
        device: where the parameters live.
        dtype: dtype of the parameters.

    Raises:
        UserError: if top_k is not between 1 and num_experts.
    """

    losses: frozenset[str] = frozenset({"z"})

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
        self.noise: Noise = options.noise or "fixed"
        self.default_losses: dict[str, float] = {}
        self.weight = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """LeCun normal."""
        nn.init.normal_(self.weight, std=self.dim**-0.5)

    def forward(self, x: Tensor) -> ExpertChoiceRouting:
        """Let every expert choose among the tokens x [B, N, D] of each image."""
        with full_precision(x):
            return self._route(at_least_float32(x))

    def _route(self, x: Tensor) -> ExpertChoiceRouting:
        logits = F.linear(x, self.weight.to(x.dtype))
        noise_std = logits.new_full((1, 1, 1), 1 / self.num_experts) if self._is_noisy() else None
        noisy_logits = logits if noise_std is None else logits + torch.randn_like(logits) * noise_std
        tokens = x.shape[1]
        capacity = min(tokens, capacity_of(1.0, tokens, self.top_k, self.num_experts))
        affinity = noisy_logits.softmax(-1).mT  # [B, E, N]
        # A stable sort, not topk: among equal scores (bf16 inputs, zero images) the earlier token wins everywhere.
        token_index = affinity.argsort(dim=-1, descending=True, stable=True)[..., :capacity]
        token_weight = affinity.gather(-1, token_index)
        if self.options.normalize_gates:
            taken = torch.zeros_like(affinity).scatter(-1, token_index, token_weight).sum(1, keepdim=True)
            token_weight = token_weight / taken.expand_as(affinity).gather(-1, token_index)
        return ExpertChoiceRouting.of(logits, noisy_logits, noise_std, token_index, token_weight)

    def _is_noisy(self) -> bool:
        return self.training and self.noise == "fixed"

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{self.dim}, num_experts={self.num_experts}, top_k={self.top_k}, noise={self.noise!r}"

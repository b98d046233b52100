"""How much the experts of a model are used: what expert surgery decides on.

Axes: E experts, B images, N tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from moevision.errors import UserError
from moevision.layers import Routing, forward_routing, moe_layers


@dataclass(frozen=True)
class ExpertUse:
    """What the tokens of some images gave to the experts of one layer.

    Attributes:
        counts: [E] int64, choices that each expert computed (slots, where experts have slots).
        gate_sum: [E] float64, the sum over tokens of the weight that each expert had in their output.
        tokens: number of tokens, prefix tokens included: they are routed too.
        alike: [E, E] float64, Pearson correlation of the experts' clean router logits over tokens; 0 where a logit
            never changes. Experts that are alike are wanted by the same tokens.
    """

    counts: Tensor
    gate_sum: Tensor
    tokens: int
    alike: Tensor

    @property
    def gate_total(self) -> float:
        """Mean over tokens of the sum of a token's gates: 1 where gates are normalised and nothing is dropped."""
        return float(self.gate_sum.sum()) / self.tokens


@torch.no_grad()
def measure_use(model: nn.Module, batches: Iterable[Tensor]) -> dict[int, ExpertUse]:
    """Count what the experts of every MoE layer do for some images.

    Args:
        model: a converted model, in eval mode: noise and dropout would count otherwise.
        batches: images [B, 3, H, W] as the model takes them, on its device.

    Returns:
        Block index -> use.

    Raises:
        UserError: if the model is in training mode or has no MoE layer, or there is no image.
    """
    if model.training:
        raise UserError("The use of experts is counted in eval mode: call model.eval() first.")
    if not moe_layers(model):
        raise UserError(f"{type(model).__name__} has no MoE layer, so it has no experts to count: give a MoE model.")
    sums: dict[int, _Sums] = {}
    for images in batches:
        for place, routing in enumerate(forward_routing(model, images)[1]):
            block = place if routing.layer is None else routing.layer
            sums.setdefault(block, _Sums(routing.num_experts)).add(routing)
    if not sums:
        raise UserError("There is no image to count the use of experts on: give at least one batch.")
    return {block: layer.use() for block, layer in sums.items()}


@dataclass
class _Sums:
    """Running sums of one layer, in float64."""

    num_experts: int
    counts: Tensor = field(init=False)
    gate_sum: Tensor = field(init=False)
    logit_sum: Tensor = field(init=False)
    product_sum: Tensor = field(init=False)
    shift: Tensor | None = None
    tokens: int = 0

    def __post_init__(self) -> None:
        zeros = torch.zeros(self.num_experts, dtype=torch.float64)
        self.counts, self.gate_sum, self.logit_sum = zeros.long(), zeros, zeros
        self.product_sum = torch.zeros(self.num_experts, self.num_experts, dtype=torch.float64)

    def add(self, routing: Routing) -> None:
        logits = routing.logits.flatten(0, 1).double().cpu()
        if self.shift is None:
            self.shift = logits[0].clone()  # correlation doesn't change by it, and large offsets lose no digits
        logits = logits - self.shift
        self.counts = self.counts + routing.counts().cpu()
        self.gate_sum = self.gate_sum + routing.expert_weights().double().sum((0, 1)).cpu()
        self.logit_sum = self.logit_sum + logits.sum(0)
        self.product_sum = self.product_sum + logits.T @ logits
        self.tokens += len(logits)

    def use(self) -> ExpertUse:
        mean = self.logit_sum / self.tokens
        covariance = self.product_sum / self.tokens - mean.outer(mean)
        deviation = covariance.diagonal().clamp_min(0).sqrt()
        scale = deviation.outer(deviation)
        alike = torch.where(scale > 0, covariance / scale.clamp_min(1e-300), torch.zeros_like(scale))
        return ExpertUse(self.counts, self.gate_sum, self.tokens, alike.clamp(-1, 1))

"""Routing statistics as torchmetrics: they add up over batches and ranks.

Axes: L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torchmetrics import Metric

from moevision.layers import Routing
from moevision.losses import cv_squared


@dataclass(frozen=True)
class LayerLoad:
    """How the choices of one MoE layer fell on its experts.

    Attributes:
        layer: index of the transformer block.
        counts: choices that each expert computed.
        max_over_mean: load of the slowest expert over the mean load; 1 is perfect, and what the others wait for.
        cv_squared: variance over squared mean of the counts.
        cv_squared_floor: CV² that chance alone is expected to give on so many images, if over all possible images every
            expert were chosen equally often: Σ_e I · var(c_e) / E ÷ mean load², with c_e the counts of expert e in
            each of I images. Choices of one image go together; only independent ones would give (E - 1) / choices,
            which is said of a single image.
        dead: experts that no token chose.
        entropy_bits: mean entropy of a token's router probabilities; log2(E) is undecided.
        dropped: share of choices that capacity dropped.
        unrouted: share of tokens that no expert computes: all choices dropped, or (expert choice) none took them.
    """

    layer: int
    counts: list[int]
    max_over_mean: float
    cv_squared: float
    cv_squared_floor: float
    dead: int
    entropy_bits: float
    dropped: float
    unrouted: float = 0.0

    @classmethod
    def from_sums(
        cls,
        layer: int,
        counts: Tensor,
        requested: Tensor,
        entropy_bits: Tensor,
        tokens: Tensor,
        unrouted: Tensor,
        *,
        count_squares: Tensor,
        images: Tensor,
    ) -> LayerLoad:
        """Summarise sums over images: counts [E], requested [E] choices, squares of the counts [E] of each image.

        `entropy_bits` and `unrouted` are sums over `tokens` tokens.
        """
        load = counts.double()
        total = load.sum()
        spread = (count_squares.double() - load.square() / images) / (images - 1)  # [E] variance of an image's counts
        floor = images * spread.mean() / load.mean().square() if images > 1 else (len(load) - 1) / total
        return cls(
            layer=layer,
            counts=counts.tolist(),
            max_over_mean=float(load.max() / load.mean()),
            cv_squared=float(cv_squared(load)),
            cv_squared_floor=float(floor),
            dead=int((load == 0).sum()),
            entropy_bits=float(entropy_bits / tokens),
            dropped=float(1 - total / requested.sum()),
            unrouted=float(unrouted / tokens),
        )


class RoutingStatistics(Metric):
    """Load, entropy and drops of every MoE layer, from hard counts over all tokens (prefix tokens too).

    Args:
        layers: block index of each MoE layer, in order of depth.
        num_experts: E, one for all layers or one for each.
    """

    full_state_update = False
    counts: Tensor
    count_squares: Tensor
    requested: Tensor
    entropy_bits: Tensor
    tokens: Tensor
    images: Tensor
    unrouted: Tensor

    def __init__(self, layers: Sequence[int], num_experts: int | Sequence[int]) -> None:
        super().__init__()
        self.layers = list(layers)
        self.num_experts = (
            [num_experts] * len(self.layers) if isinstance(num_experts, int) else [int(count) for count in num_experts]
        )
        shape = (len(self.layers), max(self.num_experts, default=0))  # a layer with fewer experts has zeros behind
        for name in ("counts", "count_squares", "requested"):
            self.add_state(name, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("entropy_bits", torch.zeros(shape[0], dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("tokens", "images", "unrouted"):
            self.add_state(name, torch.zeros(shape[0], dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, routings: Sequence[Routing]) -> None:
        """Add one batch: the `Routing` of every MoE layer, in order of depth."""
        for row, routing in enumerate(routings):
            probs = routing.probs.detach()
            self.counts[row, : routing.num_experts] += routing.counts()
            self.count_squares[row, : routing.num_experts] += routing.image_counts().square().sum(0)
            self.requested[row, : routing.num_experts] += routing.requested_counts()
            self.entropy_bits[row] += torch.special.entr(probs).sum().double() / torch.log(torch.tensor(2.0))
            self.tokens[row] += probs.shape[0] * probs.shape[1]
            self.images[row] += probs.shape[0]
            self.unrouted[row] += (~routing.kept.any(-1)).sum()

    def compute(self) -> dict[str, Tensor]:
        """Sums per MoE layer.

        Over images `counts`, `count_squares`, `requested` [L, E] and `images` [L]; over tokens `entropy_bits`, `tokens`
        and `unrouted` [L].
        """
        return cast(dict[str, Tensor], dict(self.metric_state))

    def layer_loads(self) -> list[LayerLoad]:
        """What the sums say about each MoE layer, over all ranks."""
        # torchmetrics squeezes a state of one element, such as the tokens of the only layer.
        sums = {name: value.reshape(len(self.layers), -1) for name, value in self.compute().items()}
        return [
            LayerLoad.from_sums(
                layer,
                sums["counts"][row, :num_experts],
                sums["requested"][row, :num_experts],
                *(sums[name][row, 0] for name in ("entropy_bits", "tokens", "unrouted")),
                count_squares=sums["count_squares"][row, :num_experts],
                images=sums["images"][row, 0],
            )
            for row, (layer, num_experts) in enumerate(zip(self.layers, self.num_experts, strict=True))
        ]

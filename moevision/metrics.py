"""Routing statistics as torchmetrics: they add up over batches and ranks.

Axes: L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torchmetrics import Metric

from moevision.layers import LayerLoad as LayerLoad
from moevision.layers import Routing


class RoutingStatistics(Metric):
    """Load, entropy and drops of every MoE layer, from hard counts over all tokens (prefix tokens too).

    `layers` are block indices in order of depth, `num_experts` is E, one for all layers or one for each.
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

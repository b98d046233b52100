"""FLOPs of a pass, with everything that runs.

- executed: every product that ran, with the rows that the dispatcher adds so that groups have few different sizes,
  choices that a capacity dropped, experts that nobody chose (`dense`), and what checkpointing and fused attention
  compute a second time.
- useful: what the definition of the model asks for: of the experts kept choices only (slots for experts that choose or
  mix tokens), and nothing twice. MFU is made of these (Chowdhery et al. 2022, PaLM, arXiv:2204.02311, appendix B).

What is counted as a FLOP says `moevision.efficiency`. Axes: B images.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from moevision.efficiency import LayerCount, count_layers, flop_counter, measure_cost
from moevision.layers import moe_layers

_aten = torch.ops.aten

# These compute the scores again instead of having stored them: one of their five products.
_RECOMPUTING = (
    _aten._scaled_dot_product_flash_attention_for_cpu_backward,
    _aten._scaled_dot_product_flash_attention_backward,
    _aten._scaled_dot_product_efficient_attention_backward,
    _aten._scaled_dot_product_cudnn_attention_backward,
)


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of one batch.

    Attributes:
        images: B.
        executed: everything that ran.
        useful: what the model needs.
        router: the routers' part of both.
        experts_executed: what ran of the routed experts, one computation of each row.
        experts_useful: the part of it that reached an output.
    """

    images: int
    executed: int
    useful: int
    router: int
    experts_executed: int
    experts_useful: int

    @property
    def useful_per_image(self) -> float:
        """Useful FLOPs per image."""
        return self.useful / self.images

    @property
    def padding_waste(self) -> float:
        """1 - useful / executed of the routed experts, in [0, 1); 0 for a dense model."""
        return 1 - self.experts_useful / self.experts_executed if self.experts_executed else 0.0

    @property
    def waste(self) -> float:
        """1 - useful / executed of the whole pass: `padding_waste` diluted, and what was computed twice."""
        return 1 - self.useful / self.executed


def inference_flops(
    model: nn.Module, images: Tensor, *, autocast: torch.dtype | None = None
) -> FlopCount:
    """Count one forward pass in eval mode without gradients; the model is left as it was.

    Args:
        model: an image model, MoE or dense.
        images: [B, 3, H, W] on the model's device; padding depends on where their tokens go.
        autocast: dtype of autocast; None for none.
    """
    return _count(model, images, autocast, training=False)


def training_flops(
    model: nn.Module, images: Tensor, *, autocast: torch.dtype | None = None
) -> FlopCount:
    """Count one forward and backward pass in train mode, on a copy of the model.

    Losses and optimizers have no matrix products (Muon and its like, which do, are not counted).

    Args:
        model: an image model, MoE or dense; parameters that don't require a gradient cost none.
        images: [B, 3, H, W] on the model's device; the pixels get no gradient.
        autocast: as for `inference_flops`.
    """
    once = _count(model, images, autocast, training=True)
    if not getattr(model, "grad_checkpointing", False):
        return once
    executed, _, _ = _run(model, images, autocast, training=True, checkpointing=True)
    return replace(once, executed=executed)


def _count(
    model: nn.Module, images: Tensor, autocast: torch.dtype | None, *, training: bool
) -> FlopCount:
    executed, recomputed, layers = _run(
        model, images, autocast, training=training, checkpointing=False
    )
    experts = [
        (layer.rows, int(layer.routing.counts().sum()), _per_row(layer, reached, training=training))
        for layer, reached in layers
    ]
    wasted = sum((rows - kept) * per_row for rows, kept, per_row in experts)
    return FlopCount(
        images=len(images),
        executed=executed,
        useful=executed - wasted - recomputed,
        router=sum(_router_flops(layer, reached, training=training) for layer, reached in layers),
        experts_executed=sum(rows * per_row for rows, _, per_row in experts),
        experts_useful=sum(kept * per_row for _, kept, per_row in experts),
    )


def _per_row(layer: LayerCount, reached: bool, *, training: bool) -> int:
    """FLOPs of one row through one expert: forward, and as much again for each gradient.

    `reached`: whether the layer's input has a gradient to be computed.
    """
    if not training:
        return layer.per_row
    fc1, fc2 = layer.layer.experts.fc1, layer.layer.experts.fc2
    hidden_needs_gradient = reached or any(p.requires_grad for p in fc1.parameters())
    first = 2 * fc1.in_features * fc1.out_features * (1 + fc1.weight.requires_grad + reached)
    return first + 2 * fc2.in_features * fc2.out_features * (
        1 + fc2.weight.requires_grad + hidden_needs_gradient
    )


def _router_flops(layer: LayerCount, reached: bool, *, training: bool) -> int:
    """The router's FLOPs; all of its products have a weight and an activation."""
    trains = any(parameter.requires_grad for parameter in layer.layer.router.parameters())
    return layer.router * (1 + training * (trains + reached))


def _run(
    model: nn.Module,
    images: Tensor,
    autocast: torch.dtype | None,
    *,
    training: bool,
    checkpointing: bool,
) -> tuple[int, int, list[tuple[LayerCount, bool]]]:
    """FLOPs of one pass, those of attention scores computed twice, and the MoE layers (none under checkpointing).

    With each layer comes whether its input has a gradient to be computed.
    """
    # The copy of a compiled block is an uncompiled one; `torch.compile(model)` wraps the model instead.
    net = copy.deepcopy(cast(nn.Module, getattr(model, "_orig_mod", model))).train(training)
    if getattr(net, "grad_checkpointing", False) and not checkpointing:
        cast(Any, net).set_grad_checkpointing(False)
    scope: AbstractContextManager[Any] = (
        nullcontext() if autocast is None else torch.autocast(images.device.type, dtype=autocast)
    )
    layers: list[LayerCount] = []
    reached: list[bool] = []
    for layer in moe_layers(net):  # of the copy, which nobody else uses
        layer.register_forward_pre_hook(
            lambda _, arguments: reached.append(arguments[0].requires_grad)
        )
    with (
        flop_counter() as counter,
        torch.random.fork_rng(devices=[images.device] if images.is_cuda else []),
    ):
        with scope, torch.set_grad_enabled(training):
            if checkpointing:
                output = net(images)
            else:
                output, layers = count_layers(net, counter, lambda: net(images))
        if training:
            # Any loss without a matrix product, whose gradient is no expanded tensor (`grouped_mm` refuses those).
            output.float().square().mean().backward()
    pairs = [] if checkpointing else list(zip(layers, reached, strict=True))
    return int(counter.get_total_flops()), recomputed_attention_flops(counter), pairs


def recomputed_attention_flops(counter: FlopCounterMode) -> int:
    """FLOPs that fused attention spent on scores it had computed before (head widths of q, k and v are equal)."""
    by_operation = counter.get_flop_counts().get("Global", {})
    return sum(by_operation.get(operation, 0) for operation in _RECOMPUTING) // 5


def routed_share(net: nn.Module, image_size: int) -> float:
    """Share of all FLOPs of an image that are in routed experts."""
    image = torch.zeros(1, 3, image_size, image_size)
    with torch.no_grad(), flop_counter() as counter:
        _, layers = count_layers(net, counter, lambda: net(image))
    cost = measure_cost(net, image_size)
    routed = sum(layer.requested_rows * layer.per_row for layer in layers)
    return routed / (cost.flops_per_image + cost.router_flops_per_image)

"""Useful FLOPs of a training step: what the definition of the model asks for, of which MFU is made.

Of the experts kept choices only (slots for experts that choose or mix tokens), and nothing twice: not the rows that the
dispatcher adds so that groups have few different sizes, not the choices that a capacity dropped, not the experts that
nobody chose (`dense`), and not the attention scores that fused kernels compute again for the backward pass (Chowdhery
et al. 2022, PaLM, arXiv:2204.02311, appendix B). Losses and optimizers aren't counted. Of one forward pass
`moevision.efficiency.measure_cost` counts them, which also says what a FLOP is.

Axes: B images.
"""

from __future__ import annotations

import copy
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


def training_flops(model: nn.Module, images: Tensor) -> int:
    """Useful FLOPs of one forward and backward pass in train mode, counted on a copy without checkpointing.

    Args:
        model: an image model, MoE or dense; parameters that don't require a gradient cost none.
        images: [B, 3, H, W] on the model's device; the pixels get no gradient.
    """
    # The copy of a compiled block is an uncompiled one; `torch.compile(model)` wraps the model instead.
    net = copy.deepcopy(cast(nn.Module, getattr(model, "_orig_mod", model))).train()
    if getattr(net, "grad_checkpointing", False):
        cast(Any, net).set_grad_checkpointing(False)
    reached: list[bool] = []  # whether the input of each MoE layer has a gradient to be computed
    for layer in moe_layers(net):  # of the copy, which nobody else uses
        layer.register_forward_pre_hook(
            lambda _, arguments: reached.append(arguments[0].requires_grad)
        )
    devices = [images.device] if images.is_cuda else []
    with flop_counter() as counter, torch.random.fork_rng(devices=devices):
        output, layers = count_layers(net, counter, lambda: net(images))
        # Any loss without a matrix product, whose gradient is no expanded tensor (`grouped_mm` refuses those).
        output.float().square().mean().backward()
    wasted = 0
    for layer, has_gradient in zip(layers, reached, strict=True):
        kept = int(layer.routing.counts().sum())
        wasted += (layer.computed_rows - kept) * _per_row(layer, has_gradient)
    return int(counter.get_total_flops()) - wasted - recomputed_attention_flops(counter)


def _per_row(layer: LayerCount, reached: bool) -> int:
    """FLOPs of one row through one expert: forward, and as much again for each gradient.

    `reached`: whether the layer's input has a gradient to be computed.
    """
    fc1, fc2 = layer.layer.experts.fc1, layer.layer.experts.fc2
    hidden_needs_gradient = reached or any(p.requires_grad for p in fc1.parameters())
    first = 1 + fc1.weight.requires_grad + reached
    second = 1 + fc2.weight.requires_grad + hidden_needs_gradient
    sizes = [2 * fc.in_features * fc.out_features for fc in (fc1, fc2)]
    return first * sizes[0] + second * sizes[1]


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
    routed = sum(layer.requested_rows * layer.flops_per_row for layer in layers)
    return routed / (cost.flops_per_image + cost.router_flops_per_image)

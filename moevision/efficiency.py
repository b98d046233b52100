"""The size of a model and the cost of one image: its parameters and its active FLOPs.

FLOPs are counted by torch's counter, to which this module adds the formulas that it lacks. A multiply-add is two FLOPs,
as in torch. Matrix products, convolutions and attention are counted; elementwise operations, sorting, copies and the
colour router's distances in three dimensions aren't.

Active FLOPs are those that the choices of one image ask for (K experts per token): without the rows of padding that a
dispatcher adds, with the choices that a capacity drops. The routers' FLOPs are counted separately.

Axes: B images, N tokens, D width, H hidden width of an expert, O output width, E experts or groups, P slots of an
expert, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import (
    FlopCounterMode,
    bmm_flop,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from moevision.layers import Backend, MoEMlp, Routing, SoftRouting, moe_layers, record_routing
from moevision.layers.routing import evaluating


@dataclass(frozen=True)
class ModelCost:
    """Size and cost of one model."""

    total_parameters: int
    active_parameters: int  # that one token uses
    flops_per_image: int  # without the routers'
    router_flops_per_image: int = 0


def measure_cost(
    model: nn.Module, image_size: int | tuple[int, int], *, backend: Backend = "loop"
) -> ModelCost:
    """Count the parameters of a model, MoE or dense, and the FLOPs of one image, on the model's own device.

    With the backend `dense` `flops_per_image` is the work of all experts. The other backends
    compute the chosen experts only, and all give the same number: the active FLOPs.
    """
    if isinstance(image_size, int):
        image_size = image_size, image_size
    parameter = next(model.parameters())
    image = torch.zeros(1, 3, *image_size, device=parameter.device, dtype=parameter.dtype)
    # With gradients on, since torch's counter fails without where a module gets a view of a parameter (SigLIP's head).
    with torch.enable_grad(), _eval_with_backend(model, backend), flop_counter() as counter:
        _, layers = count_layers(model, counter, lambda: model(image))

    router_flops = sum(layer.router_flops for layer in layers)
    flops = counter.get_total_flops() - router_flops
    if backend != "dense":
        for layer in layers:
            # Count the requested rows: without those of padding, and with the choices that a capacity dropped.
            flops -= (layer.computed_rows - layer.requested_rows) * layer.flops_per_row

    total, active = parameter_counts(model)
    return ModelCost(total, active, flops, router_flops)


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Total and active parameters: K / E of the routed experts of each MoE layer are active, and everything else.

    Under expert choice K / E holds on average. Under Soft MoE all experts are active: each computes few rows, but these
    are mixtures of all tokens.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    inactive = 0
    for layer in moe_layers(model):
        router = layer.router
        if router.kind != "soft":
            expert_parameters = sum(parameter.numel() for parameter in layer.experts.parameters())
            per_expert = expert_parameters // router.num_experts
            inactive += per_expert * (router.num_experts - router.top_k)
    return total, total - inactive


@contextmanager
def _eval_with_backend(model: nn.Module, backend: Backend) -> Iterator[None]:
    """A scope in which the model is in eval mode and all its MoE layers use `backend`."""
    experts = [layer.experts for layer in moe_layers(model)]
    previous_backends = [module.backend for module in experts]
    for layer_experts in experts:
        layer_experts.backend = backend
    try:
        with evaluating(model):
            yield
    finally:
        for layer_experts, previous in zip(experts, previous_backends, strict=True):
            layer_experts.backend = previous


# ---- FLOPs of each MoE layer


@dataclass(frozen=True)
class LayerCount:
    """FLOPs of one MoE layer's forward pass, and the routing that it had."""

    layer: MoEMlp
    routing: Routing
    router_flops: int
    expert_flops: int  # of all routed experts

    @property
    def flops_per_row(self) -> int:
        """FLOPs of one row through one expert: 2 · (D · H + H · O)."""
        linears = self.layer.experts.fc1, self.layer.experts.fc2
        return sum(2 * linear.in_features * linear.out_features for linear in linears)

    @property
    def computed_rows(self) -> int:
        """R, the number of rows that experts computed, padding included: their FLOPs over those of one row.

        A RuntimeError is raised if that isn't a whole number or too small: some operation was then not counted.
        """
        rows, remainder = divmod(self.expert_flops, self.flops_per_row)
        if remainder or rows < self.routing.counts().sum():
            raise RuntimeError(
                f"{self.expert_flops} FLOPs of experts are no number of rows: an operation of backend "
                f"{self.layer.experts.backend!r} has no FLOP formula."
            )
        return rows

    @property
    def requested_rows(self) -> int:
        """Rows that the routing asks for, before any capacity drops some; these are the active ones."""
        return int(self.routing.requested_counts().sum())


def count_layers(
    model: nn.Module, counter: FlopCounterMode, forward: Callable[[], Any]
) -> tuple[Any, list[LayerCount]]:
    """Run `forward` once inside an open `flop_counter()`.

    Returns:
        What `forward` returned, and the counts of the model's MoE layers in order of depth.
    """
    with record_routing(model) as routings:
        output = forward()

    # Name of a module, with the model's class as its first part -> operation -> FLOPs.
    flops_by_name = counter.get_flop_counts()
    names = {module: f"{type(model).__name__}.{name}" for name, module in model.named_modules()}

    def flops(module: nn.Module | None) -> int:
        return sum(flops_by_name.get(names.get(module, ""), {}).values())

    counts = []
    # Every MoE layer runs once in a forward pass.
    for layer, routing in zip(moe_layers(model), routings, strict=True):
        router_flops = flops(layer.router)
        expert_flops = flops(layer) - router_flops - flops(layer.shared)
        if isinstance(routing, SoftRouting):
            # Without the two mixing products: tokens to slots, 2 · B · N · E · P · D, and back, 2 · B · N · E · P · O.
            fc1, fc2 = layer.experts.fc1, layer.experts.fc2
            expert_flops -= 2 * routing.slot_weight.numel() * (fc1.in_features + fc2.out_features)
        counts.append(LayerCount(layer, routing, router_flops, expert_flops))
    return output, counts


# ---- torch's counter, and the formulas that it lacks
#
# Torch 2.13 has no formula for `grouped_mm` (forward and both gradients) and for the fused attention of CPUs (forward
# and backward). It has those of CUDA's fused attentions (flash, memory-efficient, cuDNN).

_aten = torch.ops.aten


def grouped_mm_flops(a_shape: torch.Size, b_shape: torch.Size, *_: Any, **__: Any) -> int:
    """FLOPs of `torch.nn.functional.grouped_mm`; they don't depend on the offsets, since every row is in one group.

    Rows [R, D] times weights [E, D, H] take 2 · R · D · H; so does the weights' gradient, [D, R] times [R, H]. Two
    three-dimensional operands are an ordinary batched product.
    """
    if len(a_shape) == len(b_shape) == 3:
        return int(bmm_flop(a_shape, b_shape))
    return 2 * a_shape[-2] * a_shape[-1] * b_shape[-1]


def flop_counter() -> FlopCounterMode:
    """Torch's counter with all formulas that a moevision model needs on a CPU or on CUDA.

    It doesn't see matrix products inside code that Inductor compiled: count the uncompiled model.
    """
    # The first arguments are the shapes of q, k and v; in the backward pass the output's gradient comes before them.
    attention = _aten._scaled_dot_product_flash_attention_for_cpu
    backward = _aten._scaled_dot_product_flash_attention_for_cpu_backward
    formulas = {
        _aten._grouped_mm: grouped_mm_flops,
        attention: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
        backward: lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4]),
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)

"""What a model weighs and what one image costs: its parameters and its active FLOPs.

Parameters are counted; so are FLOPs, by torch's counter with the formulas that it lacks. A multiply-add is two FLOPs,
as in torch. Matrix products, convolutions and attention count; elementwise work, sorting, copies and the colour
router's distances in three dimensions don't.

Active is what one image asks for (K experts per token), without rows that a dispatcher adds; the routers' FLOPs are
apart.

Axes: B images, N tokens, D width, H hidden width of an expert, O output width, E experts or groups, P slots, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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
    """Size and cost of one model; active is what one token passes through, FLOPs are those without the routers."""

    total_parameters: int
    active_parameters: int
    flops_per_image: int
    router_flops_per_image: int = 0


def measure_cost(
    model: nn.Module, image_size: int | tuple[int, int], *, backend: Backend = "loop"
) -> ModelCost:
    """Count the parameters of a model, MoE or dense, and the FLOPs of one image, on the model's own device.

    The backend `dense` computes all experts, as exported files do: `flops_per_image` is then no longer what is active.
    The others compute the chosen ones and agree.
    """
    if isinstance(image_size, int):
        image_size = image_size, image_size
    parameter = next(model.parameters())
    image = torch.zeros(1, 3, *image_size, device=parameter.device, dtype=parameter.dtype)
    # With gradients: without, torch's counter fails where a module is given a view of a parameter (SigLIP's head).
    with torch.enable_grad(), _eval_with(model, backend), flop_counter() as counter:
        _, layers = count_layers(model, counter, lambda: model(image))

    router_flops = sum(layer.router for layer in layers)
    flops = counter.get_total_flops() - router_flops
    if backend != "dense":
        for layer in layers:  # without rows that a dispatcher adds
            flops -= (layer.rows - layer.requested_rows) * layer.per_row
    total, active = parameter_counts(model)
    return ModelCost(total, active, flops, router_flops)


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Total and active parameters; of each MoE layer's experts K / E are active, of everything else all.

    Under expert choice K / E holds on average. Under Soft MoE all experts are active: each computes few rows, but every
    token has a part of them all.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = 0
    for layer in moe_layers(model):
        router = layer.router
        if router.kind != "soft":
            experts = sum(parameter.numel() for parameter in layer.experts.parameters())
            idle += experts // router.num_experts * (router.num_experts - router.top_k)
    return total, total - idle


@contextmanager
def _eval_with(model: nn.Module, backend: Backend) -> Iterator[None]:
    """Eval mode with one backend; `loop` computes the chosen experts only."""
    experts = [module.experts for module in model.modules() if isinstance(module, MoEMlp)]
    backends = [module.backend for module in experts]
    for expert in experts:
        expert.backend = backend
    try:
        with evaluating(model):
            yield
    finally:
        for expert, backend in zip(experts, backends, strict=True):
            expert.backend = backend


# ---- FLOPs of each MoE layer


@dataclass(frozen=True)
class LayerCount:
    """FLOPs of one MoE layer's forward pass: of its router, and of its routed experts."""

    layer: MoEMlp
    routing: Routing
    router: int
    experts: int

    @property
    def per_row(self) -> int:
        """FLOPs of one row through one expert: 2 · (D · H + H · O)."""
        linears = self.layer.experts.fc1, self.layer.experts.fc2
        return sum(2 * linear.in_features * linear.out_features for linear in linears)

    @property
    def rows(self) -> int:
        """R, the rows that went through an expert; a RuntimeError if an operation of the experts has no formula."""
        rows, remainder = divmod(self.experts, self.per_row)
        if remainder or rows < self.routing.counts().sum():
            raise RuntimeError(
                f"{self.experts} FLOPs of experts are no number of rows: an operation of backend "
                f"{self.layer.experts.backend!r} has no FLOP formula."
            )
        return rows

    @property
    def requested_rows(self) -> int:
        """Rows that the routing asks for before any capacity: what is called active."""
        return int(self.routing.requested_counts().sum())


def count_layers(
    model: nn.Module, counter: FlopCounterMode, forward: Callable[[], Any]
) -> tuple[Any, list[LayerCount]]:
    """Run one forward pass under an open `flop_counter()`: what it returned, and its MoE layers in order of depth."""
    # FLOPs between start and end of a layer, its router and its shared experts.
    flops: dict[nn.Module | None, int] = {None: 0}

    def start(module: nn.Module, _: tuple[Any, ...]) -> None:
        flops[module] = -counter.get_total_flops()

    def end(module: nn.Module, _: tuple[Any, ...], __: Any) -> None:
        flops[module] += counter.get_total_flops()

    layers = moe_layers(model)
    with record_routing(model) as routings, ExitStack() as hooks:
        for layer in layers:
            for module in (layer, layer.router, layer.shared):
                if module is not None:
                    hooks.enter_context(module.register_forward_pre_hook(start))
                    hooks.enter_context(module.register_forward_hook(end))
        output = forward()

    counts = []
    # Every MoE layer runs once in a forward pass.
    for layer, routing in zip(layers, routings, strict=True):
        experts = flops[layer] - flops[layer.router] - flops[layer.shared]
        if isinstance(routing, SoftRouting):
            # Slots are filled with weighted means of tokens, and tokens with those of slots: 4 · B · N · E · P · D.
            fc1, fc2 = layer.experts.fc1, layer.experts.fc2
            experts -= 2 * routing.slot_weight.numel() * (fc1.in_features + fc2.out_features)
        counts.append(LayerCount(layer, routing, flops[layer.router], experts))
    return output, counts


# ---- torch's counter, and the formulas that it lacks
#
# Torch 2.13 has none for `grouped_mm` (forward and both gradients) and the fused attention of CPUs (forward and
# backward). CUDA's fused attentions (flash, memory-efficient, cuDNN) it knows.

_aten = torch.ops.aten


def grouped_mm_flops(a_shape: torch.Size, b_shape: torch.Size, *_: Any, **__: Any) -> int:
    """FLOPs of `torch.nn.functional.grouped_mm`; every row belongs to one group, so no number depends on the offsets.

    Rows by weights and the weights' gradient alike take 2 · R · K · N; two batches, of E groups, E times as many.
    """
    if len(a_shape) == len(b_shape) == 3:
        return int(bmm_flop(a_shape, b_shape))
    return 2 * a_shape[-2] * a_shape[-1] * b_shape[-1]


def flop_counter() -> FlopCounterMode:
    """Torch's counter with all formulas that a moevision model needs on a CPU or on CUDA.

    Code that Inductor compiled hides its products from any counter: count the uncompiled model.
    """
    attention = _aten._scaled_dot_product_flash_attention_for_cpu
    backward = _aten._scaled_dot_product_flash_attention_for_cpu_backward
    formulas = {
        _aten._grouped_mm: grouped_mm_flops,
        attention: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
        backward: lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4]),
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)

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
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, bmm_flop, sdpa_backward_flop_count, sdpa_flop_count

from moevision.layers import Backend, MoEMlp, Routing, SoftRouting, moe_layers, record_routing
from moevision.layers.routing import evaluating


@dataclass(frozen=True)
class ModelCost:
    """Size and cost of one model."""

    total_parameters: int  # everything that is stored
    active_parameters: int  # what one token passes through: K of the E experts in each MoE layer
    flops_per_image: int  # active FLOPs of one forward pass, without the routers
    router_flops_per_image: int = 0  # FLOPs of the routers


def measure_cost(
    model: nn.Module, image_size: int | tuple[int, int], in_chans: int = 3, *, backend: Backend = "loop"
) -> ModelCost:
    """Count the parameters of a model and the FLOPs of one image, on the model's own device.

    Args:
        model: an image model, MoE or dense.
        image_size: side(s) of the input in pixels.
        in_chans: channels of the input.
        backend: whose FLOPs to count: `dense` computes all experts, as exported files do (`flops_per_image` is then no
            longer what is active); the others compute the chosen ones and agree.
    """
    height, width = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    parameter = next(model.parameters())
    image = torch.zeros(1, in_chans, height, width, device=parameter.device, dtype=parameter.dtype)
    with torch.no_grad(), _eval_with(model, backend), flop_counter() as counter:
        _, layers = count_layers(model, counter, lambda: model(image))
    router = sum(layer.router for layer in layers)
    flops = int(counter.get_total_flops()) - router
    if backend != "dense":  # without rows that a dispatcher adds
        flops -= sum((layer.rows() - layer.requested_rows()) * layer.per_row(backward=False) for layer in layers)
    return ModelCost(*parameter_counts(model), flops, router)


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Total and active parameters; of each MoE layer's experts K / E are active, of everything else all.

    Under expert choice K / E holds on average. Under Soft MoE all experts are active: each computes few rows, but every
    token has a part of them all.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = 0
    for layer in moe_layers(model):
        if layer.router.kind == "soft":
            continue
        experts = sum(parameter.numel() for parameter in layer.experts.parameters())
        idle += experts // layer.router.num_experts * (layer.router.num_experts - layer.router.top_k)
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
    """FLOPs of one MoE layer's forward pass."""

    layer: MoEMlp
    routing: Routing  # what it decided
    router: int  # the router's FLOPs
    experts: int  # the routed experts' FLOPs
    input_needs_gradient: bool  # whether the layer's input has a gradient to be computed

    def per_row(self, *, backward: bool) -> int:
        """FLOPs of one row through one expert: 2 · (D · H + H · O) forward, as much again for each gradient."""
        fc1, fc2 = self.layer.experts.fc1, self.layer.experts.fc2
        first, second = (2 * linear.in_features * linear.out_features for linear in (fc1, fc2))
        if not backward:
            return first + second
        hidden_needs_gradient = self.input_needs_gradient or any(p.requires_grad for p in fc1.parameters())
        first *= 1 + fc1.weight.requires_grad + self.input_needs_gradient
        second *= 1 + fc2.weight.requires_grad + hidden_needs_gradient
        return first + second

    def rows(self) -> int:
        """R, the rows that went through an expert.

        A RuntimeError if the counted FLOPs are no whole number of rows, or fewer than were kept: an operation of the
        experts has no formula then.
        """
        rows, rest = divmod(self.experts, self.per_row(backward=False))
        if rest or rows < self.kept_rows():
            raise RuntimeError(
                f"{self.experts} FLOPs of experts were counted where {self.kept_rows()} rows of "
                f"{self.per_row(backward=False)} were kept: an operation of backend "
                f"{self.layer.experts.backend!r} has no FLOP formula."
            )
        return rows

    def kept_rows(self) -> int:
        """Rows that reach an output."""
        return int(self.routing.counts().sum())

    def requested_rows(self) -> int:
        """Rows that the routing asks for before any capacity: what is called active."""
        return int(self.routing.requested_counts().sum())

    def router_flops(self, *, backward: bool) -> int:
        """The router's FLOPs; all of its products have a weight and an activation."""
        trains = any(parameter.requires_grad for parameter in self.layer.router.parameters())
        return self.router * (1 + backward * (trains + self.input_needs_gradient))


def count_layers(
    model: nn.Module, counter: FlopCounterMode, forward: Callable[[], Any]
) -> tuple[Any, list[LayerCount]]:
    """Run one forward pass of a model under an open `flop_counter()` and look at each MoE layer in it.

    Returns:
        What `forward` returned, and the layers in order of depth.
    """
    spent: dict[nn.Module, int] = {}  # FLOPs between start and end of a layer, its router and its shared experts
    needs_gradient: dict[nn.Module, bool] = {}

    def start(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        spent[module] = -int(counter.get_total_flops())
        needs_gradient[module] = arguments[0].requires_grad

    def end(module: nn.Module, _: tuple[Any, ...], __: Any) -> None:
        spent[module] += int(counter.get_total_flops())

    layers = moe_layers(model)
    parts = [part for layer in layers for part in (layer, layer.router, layer.shared) if part is not None]
    handles = [part.register_forward_pre_hook(start) for part in parts]
    handles += [part.register_forward_hook(end) for part in parts]
    try:
        with record_routing(model) as routings:
            output = forward()
    finally:
        for handle in handles:
            handle.remove()
    counts = []
    for layer, routing in zip(layers, routings, strict=True):  # every MoE layer runs once in a forward pass
        experts = spent[layer] - spent[layer.router] - (0 if layer.shared is None else spent[layer.shared])
        if isinstance(routing, SoftRouting):
            # Slots are filled with weighted means of tokens, and tokens with those of slots: 4 · B · N · E · P · D.
            fc1, fc2 = layer.experts.fc1, layer.experts.fc2
            experts -= 2 * routing.slot_weight.numel() * (fc1.in_features + fc2.out_features)
        counts.append(LayerCount(layer, routing, spent[layer.router], experts, needs_gradient[layer]))
    return output, counts


# ---- torch's counter, and the formulas that it lacks
#
# Torch 2.13 has none for `grouped_mm` (forward and both gradients) and the fused attention of CPUs (forward and
# backward). CUDA's fused attentions (flash, memory-efficient, cuDNN) it knows.

_aten = torch.ops.aten


def grouped_mm_flops(a_shape: torch.Size, b_shape: torch.Size, *_: Any, **__: Any) -> int:
    """FLOPs of `torch.nn.functional.grouped_mm`; every row belongs to one group, so no number depends on the offsets.

    2 · R · K · N for rows [R, K] by weights [E, K, N] and for the weights' gradient ([M, R] by [R, N]) alike;
    2 · E · M · K · N for two batches [E, M, K] and [E, K, N].
    """
    if len(a_shape) == len(b_shape) == 3:
        return int(bmm_flop(a_shape, b_shape))
    return 2 * a_shape[-2] * a_shape[-1] * b_shape[-1]


def _formula(flops: Callable[..., int], shapes: int) -> Callable[..., int]:
    """Of an operation whose first so many arguments are what `flops` takes."""
    return lambda *given, **_: int(flops(*given[:shapes]))


def flop_counter() -> FlopCounterMode:
    """Torch's counter with all formulas that a moevision model needs on a CPU or on CUDA.

    Code that Inductor compiled hides its products from any counter: count the uncompiled model.
    """
    attention = _aten._scaled_dot_product_flash_attention_for_cpu
    formulas = {
        _aten._grouped_mm: grouped_mm_flops,
        attention: _formula(sdpa_flop_count, 3),
        _aten._scaled_dot_product_flash_attention_for_cpu_backward: _formula(sdpa_backward_flop_count, 4),
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)

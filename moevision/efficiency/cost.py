"""What a model weighs and what one image costs.

Parameters are counted; FLOPs are counted on one image (`counter.py`). A multiply-add is two FLOPs, as in torch. Active
FLOPs are what one image asks for (K experts per token), without rows that a dispatcher adds; the router's are reported
apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from moevision.efficiency.counter import flop_counter
from moevision.efficiency.layer_flops import count_layers
from moevision.layers import Backend, MoEMlp, SoftRouter, label_oracle, moe_layers


@dataclass(frozen=True)
class ModelCost:
    """Size and cost of one model.

    Attributes:
        total_parameters: everything that is stored.
        active_parameters: what one token passes through: K of the E experts in each MoE layer.
        flops_per_image: active FLOPs of one forward pass, without the routers.
        router_flops_per_image: FLOPs of the routers.
    """

    total_parameters: int
    active_parameters: int
    flops_per_image: int
    router_flops_per_image: int = 0


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
    labels = torch.zeros(1, dtype=torch.int64)
    with torch.no_grad(), _eval_with(model, backend), label_oracle(model, labels), flop_counter() as counter:
        _, layers = count_layers(model, counter, lambda: model(image))
    router = sum(layer.router for layer in layers)
    executed = int(counter.get_total_flops())
    padding = (
        0
        if backend == "dense"
        else sum((layer.rows() - layer.requested_rows()) * layer.per_row(backward=False) for layer in layers)
    )
    total, active = parameter_counts(model)
    return ModelCost(total, active, executed - padding - router, router)


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Total and active parameters; of each MoE layer's experts K / E are active, of everything else all.

    Under expert choice K / E holds on average. Under Soft MoE all experts are active: each computes few rows, but every
    token has a part of them all.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = 0
    for layer in moe_layers(model):
        if isinstance(layer.router, SoftRouter):
            continue
        experts = sum(parameter.numel() for parameter in layer.experts.parameters())
        idle += experts // layer.router.num_experts * (layer.router.num_experts - layer.router.top_k)
    return total, total - idle


@contextmanager
def _eval_with(model: nn.Module, backend: Backend) -> Iterator[None]:
    """Eval mode with one backend; `loop` computes the chosen experts only."""
    training = {module: module.training for module in model.modules()}
    experts = [module.experts for module in model.modules() if isinstance(module, MoEMlp)]
    backends = [module.backend for module in experts]
    model.eval()
    for expert in experts:
        expert.backend = backend
    try:
        yield
    finally:
        for expert, backend in zip(experts, backends, strict=True):
            expert.backend = backend
        for module, was_training in training.items():
            module.training = was_training

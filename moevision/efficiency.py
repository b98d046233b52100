"""What a model weighs and what one image costs.

Parameters are counted; FLOPs are measured by torch's counter on one image, with a formula for the fused CPU
attention that the counter leaves out. A multiply-add is two FLOPs, as in torch. Active FLOPs are what one image
really computes (K experts per token); the router's are reported apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

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
        backend: whose FLOPs to count: `loop` computes the chosen experts only, `dense` all of them, as exported files
            do (`flops_per_image` is then no longer what is active).
    """
    height, width = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    parameter = next(model.parameters())
    image = torch.zeros(1, in_chans, height, width, device=parameter.device, dtype=parameter.dtype)
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    with torch.no_grad(), _eval_with(model, backend), label_oracle(model, torch.zeros(1, dtype=torch.int64)), counter:
        model(image)
    by_module = counter.get_flop_counts()
    router = sum(
        sum(counts.values()) for name, counts in by_module.items() if name.endswith(".router") and ".mlp." in name
    )
    total, active = parameter_counts(model)
    return ModelCost(total, active, int(counter.get_total_flops()) - router, router)


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
    """Eval mode with one backend; `loop` computes the chosen experts only, in operations that torch counts."""
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


def _cpu_attention_flops(
    query: torch.Size, key: torch.Size, value: torch.Size, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return int(sdpa_flop_count(query, key, value))


_FORMULAS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention_flops}

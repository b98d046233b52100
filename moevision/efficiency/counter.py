"""FLOPs of whatever torch executes: torch's counter, and the formulas that it leaves out.

A multiply-add is two FLOPs, as in torch. Matrix products, convolutions and attention count; elementwise work, sorting,
copies and the colour router's distances in three dimensions don't.

What torch 2.13 has no formula for: `grouped_mm` (forward and both gradients) and the fused attention of CPUs (forward
and backward). CUDA's fused attentions (flash, memory-efficient, cuDNN) it knows.

Axes: E groups, M and R rows, K and N widths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, bmm_flop, sdpa_backward_flop_count, sdpa_flop_count

_aten = torch.ops.aten


def grouped_mm_flops(a_shape: torch.Size, b_shape: torch.Size) -> int:
    """FLOPs of `torch.nn.functional.grouped_mm`; every row belongs to one group, so no number depends on the offsets.

    Args:
        a_shape: [R, K] (rows in groups), [E, M, K], or [M, R] (a gradient's columns in groups).
        b_shape: [E, K, N], [K, R] (columns in groups), or [R, N] (rows in groups).

    Returns:
        2 · R · K · N for rows by weights and for the weights' gradient alike; 2 · E · M · K · N for two batches.
    """
    if len(a_shape) == len(b_shape) == 3:
        return int(bmm_flop(a_shape, b_shape))
    return 2 * a_shape[-2] * a_shape[-1] * b_shape[-1]


def _grouped_mm(a_shape: torch.Size, b_shape: torch.Size, *_: Any, **__: Any) -> int:
    return grouped_mm_flops(a_shape, b_shape)


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(
    grad: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any
) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


_FORMULAS = {
    _aten._grouped_mm: _grouped_mm,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}

# These compute the scores again instead of having stored them: one of their five products.
_RECOMPUTING = (
    _aten._scaled_dot_product_flash_attention_for_cpu_backward,
    _aten._scaled_dot_product_flash_attention_backward,
    _aten._scaled_dot_product_efficient_attention_backward,
    _aten._scaled_dot_product_cudnn_attention_backward,
)


def flop_counter() -> FlopCounterMode:
    """Torch's counter with all formulas that a moevision model needs on a CPU or on CUDA.

    Code that Inductor compiled hides its products from any counter: count the uncompiled model.
    """
    return FlopCounterMode(display=False, custom_mapping=_FORMULAS)


def count_flops(function: Callable[[], object]) -> int:
    """FLOPs that one call executes, backward passes in it included.

    Example:
        >>> count_flops(lambda: torch.zeros(2, 3) @ torch.zeros(3, 5))
        60
    """
    with flop_counter() as counter:
        function()
    return int(counter.get_total_flops())


def recomputed_attention_flops(counter: FlopCounterMode) -> int:
    """FLOPs that fused attention spent on scores it had computed before (head widths of q, k and v are equal)."""
    by_operation = counter.get_flop_counts().get("Global", {})
    return sum(by_operation.get(operation, 0) for operation in _RECOMPUTING) // 5

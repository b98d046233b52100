"""One expert after the other on its slice of the rows, with a backward pass that writes each gradient once.

Autograd would do the same work and then copy every slice again: into zero-filled halves of a split, into a stack of
weight gradients, into their float32 version. Where all experts have equally many rows, their products are one batched
product: small ones leave a fast matrix unit waiting (docs/performance.md). Where they haven't, the loop of products
without a bias is `grouped_mm`'s, which on a CPU is such a loop in C++.

Axes: R rows, D width, H hidden width, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moevision.layers.once import differentiable_once

_ALIGNMENT = 16
"""Bytes that the start and the strides of a matrix must be multiples of for `grouped_mm`."""


def looped_mlps(
    rows: Tensor,
    counts: Sequence[int],
    act: nn.Module,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
) -> Tensor:
    """Apply expert e, `fc2(act(fc1(x)))`, to the e-th group of rows.

    Args:
        rows: [R, D], sorted by expert.
        counts: length of each of the E groups; they sum to R.
        act: an elementwise activation without parameters, state and randomness, not in place.
        weight1: [E, H, D], in any dtype; it is computed with in that of the rows.
        bias1: [E, H] or None.
        weight2: [E, out, H].
        bias2: [E, out] or None.

    Returns:
        [R, out]. Gradients can be taken once, not of gradients.
    """
    parameters = (weight1, bias1, weight2, bias2)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (rows, *parameters)):
        out: Tensor = _LoopedMlps.apply(rows, counts, act, *parameters)  # type: ignore[no-untyped-call]
        return out
    cast = [None if x is None else x.to(rows.dtype) for x in parameters]
    return _linear(act(_linear(rows, counts, cast[0], cast[1])), counts, cast[2], cast[3])


class _LoopedMlps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: Sequence[int], act: nn.Module, *parameters: Tensor | None) -> Tensor:
        weight1, bias1, weight2, bias2 = (None if x is None else x.to(rows.dtype) for x in parameters)
        hidden = _linear(rows, counts, weight1, bias1)
        active = act(hidden)
        ctx.counts, ctx.act = counts, act
        ctx.dtypes = [None if x is None else x.dtype for x in parameters]
        ctx.save_for_backward(rows, hidden, active, weight1, weight2)
        return _linear(active, counts, weight2, bias2)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, hidden, active, weight1, weight2 = ctx.saved_tensors
        counts, gradient, needed = ctx.counts, gradient.contiguous(), ctx.needs_input_grad[3:]
        of_hidden = _activation_gradient(ctx.act, hidden, _product(gradient, counts, weight2))
        return (
            _product(of_hidden, counts, weight1) if ctx.needs_input_grad[0] else None,
            None,
            None,
            _weight_gradient(of_hidden, rows, counts, ctx.dtypes[0]) if needed[0] else None,
            _bias_gradient(of_hidden, counts, ctx.dtypes[1]) if needed[1] else None,
            _weight_gradient(gradient, active, counts, ctx.dtypes[2]) if needed[2] else None,
            _bias_gradient(gradient, counts, ctx.dtypes[3]) if needed[3] else None,
        )


def _linear(rows: Tensor, counts: Sequence[int], weight: Any, bias: Any) -> Tensor:
    """rows_e · weight_eᵀ + bias_e: [R, I] -> [R, O]."""
    if bias is None:
        return _product(rows, counts, weight.mT)
    if _equal(counts):
        return torch.baddbmm(bias.unsqueeze(1), _batched(rows, counts), weight.mT).flatten(0, 1)
    out = rows.new_empty(rows.shape[0], weight.shape[1])
    groups = zip(bias.unbind(), rows.split(counts), weight.mT.unbind(), out.split(counts), strict=True)
    for one_bias, group, one_weight, place in groups:
        torch.addmm(one_bias, group, one_weight, out=place)
    return out


def _product(rows: Tensor, counts: Sequence[int], weight: Tensor) -> Tensor:
    """rows_e · weight_e: rows [R, I], weight [E, I, O] -> [R, O]."""
    if _equal(counts):
        return torch.bmm(_batched(rows, counts), weight).flatten(0, 1)
    if _fits_grouped_mm(rows, weight):
        return F.grouped_mm(rows, weight, offs=_ends(counts))
    out = rows.new_empty(rows.shape[0], weight.shape[2])
    for group, one, place in zip(rows.split(counts), weight.unbind(), out.split(counts), strict=True):
        torch.mm(group, one, out=place)
    return out


def _weight_gradient(of_out: Tensor, rows: Tensor, counts: Sequence[int], dtype: torch.dtype) -> Tensor:
    """of_out_eᵀ · rows_e: [E, O, I]."""
    if _equal(counts):
        return torch.bmm(_batched(of_out, counts).mT, _batched(rows, counts)).to(dtype)
    if _fits_grouped_mm(of_out, rows):
        return F.grouped_mm(of_out.t(), rows, offs=_ends(counts)).to(dtype)
    pairs = zip(of_out.split(counts), rows.split(counts), strict=True)
    return torch.stack([out.t() @ group for out, group in pairs]).to(dtype)


def _fits_grouped_mm(*matrices: Tensor) -> bool:
    """Whether `grouped_mm` takes them and loops in C++, on a CPU; a GPU's loop would ask the device for the counts."""
    return all(
        x.is_cpu
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and x.data_ptr() % _ALIGNMENT == 0
        and all(stride == 1 or stride * x.itemsize % _ALIGNMENT == 0 for stride in x.stride())
        for x in matrices
    )


def _ends(counts: Sequence[int]) -> Tensor:
    return torch.tensor(list(accumulate(counts)), dtype=torch.int32)


def _bias_gradient(of_out: Tensor, counts: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Sum of each group: [E, O]."""
    if of_out.is_cpu:
        # One bag of rows for each expert: a third of the time of one sum after the other, and added up in float32.
        every, first = torch.arange(of_out.shape[0]), torch.tensor([0, *accumulate(counts[:-1])])
        return F.embedding_bag(every, of_out, first, mode="sum").to(dtype)
    return torch.stack([group.sum(0) for group in of_out.split(counts)]).to(dtype)


def _equal(counts: Sequence[int]) -> bool:
    return min(counts) == max(counts)


def _batched(rows: Tensor, counts: Sequence[int]) -> Tensor:
    return rows.view(len(counts), counts[0], rows.shape[1])


def _activation_gradient(act: nn.Module, hidden: Tensor, of_active: Tensor) -> Tensor:
    if isinstance(act, nn.GELU):
        # Not into the memory of `of_active`, though nobody else reads that: it would take 1.2 to 1.4 times as long.
        of_hidden: Tensor = torch.ops.aten.gelu_backward(of_active, hidden, approximate=act.approximate)
        return of_hidden
    with torch.enable_grad():
        hidden = hidden.detach().requires_grad_()
        return torch.autograd.grad(act(hidden), hidden, of_active)[0]

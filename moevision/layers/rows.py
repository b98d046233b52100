"""Rows taken and summed by index: the moves of dispatch and combine, with gradients that gather too.

Autograd's gradient of a gather is a scatter-add: one row after the other on a CPU, in an order that changes from run to
run on a GPU. Here every row is a copy of one token and every token knows its K rows, so the gradient of either
move is again a gather and a sum. On a CPU that is one kernel, torch's `embedding_bag`, which adds up in float32.

Axes: T tokens, K choices, R rows (T·K and padding), D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moevision.layers.once import differentiable_once


def take_rows(x: Tensor, token: Tensor, position: Tensor) -> Tensor:
    """Copies of tokens.

    Args:
        x: [T, D].
        token: [R] int64, the token that each row copies.
        position: [T, K] int64, the rows of each token; rows that it doesn't name (padding) get no gradient.

    Returns:
        [R, D].
    """
    if torch.compiler.is_compiling():
        return x.index_select(0, token)
    rows: Tensor = _TakeRows.apply(x, token, position)  # type: ignore[no-untyped-call]
    return rows


def sum_rows(rows: Tensor, weight: Tensor, token: Tensor, position: Tensor) -> Tensor:
    """Weighted sum of each token's rows.

    Args:
        rows: [R, D].
        weight: [T, K], rounded to the rows' dtype first: under bf16 autocast that costs no more precision than the
            rounding of the result does, and spares float32 copies of the rows.
        token: [R] int64, the token of each row.
        position: [T, K] int64, the rows of each token.

    Returns:
        [T, D] in the rows' dtype.
    """
    weight = weight.to(rows.dtype)
    if torch.compiler.is_compiling():
        return _sum(rows, position, weight)
    total: Tensor = _SumRows.apply(rows, weight, token, position)  # type: ignore[no-untyped-call]
    return total


def _sum(rows: Tensor, position: Tensor, weight: Tensor | None = None) -> Tensor:
    """[T, D]: Σ_k weight[t, k] · rows[position[t, k]], in the same order every time."""
    if rows.device.type == "cpu" and not torch.compiler.is_compiling():
        return F.embedding_bag(position, rows, mode="sum", per_sample_weights=weight)
    by_token = rows.index_select(0, position.flatten()).view(*position.shape, rows.shape[1])
    if weight is not None:
        by_token = by_token * weight.unsqueeze(-1)
    return by_token.squeeze(1) if position.shape[1] == 1 else by_token.sum(1)


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, position: Tensor) -> Tensor:
        ctx.save_for_backward(position)
        return x.index_select(0, token)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (position,) = ctx.saved_tensors
        return _sum(gradient.contiguous(), position), None, None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, token: Tensor, position: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight, token, position)
        return _sum(rows, position, weight)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        rows, weight, token, position = ctx.saved_tensors
        gradient = gradient.contiguous()
        # Padding has weight 0, whatever token it copies.
        of_row = weight.new_zeros(rows.shape[0]).index_copy_(0, position.flatten(), weight.flatten())
        of_rows = _sum(gradient, token.unsqueeze(1), of_row.unsqueeze(1))  # [R, D], gathered and scaled at once
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = (gradient.index_select(0, token) * rows).sum(-1).index_select(0, position.flatten())
        return of_rows, None if of_weight is None else of_weight.view_as(weight), None, None

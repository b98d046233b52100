"""What only makes the layer fast on a CPU, or repeatable on a GPU: skip it at first reading.

Nothing here changes what is computed. Custom backward passes can be differentiated once: `refuse_transforms` and
`differentiable_once` say so. Measurements: benchmarks/performance.

Axes: T tokens, K choices, R rows (T·K and padding), D width, H hidden width, E experts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache, wraps
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moevision.errors import UserError

MULTIPLE, SMALL_MULTIPLE = 32, 16
"""What sizes of large and small groups are rounded up to in bfloat16: 6 % of additional rows at most, on average."""

FEW = 1024
"""Rows up to which the number of calls counts more than what each of them does: those of a few images at most."""

_ALIGNMENT = 16
"""Bytes that the start and the strides of a matrix must be multiples of for `grouped_mm`."""


# ---- the machine


@cache
def has_matrix_unit() -> bool:
    """Whether this CPU has a matrix unit for bfloat16 (Intel's AMX) and oneDNN may use it.

    The environment variable `ONEDNN_MAX_CPU_ISA` can take it away, as it does for oneDNN.
    """
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper()
    if allowed not in ("DEFAULT", "ALL") and "AMX" not in allowed:
        return False
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # not in every torch that we allow
    return capabilities is not None and bool(capabilities().get("amx_bf16", False))


def _eager(x: Tensor) -> bool:
    """Whether x is on a CPU and code runs as it stands: data may decide what is done."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


# ---- custom backward passes can be differentiated once


def refuse_transforms() -> None:
    """Raise a UserError inside of `torch.func.grad`, `vmap` and their like, which can't see through sorted rows."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise UserError(
            'torch.func and vmap need an MoE layer without data-dependent shapes: build it with backend="dense".'
        )


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate the `backward` of an autograd.Function: `once_differentiable` with an error that says what to do.

    It is raised, too, where the second gradient would come from a saved tensor only, for which torch's gives 0.
    """

    @wraps(backward)
    def once(ctx: Any, *gradients: Tensor) -> Any:
        with torch.no_grad():
            found = backward(ctx, *gradients)
        if not torch.is_grad_enabled():
            return found
        used = (*gradients, *(x for x in ctx.saved_tensors if x is not None))
        found = found if isinstance(found, tuple) else (found,)
        return tuple(None if x is None else _Refuse.apply(x, *used) for x in found)  # type: ignore[no-untyped-call]

    return once


class _Refuse(torch.autograd.Function):
    """A gradient that can be used, but not differentiated again."""

    @staticmethod
    def forward(ctx: Any, found: Tensor, *used: Tensor) -> Tensor:
        return found.view_as(found)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise UserError(
            'Gradients of gradients need an MoE layer without custom backward passes: build it with backend="dense".'
        )


# ---- dispatch: order and group sizes


def send_choices(
    x: Tensor,
    expert: Tensor,
    num_experts: int,
    row_multiple: int | None = None,
    max_padding: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Copies of tokens x [T, D] sorted by their experts [T, K], equal choices as they stand, with padding.

    Returns:
        [R, D] rows; int64: [E] rows of each expert, [R] the token that each row copies (padding: token 0), [T, K] the
        rows of each token.
    """
    choices, top_k = expert.flatten(), expert.shape[1]  # [T·K]
    if row_multiple is max_padding is None and 0 < len(choices) <= FEW and _rows_of_a_call(x):
        # Places in a group are counted, not sorted: few calls count here, each runs code that isn't in the cache.
        place = (
            choices.new_zeros(len(choices), num_experts)
            .scatter_(1, choices.unsqueeze(1), 1)
            .cumsum(0)
        )
        sizes = _padded(place[-1].tolist(), x, None, None)
        first, padded = torch.tensor(
            [[-1, *(end - 1 for end in accumulate(sizes[:-1]))], sizes]
        ).unbind()
        row = (place + first).gather(1, choices.unsqueeze(1)).squeeze(1)
        token = row.new_zeros(sum(sizes)).scatter_(0, row, torch.arange(len(row)) // top_k)  # [R]
    else:
        # [T·K] the choices, expert after expert; [T·K] the row at which each stands then; [E] rows of each expert
        choice, row, counts = sort_choices(choices, num_experts)
        token = choice // top_k  # [T·K] who made each
        padded = padded_counts(counts, x, row_multiple, max_padding)
        if (
            padded is not counts
        ):  # rows of padding copy token 0, and nothing reads what becomes of them
            before = (padded - counts).cumsum(0) - (
                padded - counts
            )  # [E] padding in front of each group
            row += before.index_select(0, choices)
            token = token.new_zeros(int(padded.sum())).index_copy_(
                0, row.index_select(0, choice), token
            )  # [R]
    position = row.view_as(expert)
    return take_rows(x, token, position), padded, token, position


def sort_choices(expert: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort choices by their expert [R] int64, equal ones as they stand: their order, its inverse, and counts [E]."""
    if _eager(expert) and len(expert) <= FEW:  # few calls count here
        order = expert.argsort(stable=True)
        return order, order.argsort(), torch.bincount(expert, minlength=num_experts)
    if _eager(expert) and num_experts <= 256:
        # NumPy sorts single bytes by counting them: a tenth of the time of torch's comparisons.
        order = torch.from_numpy(np.argsort(expert.to(torch.uint8).numpy(), kind="stable"))
    else:
        order = expert.argsort(stable=True)
    row = torch.empty_like(order).index_copy_(
        0, order, torch.arange(order.numel(), device=order.device)
    )
    # scatter_add has a static result shape: no host synchronisation, and it compiles, unlike bincount.
    counts = torch.zeros(num_experts, dtype=torch.int64, device=expert.device)
    return order, row, counts.scatter_add(0, expert, torch.ones_like(expert))


def padded_counts(
    counts: Tensor, x: Tensor, row_multiple: int | None = None, max_padding: float | None = None
) -> Tensor:
    """Group sizes with padding; `counts` itself where nothing is padded.

    In bfloat16 on a CPU groups are padded. Matrix kernels are compiled there for each shape that occurs, for 1 to 2 ms
    and 0.6 MB each (in float32 they aren't), and counts change with every batch: sizes are rounded up to a multiple of
    32 rows (small ones: 16; large ones: a sixteenth of a power of two). With a matrix unit launch overhead dominates:
    all groups are made equally long, for one batched product, if that adds at most a quarter of the rows (two fifths
    below 1 024 rows an expert). Elsewhere that padding would cost more than it saves, unless rows are few: without
    gradients it is done where the added rows cost less than the calls that it spares (`_rows_of_a_call`).

    Of the tokens `x` device, dtype and width count. `row_multiple` is what sizes are rounded up to on a CPU, and
    `max_padding` rows over choices up to which groups are made equally long: 1 turns it off, None is the rule above.
    """
    if not _eager(x):
        return counts
    sizes = counts.tolist()
    lengths = _padded(sizes, x, row_multiple, max_padding)
    return counts if lengths is sizes else counts.new_tensor(lengths)


def _padded(
    sizes: list[int], x: Tensor, row_multiple: int | None, max_padding: float | None
) -> list[int]:
    """See `padded_counts`; `sizes` itself where nothing is padded."""
    half, num_rows = x.dtype == torch.bfloat16, sum(sizes)
    if row_multiple is max_padding is None and (spared := _rows_of_a_call(x)):
        longest = _rounded(max(sizes), 8 if half else 1)
        if len(sizes) * longest - num_rows <= spared * (len(sizes) - sizes.count(0)):
            return len(sizes) * [longest]
    if row_multiple is None:
        row_multiple = (
            1 if not half else MULTIPLE if num_rows >= 8 * MULTIPLE * len(sizes) else SMALL_MULTIPLE
        )
    if row_multiple == 1:
        return sizes
    lengths = [_rounded(count, row_multiple) for count in sizes]
    if max_padding is None:
        with_unit = 1.4 if num_rows < 1024 * len(lengths) else 1.25
        max_padding = with_unit if half and has_matrix_unit() else 1.0
    equal = len(lengths) * [max(lengths)]
    return equal if sum(equal) <= max_padding * num_rows else lengths


def _rows_of_a_call(x: Tensor) -> float:
    """Rows that a product computes in the time that one more call takes, where no gradient is asked for; else 0.

    Measured are 2.1 to 3 million multiply-adds in bfloat16, on two threads twice that; in float32 .5 to .8 on two
    threads and too few to count on one. x is as wide as the rows, and experts are taken to be twice as wide.
    """
    threads = torch.get_num_threads()
    if not _eager(x) or torch.is_grad_enabled() or (x.dtype != torch.bfloat16 and threads == 1):
        return 0.0
    return threads * (2.5e6 if x.dtype == torch.bfloat16 else 0.3e6) / (2 * x.shape[-1] ** 2)


def _rounded(count: int, step: int) -> int:
    """The next multiple of `step`, or for large groups of a sixteenth of the power of two below `count`."""
    step = max(step, (1 << count.bit_length()) // 32)
    return -(-count // step) * step


# ---- routers


def best(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The K highest of the last dimension and their indices, best first: `topk`."""
    if top_k == 1:  # a third to a fifth of topk's time on a CPU
        highest = scores.max(dim=-1, keepdim=True)
        return highest.values, highest.indices
    top = scores.topk(top_k, dim=-1)
    return top.values, top.indices


def softmax_over_experts(logits: Tensor) -> Tensor:
    """Softmax of logits [B, N, E] over E; on a CPU across tokens, since E numbers don't fill a vector register."""
    eager = not torch.compiler.is_compiling() and not torch.is_grad_enabled()
    if logits.device.type != "cpu" or (
        eager and logits.numel() <= FEW
    ):  # for few tokens one call, not three
        return logits.softmax(-1)
    return logits.mT.contiguous().softmax(-2).mT


# ---- moves of rows
#
# Autograd's gradient of a gather is a scatter-add: one row after the other on a CPU, in an order that changes from run
# to run on a GPU. Here every row is a copy of one token and every token knows its K rows, so the gradient of either
# move is again a gather and a sum. On a CPU that is one kernel, torch's `embedding_bag`, which adds up in float32.


def take_rows(x: Tensor, token: Tensor, position: Tensor) -> Tensor:
    """Copies [R, D] of tokens x [T, D].

    `token` [R] says which token each row copies, `position` [T, K] the rows of each token; rows that it doesn't name
    (padding) get no gradient.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return x.index_select(0, token)
    rows: Tensor = _TakeRows.apply(x, token, position)  # type: ignore[no-untyped-call]
    return rows


def sum_rows(rows: Tensor, weight: Tensor, token: Tensor, position: Tensor) -> Tensor:
    """Weighted sum of each token's rows: rows [R, D], weight [T, K], token and position as in `take_rows` -> [T, D].

    Weights are rounded to the rows' dtype first: under bf16 autocast that costs no more precision than the rounding of
    the result does, and spares float32 copies of the rows.
    """
    weight = weight.to(rows.dtype)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
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
        of_row = weight.new_zeros(rows.shape[0]).index_copy_(
            0, position.flatten(), weight.flatten()
        )
        of_rows = _sum(
            gradient, token.unsqueeze(1), of_row.unsqueeze(1)
        )  # [R, D], gathered and scaled at once
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = (
                (gradient.index_select(0, token) * rows).sum(-1).index_select(0, position.flatten())
            )
        return of_rows, None if of_weight is None else of_weight.view_as(weight), None, None


# ---- the experts' loop
#
# Autograd would do the same work and then copy every slice again: into zero-filled halves of a split, into a stack of
# weight gradients, into their float32 version. Where all experts have equally many rows, their products are one batched
# product, since small ones leave a matrix unit waiting. Where they haven't, the loop of products without a bias is
# `grouped_mm`'s, which on a CPU is such a loop in C++.


def looped_mlps(
    rows: Tensor,
    counts: Sequence[int],
    act: nn.Module,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
) -> Tensor:
    """Apply expert e, `fc2(act(fc1(x)))`, to the e-th group of rows [R, D], `counts` long -> [R, out].

    The activation is elementwise, without parameters, state and randomness, and not in place. Weights [E, H, D] and [E,
    out, H] are of any dtype; they are computed with in that of the rows. Gradients can be taken once, not of gradients.
    """
    parameters = (weight1, bias1, weight2, bias2)
    if torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (rows, *parameters)
    ):
        out: Tensor = _LoopedMlps.apply(rows, counts, act, *parameters)  # type: ignore[no-untyped-call]
        return out
    return _linear(act(_linear(rows, counts, weight1, bias1)), counts, weight2, bias2)


class _LoopedMlps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, counts: Sequence[int], act: nn.Module, *parameters: Tensor | None
    ) -> Tensor:
        weight1, bias1, weight2, bias2 = (
            None if x is None else x.to(rows.dtype) for x in parameters
        )
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
    """rows_e · weight_eᵀ + bias_e, in the dtype of the rows: [R, I] -> [R, O]."""
    dtype = rows.dtype
    if bias is None:
        return _product(rows, counts, weight.to(dtype).mT)
    out = rows.new_empty(
        rows.shape[0], weight.shape[1]
    )  # no view of a product: FSDP2 warns of outputs that are views
    if _equal(counts):
        bias, weight = bias.to(dtype).unsqueeze(1), weight.to(dtype).mT
        torch.baddbmm(bias, _batched(rows, counts), weight, out=_batched(out, counts))
        return out
    if 0 not in counts:  # with few rows many experts have none, whose weights needn't be cast
        bias, weight = bias.to(dtype), weight.to(dtype)
    groups = zip(
        bias.unbind(), rows.split(counts), weight.mT.unbind(), out.split(counts), strict=True
    )
    for one_bias, group, one_weight, place in groups:
        if len(group):
            if one_weight.dtype is not dtype:
                one_bias, one_weight = one_bias.to(dtype), one_weight.to(dtype)
            torch.addmm(one_bias, group, one_weight, out=place)
    return out


def _product(rows: Tensor, counts: Sequence[int], weight: Tensor) -> Tensor:
    """rows_e · weight_e: rows [R, I], weight [E, I, O] -> [R, O]."""
    if not _equal(counts) and _fits_grouped_mm(rows, weight):
        return F.grouped_mm(rows, weight, offs=_ends(counts))
    out = rows.new_empty(rows.shape[0], weight.shape[2])
    if _equal(counts):
        torch.bmm(_batched(rows, counts), weight, out=_batched(out, counts))
        return out
    for group, one, place in zip(
        rows.split(counts), weight.unbind(), out.split(counts), strict=True
    ):
        torch.mm(group, one, out=place)
    return out


def _weight_gradient(
    of_out: Tensor, rows: Tensor, counts: Sequence[int], dtype: torch.dtype
) -> Tensor:
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
        of_hidden: Tensor = torch.ops.aten.gelu_backward(
            of_active, hidden, approximate=act.approximate
        )
        return of_hidden
    with torch.enable_grad():
        hidden = hidden.detach().requires_grad_()
        return torch.autograd.grad(act(hidden), hidden, of_active)[0]

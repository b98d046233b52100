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

MULTIPLE = 32
"""What sizes of large groups are rounded up to in bfloat16: 6 % of additional rows at most, on average."""

SMALL_MULTIPLE = 16
"""The same for small groups."""

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
            results = backward(ctx, *gradients)
        if not torch.is_grad_enabled():
            return results

        inputs = [*gradients, *ctx.saved_tensors]
        inputs = [x for x in inputs if x is not None]
        if not isinstance(results, tuple):
            results = (results,)
        return tuple(None if x is None else _Refuse.apply(x, *inputs) for x in results)  # type: ignore[no-untyped-call]

    return once


class _Refuse(torch.autograd.Function):
    """A gradient that can be used, but not differentiated again."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *_inputs: Tensor) -> Tensor:
        return gradient.view_as(gradient)

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
    choices = expert.flatten()  # [T·K]
    by_rule = row_multiple is None and max_padding is None
    if by_rule and 0 < len(choices) <= FEW and _rows_of_a_call(x):
        token, row, counts = _count_choices(x, expert, num_experts)
    else:
        order, row, counts = sort_choices(choices, num_experts)
        token = order // expert.shape[1]  # [T·K] the token of each choice, expert after expert

        padded = padded_counts(counts, x, row_multiple, max_padding)
        if padded is not counts:
            # Rows of padding copy token 0, and nothing reads what becomes of them.
            padding = padded - counts  # [E]
            padding_before = padding.cumsum(0) - padding  # [E] rows of padding before each group
            row += padding_before.index_select(0, choices)
            padded_token = token.new_zeros(int(padded.sum()))  # [R]
            token = padded_token.index_copy_(0, row.index_select(0, order), token)
            counts = padded
    position = row.view_as(expert)
    return take_rows(x, token, position), counts, token, position


def _count_choices(x: Tensor, expert: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """`send_choices` for few choices: positions in a group are counted, not sorted, which takes fewer calls.

    Returns:
        int64: [R] the token that each row copies, [T·K] the row of each choice, [E] rows of each expert.
    """
    choices = expert.flatten().unsqueeze(1)  # [T·K, 1]
    chosen = choices.new_zeros(len(choices), num_experts).scatter_(1, choices, 1)
    number = chosen.cumsum(0)  # [T·K, E] the choice's number in the group of each expert, from 1

    sizes = _padded(number[-1].tolist(), x, None, None)
    starts = accumulate(sizes[:-1], initial=0)
    before_first, counts = torch.tensor([[start - 1 for start in starts], sizes]).unbind()

    row = (number + before_first).gather(1, choices).squeeze(1)  # [T·K]
    token_of_choice = torch.arange(len(row)) // expert.shape[1]
    zeros = row.new_zeros(sum(sizes))  # [R]
    token = zeros.scatter_(0, row, token_of_choice)
    return token, row, counts


def sort_choices(expert: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort choices by their expert [R] int64, equal ones as they stand: their order, its inverse, and counts [E]."""
    eager = _eager(expert)
    if eager and len(expert) <= FEW:  # few calls count here
        order = expert.argsort(stable=True)
        return order, order.argsort(), torch.bincount(expert, minlength=num_experts)

    if eager and num_experts <= 256:
        # NumPy sorts single bytes by counting them: a tenth of the time of torch's comparisons.
        order = torch.from_numpy(np.argsort(expert.to(torch.uint8).numpy(), kind="stable"))
    else:
        order = expert.argsort(stable=True)
    rank = torch.arange(order.numel(), device=order.device)
    row = torch.empty_like(order).index_copy_(0, order, rank)

    # scatter_add has a static result shape: no host synchronisation, and it compiles, unlike bincount.
    zeros = torch.zeros(num_experts, dtype=torch.int64, device=expert.device)
    return order, row, zeros.scatter_add(0, expert, torch.ones_like(expert))


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
    half = x.dtype == torch.bfloat16
    num_rows = sum(sizes)
    num_experts = len(sizes)

    # Few rows without gradients: equal groups, if the added rows cost less than the calls that they spare.
    rows_of_a_call = _rows_of_a_call(x) if row_multiple is None and max_padding is None else 0.0
    if rows_of_a_call:
        longest = _rounded(max(sizes), 8 if half else 1)
        calls = num_experts - sizes.count(0)
        if num_experts * longest - num_rows <= rows_of_a_call * calls:
            return num_experts * [longest]

    if row_multiple is None:
        row_multiple = _row_multiple(num_rows / num_experts) if half else 1
    if row_multiple == 1:
        return sizes
    lengths = [_rounded(count, row_multiple) for count in sizes]

    # With a matrix unit: equal groups, if that adds few rows.
    if max_padding is None:
        max_padding = 1.0
        if half and has_matrix_unit():
            max_padding = 1.4 if num_rows < 1024 * num_experts else 1.25
    equal = num_experts * [max(lengths)]
    return equal if sum(equal) <= max_padding * num_rows else lengths


def _row_multiple(rows_per_expert: float) -> int:
    return MULTIPLE if rows_per_expert >= 8 * MULTIPLE else SMALL_MULTIPLE


def _rows_of_a_call(x: Tensor) -> float:
    """Rows that a product computes in the time that one more call takes, where no gradient is asked for; else 0.

    Measured are 2.1 to 3 million multiply-adds in bfloat16, on two threads twice that; in float32 .5 to .8 on two
    threads and too few to count on one. x is as wide as the rows, and experts are taken to be twice as wide.
    """
    threads = torch.get_num_threads()
    half = x.dtype == torch.bfloat16
    if not _eager(x) or torch.is_grad_enabled() or (threads == 1 and not half):
        return 0.0
    multiply_adds = threads * (2.5e6 if half else 0.3e6)
    return multiply_adds / (2 * x.shape[-1] ** 2)


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
    few = eager and logits.numel() <= FEW  # one call then, not three
    if few or logits.device.type != "cpu":
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
        rows_of_tokens = position.flatten()  # [T·K]

        # Padding has weight 0, whatever token it copies.
        zeros = weight.new_zeros(rows.shape[0])
        row_weight = zeros.index_copy_(0, rows_of_tokens, weight.flatten())  # [R]
        # Gathered and scaled at once.
        rows_gradient = _sum(gradient, token.unsqueeze(1), row_weight.unsqueeze(1))  # [R, D]

        weight_gradient = None
        if ctx.needs_input_grad[1]:
            by_row = (gradient.index_select(0, token) * rows).sum(-1)  # [R]
            weight_gradient = by_row.index_select(0, rows_of_tokens).view_as(weight)
        return rows_gradient, weight_gradient, None, None


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
    inputs = [x for x in (rows, *parameters) if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        out: Tensor = _LoopedMlps.apply(rows, counts, act, *parameters)  # type: ignore[no-untyped-call]
        return out
    hidden = act(_linear(rows, counts, weight1, bias1))
    return _linear(hidden, counts, weight2, bias2)


class _LoopedMlps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, counts: Sequence[int], act: nn.Module, *parameters: Tensor | None
    ) -> Tensor:
        ctx.counts = counts
        ctx.act = act
        ctx.dtypes = [None if x is None else x.dtype for x in parameters]

        same_dtype = [None if x is None else x.to(rows.dtype) for x in parameters]
        weight1, bias1, weight2, bias2 = same_dtype
        hidden = _linear(rows, counts, weight1, bias1)
        active = act(hidden)
        ctx.save_for_backward(rows, hidden, active, weight1, weight2)
        return _linear(active, counts, weight2, bias2)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, hidden, active, weight1, weight2 = ctx.saved_tensors
        counts = ctx.counts
        needs_rows, _, _, needs_weight1, needs_bias1, needs_weight2, needs_bias2 = (
            ctx.needs_input_grad
        )
        dtype1, bias_dtype1, dtype2, bias_dtype2 = ctx.dtypes
        grads: list[Tensor | None] = [None] * 7  # of each argument of `forward`

        out_grad = gradient.contiguous()  # [R, out]
        # One expression: the gradient of `active` [R, H] is freed at once.
        hidden_grad = _activation_gradient(ctx.act, hidden, _product(out_grad, counts, weight2))
        if needs_rows:
            grads[0] = _product(hidden_grad, counts, weight1)
        if needs_weight1:
            grads[3] = _weight_gradient(hidden_grad, rows, counts, dtype1)
        if needs_bias1:
            grads[4] = _bias_gradient(hidden_grad, counts, bias_dtype1)
        if needs_weight2:
            grads[5] = _weight_gradient(out_grad, active, counts, dtype2)
        if needs_bias2:
            grads[6] = _bias_gradient(out_grad, counts, bias_dtype2)
        return tuple(grads)


def _linear(rows: Tensor, counts: Sequence[int], weight: Any, bias: Any) -> Tensor:
    """rows_e · weight_eᵀ + bias_e, in the dtype of the rows: [R, I] -> [R, O]."""
    dtype = rows.dtype
    if bias is None:
        return _product(rows, counts, weight.to(dtype).mT)

    # No view of a product: FSDP2 warns of outputs that are views.
    out = rows.new_empty(rows.shape[0], weight.shape[1])
    if _equal(counts):
        bias = bias.to(dtype).unsqueeze(1)  # [E, 1, O]
        weight = weight.to(dtype).mT  # [E, I, O]
        torch.baddbmm(bias, _batched(rows, counts), weight, out=_batched(out, counts))
        return out

    if 0 not in counts:  # with few rows many experts have none, whose weights needn't be cast
        bias = bias.to(dtype)
        weight = weight.to(dtype)
    groups_in = rows.split(counts)
    groups_out = out.split(counts)
    parts = zip(groups_in, weight.mT.unbind(), bias.unbind(), groups_out, strict=True)
    for group, expert_weight, expert_bias, group_out in parts:
        if not len(group):
            continue
        if expert_weight.dtype is not dtype:
            expert_weight = expert_weight.to(dtype)
            expert_bias = expert_bias.to(dtype)
        torch.addmm(expert_bias, group, expert_weight, out=group_out)
    return out


def _product(rows: Tensor, counts: Sequence[int], weight: Tensor) -> Tensor:
    """rows_e · weight_e: rows [R, I], weight [E, I, O] -> [R, O]."""
    if not _equal(counts) and _fits_grouped_mm(rows, weight):
        return F.grouped_mm(rows, weight, offs=_ends(counts))
    out = rows.new_empty(rows.shape[0], weight.shape[2])
    if _equal(counts):
        torch.bmm(_batched(rows, counts), weight, out=_batched(out, counts))
        return out
    groups_in = rows.split(counts)
    groups_out = out.split(counts)
    parts = zip(groups_in, weight.unbind(), groups_out, strict=True)
    for group, expert_weight, group_out in parts:
        torch.mm(group, expert_weight, out=group_out)
    return out


def _weight_gradient(
    out_grad: Tensor, rows: Tensor, counts: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """out_grad_eᵀ · rows_e: [E, O, I]."""
    if _equal(counts):
        return torch.bmm(_batched(out_grad, counts).mT, _batched(rows, counts)).to(dtype)
    if _fits_grouped_mm(out_grad, rows):
        return F.grouped_mm(out_grad.t(), rows, offs=_ends(counts)).to(dtype)
    pairs = zip(out_grad.split(counts), rows.split(counts), strict=True)
    return torch.stack([grad.t() @ group for grad, group in pairs]).to(dtype)


def _fits_grouped_mm(*matrices: Tensor) -> bool:
    """Whether `grouped_mm` takes them and loops in C++, on a CPU; a GPU's loop would ask the device for the counts."""
    for x in matrices:
        if not x.is_cpu or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return False
        if x.data_ptr() % _ALIGNMENT:
            return False
        if any(stride != 1 and stride * x.itemsize % _ALIGNMENT for stride in x.stride()):
            return False
    return True


def _ends(counts: Sequence[int]) -> Tensor:
    return torch.tensor(list(accumulate(counts)), dtype=torch.int32)


def _bias_gradient(out_grad: Tensor, counts: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Sum of each group: [E, O]."""
    if not out_grad.is_cpu:
        return torch.stack([group.sum(0) for group in out_grad.split(counts)]).to(dtype)
    # One bag of rows for each expert: a third of the time of one sum after the other, and added up in float32.
    rows = torch.arange(out_grad.shape[0])
    starts = torch.tensor([0, *accumulate(counts[:-1])])
    return F.embedding_bag(rows, out_grad, starts, mode="sum").to(dtype)


def _equal(counts: Sequence[int]) -> bool:
    return min(counts) == max(counts)


def _batched(rows: Tensor, counts: Sequence[int]) -> Tensor:
    return rows.view(len(counts), counts[0], rows.shape[1])


def _activation_gradient(act: nn.Module, hidden: Tensor, active_grad: Tensor) -> Tensor:
    if isinstance(act, nn.GELU):
        # Not into the memory of `active_grad`, though nobody else reads that: it would take 1.2 to 1.4 times as long.
        gelu_backward = torch.ops.aten.gelu_backward
        hidden_grad: Tensor = gelu_backward(active_grad, hidden, approximate=act.approximate)
        return hidden_grad
    with torch.enable_grad():
        hidden = hidden.detach().requires_grad_()
        return torch.autograd.grad(act(hidden), hidden, active_grad)[0]

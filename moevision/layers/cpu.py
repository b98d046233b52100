"""Operations that make the layer fast on a CPU, or reproducible on a GPU: skip this file at first reading.

They compute the same as simple PyTorch code. Their custom backward passes support neither second derivatives, for which
`differentiable_once` raises an error, nor torch.func, for which torch does. Measurements: benchmarks/performance.

Axes: T tokens, K choices of a token, R rows (T·K and padding), D width, H hidden width, E experts; I input and O output
width of one matrix product.
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

ROW_MULTIPLE = 32
"""In bfloat16, the rows of large groups are rounded up to a multiple of this: on average at most 6 % more rows."""

SMALL_ROW_MULTIPLE = 16
"""The multiple for small groups."""

FEW_CHOICES = 1024
"""Up to this many choices, those of a few images, the number of torch calls matters more than the work in each call."""

_FEW_LOGITS = 1024
"""The same for a softmax."""

_ALIGNMENT = 16
"""`grouped_mm` needs matrices whose address and strides are multiples of this many bytes."""


# ---- the machine


@cache
def has_matrix_unit() -> bool:
    """Whether this CPU has a matrix unit for bfloat16 (Intel's AMX) and oneDNN may use it.

    oneDNN doesn't use it if the environment variable `ONEDNN_MAX_CPU_ISA` names a smaller instruction set.
    """
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper()
    if allowed not in ("DEFAULT", "ALL") and "AMX" not in allowed:
        return False
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # not in every torch that we allow
    return capabilities is not None and bool(capabilities().get("amx_bf16", False))


def _is_eager_cpu(x: Tensor) -> bool:
    """Whether x is on a CPU and the code isn't being compiled, so that Python may branch on values of tensors."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


# ---- custom backward passes can be differentiated once


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator for the `backward` of an autograd.Function: raises a UserError under `create_graph=True`.

    Torch's `once_differentiable` doesn't raise one where the gradient depends on saved tensors only: second derivatives
    are then silently 0.
    """

    @wraps(backward)
    def guarded_backward(ctx: Any, *gradients: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise UserError(
                "Gradients of gradients need an MoE layer without custom backward passes: build it with "
                'backend="dense".'
            )
        return backward(ctx, *gradients)

    return guarded_backward


# ---- dispatch: order and group sizes


def copy_to_experts(
    x: Tensor, expert: Tensor, num_experts: int, *, pad: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Copies of the tokens x [T, D], sorted by the experts [T, K] that they chose, perhaps with padding if `pad`.

    Rows of one expert are in the order of their tokens.

    Returns:
        rows [R, D]; int64: [E] the number of rows of each expert, [R] the token that each row copies (padding: token
        0), [T, K] the row of each choice.
    """
    choices = expert.flatten()  # [T·K]
    # The number of choices is asked last: in an exported program a branch on it would fix the batch size.
    if pad and _rows_worth_one_call(x) and 0 < len(choices) <= FEW_CHOICES:
        token_of_row, row_of_choice, counts = _place_few_choices(x, expert, num_experts)
    else:
        order, row_of_choice, counts = sort_choices(choices, num_experts)
        token_of_row = order // expert.shape[1]  # [T·K] sorted by expert

        padded_sizes = padded_counts(counts, x) if pad else counts
        if padded_sizes is not counts:
            # Rows of padding copy token 0; their outputs are never read.
            padding = padded_sizes - counts  # [E]
            padding_before = padding.cumsum(0) - padding  # [E] rows of padding before each group
            row_of_choice += padding_before.index_select(0, choices)
            padded_token = token_of_row.new_zeros(int(padded_sizes.sum()))  # [R]
            row_of_sorted_choice = row_of_choice.index_select(0, order)  # [T·K]
            token_of_row = padded_token.index_copy_(0, row_of_sorted_choice, token_of_row)
            counts = padded_sizes

    position = row_of_choice.view_as(expert)  # [T, K]
    rows = take_rows(x, token_of_row, position)
    return rows, counts, token_of_row, position


def _place_few_choices(
    x: Tensor, expert: Tensor, num_experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of few choices, found by counting instead of sorting, which takes fewer calls.

    Returns:
        int64: [R] the token that each row copies, [T·K] the row of each choice, [E] rows of each expert.
    """
    choices = expert.flatten().unsqueeze(1)  # [T·K, 1]
    one_hot = choices.new_zeros(len(choices), num_experts).scatter_(1, choices, 1)  # [T·K, E]
    number_in_group = one_hot.cumsum(0)  # [T·K, E] choices of each expert up to this one, from 1 on

    sizes = _padded_lengths(number_in_group[-1].tolist(), x)
    starts = accumulate(sizes[:-1], initial=0)
    # Both [E], made in one call. The first choice of a group has number 1 and belongs into the row `start`: so the row
    # of a choice is its number plus `start - 1`.
    row_before_group, counts = torch.tensor([[start - 1 for start in starts], sizes]).unbind()

    row_of_choice = (number_in_group + row_before_group).gather(1, choices).squeeze(1)  # [T·K]
    token_of_choice = torch.arange(len(row_of_choice)) // expert.shape[1]  # [T·K]
    token_zero = row_of_choice.new_zeros(sum(sizes))  # [R]
    token_of_row = token_zero.scatter_(0, row_of_choice, token_of_choice)
    return token_of_row, row_of_choice, counts


def sort_choices(expert: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Stable sort of choices by their expert [T·K] int64.

    Returns:
        int64: [T·K] the choices (their indices) sorted by expert, [T·K] the place of each choice in this order, [E] the
        number of choices of each expert.
    """
    is_eager = _is_eager_cpu(expert)
    if is_eager and len(expert) <= FEW_CHOICES:  # the fewest calls
        order = expert.argsort(stable=True)
        return order, order.argsort(), torch.bincount(expert, minlength=num_experts)

    if is_eager and num_experts <= 256:
        # NumPy's counting sort of bytes takes a tenth of the time of torch's comparison sort.
        order = torch.from_numpy(np.argsort(expert.to(torch.uint8).numpy(), kind="stable"))
    else:
        order = expert.argsort(stable=True)
    places = torch.arange(order.numel(), device=order.device)
    place_of_choice = torch.empty_like(order).index_copy_(0, order, places)

    # Unlike bincount, scatter_add has a static result shape, so that it compiles and needs no host synchronisation.
    zeros = torch.zeros(num_experts, dtype=torch.int64, device=expert.device)
    return order, place_of_choice, zeros.scatter_add(0, expert, torch.ones_like(expert))


def padded_counts(counts: Tensor, x: Tensor) -> Tensor:
    """Lengths [E] of the experts' groups with padding; `counts` [E] itself where nothing is padded.

    Groups are padded on a CPU in these three cases:

    - In bfloat16, matrix kernels are compiled for each shape, which takes 1 to 2 ms and 0.6 MB each, and lengths change
      with every batch. So they are rounded up to a multiple of 32 rows (small groups: 16; large ones: a sixteenth of a
      power of two).
    - In bfloat16 with a matrix unit, the time is dominated by the launches of products. So all groups are made equally
      long, for one batched product, if that adds at most a quarter of the rows (two fifths below 1 024 rows an expert).
    - Without gradients and with few rows, in either dtype, all groups are made equally long if the added rows take less
      time than the calls that this saves (`_rows_worth_one_call`).

    Args:
        counts: [E] the rows of each expert.
        x: the tokens, for their device, dtype and width.
    """
    if not _is_eager_cpu(x):
        return counts
    sizes = counts.tolist()
    lengths = _padded_lengths(sizes, x)
    return counts if lengths is sizes else counts.new_tensor(lengths)


def _padded_lengths(sizes: list[int], x: Tensor) -> list[int]:
    """`padded_counts` for a list of lengths [E]; `sizes` itself where nothing is padded."""
    is_bf16 = x.dtype == torch.bfloat16
    num_rows = sum(sizes)
    num_experts = len(sizes)

    # Few rows without gradients: equal groups, if the added rows take less time than the calls of a loop. In bfloat16
    # their length is a multiple of 8, so that there are fewer shapes to compile kernels for.
    call_rows = _rows_worth_one_call(x)
    if call_rows:  # else 0: padding doesn't pay
        longest = _round_up(max(sizes), 8 if is_bf16 else 1)
        num_calls = num_experts - sizes.count(0)
        if num_experts * longest - num_rows <= call_rows * num_calls:
            return num_experts * [longest]
    if not is_bf16:
        return sizes

    # Round up each length.
    row_multiple = _row_multiple(num_rows / num_experts)
    lengths = [_round_up(count, row_multiple) for count in sizes]
    if not has_matrix_unit():
        return lengths

    # With a matrix unit: equal groups, if that adds few rows. For small groups a launch takes a larger share of the
    # time, which is worth more rows.
    max_padding = 1.4 if num_rows < 1024 * num_experts else 1.25
    equal_lengths = num_experts * [max(lengths)]
    return equal_lengths if sum(equal_lengths) <= max_padding * num_rows else lengths


def _row_multiple(rows_per_expert: float) -> int:
    """The multiple that lengths are rounded up to in bfloat16."""
    return ROW_MULTIPLE if rows_per_expert >= 8 * ROW_MULTIPLE else SMALL_ROW_MULTIPLE


def _rows_worth_one_call(x: Tensor) -> float:
    """Number of rows that a linear layer of an expert computes in the time of one call; 0 if padding doesn't pay.

    It doesn't pay with gradients, in compiled code, on other devices, and in float32 on one thread. Measured were, in
    the time of a call: in bfloat16 2.1 to 3 million multiply-adds on one thread and twice that on two; in float32 0.5
    to 0.8 million on two threads. A row takes D · H multiply-adds; H is assumed to be 2 D.
    """
    threads = torch.get_num_threads()
    is_bf16 = x.dtype == torch.bfloat16
    if not _is_eager_cpu(x) or torch.is_grad_enabled() or (threads == 1 and not is_bf16):
        return 0.0
    multiply_adds = threads * (2.5e6 if is_bf16 else 0.3e6)
    return multiply_adds / (2 * x.shape[-1] ** 2)


def _round_up(count: int, step: int) -> int:
    """Round up to a multiple of `step`, or of 1/16 of the largest power of two up to `count` if that is more.

    That power has one bit less than `1 << count.bit_length()`, hence the 32.
    """
    step = max(step, (1 << count.bit_length()) // 32)
    return -(-count // step) * step


# ---- routers


def top_k_scores(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """`topk` over the last dimension: the K highest scores and their indices, best first."""
    if top_k == 1:  # takes a third to a fifth of the time of topk on a CPU
        highest = scores.max(dim=-1, keepdim=True)
        return highest.values, highest.indices
    top = scores.topk(top_k, dim=-1)
    return top.values, top.indices


def softmax_over_experts(logits: Tensor) -> Tensor:
    """Softmax of logits [B, N, E] over E.

    On a CPU the tensor is transposed first, so that vector registers hold several tokens: E numbers don't fill one.
    """
    is_inference = not torch.compiler.is_compiling() and not torch.is_grad_enabled()
    is_small = is_inference and logits.numel() <= _FEW_LOGITS  # there one call is faster than three
    if is_small or logits.device.type != "cpu":
        return logits.softmax(-1)
    return logits.mT.contiguous().softmax(-2).mT


# ---- copying tokens to rows, and adding up the rows of each token
#
# Autograd's gradient of a gather is a scatter-add: on a CPU it adds one row after the other, on a GPU in an order that
# changes from run to run. Here every row is a copy of one token, and the K rows of every token are known. So the
# gradient of either operation is a gather and a sum. On a CPU these are one kernel, torch's `embedding_bag`, which adds
# up in float32.


def take_rows(x: Tensor, token: Tensor, position: Tensor) -> Tensor:
    """Copies [R, D] of tokens x [T, D].

    `token` [R] is the token that each row copies, `position` [T, K] the rows of each token. Padding is in no `position`
    and gets no gradient.
    """
    # Compiled code has a backward pass of Inductor's own, and without gradients there is none.
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return x.index_select(0, token)
    rows: Tensor = _TakeRows.apply(x, token, position)  # type: ignore[no-untyped-call]
    return rows


def sum_rows(rows: Tensor, weight: Tensor, token: Tensor, position: Tensor) -> Tensor:
    """Sum of each token's rows by the weights of its choices: rows [R, D], weight [T, K] -> [T, D].

    `token` and `position` are as in `take_rows`. Weights are rounded to the rows' dtype first. Under bf16 autocast that
    loses no more precision than rounding the result does, and avoids float32 copies of the rows.
    """
    weight = weight.to(rows.dtype)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return _gather_and_sum(rows, position, weight)
    total: Tensor = _SumRows.apply(rows, weight, token, position)  # type: ignore[no-untyped-call]
    return total


def _gather_and_sum(rows: Tensor, position: Tensor, weight: Tensor | None = None) -> Tensor:
    """[T, D]: Σ_k weight[t, k] · rows[position[t, k]] for rows [R, D], always added in the same order."""
    if rows.device.type == "cpu" and not torch.compiler.is_compiling():
        return F.embedding_bag(position, rows, mode="sum", per_sample_weights=weight)

    # [T, K, D]
    by_token = rows.index_select(0, position.flatten()).view(*position.shape, rows.shape[1])
    if weight is not None:
        by_token = by_token * weight.unsqueeze(-1)
    return by_token.squeeze(1) if position.shape[1] == 1 else by_token.sum(1)


class _TakeRows(torch.autograd.Function):
    """`take_rows` with a gradient that gathers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, position: Tensor) -> Tensor:
        ctx.save_for_backward(position)
        return x.index_select(0, token)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (position,) = ctx.saved_tensors
        return _gather_and_sum(gradient.contiguous(), position), None, None


class _SumRows(torch.autograd.Function):
    """`sum_rows` with gradients that gather."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, token: Tensor, position: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight, token, position)
        return _gather_and_sum(rows, position, weight)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        rows, weight, token, position = ctx.saved_tensors
        gradient = gradient.contiguous()  # [T, D]
        row_of_choice = position.flatten()  # [T·K]

        # Rows of padding keep the weight 0.
        zero_weights = weight.new_zeros(rows.shape[0])
        row_weight = zero_weights.index_copy_(0, row_of_choice, weight.flatten())  # [R]

        # [R, D]: the gradient of a row is that of its token times its weight; this gathers and multiplies in one call.
        rows_gradient = _gather_and_sum(gradient, token.unsqueeze(1), row_weight.unsqueeze(1))

        weight_gradient = None
        if ctx.needs_input_grad[1]:
            gradient_of_weight = (gradient.index_select(0, token) * rows).sum(-1)  # [R]
            weight_gradient = gradient_of_weight.index_select(0, row_of_choice).view_as(weight)
        return rows_gradient, weight_gradient, None, None


# ---- the experts' MLPs, each on its group of rows
#
# A plain loop over experts has the same products, but autograd adds copies: gradients of slices are written into
# zero-filled tensors, those of weights are stacked and then cast to float32. Where all groups are equally long, one
# batched product replaces the loop, since small products don't keep a matrix unit busy. Where they aren't, products
# without a bias use `grouped_mm`, which on a CPU is the same loop in C++.


def grouped_mlps(
    rows: Tensor,
    counts: Sequence[int],
    act: nn.Module,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
) -> Tensor:
    """Apply expert e, `fc2(act(fc1(x)))`, to the e-th group of rows [R, D], which has `counts[e]` rows -> [R, O].

    The activation must be elementwise, without parameters, state and randomness, and not in place. Weights [E, H, D]
    and [E, O, H], and biases [E, H] and [E, O], of any dtype are cast to that of the rows. Second derivatives aren't
    supported.
    """
    parameters = (weight1, bias1, weight2, bias2)
    inputs = [x for x in (rows, *parameters) if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        out: Tensor = _GroupedMlps.apply(rows, counts, act, *parameters)  # type: ignore[no-untyped-call]
        return out
    hidden = act(_grouped_linear(rows, counts, weight1, bias1))
    return _grouped_linear(hidden, counts, weight2, bias2)


class _GroupedMlps(torch.autograd.Function):
    """`grouped_mlps` with a backward pass in the same groups."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, counts: Sequence[int], act: nn.Module, *parameters: Tensor | None
    ) -> Tensor:
        ctx.counts = counts
        ctx.act = act
        ctx.dtypes = [None if parameter is None else parameter.dtype for parameter in parameters]

        cast_parameters = [
            None if parameter is None else parameter.to(rows.dtype) for parameter in parameters
        ]
        weight1, bias1, weight2, bias2 = cast_parameters

        hidden = _grouped_linear(rows, counts, weight1, bias1)  # [R, H]
        activated = act(hidden)  # [R, H]
        ctx.save_for_backward(rows, hidden, activated, weight1, weight2)
        return _grouped_linear(activated, counts, weight2, bias2)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, hidden, activated, weight1, weight2 = ctx.saved_tensors
        counts = ctx.counts
        needs_rows, _, _, needs_weight1, needs_bias1, needs_weight2, needs_bias2 = (
            ctx.needs_input_grad
        )
        # Those of the parameters before the cast.
        dtype1, bias_dtype1, dtype2, bias_dtype2 = ctx.dtypes
        # Of the arguments of `forward`: 0 rows, 1 counts, 2 act, 3 weight1, 4 bias1, 5 weight2, 6 bias2.
        grads: list[Tensor | None] = [None] * 7

        out_grad = gradient.contiguous()  # [R, O]
        # One expression, so that the gradient of `activated` [R, H] has no name and is freed at once.
        hidden_grad = _activation_gradient(
            ctx.act, hidden, _grouped_product(out_grad, counts, weight2)
        )
        if needs_rows:
            grads[0] = _grouped_product(hidden_grad, counts, weight1)
        if needs_weight1:
            grads[3] = _weight_gradient(hidden_grad, rows, counts, dtype1)
        if needs_bias1:
            grads[4] = _bias_gradient(hidden_grad, counts, bias_dtype1)
        if needs_weight2:
            grads[5] = _weight_gradient(out_grad, activated, counts, dtype2)
        if needs_bias2:
            grads[6] = _bias_gradient(out_grad, counts, bias_dtype2)
        return tuple(grads)


def _grouped_linear(rows: Tensor, counts: Sequence[int], weight: Any, bias: Any) -> Tensor:
    """rows_e · weight_eᵀ + bias_e, in the dtype of the rows: rows [R, I], weight [E, O, I], bias [E, O] -> [R, O]."""
    dtype = rows.dtype
    if bias is None:
        return _grouped_product(rows, counts, weight.to(dtype).mT)

    # Products are written into `out`, since FSDP2 warns about outputs that are views.
    out = rows.new_empty(rows.shape[0], weight.shape[1])
    if _all_equal(counts):
        bias = bias.to(dtype).unsqueeze(1)  # [E, 1, O]
        weight = weight.to(dtype).mT  # [E, I, O]
        torch.baddbmm(bias, _stack_groups(rows, counts), weight, out=_stack_groups(out, counts))
        return out

    # All weights are cast at once. If some experts have no rows, that would be wasted on theirs: then the others' are
    # cast one by one, below.
    if 0 not in counts:
        bias = bias.to(dtype)
        weight = weight.to(dtype)
    groups_in = rows.split(counts)
    groups_out = out.split(counts)
    per_expert = zip(groups_in, weight.mT.unbind(), bias.unbind(), groups_out, strict=True)
    for group, expert_weight, expert_bias, group_out in per_expert:
        if not len(group):
            continue
        if expert_weight.dtype is not dtype:
            expert_weight = expert_weight.to(dtype)
            expert_bias = expert_bias.to(dtype)
        torch.addmm(expert_bias, group, expert_weight, out=group_out)
    return out


def _grouped_product(rows: Tensor, counts: Sequence[int], weight: Tensor) -> Tensor:
    """rows_e · weight_e: rows [R, I], weight [E, I, O] -> [R, O]."""
    if not _all_equal(counts) and _fits_grouped_mm(rows, weight):
        return F.grouped_mm(rows, weight, offs=_group_ends(counts))

    out = rows.new_empty(rows.shape[0], weight.shape[2])
    if _all_equal(counts):
        torch.bmm(_stack_groups(rows, counts), weight, out=_stack_groups(out, counts))
        return out

    groups_in = rows.split(counts)
    groups_out = out.split(counts)
    per_expert = zip(groups_in, weight.unbind(), groups_out, strict=True)
    for group, expert_weight, group_out in per_expert:
        torch.mm(group, expert_weight, out=group_out)
    return out


def _weight_gradient(
    out_grad: Tensor, rows: Tensor, counts: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """out_grad_eᵀ · rows_e: out_grad [R, O], rows [R, I] -> [E, O, I]."""
    if _all_equal(counts):
        out_grads = _stack_groups(out_grad, counts).mT  # [E, O, R / E]
        return torch.bmm(out_grads, _stack_groups(rows, counts)).to(dtype)
    if _fits_grouped_mm(out_grad, rows):
        return F.grouped_mm(out_grad.t(), rows, offs=_group_ends(counts)).to(dtype)
    pairs = zip(out_grad.split(counts), rows.split(counts), strict=True)
    return torch.stack([grad.t() @ group for grad, group in pairs]).to(dtype)


def _fits_grouped_mm(*matrices: Tensor) -> bool:
    """Whether `grouped_mm` supports these matrices.

    On a GPU it isn't used: its group ends would have to be on the device, while `counts` are Python's.
    """
    for x in matrices:
        if not x.is_cpu or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return False
        if x.data_ptr() % _ALIGNMENT:
            return False
        if any(stride != 1 and stride * x.itemsize % _ALIGNMENT for stride in x.stride()):
            return False
    return True


def _group_ends(counts: Sequence[int]) -> Tensor:
    """[E] int32: the end of each group, as `grouped_mm` needs it."""
    return torch.tensor(list(accumulate(counts)), dtype=torch.int32)


def _bias_gradient(out_grad: Tensor, counts: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Sum of each group: out_grad [R, O] -> [E, O]."""
    if not out_grad.is_cpu:
        return torch.stack([group.sum(0) for group in out_grad.split(counts)]).to(dtype)
    # One "bag" of rows per expert: that takes a third of the time of a loop of sums, and adds up in float32.
    rows = torch.arange(out_grad.shape[0])
    starts = torch.tensor([0, *accumulate(counts[:-1])])
    return F.embedding_bag(rows, out_grad, starts, mode="sum").to(dtype)


def _all_equal(counts: Sequence[int]) -> bool:
    """Whether all groups are equally long."""
    return min(counts) == max(counts)


def _stack_groups(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """View of the rows [R, D] of equally long groups as [E, R / E, D]."""
    return rows.view(len(counts), counts[0], rows.shape[1])


def _activation_gradient(act: nn.Module, hidden: Tensor, active_grad: Tensor) -> Tensor:
    """The gradient of `hidden` [R, H], given that of `act(hidden)`."""
    if isinstance(act, nn.GELU):
        # Writing into `active_grad`, which isn't needed any more, would take 1.2 to 1.4 times as long.
        result: Tensor = torch.ops.aten.gelu_backward(
            active_grad, hidden, approximate=act.approximate
        )
        return result
    with torch.enable_grad():
        hidden = hidden.detach().requires_grad_()
        return torch.autograd.grad(act(hidden), hidden, active_grad)[0]

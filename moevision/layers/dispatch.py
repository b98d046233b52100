"""Dispatch and combine: from tokens to rows sorted by expert, and back.

The dispatcher owns no parameters. It is the only object that knows where experts live, so expert parallelism
replaces it and nothing else. Here all experts are local.

Axes: B images, N tokens of an image, T = B·N tokens, D width, K choices, R rows, E experts, C tokens that an expert
takes of an image (expert choice), P slots of an expert (Soft MoE).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moevision.layers.machine import has_matrix_unit
from moevision.layers.routing import Routing
from moevision.layers.rows import sum_rows, take_rows
from moevision.layers.slots import ExpertChoiceRouting, SoftRouting

MULTIPLE, SMALL_MULTIPLE = 32, 16
"""What sizes of large and small groups are rounded up to in bfloat16: 6 % of additional rows at most, on average."""


@dataclass(frozen=True)
class Dispatched:
    """Rows ready for the experts, and the way back.

    Attributes:
        rows: [R, D] copies of tokens (or slots), sorted by expert; R = T·K plus padding, B·E·C or B·E·P.
        counts: [E] int64, rows of each expert, padding included; they sum to R.
        token: [R] int64, the token that each row is a copy of (padding: token 0); None for slots, which mix tokens.
        position: [T, K] int64, the rows of each token, where every token has K of them (token choice); else None.
    """

    rows: Tensor
    counts: Tensor
    token: Tensor | None = None
    position: Tensor | None = None


class LocalDispatcher:
    """Dispatch to experts in this process.

    A choice that the router did not keep is computed and given weight 0, so that shapes stay static.

    In bfloat16 on a CPU groups are padded. Matrix kernels are compiled there for each shape that occurs, for 1 to 2 ms
    and 0.6 MB each (in float32 they aren't), and counts change with every batch: sizes are rounded up to a multiple of
    32 rows (small ones: 16; large ones: a sixteenth of a power of two). A matrix unit makes the experts'
    products so quick that starting them counts: where loads are so even that it adds at most a quarter (two fifths to
    less than 1 024 rows an expert), all groups are made equally long there, and their products are one batched
    product. Elsewhere that padding would cost more than it saves (docs/performance.md).
    Padding rows copy token 0; nothing reads their result, so their gradient is zero (if that of token 0 is finite).

    Args:
        row_multiple: what group sizes are rounded up to on a CPU; 1 turns padding off; None: the rule above.
        max_padding: rows over choices up to which groups are made equally long; 1 turns that off; None: the rule above.
    """

    def __init__(self, row_multiple: int | None = None, max_padding: float | None = None) -> None:
        self.row_multiple, self.max_padding = row_multiple, max_padding

    def dispatch(self, x: Tensor, routing: Routing) -> Dispatched:
        """Bring the tokens x [T, D] of a batch into rows sorted by expert."""
        if isinstance(routing, SoftRouting):
            return self._fill_slots(x, routing)
        if isinstance(routing, ExpertChoiceRouting):
            return self._take_tokens(x, routing)
        return self._send_choices(x, routing)

    def combine(self, rows: Tensor, dispatched: Dispatched, routing: Routing) -> Tensor:
        """Weighted sum [T, D] of the experts' rows [R, D], in the rows' dtype."""
        if isinstance(routing, SoftRouting):
            return self._read_slots(rows, routing)
        assert dispatched.token is not None  # only slots have no single token
        if isinstance(routing, ExpertChoiceRouting):
            weight = _by_expert(routing.token_weight).to(rows.dtype).unsqueeze(-1)
            tokens = rows.new_zeros(routing.logits.shape[0] * routing.logits.shape[1], rows.shape[-1])
            return tokens.index_add(0, dispatched.token, rows * weight)
        assert dispatched.position is not None
        weight = (routing.combine_weight * routing.kept).flatten(0, 1)
        return sum_rows(rows, weight, dispatched.token, dispatched.position)

    def _send_choices(self, x: Tensor, routing: Routing) -> Dispatched:
        """Token choice: copy each token once for every expert that it chose."""
        counts, top_k = routing.requested_counts(), routing.top_k
        expert = routing.expert_index.flatten()
        order = _stable_order(expert, routing.num_experts)
        place = torch.arange(order.numel(), device=order.device)
        position = torch.empty_like(order)
        step = self._step(order.numel(), routing.num_experts, x)
        if step > 1:
            rounded = self._padded(counts, step, order.numel(), x.dtype)
            padding = (rounded - counts).cumsum(0) - (rounded - counts)  # in front of each group
            place += padding.index_select(0, expert.index_select(0, order))
            token = order.new_zeros(int(rounded.sum())).index_copy_(0, place, order // top_k)
            counts = rounded
        else:
            token = order // top_k
        position = position.index_copy_(0, order, place).view(-1, top_k)
        return Dispatched(take_rows(x, token, position), counts, token, position)

    def _take_tokens(self, x: Tensor, routing: ExpertChoiceRouting) -> Dispatched:
        """Expert choice: every expert's tokens, image after image."""
        images, tokens = routing.logits.shape[:2]
        first = torch.arange(images, device=x.device).view(-1, 1, 1) * tokens
        token = _by_expert(routing.token_index + first)
        counts = torch.full((routing.num_experts,), token.numel() // routing.num_experts, device=x.device)
        return Dispatched(x.index_select(0, token), counts, token)

    def _fill_slots(self, x: Tensor, routing: SoftRouting) -> Dispatched:
        """Soft MoE: slot inputs, expert after expert."""
        weight = routing.dispatch_weight.to(x.dtype)
        slots = torch.einsum("bnd,bnep->ebpd", x.view(*weight.shape[:2], x.shape[-1]), weight)
        return Dispatched(slots.flatten(0, 2), routing.counts())

    def _read_slots(self, rows: Tensor, routing: SoftRouting) -> Tensor:
        images, _, num_experts, slots = routing.slot_weight.shape
        by_expert = rows.view(num_experts, images, slots, rows.shape[-1])
        return torch.einsum("bnep,ebpd->bnd", routing.slot_weight.to(rows.dtype), by_expert).flatten(0, 1)

    def _step(self, num_rows: int, num_experts: int, x: Tensor) -> int:
        """What group sizes are rounded up to; 1 for not at all."""
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return 1
        if self.row_multiple is not None:
            return self.row_multiple
        if x.dtype != torch.bfloat16:
            return 1
        return MULTIPLE if num_rows >= 8 * MULTIPLE * num_experts else SMALL_MULTIPLE

    def _padded(self, counts: Tensor, step: int, num_rows: int, dtype: torch.dtype) -> Tensor:
        """Group sizes [E] with padding, of group sizes without."""
        lengths = [_rounded(count, step) for count in counts.tolist()]
        default = 1.0
        if dtype == torch.bfloat16 and has_matrix_unit():
            default = 1.4 if num_rows < 1024 * len(lengths) else 1.25
        equal = len(lengths) * [max(lengths)]
        return counts.new_tensor(equal if sum(equal) <= (self.max_padding or default) * num_rows else lengths)


def _rounded(count: int, step: int) -> int:
    """The next multiple of `step`, or for large groups of a sixteenth of the power of two below `count`."""
    step = max(step, (1 << count.bit_length()) // 32)
    return -(-count // step) * step


def _stable_order(expert: Tensor, num_experts: int) -> Tensor:
    """[R] int64: the order that sorts `expert` [R], equal ones as they stand."""
    if expert.device.type != "cpu" or torch.compiler.is_compiling() or num_experts > 256:
        return expert.argsort(stable=True)
    # NumPy sorts single bytes by counting them: a tenth of the time of torch's comparisons.
    return torch.from_numpy(np.argsort(expert.to(torch.uint8).numpy(), kind="stable"))


def _by_expert(x: Tensor) -> Tensor:
    """[B, E, C] -> [E·B·C], sorted by expert."""
    return x.transpose(0, 1).flatten()

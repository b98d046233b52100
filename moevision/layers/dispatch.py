"""Dispatch and combine: from tokens to rows sorted by expert, and back.

The dispatcher owns no parameters. It is the only object that knows where experts live, so expert parallelism
replaces it and nothing else. Here all experts are local.

Axes: B images, N tokens of an image, T = B·N tokens, D width, K choices, R rows, E experts, C tokens that an expert
takes of an image (expert choice), P slots of an expert (Soft MoE).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moevision.layers.routing import Routing
from moevision.layers.slots import ExpertChoiceRouting, SoftRouting


@dataclass(frozen=True)
class Dispatched:
    """Rows ready for the experts, and the way back.

    Attributes:
        rows: [R, D] copies of tokens (or slots), sorted by expert; R = T·K plus padding, B·E·C or B·E·P.
        counts: [E] int64, rows of each expert, padding included; they sum to R.
        position: the way back. Token choice: [T·K] int64, `rows[position]` is in the order token 0 choice 0, token 0
            choice 1, ... Expert choice: [R] int64, the token of each row. Soft: None.
    """

    rows: Tensor
    counts: Tensor
    position: Tensor | None


class LocalDispatcher:
    """Dispatch to experts in this process.

    A choice that the router did not keep is computed and given weight 0, so that shapes stay static.

    On a CPU each expert's group is rounded up to a multiple of `row_multiple` rows once groups are large. Matrix
    kernels are compiled there for each shape that occurs, and counts change with every batch: without rounding a
    layer's forward and backward took 1.1 to 1.4 times as long (`benchmarks/moe_layer.py`, recorded beside it).
    Padding rows copy token 0; nothing reads their result, so their gradient is zero.

    Args:
        row_multiple: what group sizes are rounded up to; 1 turns rounding off.
    """

    def __init__(self, row_multiple: int = 16) -> None:
        self.row_multiple = row_multiple

    def dispatch(self, x: Tensor, routing: Routing) -> Dispatched:
        """Bring the tokens x [T, D] of a batch into rows sorted by expert."""
        if isinstance(routing, SoftRouting):
            return self._fill_slots(x, routing)
        if isinstance(routing, ExpertChoiceRouting):
            return self._take_tokens(x, routing)
        return self._send_choices(x, routing)

    def combine(self, rows: Tensor, dispatched: Dispatched, routing: Routing) -> Tensor:
        """Weighted sum [T, D] of the experts' rows [R, D], in the rows' dtype.

        The weights are rounded to the rows' dtype first: under bf16 autocast that costs no more precision than the
        rounding of the product does, and spares float32 copies of the rows.
        """
        if isinstance(routing, SoftRouting):
            return self._read_slots(rows, routing)
        assert dispatched.position is not None  # only soft rows have no single token
        if isinstance(routing, ExpertChoiceRouting):
            weight = _by_expert(routing.token_weight).to(rows.dtype).unsqueeze(-1)
            tokens = rows.new_zeros(routing.logits.shape[0] * routing.logits.shape[1], rows.shape[-1])
            return tokens.index_add(0, dispatched.position, rows * weight)
        # The gather and a sum over K give the same bits every time, unlike a scatter-add on a GPU.
        weight = (routing.combine_weight * routing.kept).to(rows.dtype).view(-1, routing.top_k, 1)
        by_token = rows.index_select(0, dispatched.position).view(weight.shape[0], routing.top_k, -1)
        combined = by_token * weight
        return combined.squeeze(1) if routing.top_k == 1 else combined.sum(1)

    def _send_choices(self, x: Tensor, routing: Routing) -> Dispatched:
        """Token choice: copy each token once for every expert that it chose."""
        counts = routing.requested_counts()
        expert = routing.expert_index.flatten()
        order = expert.argsort(stable=True)
        position = torch.empty_like(order)
        place = torch.arange(order.numel(), device=order.device)
        # index_select, not x[...]: on CPU its backward is about twice as fast.
        if not self._rounds(order.numel(), routing.num_experts, x):
            position.scatter_(0, order, place)
            return Dispatched(x.index_select(0, order // routing.top_k), counts, position)
        rounded = (counts + self.row_multiple - 1) // self.row_multiple * self.row_multiple
        shift = (rounded - counts).cumsum(0) - (rounded - counts)  # padding in front of each group
        place += shift.repeat_interleave(counts, output_size=order.numel())
        position.scatter_(0, order, place)
        token = order.new_zeros(int(rounded.sum())).scatter_(0, place, order // routing.top_k)
        return Dispatched(x.index_select(0, token), rounded, position)

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
        slots = torch.einsum("bnd,bnep->ebpd", x.view(*weight.shape[:2], -1), weight)
        return Dispatched(slots.flatten(0, 2), routing.counts(), None)

    def _read_slots(self, rows: Tensor, routing: SoftRouting) -> Tensor:
        images, _, num_experts, slots = routing.slot_weight.shape
        by_expert = rows.view(num_experts, images, slots, -1)
        return torch.einsum("bnep,ebpd->bnd", routing.slot_weight.to(rows.dtype), by_expert).flatten(0, 1)

    def _rounds(self, num_rows: int, num_experts: int, x: Tensor) -> bool:
        if self.row_multiple == 1 or x.device.type != "cpu" or torch.compiler.is_compiling():
            return False
        return num_rows >= 8 * self.row_multiple * num_experts  # at most about 6 % of padding


def _by_expert(x: Tensor) -> Tensor:
    """[B, E, C] -> [E·B·C], sorted by expert."""
    return x.transpose(0, 1).flatten()

"""Dispatch and combine: from tokens to rows sorted by expert, and back.

The dispatcher owns no parameters. It is the only object that knows where experts live; here all are local, and
`moevision.train.parallel.all_to_all` has the one whose experts are spread over processes.

Axes: B images, N tokens of an image, T = B·N tokens, D width, K choices, R rows, E experts, C tokens that an expert
takes of an image (expert choice), P slots of an expert (Soft MoE).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moevision.layers.cpu import send_choices, sum_rows
from moevision.layers.routers_soft import ExpertChoiceRouting, SoftRouting
from moevision.layers.routing import Routing


@dataclass(frozen=True)
class Dispatched:
    """Rows ready for the experts, and the way back."""

    rows: Tensor  # [R, D] copies of tokens (or slots), sorted by expert; R = T·K plus padding, B·E·C or B·E·P
    counts: Tensor  # [E] int64, rows of each expert, padding included; they sum to R
    # [R] int64, the token that each row is a copy of (padding: token 0); None for slots, which mix tokens
    token: Tensor | None = None
    # [T, K] int64, the rows of each token, where every token has K of them (token choice); else None
    position: Tensor | None = None


class LocalDispatcher:
    """Dispatch to experts in this process.

    A choice that the router did not keep is computed and given weight 0, so that shapes stay static.

    Args:
        row_multiple: what group sizes are rounded up to on a CPU, see `cpu.padded_counts`; 1 turns padding off.
        max_padding: rows over choices up to which groups are made equally long there; 1 turns that off.
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

    def receive(self, sent: Dispatched) -> tuple[Tensor, Tensor]:
        """Rows [R, D] for the experts of this process and the length of each group [E]: those that were sent."""
        return sent.rows, sent.counts

    def combine(self, rows: Tensor, dispatched: Dispatched, routing: Routing) -> Tensor:
        """Weighted sum [T, D] of the experts' rows [R, D], in the rows' dtype."""
        if isinstance(routing, SoftRouting):
            return self._read_slots(rows, routing)
        assert dispatched.token is not None  # only slots have no single token
        if isinstance(routing, ExpertChoiceRouting):
            weight = _by_expert(routing.token_weight).to(rows.dtype).unsqueeze(-1)  # [R, 1]
            tokens = rows.new_zeros(routing.logits.shape[0] * routing.logits.shape[1], rows.shape[-1])  # [T, D]
            return tokens.index_add(0, dispatched.token, rows * weight)
        assert dispatched.position is not None
        weight = (routing.combine_weight * routing.kept).flatten(0, 1)  # [T, K]
        return sum_rows(rows, weight, dispatched.token, dispatched.position)

    def _send_choices(self, x: Tensor, routing: Routing) -> Dispatched:
        """Token choice: copy each token once for every expert that it chose."""
        expert = routing.expert_index.flatten(0, 1)  # [T, K]
        return Dispatched(*send_choices(x, expert, routing.num_experts, self.row_multiple, self.max_padding))

    def _take_tokens(self, x: Tensor, routing: ExpertChoiceRouting) -> Dispatched:
        """Expert choice: every expert's tokens, image after image."""
        images, tokens = routing.logits.shape[:2]
        first = torch.arange(images, device=x.device).view(-1, 1, 1) * tokens  # [B, 1, 1] each image's first token
        token = _by_expert(routing.token_index + first)  # [R]
        counts = torch.full((routing.num_experts,), token.numel() // routing.num_experts, device=x.device)
        return Dispatched(x.index_select(0, token), counts, token)

    def _fill_slots(self, x: Tensor, routing: SoftRouting) -> Dispatched:
        """Soft MoE: slot inputs, expert after expert."""
        weight = routing.dispatch_weight.to(x.dtype)  # [B, N, E, P]
        slots = torch.einsum("bnd,bnep->ebpd", x.view(*weight.shape[:2], x.shape[-1]), weight)
        return Dispatched(slots.flatten(0, 2), routing.counts())

    def _read_slots(self, rows: Tensor, routing: SoftRouting) -> Tensor:
        images, _, num_experts, slots = routing.slot_weight.shape
        by_expert = rows.view(num_experts, images, slots, rows.shape[-1])
        return torch.einsum("bnep,ebpd->bnd", routing.slot_weight.to(rows.dtype), by_expert).flatten(0, 1)


def _by_expert(x: Tensor) -> Tensor:
    """[B, E, C] -> [E·B·C], sorted by expert."""
    return x.transpose(0, 1).flatten()

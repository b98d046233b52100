"""Dispatch to experts that are spread over processes: rows travel to their experts by all-to-all, and back.

Expert parallelism as in GShard (arXiv:2006.16668, §3.2): of W processes, process r holds experts r · E/W to
(r + 1) · E/W - 1. Every process routes its own tokens, sends each row to the process of its expert, and gets the
result back. How many rows travel is known only after routing, so counts are exchanged first; the host must know them,
which is the one synchronisation.

torch's functional `all_to_all_single_autograd` starts the transfer and doesn't wait for it: what is computed before
`receive` (shared experts) overlaps with it. Its backward pass is the transfer in the other direction.

Axes: D width, E experts of all processes, E' = E / W of this one, R rows that a process sends, R' rows that it gets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as functional

from moevision.layers.cpu import padded_counts, sum_rows, take_rows
from moevision.layers.moe import Dispatched, LocalDispatcher
from moevision.layers.routing import Routing


@dataclass(frozen=True, kw_only=True)
class Travelling(Dispatched):
    """Rows on their way to the processes of their experts.

    Attributes:
        rows: [R', D] in order of arrival: by process, and for each by expert. Reading them waits for the transfer.
        counts: [E'] int64, rows of each expert of this process, with padding.
        home: the rows of this process before they were sent.
        place: [R'] int64, row at which the experts see each row that arrives.
        arrival: [R' + padding] int64, its inverse; row 0 where there is padding.
        sent: rows that went to each process.
        received: rows that came from each process.
    """

    home: Dispatched
    place: Tensor
    arrival: Tensor
    sent: list[int]
    received: list[int]


class AllToAllDispatcher(LocalDispatcher):
    """Dispatch to experts on all processes of a group, in order of experts; every process must call it equally often.

    `row_multiple` and `max_padding` as in `LocalDispatcher`, for the rows that arrive. Padding is never sent.
    """

    def __init__(
        self, group: dist.ProcessGroup, row_multiple: int | None = None, max_padding: float | None = None
    ) -> None:
        super().__init__(row_multiple, max_padding)
        self.group, self.size = group, dist.get_world_size(group)
        self._home = LocalDispatcher(row_multiple=1, max_padding=1.0)

    def __deepcopy__(self, memo: dict[int, Any]) -> AllToAllDispatcher:
        """A group can't be copied; a copy of the model has its experts in the same processes."""
        return AllToAllDispatcher(self.group, self.row_multiple, self.max_padding)

    def dispatch(self, x: Tensor, routing: Routing) -> Travelling:
        """Begin to send the tokens x [T, D] of this process to their experts."""
        home = self._home.dispatch(x, routing)
        to_each = home.counts.view(self.size, -1).contiguous()  # [W, E'] by process, then by its experts
        from_each = torch.empty_like(to_each)
        dist.all_to_all_single(from_each, to_each, group=self.group)
        sent, received = torch.stack([to_each.sum(1), from_each.sum(1)]).tolist()
        rows = self._travel(home.rows, sent, received)
        counts = from_each.sum(0)
        total = sum(received)
        padded = padded_counts(counts, x, self.row_multiple, self.max_padding)
        # From (process, expert) as rows arrive to (expert, process) as experts want them.
        lengths = from_each.flatten()
        first = (padded.cumsum(0) - padded) + (from_each.cumsum(0) - from_each)  # [W, E'] where each group is put
        shift = first.flatten() - (lengths.cumsum(0) - lengths)
        number = torch.arange(total, device=x.device)
        place = number + shift.repeat_interleave(lengths, output_size=total)
        length = total if padded is counts else int(padded.sum())
        arrival = number.new_zeros(length).index_copy_(0, place, number)
        return Travelling(rows, padded, home=home, place=place, arrival=arrival, sent=sent, received=received)

    def receive(self, sent: Dispatched) -> tuple[Tensor, Tensor]:
        """Wait for the rows of this process's experts: [R' + padding, D] sorted by expert, and counts [E']."""
        assert isinstance(sent, Travelling)
        return take_rows(_arrived(sent.rows), sent.arrival, sent.place.unsqueeze(1)), sent.counts

    def combine(self, rows: Tensor, dispatched: Dispatched, routing: Routing) -> Tensor:
        """Send the experts' rows back; weighted sum [T, D] of those that return."""
        assert isinstance(dispatched, Travelling)
        place, arrival = dispatched.place, dispatched.arrival
        if len(place) == len(arrival):
            ordered = take_rows(rows, place, arrival.unsqueeze(1))
        else:  # rows of padding must get no gradient
            ones = rows.new_ones(len(place), 1)
            ordered = sum_rows(rows, ones, arrival, place.unsqueeze(1))
        returned = _arrived(self._travel(ordered, dispatched.received, dispatched.sent))
        return self._home.combine(returned, dispatched.home, routing)

    def _travel(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        moved: Tensor = functional.all_to_all_single_autograd(rows.contiguous(), received, sent, self.group)
        return moved


def _arrived(rows: Tensor) -> Tensor:
    """Rows whose transfer is over: on a CPU this waits, on a GPU the current stream does."""
    return rows.wait() if isinstance(rows, functional.AsyncCollectiveTensor) else rows

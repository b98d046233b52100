"""Several processes of one training, when they must agree; with one process nothing is sent and nothing copied."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor


def several_processes() -> bool:
    """Whether this is one of several processes that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_processes(counts: Tensor) -> Tensor:
    """Add up over the processes of a training, in place."""
    if several_processes():
        dist.all_reduce(counts)
    return counts


def sum_numbers(values: list[float], device: torch.device) -> list[float]:
    """Sums over processes of a few numbers, in double precision."""
    if not several_processes():
        return values
    total = sum_over_processes(torch.tensor(values, dtype=torch.float64, device=device))
    return cast(list[float], total.tolist())


def from_first(value: Any) -> Any:
    """What the first process has here."""
    if not several_processes():
        return value
    found = [value]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def gather(value: Any) -> list[Any]:
    """What every process has here, in order of rank."""
    if not several_processes():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found

"""What a person may change about a model before a picture is routed: top-k, capacity, one intervention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Final

from torch import nn

from moevision.analysis.intervention import Intervention, intervene

KINDS: Final = ("ablate", "force", "random")
FILLS: Final = ("next_best", "zero")


@dataclass(frozen=True)
class Settings:
    """How a picture is routed, where it differs from how the model was trained.

    Attributes:
        top_k: experts per patch; None as trained.
        capacity: an expert computes at most ceil(capacity · choices / E) of a picture's choices; None for no limit.
        intervention: at most one change of the routing, of one of `KINDS`.
    """

    top_k: int | None = None
    capacity: float | None = None
    intervention: Intervention | None = None

    @property
    def conditions(self) -> tuple[Intervention, ...]:
        """Top-k and capacity, as interventions."""
        top_k = [] if self.top_k is None else [Intervention("top_k", top_k=self.top_k)]
        capacity = [] if self.capacity is None else [Intervention("capacity", factor=self.capacity)]
        return (*top_k, *capacity)

    @contextmanager
    def applied(self, net: nn.Module) -> Iterator[None]:
        """Hold `net` in these settings inside the scope; other threads wait for their turn on it."""
        changed = () if self.intervention is None else (self.intervention,)
        with intervene(net, *self.conditions, *changed):
            yield

    @contextmanager
    def conditions_applied(self, net: nn.Module) -> Iterator[None]:
        """Hold `net` in the other k and capacity only; without those the lock stays free for other threads."""
        with intervene(net, *self.conditions) if self.conditions else nullcontext():
            yield


def intervention_json(change: Intervention) -> dict[str, Any]:
    """The five fields of an intervention as the explorer's requests and answers have them."""
    return {
        "kind": change.kind,
        "layer": change.layer,
        "expert": change.expert,
        "fill": change.fill,
        "seed": change.seed,
    }

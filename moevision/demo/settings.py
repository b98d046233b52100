"""What a person may change about a model before a picture is routed: top-k, capacity, one intervention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Final, Literal

from torch import nn

from moevision.analysis.decisions import routing_kind
from moevision.analysis.intervention import Intervention, intervene, numbered_layers, refusal
from moevision.demo.kinds import LayerFacts

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

    def conditions(self, net: nn.Module) -> tuple[Intervention, ...]:
        """Top-k and capacity as interventions on those layers of `net` where they have a meaning.

        Raises:
            UserError: if one that is set has a meaning in no layer.
        """
        top_k = [] if self.top_k is None else _where_possible(net, "top_k", top_k=self.top_k)
        capacity = [] if self.capacity is None else _where_possible(net, "capacity", factor=self.capacity)
        return (*top_k, *capacity)

    @contextmanager
    def applied(self, net: nn.Module) -> Iterator[None]:
        """Hold `net` in these settings inside the scope; other threads wait for their turn on it."""
        changed = () if self.intervention is None else (self.intervention,)
        with intervene(net, *self.conditions(net), *changed):
            yield

    @contextmanager
    def conditions_applied(self, net: nn.Module) -> Iterator[None]:
        """Hold `net` in the other k and capacity only; without those the lock stays free for other threads."""
        conditions = self.conditions(net)
        with intervene(net, *conditions) if conditions else nullcontext():
            yield

    def off_reason(self, routers: Sequence[LayerFacts]) -> str | None:
        """How k and capacity differ from the training, in words; None where they don't."""
        reasons = [] if self.top_k is None else _other_k(self.top_k, routers)
        if self.capacity is not None:
            reasons += _other_capacity(self.capacity, routers)
        return " ".join(reasons) or None


def _where_possible(net: nn.Module, kind: Literal["top_k", "capacity"], **value: Any) -> list[Intervention]:
    layers = numbered_layers(net)
    able = [number for number, layer in layers.items() if refusal(kind, routing_kind(layer.router)) is None]
    # Where none is able, the first one says why.
    return [Intervention(kind, layer=number, **value) for number in able or layers]


def _other_k(k: int, routers: Sequence[LayerFacts]) -> list[str]:
    """At most one sentence about an other k."""
    able = [router for router in routers if "top_k" not in router.refused]
    trained = {router.k_words: [other.name for other in able if other.k_words == router.k_words] for router in able}
    if all(router.top_k == k for router in able):
        return []
    if len(trained) == 1:
        shown = f"top-{k}" if able[0].kind == "token_choice" else str(k)
        return [f"Trained with {able[0].k_words}, shown is {shown}."]
    was = "; ".join(f"{words} in {' and '.join(names)}" for words, names in trained.items())
    return [f"Shown is k = {k}; trained were {was}."]


def _other_capacity(factor: float, routers: Sequence[LayerFacts]) -> list[str]:
    """A sentence about layers whose patches choose, and one about those whose experts do."""
    able = [router for router in routers if "capacity" not in router.refused]
    limits = {router.train_capacity for router in able if router.kind == "token_choice"}
    sentences = []
    if limits == {None}:
        sentences.append(f"Trained without a capacity limit, shown is capacity factor {factor:g}.")
    elif limits - {factor}:
        was = " and ".join(sorted("no limit" if limit is None else f"capacity factor {limit:g}" for limit in limits))
        sentences.append(f"Trained with {was}, shown is {factor:g}.")
    if factor != 1 and any(router.kind == "expert_choice" for router in able):
        sentences.append(f"Experts take {factor:g} times as many patches as trained.")
    return sentences


def intervention_json(change: Intervention) -> dict[str, Any]:
    """The five fields of an intervention as the explorer's requests and answers have them."""
    return {
        "kind": change.kind,
        "layer": change.layer,
        "expert": change.expert,
        "fill": change.fill,
        "seed": change.seed,
    }

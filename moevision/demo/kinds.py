"""How each MoE layer routes, in facts and in words: what was asked of it, and what of it may be changed.

Layers of one model may differ in router, number of experts and k, so nothing here is about the whole model.

Axes: L MoE layers, E experts, K experts per patch, S slots of an expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from torch import nn

from moevision.analysis.intervention import Kind as Change
from moevision.analysis.intervention import refusal
from moevision.errors import UserError
from moevision.layers import HandmadeRouter, LabelRouter, MoEMlp, Routing
from moevision.layers.routing import Kind

# How a gate that nobody learned decides.
RULES: Final = {
    "hash": "by a hash of the position",
    "random": "at random",
    "position": "by position",
    "colour": "by the patch's colour",
}

CHANGES: Final[tuple[Change, ...]] = ("ablate", "force", "random", "top_k", "capacity")


@dataclass(frozen=True)
class LayerFacts:
    """What there is to know about one MoE layer before a picture is routed.

    Attributes:
        layer: index of the transformer block.
        router: its name in `moevision.layers.ROUTERS`.
        kind: `token_choice`, `expert_choice` or `soft`.
        learned: False for gates by a rule.
        num_experts: E.
        top_k: K: experts that a patch chooses, or has on average where experts choose; for Soft MoE what the slots
            cost, in experts per patch.
        num_shared_experts: experts that compute every patch besides the routed ones.
        capacity: the model's own capacity factor in evaluation; None if it drops nothing there.
        train_capacity: the same in training.
        slots: S of Soft MoE, else None.
        refused: why a change of that kind has no meaning here, as the end of a sentence; kinds that aren't in it do.
    """

    layer: int
    router: str
    kind: Kind
    learned: bool
    num_experts: int
    top_k: int
    num_shared_experts: int = 0
    capacity: float | None = None
    train_capacity: float | None = None
    slots: int | None = None
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As in "L3"."""
        return f"L{self.layer}"

    @property
    def words(self) -> str:
        """How it routes, as in "top-2 of 8 experts, capacity factor 0.8, plus 1 shared expert for every patch"."""
        limit = "" if self.capacity is None else f", capacity factor {self.capacity:g}"
        shared = {0: "", 1: ", plus 1 shared expert that computes every patch"}.get(
            self.num_shared_experts, f", plus {self.num_shared_experts} shared experts that compute every patch"
        )
        return self._choice() + limit + shared

    def _choice(self) -> str:
        experts = plural(self.num_experts, "expert")
        if self.kind == "soft":
            return f"{experts} with {plural(self.slots or 0, 'slot')} each, which read all patches"
        if self.kind == "expert_choice":
            return f"{experts} that choose patches, {self.top_k} per patch on average"
        chosen = f"top-{self.top_k} of {experts}"
        return chosen if self.learned else f"{chosen} {RULES.get(self.router, 'by a rule')}, not learned"

    @property
    def k_words(self) -> str:
        """What k is, as in "top-2"."""
        if self.kind == "token_choice":
            return f"top-{self.top_k}"
        return f"{plural(self.top_k, 'expert')} per patch on average"

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON, with `name` and `words`."""
        return {**asdict(self), "name": self.name, "words": self.words}


def layer_facts(net: nn.Module, layers: Sequence[MoEMlp], routings: Sequence[Routing]) -> tuple[LayerFacts, ...]:
    """What there is to know about the MoE layers of a model, from the layers and what each decided about a picture."""
    configured = getattr(net, "moe_config", {}).get("router")
    names = configured if isinstance(configured, list) else [configured] * len(layers)
    return tuple(
        LayerFacts(
            layer=int(routing.layer or 0),
            router=name or type(layer.router).__name__,
            kind=routing.kind,
            learned=not isinstance(layer.router, HandmadeRouter),
            num_experts=routing.num_experts,
            top_k=layer.router.top_k,
            num_shared_experts=layer.num_shared_experts,
            capacity=_option(layer, "eval_capacity_factor"),
            train_capacity=_option(layer, "capacity_factor"),
            slots=slots_of(routing),
            refused={kind: why for kind in CHANGES if (why := refusal(kind, routing.kind)) is not None},
        )
        for name, layer, routing in zip(names, layers, routings, strict=True)
    )


def slots_of(routing: Routing) -> int | None:
    """S of Soft MoE, else None."""
    weight = getattr(routing, "slot_weight", None)
    return None if weight is None else int(weight.shape[-1])


def check_not_an_oracle(layers: Iterable[MoEMlp]) -> None:
    """Refuse a model whose routing needs the answer.

    Raises:
        UserError: if a layer routes by the class.
    """
    if any(isinstance(layer.router, LabelRouter) for layer in layers):
        raise UserError(
            "This model's router 'label' is an oracle, which must be told the class of every picture: the explorer "
            "can't show it. Open a model with another router."
        )


def common(values: Iterable[int]) -> int | None:
    """The value that all layers share; None where they differ."""
    found = set(values)
    return found.pop() if len(found) == 1 else None


def plural(number: int, word: str) -> str:
    """As in "1 expert" and "8 experts"."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def _option(layer: MoEMlp, name: str) -> float | None:
    value = getattr(getattr(layer.router, "options", None), name, None)
    return None if value is None else float(value)

"""`Intervention`: one change of the routing as data, for JSON and for sentences, and what it does to a layer.

Opening one is `intervention.py`; which have no meaning for a router is said by `refusal`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import methodcaller
from typing import Any, Final, Literal, cast, get_args

from torch import nn

from moevision.analysis.decision import Edit, routing_kind
from moevision.errors import UserError
from moevision.layers import MoEMlp, moe_layers
from moevision.layers.routing import Kind as RoutingKind

Kind = Literal["ablate", "force", "swap", "random", "top_k", "capacity"]
Fill = Literal["next_best", "zero"]
_FIELDS: dict[str, tuple[str, ...]] = {
    "ablate": ("layer", "expert", "fill"),
    "force": ("layer", "expert"),
    "swap": ("layer", "expert", "other"),
    "random": ("layer", "seed"),
    "top_k": ("layer", "top_k"),
    "capacity": ("layer", "factor"),
}
_REFUSALS: Final[dict[tuple[RoutingKind, Kind], str]] = {
    ("expert_choice", "force"): "its experts choose their tokens, so no token has a first choice to be changed",
    ("soft", "force"): "every token takes from all slots, so no token has a first choice to be changed",
    ("soft", "top_k"): "every token takes from all slots, so there is no k to be changed",
    ("soft", "capacity"): "every expert computes its slots and no more, so there is no capacity to be limited",
}


@dataclass(frozen=True)
class Intervention:
    """One change of the routing, as data: for JSON, for sentences, and for `intervene`.

    Attributes:
        kind: `ablate`, `force`, `swap`, `random`, `top_k` or `capacity`.
        layer: block index; None means every MoE layer (`random`, `top_k` and `capacity` only).
        expert: the expert that is ablated or forced, or the first of two that are swapped.
        other: the second of two that are swapped.
        fill: what an ablated expert's tokens get: their `next_best` expert, or `zero` in its place.
        seed: of `random`, not negative.
        top_k: k of `top_k`.
        factor: of `capacity`: an expert computes at most ceil(factor · N · K / E) choices of one image.

    Raises:
        UserError: if a value that the kind needs is missing or impossible.
    """

    kind: Kind
    layer: int | None = None
    expert: int | None = None
    other: int | None = None
    fill: Fill = "next_best"
    seed: int = 0
    top_k: int | None = None
    factor: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in _FIELDS:
            raise UserError(f"There is no intervention {self.kind!r}: choose one of {', '.join(_FIELDS)}.")
        if self.fill not in get_args(Fill):
            raise UserError(f"There is no fill {self.fill!r}: choose next_best or zero.")
        needed = {"layer", "expert", "other", "top_k", "factor"} & set(_FIELDS[self.kind])
        if "expert" not in needed:
            needed -= {"layer"}
        missing = sorted(name for name in needed if getattr(self, name) is None)
        if missing:
            raise UserError(f"The intervention {self.kind!r} needs {' and '.join(missing)}: give a number.")
        for name in ("layer", "expert", "other", "seed", "top_k"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
                raise UserError(f"{name}={value!r} does not fit an intervention: give a whole number from 0.")
        if self.factor is not None and not 0 < self.factor < float("inf"):
            raise UserError(f"factor={self.factor!r} is no capacity: give a positive number, 1 is perfect balance.")

    @property
    def where(self) -> str:
        """What it acts on, in words: "L4·E3", "L4" or "every MoE layer"."""
        layer = "every MoE layer" if self.layer is None else f"L{self.layer}"
        return f"{layer}·E{self.expert}" if self.kind in ("ablate", "force", "swap") else layer

    def to_json(self) -> dict[str, Any]:
        """The kind and what belongs to it."""
        return {"kind": self.kind, **{name: getattr(self, name) for name in _FIELDS[self.kind]}}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Intervention:
        """The intervention that `to_json` wrote; entries that don't belong to the kind are passed over.

        Raises:
            UserError: if it is none.
        """
        if not isinstance(value, Mapping) or not isinstance(value.get("kind"), str):
            raise UserError(f"An intervention names its kind: one of {', '.join(_FIELDS)}.")
        kind = value["kind"]
        given = {name: value[name] for name in _FIELDS.get(kind, ()) if value.get(name) is not None}
        if not isinstance(given.get("factor", 1.0), int | float) or not isinstance(given.get("fill", ""), str):
            raise UserError("The intervention has a value of a wrong type: factor is a number, fill a word.")
        return cls(kind=cast(Kind, kind), **given)

    def edits(self, model: nn.Module) -> dict[MoEMlp, Edit]:
        """The edit of each MoE layer that it acts on.

        Raises:
            UserError: if the model has no such layer or expert, k doesn't fit, or it has no meaning for the router.
        """
        layers = numbered_layers(model)
        if self.layer is not None and self.layer not in layers:
            names = ", ".join(str(number) for number in layers)
            raise UserError(f"Block {self.layer} is no MoE layer of this model: choose one of {names}.")
        chosen = layers if self.layer is None else {self.layer: layers[self.layer]}
        return {layer: self._edit(number, layer.router) for number, layer in chosen.items()}

    def _edit(self, layer: int, router: Any) -> Edit:
        why = refusal(self.kind, routing_kind(router))
        if why is not None:
            raise UserError(f"The intervention {self.kind!r} has no meaning in L{layer}: {why}; choose another one.")
        last = router.num_experts - 1
        for expert in (self.expert, self.other):
            if expert is not None and expert > last:
                raise UserError(f"L{layer} has no expert {expert}: its experts are 0 to {last}.")
        match self.kind:
            case "ablate":
                return methodcaller("remove" if self.fill == "next_best" else "silence", self.expert)
            case "force":
                return methodcaller("put_first", self.expert)
            case "swap":
                return methodcaller("exchange", self.expert, self.other)
            case "random":
                return methodcaller("shuffle", (self.seed, layer))
            case "top_k":
                k = cast(int, self.top_k)
                if not 1 <= k <= last + 1:
                    raise UserError(f"k={k} does not fit {last + 1} experts: choose k between 1 and {last + 1}.")
                return methodcaller("at_top_k", k)
            case "capacity":
                return methodcaller("at_capacity", self.factor)


def refusal(kind: Kind, routing: RoutingKind) -> str | None:
    """Why an intervention has no meaning for a kind of routing, as the end of a sentence; None where it has one."""
    return _REFUSALS.get((routing, kind))


def numbered_layers(model: nn.Module) -> dict[int, MoEMlp]:
    """The MoE layers by block index; by position among them where they aren't in a converted model.

    Raises:
        UserError: if there are none.
    """
    layers = moe_layers(model)
    if not layers:
        raise UserError(f"{type(model).__name__} has no MoE layer to intervene on: give a MoE model, not a dense one.")
    return {
        position if layer.layer_index is None else layer.layer_index: layer for position, layer in enumerate(layers)
    }

"""Interventions: what if an expert were away, forced, swapped, the router random, k another, the capacity limited?

    with ablate(model, layer=3, expert=2):
        logits, routings = forward_routing(model, images)

What holds for all of them:

- They act on every token of the layer, the class and register tokens too: an expert that is away is away for all.
- Scopes nest. `force`, `swap` and `random_route` act on what the scopes around them left, in order of entry. Ablated
  experts, k and the capacity are conditions of the layer that hold for whatever is entered inside or outside: an
  ablated expert is never brought back, the capacity is applied last; of two k or two capacities the inner one counts.
- A `Routing` recorded inside tells what was computed (`expert_index`, `combine_weight`, `kept`); its logits and
  probabilities stay what the router said.
- A model with a capacity of its own applies it to what the edits have left, as it would to any other choice: tokens of
  an ablated expert compete for a place at their next-best one, and a dropped token may get a place that became free.
  `limit_capacity` takes its place.
- Nothing depends on batch-mates (unless the model's own capacity is shared by the batch), and leaving the scope
  restores the layer, also after an exception.
- A scope holds `routing_lock(model)`: another thread that records or intervenes on the same model waits. A plain
  `model(x)` in another thread doesn't wait and sees no intervention, since it acts in the thread that entered it only.
- They work under `torch.compile` without compiling again (another k changes shapes, and so compiles once more).

They are meant for inference: activation checkpointing may run a layer again in a thread of autograd's, which sees no
intervention.

What they mean depends on who chooses. Where experts choose their tokens (expert choice) or mix them (Soft MoE) the
functions below say what each does; `refusal` says which have no meaning there, and why.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from operator import methodcaller
from typing import Any, Final, Literal, cast, get_args

from torch import nn

from moevision.analysis.decisions import Edit, decision_of, routing_kind
from moevision.errors import UserError
from moevision.layers import MoEMlp, Routing, moe_layers, routing_lock
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


@contextmanager
def intervene(model: nn.Module, *interventions: Intervention) -> Iterator[None]:
    """Change the routing of `model` inside the scope, by several interventions in their order.

    Args:
        model: any module with MoE layers.
        interventions: what to change.

    Raises:
        UserError: if the model has no such layer or expert, k doesn't fit, or it has no meaning for the router.
    """
    with routing_lock(model):
        if not interventions:
            yield
            return
        with edited(model, interventions[0].edits(model)), intervene(model, *interventions[1:]):
            yield


@contextmanager
def edited(model: nn.Module, edits: Mapping[MoEMlp, Edit]) -> Iterator[None]:
    """Apply an edit of one's own to the decisions (`Decision`) of some MoE layers of `model` inside the scope."""
    with routing_lock(model):
        outer = {layer: layer.intervention for layer in edits}
        try:
            for layer, edit in edits.items():
                around = cast(_Edits | None, outer[layer])
                before = () if around is None else around.edits
                layer.intervention = _Edits(layer.router, (*before, edit), threading.get_ident())
            yield
        finally:
            for layer, intervention in outer.items():
                layer.intervention = intervention


@dataclass(frozen=True)
class _Edits:
    """What a layer calls while a scope is open."""

    router: Any
    edits: tuple[Edit, ...]
    thread: int

    def __call__(self, routing: Routing) -> Routing:
        if threading.get_ident() != self.thread:
            return routing
        decision = decision_of(self.router, routing)
        for edit in self.edits:
            decision = edit(decision)
        return decision.settle()


def ablate(model: nn.Module, layer: int, expert: int, fill: Fill = "next_best") -> AbstractContextManager[None]:
    """Take an expert away.

    With `next_best` its tokens go to the best expert that they haven't chosen yet, by the router's own gate rule: a
    softmax over the chosen is taken anew, a softmax over all experts keeps its denominator (the choice comes after
    it), so that tokens which didn't use the expert are computed bit for bit as before. With `zero` the expert's part
    is left out of the sum and the other gates stay.

    Expert choice: the expert takes no token. Its tokens keep the other experts that took them, with the same weights
    (`next_best` sums those to 1 again if the router does), and no other expert takes its place: `zero` and `next_best`
    differ only there. Soft MoE: no token takes from the expert's slots; with `next_best` a token's softmax is taken
    over the other slots, with `zero` it stays as it is. The slots of the others read what they did.
    """
    return intervene(model, Intervention("ablate", layer=layer, expert=expert, fill=fill))


def force(model: nn.Module, layer: int, expert: int) -> AbstractContextManager[None]:
    """Send every token of a layer first to one expert.

    Weights stay with the rank: the forced expert gets the gate of the token's own first choice, which becomes the
    second and gets the second's gate, and so on; the token's last choice falls out (with k = 1 its only one). A token
    that had the expert among its choices keeps the same experts, in the new order.

    Expert choice and Soft MoE: refused, since there a token has no choice.
    """
    return intervene(model, Intervention("force", layer=layer, expert=expert))


def swap(model: nn.Module, layer: int, a: int, b: int) -> AbstractContextManager[None]:
    """Give the tokens (Soft MoE: the slots) of expert a to expert b, with the same weights, and the other way round."""
    return intervene(model, Intervention("swap", layer=layer, expert=a, other=b))


def random_route(model: nn.Module, layer: int | None = None, seed: int = 0) -> AbstractContextManager[None]:
    """Send every token to K different experts drawn at random, with the gates of its own choices by rank.

    The draw depends on seed, block index and token position: every image is sent the same way, so that its result
    is the same alone and in any batch. Use several seeds to average over maps.

    Expert choice: every expert takes as many tokens as before, at positions drawn at random, with the weights of its
    own choices by rank. Soft MoE: the slots read and give what they did, and are dealt out to the experts at random.
    """
    return intervene(model, Intervention("random", layer=layer, seed=seed))


def use_top_k(model: nn.Module, k: int, layer: int | None = None) -> AbstractContextManager[None]:
    """Route as the same weights would in a model built with top_k=k (off the distribution that it was trained on).

    Expert choice: every expert then takes ceil(N · k / E) tokens. Soft MoE: refused.
    """
    return intervene(model, Intervention("top_k", layer=layer, top_k=k))


def limit_capacity(model: nn.Module, factor: float, layer: int | None = None) -> AbstractContextManager[None]:
    """Let an expert compute at most ceil(factor · N · K / E) choices of one image; N counts prefix tokens too.

    First choices stay before second ones, and among those the tokens that are surest of it (V-MoE's batch priority
    routing); the others are dropped (kept = False, nothing added) and go nowhere else. This takes the place of a
    capacity that the model has itself.

    Expert choice: every expert takes ceil(factor · N · K / E) of its best tokens, more than by itself for a factor
    above 1. Soft MoE: refused.
    """
    return intervene(model, Intervention("capacity", layer=layer, factor=factor))

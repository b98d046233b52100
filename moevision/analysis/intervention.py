"""Interventions: what if an expert were away, forced, swapped, the router random, k another, the capacity limited?

    with intervene(model, Intervention("ablate", layer=3, expert=2)):
        logits, routings = forward_routing(model, images)

What holds for all of them:

- They act on every token of the layer, the class and register tokens too.
- Scopes nest. `force`, `swap` and `random` act on what the scopes around them left, in order of entry. Ablated
  experts, k and the capacity are conditions of the layer that hold for whatever is entered inside or outside: an
  ablated expert is never brought back, the capacity is applied last; of two k or two capacities the inner one counts.
- A `Routing` recorded inside tells what was computed (`expert_index`, `combine_weight`, `kept`); its logits and
  probabilities stay what the router said.
- A model with a capacity of its own applies it to what the edits have left, as it would to any other choice.
- Nothing depends on batch-mates (unless the model's own capacity is shared by the batch), and leaving the scope
  restores the layer, also after an exception.
- A scope holds `routing_lock(model)`: another thread that records or intervenes on the same model waits. A plain
  `model(x)` in another thread sees no intervention.
- They work under `torch.compile` without compiling again (another k changes shapes, and so compiles once more), and
  are meant for inference: activation checkpointing may run a layer again in a thread that sees no intervention.

What they mean depends on who chooses, so the second half of the file holds a layer's `Decision` in the form of its kind
of router; an intervention is an edit of it, and edits compose. Every edit is a pure function of one image's own tokens.

- Token choice (`Ranking`): each token has a list of all E experts, the K chosen first, the others by the score that the
  router chooses by.
- Expert choice (`TokenLists`): each expert has a list of all tokens of the image, best first, and takes the first C.
- Soft MoE (`SlotWeights`): each expert reads slots, weighted means of all tokens.

Axes: B images, N tokens of an image (prefix tokens first), E experts, K choices of a token, C tokens that an expert
takes, P slots of an expert.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from operator import methodcaller
from typing import Any, Final, Literal, Self, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn

from moevision.errors import UserError
from moevision.layers import (
    ExpertChoiceRouting,
    MoEMlp,
    Routing,
    SoftRouting,
    capacity_of,
    moe_layers,
    routing_lock,
    within_capacity,
)
from moevision.layers.routers_soft import shares_of_token, token_view
from moevision.layers.routing import Kind as RoutingKind
from moevision.layers.routing import routed_unit

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
_NO_FIRST_CHOICE = "so no token has a first choice to be changed"
_REFUSALS: Final[dict[tuple[RoutingKind, Kind], str]] = {
    ("expert_choice", "force"): f"its experts choose their tokens, {_NO_FIRST_CHOICE}",
    ("soft", "force"): f"every token takes from all slots, {_NO_FIRST_CHOICE}",
    ("soft", "top_k"): "every token takes from all slots, so there is no k to be changed",
    ("soft", "capacity"): (
        "every expert computes its slots and no more, so there is no capacity to be limited"
    ),
}


@dataclass(frozen=True)
class Intervention:
    """One change of the routing, as data: for JSON, for sentences, and for `intervene`.

    - `ablate` takes an expert away. With the fill `next_best` its tokens go to the best expert that they haven't chosen
      yet, by the router's own gate rule: a softmax over the chosen is taken anew, a softmax over all experts keeps its
      denominator (the choice comes after it), so that tokens which didn't use the expert are computed bit for bit as
      before. With `zero` the expert's part is left out of the sum and the other gates stay. Expert choice: the expert
      takes no token. Its tokens keep the other experts that took them, with the same weights (`next_best` sums those to
      1 again if the router does), and no other expert takes its place: `zero` and `next_best` differ only there. Soft
      MoE: no token takes from the expert's slots; with `next_best` a token's softmax is taken over the other slots,
      with `zero` it stays as it is. The slots of the others read what they did.
    - `force` sends every token of a layer first to one expert. Weights stay with the rank: the forced expert gets the
      gate of the token's own first choice, which becomes the second and gets the second's gate, and so on; the token's
      last choice falls out (with k = 1 its only one). A token that had the expert among its choices keeps the same
      experts, in the new order. Expert choice and Soft MoE: refused, since there a token has no choice.
    - `swap` gives the tokens (Soft MoE: the slots) of an expert to another one, with the same weights, and the other
      way round.
    - `random` sends every token to K different experts drawn at random, with the gates of its own choices by rank. The
      draw depends on seed, block index and token position (not on that where images are routed as a whole): every image
      is sent the same way, so that its result is the same alone and in any batch. Use several seeds to average over
      maps. Expert choice: every expert takes as many tokens as before, at positions drawn at random, with the weights
      of its own choices by rank. Soft MoE: the slots read and give what they did, and are dealt out at random.
    - `top_k` routes as the same weights would in a model built with this k (off the distribution that it was trained
      on). Expert choice: every expert then takes ceil(N · k / E) tokens. Soft MoE: refused.
    - `capacity` lets an expert compute at most ceil(factor · N · K / E) choices of one image; N counts prefix tokens
      too. First choices stay before second ones, and among those the tokens that are surest of it (V-MoE's batch
      priority routing); the others are dropped (kept = False, nothing added) and go nowhere else. This takes the place
      of a capacity that the model has itself. Expert choice: every expert takes that many of its best tokens, more than
      by itself for a factor above 1. Soft MoE: refused.

    Raises:
        UserError: if a value that the kind needs is missing or impossible.
    """

    kind: Kind  # `ablate`, `force`, `swap`, `random`, `top_k` or `capacity`
    # block index; None means every MoE layer (`random`, `top_k` and `capacity` only)
    layer: int | None = None
    expert: int | None = None  # that is ablated or forced, or the first of two that are swapped
    other: int | None = None  # the second of two that are swapped
    fill: Fill = "next_best"  # what an ablated expert's tokens get: their `next_best` expert, or `zero` in its place
    seed: int = 0  # of `random`, not negative
    top_k: int | None = None  # k of `top_k`
    factor: float | None = None  # of `capacity`

    def __post_init__(self) -> None:
        if self.kind not in _FIELDS:
            raise UserError(
                f"There is no intervention {self.kind!r}: choose one of {', '.join(_FIELDS)}."
            )
        if self.fill not in get_args(Fill):
            raise UserError(f"There is no fill {self.fill!r}: choose next_best or zero.")
        needed = {"layer", "expert", "other", "top_k", "factor"} & set(_FIELDS[self.kind])
        if "expert" not in needed:
            needed -= {"layer"}
        missing = sorted(name for name in needed if getattr(self, name) is None)
        if missing:
            raise UserError(
                f"The intervention {self.kind!r} needs {' and '.join(missing)}: give a number."
            )
        for name in ("layer", "expert", "other", "seed", "top_k"):
            value = getattr(self, name)
            is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
            if value is not None and not is_count:
                raise UserError(
                    f"{name}={value!r} does not fit an intervention: give a whole number from 0."
                )
        if self.factor is not None and not 0 < self.factor < float("inf"):
            raise UserError(
                f"factor={self.factor!r} is no capacity: give a positive number, 1 is perfect balance."
            )

    def to_json(self) -> dict[str, Any]:
        """The kind and what belongs to it."""
        return {"kind": self.kind, **{name: getattr(self, name) for name in _FIELDS[self.kind]}}

    def edits(self, model: nn.Module) -> dict[MoEMlp, Edit]:
        """The edit of each MoE layer that it acts on.

        Raises:
            UserError: if the model has no such layer or expert, k doesn't fit, or it has no meaning for the router.
        """
        layers = numbered_layers(model)
        if self.layer is not None and self.layer not in layers:
            names = ", ".join(str(number) for number in layers)
            raise UserError(
                f"Block {self.layer} is no MoE layer of this model: choose one of {names}."
            )
        if self.layer is not None:
            layers = {self.layer: layers[self.layer]}
        return {layer: self._edit(number, layer.router) for number, layer in layers.items()}

    def _edit(self, layer: int, router: Any) -> Edit:
        reason = refusal(self.kind, router)
        if reason is not None:
            raise UserError(
                f"The intervention {self.kind!r} has no meaning in L{layer}: {reason}; choose another one."
            )
        last = router.num_experts - 1
        for expert in (self.expert, self.other):
            if expert is not None and expert > last:
                raise UserError(f"L{layer} has no expert {expert}: its experts are 0 to {last}.")
        match self.kind:
            case "ablate":
                method = "remove" if self.fill == "next_best" else "silence"
                return methodcaller(method, self.expert)
            case "force":
                return methodcaller("put_first", self.expert)
            case "swap":
                return methodcaller("exchange", self.expert, self.other)
            case "random":
                return methodcaller("shuffle", (self.seed, layer))
            case "top_k":
                k = cast(int, self.top_k)
                if not 1 <= k <= last + 1:
                    raise UserError(
                        f"k={k} does not fit {last + 1} experts: choose k between 1 and {last + 1}."
                    )
                return lambda decision: replace(decision, top_k=k)
            case "capacity":
                return methodcaller("at_capacity", self.factor)


def refusal(kind: Kind, router: Any) -> str | None:
    """Why an intervention has no meaning for a router, as the end of a sentence; None where it has one."""
    missing = [name for name in ("gate_logits", "gates", "priority") if not hasattr(router, name)]
    if router.kind == "token_choice" and missing:
        return f"{type(router).__name__} doesn't say which weights other choices would get ({', '.join(missing)})"
    if routed_unit(router) == "image" and kind == "capacity":
        return "an image is routed as a whole, so one image never fills an expert"
    return _REFUSALS.get((router.kind, kind))


def numbered_layers(model: nn.Module) -> dict[int, MoEMlp]:
    """The MoE layers by block index; by position among them where they aren't in a converted model."""
    layers = moe_layers(model)
    if not layers:
        raise UserError(
            f"{type(model).__name__} has no MoE layer to intervene on: give a MoE model, not a dense one."
        )
    numbered = {}
    for position, layer in enumerate(layers):
        number = position if layer.layer_index is None else layer.layer_index
        numbered[number] = layer
    return numbered


@contextmanager
def intervene(model: nn.Module, *interventions: Intervention) -> Iterator[None]:
    """Change the routing of `model`, any module with MoE layers, inside the scope: by interventions in their order.

    Raises:
        UserError: if the model has no such layer or expert, k doesn't fit, or it has no meaning for the router.
    """
    with routing_lock(model):
        if not interventions:
            yield
            return
        with (
            apply_edits(model, interventions[0].edits(model)),
            intervene(model, *interventions[1:]),
        ):
            yield


@contextmanager
def apply_edits(model: nn.Module, edits: Mapping[MoEMlp, Edit]) -> Iterator[None]:
    """Apply an edit of one's own to the decisions (`Decision`) of some MoE layers of `model` inside the scope."""
    with routing_lock(model):
        outer = {layer: layer.intervention for layer in edits}
        try:
            for layer, edit in edits.items():
                enclosing = cast(_Edits | None, outer[layer])
                earlier = () if enclosing is None else enclosing.edits
                layer.intervention = _Edits(layer.router, (*earlier, edit), threading.get_ident())
            yield
        finally:
            for layer, intervention in outer.items():
                layer.intervention = intervention


def per_image_capacity(model: nn.Module) -> AbstractContextManager[None]:
    """A scope in which rows don't share a capacity that the model shares over its batch: they are one image's."""
    edits: dict[MoEMlp, Edit] = {}
    for layer in moe_layers(model):
        capacity = Capacity.of_router(layer.router)
        if capacity is not None and capacity.whole_batch:
            edits[layer] = Ranking.limit_per_image
    return apply_edits(model, edits)


def run_repeated(model: nn.Module, x: Tensor, rows: Tensor, first: MoEMlp) -> Tensor:
    """Logits [R, C] of the images `rows` [R] of x; up to the block that holds `first` each image is computed once."""
    blocks = getattr(model, "blocks", None)
    thread = threading.get_ident()
    rows = rows.to(x.device)
    # Such a router looks at the images again, further down.
    sees_image = any(layer.router.sees_image for layer in moe_layers(model))
    if blocks is None or first.layer_index is None or sees_image:
        return cast(Tensor, model(x[rows]))

    def repeat(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # A plain forward pass in another thread waits for no lock.
        if threading.get_ident() != thread:
            return inputs
        return (inputs[0][rows], *inputs[1:])

    with blocks[first.layer_index].register_forward_pre_hook(repeat):
        return cast(Tensor, model(x))


@dataclass(frozen=True)
class _Edits:
    """What a layer calls while a scope is open."""

    router: Any
    edits: tuple[Edit, ...]
    thread: int

    def __call__(self, routing: Routing) -> Routing:
        if threading.get_ident() != self.thread:
            return routing
        decision = _DECISIONS[self.router.kind].of(self.router, routing)
        for edit in self.edits:
            decision = edit(decision)
        return decision.settle()


@dataclass(frozen=True)
class Decision(ABC):
    """What an MoE layer is about to decide."""

    router: Any  # whose rule gives the weights
    routing: Routing  # the router's own decision; its scores and probabilities stay as they are
    # [B, N, E] bool, experts that are taken away from a token; what takes their place depends on the kind
    removed: Tensor
    # [B, N, E] bool, experts that don't compute a token; nothing takes the place, other weights stay
    silenced: Tensor

    @classmethod
    @abstractmethod
    def of(cls, router: Any, routing: Any) -> Self:
        """The decision that, settled at once, is `routing` bit for bit."""

    @abstractmethod
    def settle(self) -> Routing:
        """What the layer will compute."""

    @abstractmethod
    def exchange(self, a: int, b: int) -> Self:
        """Give to expert b what is expert a's, with its weights, and the other way round."""

    @abstractmethod
    def shuffle(self, key: Sequence[int]) -> Self:
        """Replace the router's choice by one drawn at random, the same for every image; weights stay with the rank."""

    def remove(self, expert: int) -> Self:
        """Take an expert away."""
        return replace(self, removed=self.removed | self._mask(expert))

    def silence(self, expert: int) -> Self:
        """Set an expert's output to zero; the weights of the others stay as they are."""
        return replace(self, silenced=self.silenced | self._mask(expert))

    def _mask(self, expert: int) -> Tensor:
        """[E] bool."""
        return torch.arange(self.routing.num_experts, device=self.routing.logits.device) == expert


Edit = Callable[[Any], Any]
"""Of a decision, to one of the same kind."""


def computed_pairs(routing: Routing) -> Tensor:
    """[B, N, E] bool: which expert computes which token; of Soft MoE: from which expert a token takes anything."""
    return _no_pair(routing).scatter(-1, routing.expert_index, routing.kept)


def _no_pair(routing: Routing) -> Tensor:
    """[B, N, E] bool, False everywhere."""
    return torch.zeros_like(routing.logits, dtype=torch.bool)


def draw_orders(key: Sequence[int], rows: int, length: int, device: torch.device) -> Tensor:
    """[rows, length] int64: random orders of 0 .. length - 1, the same for the same key on every machine."""
    orders = np.random.default_rng(tuple(key)).random((rows, length)).argsort(-1)
    return torch.from_numpy(orders).to(device)


@dataclass(frozen=True)
class Capacity:
    """How many choices an expert computes at most, see `moevision.layers.within_capacity`."""

    factor: float  # over the load of perfect balance
    priority: bool = True  # V-MoE's batch priority: tokens with larger first gates come first
    whole_batch: bool = False  # the limit is one of the whole batch instead of one image

    @classmethod
    def of_router(cls, router: Any) -> Capacity | None:
        """What a router itself applies in its present mode; None for no limit."""
        options = getattr(router, "options", None)
        if options is None:
            return None
        factor = options.capacity_factor if router.training else options.eval_capacity_factor
        if factor is None:
            return None
        return cls(factor, bool(options.batch_priority), options.capacity_group == "batch")


@dataclass(frozen=True)
class Ranking(Decision):
    """What a layer in which tokens choose their experts is about to decide.

    An expert that is `removed` for a token is replaced by its next-best one.
    """

    order: Tensor  # [B, N, E] int64, all experts of a token, best first, no expert twice
    # [B, N, E] what stands at each rank and makes its gate (`router.gate_logits`, which needn't be what the router
    # chooses by). It is the expert's own, unless an edit put another expert at that rank: weights then stay with the
    # rank
    scores: Tensor
    top_k: int  # K
    capacity: Capacity | None = None  # applied last, to whatever the edits have left

    @classmethod
    def of(cls, router: Any, routing: Routing) -> Self:
        """The list whose head is `routing`."""
        nobody = _no_pair(routing)
        chosen = nobody.scatter(-1, routing.expert_index, True)
        # The router's own order of the chosen is kept: among equal scores topk and sort may disagree.
        other_scores = routing.noisy_logits.masked_fill(chosen, -math.inf)
        others = other_scores.argsort(dim=-1, descending=True, stable=True)
        others = others[..., : routing.num_experts - routing.top_k]
        order = torch.cat([routing.expert_index, others], -1)

        # What the router's capacity dropped is no property of the choice: it is found again after the edits.
        capacity = Capacity.of_router(router)
        dropped = nobody
        if capacity is None:
            dropped = nobody.scatter(-1, routing.expert_index, ~routing.kept)
        return cls(
            router=router,
            routing=routing,
            removed=nobody,
            silenced=dropped,
            order=order,
            scores=router.gate_logits(routing).gather(-1, order),
            top_k=routing.top_k,
            capacity=capacity,
        )

    def settle(self) -> Routing:
        """The decision: the first K experts that aren't removed, as far as the capacity allows.

        A token left with fewer than K experts has choices with kept = False and weight 0.
        """
        # The first K ranks whose expert isn't removed.
        removed = self.removed.gather(-1, self.order)  # [B, N, E] by rank
        ranks = removed.to(torch.uint8).argsort(dim=-1, stable=True)[..., : self.top_k]  # [B, N, K]
        index = self.order.gather(-1, ranks)
        exists = ~removed.gather(-1, ranks)

        top_scores = self.scores.gather(-1, ranks).masked_fill(~exists, -math.inf)
        gate_logits = self.router.gate_logits(self.routing)
        weight = self.router.gates(gate_logits, top_scores).masked_fill(~exists, 0.0)
        kept = exists & ~self.silenced.gather(-1, index)
        if self.capacity is not None:
            priority = self.router.priority(gate_logits, top_scores).masked_fill(~exists, 0.0)
            kept = within_capacity(
                index,
                priority,
                kept,
                self.routing.num_experts,
                self.capacity.factor,
                priority=self.capacity.priority,
                whole_batch=self.capacity.whole_batch,
                unit=index.shape[1] if self.routing.route_by == "image" else 1,
            )
        return replace(self.routing, expert_index=index, combine_weight=weight, kept=kept)

    def put_first(self, expert: int) -> Self:
        """Put an expert first for every token; the others follow in their old order, weights stay with the rank."""
        # 0 for the expert, which a stable sort puts first.
        others = (self.order != expert).to(torch.uint8)  # [B, N, E]
        return replace(self, order=self.order.gather(-1, others.argsort(dim=-1, stable=True)))

    def choose(self, experts: Tensor, prefix: int) -> Self:
        """Send every patch to these experts [B, P, K]; weights stay with the rank, prefix tokens where they are.

        With P = 1 all tokens of an image go to the same experts, the prefix tokens too. A choice ~e, which is negative,
        is one of expert e that adds nothing; where all of an image's are such, those of its prefix tokens add nothing.
        """
        tokens = self.order.shape[1]
        if experts.shape[1] == 1:
            experts = experts.expand(-1, tokens, -1)
        else:
            prefix_experts = self.order[:, :prefix, : self.top_k]
            without_layer = (experts < 0).flatten(1).all(1)  # [B]
            prefix_experts = torch.where(
                without_layer[:, None, None], ~prefix_experts, prefix_experts
            )
            experts = torch.cat([prefix_experts, experts], 1)
        adds_nothing = experts < 0  # [B, N, K]
        chosen = torch.where(adds_nothing, ~experts, experts)
        silenced = _no_pair(self.routing).scatter(-1, chosen, adds_nothing)

        # Behind them the other experts, in their old order.
        is_other = torch.ones_like(self.order).scatter(-1, chosen, 0)  # [B, N, E] by expert
        chosen_first = is_other.gather(-1, self.order).argsort(dim=-1, stable=True)
        others = self.order.gather(-1, chosen_first)[..., chosen.shape[-1] :]
        order = torch.cat([chosen, others], -1)
        return replace(self, order=order, silenced=self.silenced | silenced)

    def exchange(self, a: int, b: int) -> Self:
        """Give expert a's tokens to expert b, with the weight that they gave a, and the other way round."""
        order = self.order
        return replace(self, order=order.masked_fill(order == a, b).masked_fill(order == b, a))

    def shuffle(self, key: Sequence[int]) -> Self:
        """Send the token at each position to experts drawn at random, K different ones; weights stay with the rank.

        The draw depends on the key and the position only (where images are routed as a whole, on the key): every image
        is sent the same way, alone or in any batch.
        """
        _, tokens, num_experts = self.order.shape
        rows = 1 if self.routing.route_by == "image" else tokens
        order = draw_orders(key, rows, num_experts, self.order.device)
        return replace(self, order=order.expand_as(self.order))

    def at_capacity(self, factor: float) -> Self:
        """A limit per image with batch priority, in place of any other."""
        return replace(self, capacity=Capacity(factor))

    def limit_per_image(self) -> Self:
        """Every image limited by itself, whatever the router shares a capacity over."""
        if self.capacity is None:
            return self
        return replace(self, capacity=replace(self.capacity, whole_batch=False))


@dataclass(frozen=True)
class TokenLists(Decision):
    """What a layer in which experts choose their tokens is about to decide."""

    order: Tensor  # [B, E, N] int64, all tokens of the image for each expert, best first
    scores: Tensor  # [B, E, N] the affinity that stands at each rank and becomes the weight
    top_k: int  # K, experts per token on average
    factor: float = 1.0  # C is ceil(factor · N · K / E)

    @classmethod
    def of(cls, router: Any, routing: ExpertChoiceRouting) -> Self:
        """The lists whose heads are `routing`."""
        affinity = routing.noisy_logits.softmax(-1).mT  # [B, E, N]
        order = affinity.argsort(dim=-1, descending=True, stable=True)
        nobody = _no_pair(routing)
        scores = affinity.gather(-1, order)
        return cls(router, routing, nobody, nobody, order=order, scores=scores, top_k=router.top_k)

    def settle(self) -> Routing:
        """Each expert takes the first C of its list; weights are the router's own rule."""
        tokens = self.order.shape[-1]
        capacity = capacity_of(self.factor, tokens, self.top_k, self.routing.num_experts)
        index = self.order[..., :capacity]  # [B, E, C]
        removed = self.removed.mT.gather(-1, index)
        silenced = self.silenced.mT.gather(-1, index)

        weight = self.scores[..., :capacity].masked_fill(removed, 0.0)
        if self.router.options.normalize_gates:
            weight = shares_of_token(weight, index, tokens)
        weight = weight.masked_fill(silenced, 0.0)

        nothing = torch.zeros_like(self.scores)  # [B, E, N]
        computed = nothing.bool().scatter(-1, index, ~(removed | silenced))
        view = token_view(nothing.scatter(-1, index, weight).mT, computed.mT)
        routing = cast(ExpertChoiceRouting, self.routing)
        return replace(routing, token_index=index, token_weight=weight, **view)

    def exchange(self, a: int, b: int) -> Self:
        """Let each of two experts take the other's tokens, with the other's weights."""
        order = _exchanged(self.order, a, b, 1)
        return replace(self, order=order, scores=_exchanged(self.scores, a, b, 1))

    def shuffle(self, key: Sequence[int]) -> Self:
        """Let every expert take the tokens at positions drawn at random; weights stay with the rank."""
        _, num_experts, tokens = self.order.shape
        order = draw_orders(key, num_experts, tokens, self.order.device)
        return replace(self, order=order.expand_as(self.order))

    def at_capacity(self, factor: float) -> Self:
        """`factor` times as many tokens per expert."""
        return replace(self, factor=factor)


@dataclass(frozen=True)
class SlotWeights(Decision):
    """What a Soft MoE layer is about to decide."""

    dispatch: Tensor  # [B, N, E, P] what each slot reads
    combine: Tensor  # [B, N, E, P] what each token takes of each slot

    @classmethod
    def of(cls, router: Any, routing: SoftRouting) -> Self:
        """The weights as they are."""
        nobody = _no_pair(routing)
        return cls(router, routing, nobody, nobody, routing.dispatch_weight, routing.slot_weight)

    def settle(self) -> Routing:
        """The weights without what is taken away."""
        left = self.combine.masked_fill(self.removed.unsqueeze(-1), 0.0)
        total = left.flatten(2).sum(-1)  # [B, N]
        # A token that lost nothing keeps its weights to the bit: their sum is only about 1.
        rescaled = self.removed.any(-1) & (total > 0)
        divisor = torch.where(rescaled, total, 1.0)[..., None, None]
        combine = (left / divisor).masked_fill(self.silenced.unsqueeze(-1), 0.0)

        view = token_view(combine.sum(-1), ~(self.removed | self.silenced))
        routing = cast(SoftRouting, self.routing)
        return replace(routing, dispatch_weight=self.dispatch, slot_weight=combine, **view)

    def exchange(self, a: int, b: int) -> Self:
        """Let each of two experts compute the other's slots."""
        dispatch = _exchanged(self.dispatch, a, b, 2)
        return replace(self, dispatch=dispatch, combine=_exchanged(self.combine, a, b, 2))

    def shuffle(self, key: Sequence[int]) -> Self:
        """Deal all E · P slots out to the experts at random, P to each; what a slot reads and gives stays the same."""
        dispatch = self.dispatch.flatten(2)  # [B, N, E · P]
        combine = self.combine.flatten(2)
        (order,) = draw_orders(key, 1, dispatch.shape[-1], dispatch.device)
        return replace(
            self,
            dispatch=dispatch[..., order].view_as(self.dispatch),
            combine=combine[..., order].view_as(self.combine),
        )


_DECISIONS: Final[dict[str, type[Decision]]] = {
    "token_choice": Ranking,
    "expert_choice": TokenLists,
    "soft": SlotWeights,
}


def _exchanged(x: Tensor, a: int, b: int, dim: int) -> Tensor:
    """The same with two entries of an axis exchanged."""
    order = torch.arange(x.shape[dim], device=x.device)
    order[a] = b
    order[b] = a
    return x.index_select(dim, order)

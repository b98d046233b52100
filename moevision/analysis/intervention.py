"""Interventions: ablate, force or swap experts, route at random, change k, or limit the capacity.

    with intervene(model, Intervention("ablate", layer=3, expert=2)):
        logits, routings = forward_routing(model, images)

What holds for all of them:

- They act on every token of the layer, the class and register tokens too.
- Scopes nest. `force`, `swap` and `random` act in order of entry, each on the result of the scopes around it. Ablated
  experts, k and the capacity hold for the layer whatever the order: an ablated expert is never brought back, and the
  capacity is applied last; of two k or two capacities the inner one counts.
- A `Routing` recorded inside has what was computed (`expert_index`, `combine_weight`, `kept`); its logits and
  probabilities are the router's own.
- If the model has a capacity itself, it is applied to the edited choices.
- Nothing depends on batch-mates (unless the model's own capacity is shared by the batch), and leaving the scope
  restores the layer, also after an exception.
- A scope holds `routing_lock(model)`: another thread that records or intervenes on the same model waits. A plain
  `model(x)` in another thread sees no intervention.
- They work under `torch.compile` without compiling again (another k changes shapes, and so compiles once more), and
  are meant for inference: activation checkpointing may run a layer again in a thread that sees no intervention.

A layer's `Routing` becomes a `Decision`, the edit of each intervention makes another `Decision` of it, and `to_routing`
of the last one is what the layer computes. What an edit means depends on the kind of router, so the second half of the
file has a `Decision` for each kind. Edits are pure functions of an image's own tokens.

- Token choice (`Ranking`): each token has a list of all E experts, the K chosen first, the others by the score that the
  router chooses by.
- Expert choice (`TokenLists`): each expert has a list of all tokens of the image, best first, and takes the first C.
- Soft MoE (`SlotWeights`): each expert computes slots, weighted means of all tokens.

Axes: B images, N tokens of an image (prefix tokens first), E experts, K choices of a token, C tokens that an expert
takes, P slots of an expert.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from operator import methodcaller
from typing import Any, Literal, Self, cast, get_args

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
# The fields of an `Intervention` that belong to each kind.
_FIELDS: dict[str, tuple[str, ...]] = {
    "ablate": ("layer", "expert", "fill"),
    "force": ("layer", "expert"),
    "swap": ("layer", "expert", "other"),
    "random": ("layer", "seed"),
    "top_k": ("layer", "top_k"),
    "capacity": ("layer", "factor"),
}
_NO_FIRST_CHOICE = "so no token has a first choice to be changed"
# Why a kind of intervention has no meaning for a kind of router.
_REFUSALS: dict[tuple[RoutingKind, Kind], str] = {
    ("expert_choice", "force"): f"its experts choose their tokens, {_NO_FIRST_CHOICE}",
    ("soft", "force"): f"every token takes from all slots, {_NO_FIRST_CHOICE}",
    ("soft", "top_k"): "every token takes from all slots, so there is no k to be changed",
    ("soft", "capacity"): (
        "every expert computes its slots and no more, so there is no capacity to be limited"
    ),
}


@dataclass(frozen=True)
class Intervention:
    """One change of the routing, as plain data: for JSON, for texts, and for `intervene`.

    "Weights stay with the rank" below means: the gate of a token's r-th choice is that of its r-th choice before,
    whatever expert is there now.

    - `ablate` takes an expert away.

      Token choice, fill `next_best`: its tokens go to the best expert that they haven't chosen yet. The gates follow
      the router's own rule: a softmax over the chosen experts is computed anew; a softmax over all experts keeps its
      denominator, since it comes before the choice. Tokens that didn't use the expert are computed bit for bit as
      before. Fill `zero`: the expert's output is left out of the sum, and the other gates stay.

      Expert choice: the expert takes no token, and no other expert takes its place. The weights of the other experts
      that took its tokens stay; only with `next_best`, and if the router normalises, they are made to sum to 1 again.

      Soft MoE: the weights of the expert's slots in every token's output become 0. With `next_best` the softmax is
      taken over the other slots, with `zero` the other weights stay. The contents of the other slots don't change.
    - `force` makes one expert the first choice of every token of a layer. Weights stay with the rank: the forced expert
      gets the gate of the token's first choice, which becomes the second and gets the second's gate, and so on; the
      last choice is dropped (with k = 1 the only one). If a token had chosen the expert anyway, only the order of its
      experts changes. Expert choice and Soft MoE: refused, since there tokens don't choose.
    - `swap` exchanges the tokens (Soft MoE: the slots) of two experts, with their weights.
    - `random` sends every token to K different experts drawn at random; weights stay with the rank. The draw depends on
      seed, block index and token position (if whole images are routed, not on the position). It is the same for every
      image, so that a result is the same alone and in any batch; average over several seeds. Expert choice: every
      expert takes as many tokens as before, at random positions; weights stay with the rank. Soft MoE: slots keep their
      contents and weights, and are distributed to the experts at random.
    - `top_k` routes as the same parameters would in a model built with this k, which they weren't trained for. Expert
      choice: every expert then takes ceil(N · k / E) tokens. Soft MoE: refused.
    - `capacity` lets an expert compute at most ceil(factor · N · K / E) choices of one image; N counts prefix tokens
      too. First choices come before second ones, and among equal ranks those with the largest gates (V-MoE's batch
      priority routing); the others are dropped (kept = False, nothing is added to the token). It replaces a capacity
      that the model has itself. Expert choice: every expert takes that many of its best tokens, which for a factor
      above 1 is more than without the intervention. Soft MoE: refused.

    Raises:
        UserError: if a value that the kind needs is missing or impossible.
    """

    kind: Kind  # `ablate`, `force`, `swap`, `random`, `top_k` or `capacity`
    # block index; None means every MoE layer (`random`, `top_k` and `capacity` only)
    layer: int | None = None
    expert: int | None = None  # that is ablated or forced, or the first of two that are swapped
    other: int | None = None  # the second of two that are swapped
    fill: Fill = "next_best"  # what replaces an ablated expert's output
    seed: int = 0  # for `random`, not negative
    top_k: int | None = None  # k, for `top_k`
    factor: float | None = None  # for `capacity`; 1 is perfect balance

    def __post_init__(self) -> None:
        if self.kind not in _FIELDS:
            raise UserError(
                f"There is no intervention {self.kind!r}: choose one of {', '.join(_FIELDS)}."
            )
        if self.fill not in get_args(Fill):
            raise UserError(f"There is no fill {self.fill!r}: choose next_best or zero.")
        needed = {"layer", "expert", "other", "top_k", "factor"} & set(_FIELDS[self.kind])
        if "expert" not in needed:
            needed -= {"layer"}  # None: all layers
        missing = sorted(name for name in needed if getattr(self, name) is None)
        if missing:
            raise UserError(
                f"The intervention {self.kind!r} needs {' and '.join(missing)}: give a number."
            )
        for name in ("layer", "expert", "other", "seed", "top_k"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= 0):
                raise UserError(
                    f"{name}={value!r} does not fit an intervention: give a whole number from 0."
                )
        if self.factor is not None and not 0 < self.factor < float("inf"):
            raise UserError(
                f"factor={self.factor!r} is no capacity: give a positive number, 1 is perfect balance."
            )

    def to_json(self) -> dict[str, Any]:
        """The kind and those fields that belong to it."""
        return {"kind": self.kind, **{name: getattr(self, name) for name in _FIELDS[self.kind]}}

    def edits(self, model: nn.Module) -> dict[MoEMlp, Edit]:
        """An edit for each MoE layer that the intervention acts on.

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
                return methodcaller("ablate", self.expert, self.fill)
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
    """The MoE layers by block index; if the model wasn't converted by this package, numbered from 0."""
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
    """Inside the scope, apply the interventions in their order to the routing of `model`, any module with MoE layers.

    Raises:
        UserError: if the model has no such layer or expert, k doesn't fit, or it has no meaning for the router.
    """
    with ExitStack() as scopes:
        scopes.enter_context(routing_lock(model))
        for intervention in interventions:
            scopes.enter_context(apply_edits(model, intervention.edits(model)))
        yield


@contextmanager
def apply_edits(model: nn.Module, edits: Mapping[MoEMlp, Edit]) -> Iterator[None]:
    """Inside the scope, apply the edits to the `Decision` of the given MoE layers, after those of outer scopes."""
    with routing_lock(model):
        before = {layer: layer.intervention for layer in edits}
        try:
            for layer, edit in edits.items():
                outer_edits = getattr(before[layer], "edits", ())
                edits_of_layer = (*outer_edits, edit)
                layer.intervention = _Edits(layer.router, edits_of_layer, threading.get_ident())
            yield
        finally:
            for layer, intervention in before.items():
                layer.intervention = intervention


def per_image_capacity(model: nn.Module) -> AbstractContextManager[None]:
    """A scope in which a capacity that the model shares over its batch is applied to each image of the batch alone."""
    edits: dict[MoEMlp, Edit] = {}
    for layer in moe_layers(model):
        capacity = Capacity.of_router(layer.router)
        if capacity is not None and capacity.whole_batch:
            edits[layer] = Ranking.limit_per_image
    return apply_edits(model, edits)


def run_repeated(model: nn.Module, x: Tensor, rows: Tensor, first: MoEMlp) -> Tensor:
    """Logits [R, classes] of the images x[rows], `rows` [R], whose routing differs only from the layer `first` on.

    What lies before the block of `first` is computed once for each image of x; the block gets its input by `rows`.
    """
    blocks = getattr(model, "blocks", None)
    thread = threading.get_ident()
    rows = rows.to(x.device)

    # A router that reads the input images needs as many of them as there are rows, also in later blocks.
    sees_image = any(layer.router.sees_image for layer in moe_layers(model))
    if blocks is None or first.layer_index is None or sees_image:
        return cast(Tensor, model(x[rows]))

    def repeat(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # Another thread's plain forward pass doesn't wait for the lock and must stay as it is.
        if threading.get_ident() != thread:
            return inputs
        return (inputs[0][rows], *inputs[1:])

    with blocks[first.layer_index].register_forward_pre_hook(repeat):
        return cast(Tensor, model(x))


@dataclass(frozen=True)
class _Edits:
    """The edits of all open scopes on one layer; the layer calls it with its `Routing`."""

    router: Any
    edits: tuple[Edit, ...]  # from the outermost scope to the innermost
    thread: int  # the thread that entered the scope; others get the routing unchanged

    def __call__(self, routing: Routing) -> Routing:
        if threading.get_ident() != self.thread:
            return routing
        decision = _DECISIONS[self.router.kind].of(self.router, routing)
        for edit in self.edits:
            decision = edit(decision)
        return decision.to_routing()


@dataclass(frozen=True)
class Decision(ABC):
    """A layer's routing in a form that edits can change; `to_routing` makes a `Routing` of it.

    All kinds have `exchange` and `shuffle` too, which mean something else in each.
    """

    router: Any  # its gate rule computes the weights
    routing: Routing  # the router's own decision; its scores and probabilities stay as they are
    # [B, N, E] bool, experts that a token can't use, as if they didn't exist: another expert may take the place, and
    # weights are normalised without them
    removed: Tensor
    # [B, N, E] bool, experts whose output for a token is replaced by 0: the place stays empty, other weights stay
    silenced: Tensor

    @classmethod
    @abstractmethod
    def of(cls, router: Any, routing: Any) -> Self:
        """The decision from which `to_routing`, without an edit, makes `routing` again bit for bit."""

    @abstractmethod
    def to_routing(self) -> Routing:
        """The routing that the layer will compute, after all edits."""

    def take_away(self, experts: Tensor, fill: Fill) -> Self:
        """Take experts, [B, N, E] bool or fewer axes, away from tokens; `fill` is that of an `Intervention`."""
        if fill == "zero":
            return replace(self, silenced=self.silenced | experts)
        return replace(self, removed=self.removed | experts)

    def ablate(self, expert: int, fill: Fill) -> Self:
        """Take an expert away from all tokens."""
        experts = torch.arange(self.routing.num_experts, device=self.routing.logits.device)
        return self.take_away(experts == expert, fill)


Edit = Callable[[Any], Any]
"""A function from a `Decision` to one of the same class."""


def computed_pairs(routing: Routing) -> Tensor:
    """[B, N, E] bool: which expert computes which token; for Soft MoE, whose slots contribute to which token."""
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
    """The number of choices that an expert computes at most, see `moevision.layers.within_capacity`."""

    factor: float  # limit divided by the load of perfect balance
    priority: bool = True  # V-MoE's batch priority: tokens with larger first gates come first
    whole_batch: bool = False  # one limit for the whole batch instead of one for each image

    @classmethod
    def of_router(cls, router: Any) -> Capacity | None:
        """The capacity of the router itself, in training or evaluation mode; None for no limit."""
        options = getattr(router, "options", None)
        if options is None:
            return None
        factor = options.capacity_factor if router.training else options.eval_capacity_factor
        if factor is None:
            return None
        return cls(factor, bool(options.batch_priority), options.capacity_group == "batch")


@dataclass(frozen=True)
class Ranking(Decision):
    """The decision of a layer in which tokens choose their experts: a ranking of all experts for each token.

    An expert that is `removed` for a token is replaced by the next one in its ranking.
    """

    order: Tensor  # [B, N, E] int64, all experts of a token, best first, no expert twice
    # [B, N, E] by rank in the router's own order, the scores from which gates are computed (`router.gate_logits`; it
    # may choose by others). Edits change `order` alone: an expert gets the gate of the rank that it is moved to
    scores: Tensor
    top_k: int  # K
    capacity: Capacity | None = None  # applied last, to whatever the edits have left

    @classmethod
    def of(cls, router: Any, routing: Routing) -> Self:
        """The ranking whose first K experts are those of `routing`."""
        all_false = _no_pair(routing)
        chosen = all_false.scatter(-1, routing.expert_index, True)
        # The chosen experts keep the router's order, since topk and argsort may order equal scores differently.
        other_scores = routing.noisy_logits.masked_fill(chosen, -math.inf)
        others = other_scores.argsort(dim=-1, descending=True, stable=True)
        others = others[..., : routing.num_experts - routing.top_k]  # [B, N, E - K]
        order = torch.cat([routing.expert_index, others], -1)  # [B, N, E]

        # With a capacity, `to_routing` computes anew which choices are dropped. Without one, those of `routing` stay
        # dropped.
        capacity = Capacity.of_router(router)
        dropped = all_false  # dropped choices compute nothing: they count as silenced
        if capacity is None:
            dropped = all_false.scatter(-1, routing.expert_index, ~routing.kept)
        return cls(
            router=router,
            routing=routing,
            removed=all_false,
            silenced=dropped,
            order=order,
            scores=router.gate_logits(routing).gather(-1, order),
            top_k=routing.top_k,
            capacity=capacity,
        )

    def to_routing(self) -> Routing:
        """The first K experts of each token that aren't removed, as far as the capacity allows.

        If fewer than K are left, the other choices have kept = False and weight 0.
        """
        # The first K ranks whose expert isn't removed: a stable sort of 0 (available) and 1 (removed).
        removed = self.removed.gather(-1, self.order)  # [B, N, E] by rank
        ranks = removed.to(torch.uint8).argsort(dim=-1, stable=True)[..., : self.top_k]  # [B, N, K]
        index = self.order.gather(-1, ranks)  # [B, N, K]
        is_available = ~removed.gather(-1, ranks)  # [B, N, K]

        top_scores = self.scores.gather(-1, ranks).masked_fill(~is_available, -math.inf)
        gate_logits = self.router.gate_logits(self.routing)  # [B, N, E]
        weight = self.router.gates(gate_logits, top_scores).masked_fill(~is_available, 0.0)
        kept = is_available & ~self.silenced.gather(-1, index)
        if self.capacity is not None:
            token_priority = self.router.priority(gate_logits, top_scores)
            token_priority = token_priority.masked_fill(~is_available, 0.0)
            kept = within_capacity(
                index,
                token_priority,
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
        # A stable sort of 0 (the expert) and 1 (the others).
        is_other = (self.order != expert).to(torch.uint8)  # [B, N, E] by rank
        ranks = is_other.argsort(dim=-1, stable=True)
        return replace(self, order=self.order.gather(-1, ranks))

    def choose(self, experts: Tensor, prefix: int) -> Self:
        """Send patches to `experts` [B, patches, K]; the first `prefix` tokens keep theirs. Weights stay with the rank.

        `experts` [B, 1, K] is for all tokens of an image, the prefix tokens too. A negative entry ~e = -e - 1 stands
        for expert e with its output replaced by 0. Where all entries of an image are negative, the layer is left out:
        its prefix tokens' experts are silenced, too.
        """
        tokens = self.order.shape[1]
        if experts.shape[1] == 1:
            experts = experts.expand(-1, tokens, -1)
        else:
            prefix_experts = self.order[:, :prefix, : self.top_k]  # [B, prefix, K]
            all_silent = (experts < 0).flatten(1).all(1)  # [B]
            prefix_experts = torch.where(all_silent[:, None, None], ~prefix_experts, prefix_experts)
            experts = torch.cat([prefix_experts, experts], 1)

        is_silent = experts < 0  # [B, N, K]
        chosen = torch.where(is_silent, ~experts, experts)
        silenced = _no_pair(self.routing).scatter(-1, chosen, is_silent)  # [B, N, E]

        # After the chosen experts the others follow in their old order: a stable sort of 0 (chosen) and 1.
        is_other = torch.ones_like(self.order).scatter(-1, chosen, 0)  # [B, N, E] by expert
        ranks = is_other.gather(-1, self.order).argsort(dim=-1, stable=True)
        others = self.order.gather(-1, ranks)[..., chosen.shape[-1] :]  # [B, N, E - K]
        order = torch.cat([chosen, others], -1)  # [B, N, E]
        return replace(self, order=order, silenced=self.silenced | silenced)

    def exchange(self, a: int, b: int) -> Self:
        """Exchange the tokens of experts a and b; weights stay with the rank."""
        order = self.order
        return replace(self, order=order.masked_fill(order == a, b).masked_fill(order == b, a))

    def shuffle(self, key: Sequence[int]) -> Self:
        """Send the token at each position to K different experts drawn at random; weights stay with the rank.

        The draw depends on the key and the position only (if whole images are routed, on the key), so that it is the
        same for every image, alone or in any batch.
        """
        _, tokens, num_experts = self.order.shape
        rows = 1 if self.routing.route_by == "image" else tokens
        order = draw_orders(key, rows, num_experts, self.order.device)  # [N or 1, E]
        return replace(self, order=order.expand_as(self.order))

    def at_capacity(self, factor: float) -> Self:
        """Replace the capacity by one per image, with batch priority."""
        return replace(self, capacity=Capacity(factor))

    def limit_per_image(self) -> Self:
        """Apply the router's capacity, if it has one, to each image alone."""
        if self.capacity is None:
            return self
        return replace(self, capacity=replace(self.capacity, whole_batch=False))


@dataclass(frozen=True)
class TokenLists(Decision):
    """The decision of a layer in which experts choose tokens: a ranking of an image's tokens for each expert."""

    order: Tensor  # [B, E, N] int64, all tokens of the image for each expert, best first
    scores: Tensor  # [B, E, N] by rank, the affinity that becomes the token's weight
    top_k: int  # K, experts per token on average
    factor: float = 1.0  # C is ceil(factor · N · K / E)

    @classmethod
    def of(cls, router: Any, routing: ExpertChoiceRouting) -> Self:
        """The rankings whose first C tokens are those of `routing`."""
        affinity = routing.noisy_logits.softmax(-1).mT  # [B, E, N]
        order = affinity.argsort(dim=-1, descending=True, stable=True)
        scores = affinity.gather(-1, order)
        no_pair = _no_pair(routing)
        return cls(
            router, routing, no_pair, no_pair, order=order, scores=scores, top_k=router.top_k
        )

    def to_routing(self) -> Routing:
        """Each expert takes the first C tokens of its ranking; weights follow the router's own rule."""
        tokens = self.order.shape[-1]
        capacity = capacity_of(self.factor, tokens, self.top_k, self.routing.num_experts)
        index = self.order[..., :capacity]  # [B, E, C]
        removed = self.removed.mT.gather(-1, index)  # [B, E, C]
        silenced = self.silenced.mT.gather(-1, index)  # [B, E, C]

        weight = self.scores[..., :capacity].masked_fill(removed, 0.0)  # [B, E, C]
        if self.router.options.normalize_gates:
            weight = shares_of_token(weight, index, tokens)
        weight = weight.masked_fill(silenced, 0.0)

        zeros = torch.zeros_like(self.scores)  # [B, E, N]
        computed = zeros.bool().scatter(-1, index, ~(removed | silenced))
        view = token_view(zeros.scatter(-1, index, weight).mT, computed.mT)
        routing = cast(ExpertChoiceRouting, self.routing)
        return replace(routing, token_index=index, token_weight=weight, **view)

    def exchange(self, a: int, b: int) -> Self:
        """Let experts a and b take each other's tokens, with each other's weights."""
        order = _exchanged(self.order, a, b, 1)
        return replace(self, order=order, scores=_exchanged(self.scores, a, b, 1))

    def shuffle(self, key: Sequence[int]) -> Self:
        """Let every expert take the tokens at positions drawn at random; weights stay with the rank."""
        _, num_experts, tokens = self.order.shape
        order = draw_orders(key, num_experts, tokens, self.order.device)  # [E, N]
        return replace(self, order=order.expand_as(self.order))

    def at_capacity(self, factor: float) -> Self:
        """Let each expert take `factor` times as many tokens."""
        return replace(self, factor=factor)


@dataclass(frozen=True)
class SlotWeights(Decision):
    """The decision of a Soft MoE layer."""

    dispatch: Tensor  # [B, N, E, P] weight of each token in each slot
    combine: Tensor  # [B, N, E, P] weight of each slot in each token's output

    @classmethod
    def of(cls, router: Any, routing: SoftRouting) -> Self:
        """The weights of `routing`."""
        no_pair = _no_pair(routing)
        return cls(router, routing, no_pair, no_pair, routing.dispatch_weight, routing.slot_weight)

    def to_routing(self) -> Routing:
        """Weights without the slots of removed experts are normalised again; those of silenced experts become 0."""
        combine = self.combine.masked_fill(self.removed.unsqueeze(-1), 0.0)  # [B, N, E, P]
        total = combine.flatten(2).sum(-1)  # [B, N]
        # Only tokens with a removed expert: dividing by a sum of about 1 would change the last bits of the others.
        is_rescaled = self.removed.any(-1) & (total > 0)
        divisor = torch.where(is_rescaled, total, 1.0)[..., None, None]  # [B, N, 1, 1]
        combine = (combine / divisor).masked_fill(self.silenced.unsqueeze(-1), 0.0)

        view = token_view(combine.sum(-1), ~(self.removed | self.silenced))
        routing = cast(SoftRouting, self.routing)
        return replace(routing, dispatch_weight=self.dispatch, slot_weight=combine, **view)

    def exchange(self, a: int, b: int) -> Self:
        """Let experts a and b compute each other's slots."""
        dispatch = _exchanged(self.dispatch, a, b, 2)
        return replace(self, dispatch=dispatch, combine=_exchanged(self.combine, a, b, 2))

    def shuffle(self, key: Sequence[int]) -> Self:
        """Distribute all E · P slots to the experts at random, P to each; the weights of a slot stay the same."""
        dispatch = self.dispatch.flatten(2)  # [B, N, E · P]
        combine = self.combine.flatten(2)
        (order,) = draw_orders(key, 1, dispatch.shape[-1], dispatch.device)  # [E · P]
        return replace(
            self,
            dispatch=dispatch[..., order].view_as(self.dispatch),
            combine=combine[..., order].view_as(self.combine),
        )


_DECISIONS: dict[str, type[Decision]] = {
    "token_choice": Ranking,
    "expert_choice": TokenLists,
    "soft": SlotWeights,
}


def _exchanged(x: Tensor, a: int, b: int, dim: int) -> Tensor:
    """Exchange the entries a and b along the axis `dim` of x."""
    order = torch.arange(x.shape[dim], device=x.device)
    order[a] = b
    order[b] = a
    return x.index_select(dim, order)

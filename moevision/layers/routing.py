"""A router's decision (`Routing`), the context manager that records decisions, and the base class of routers.

`Routing` is one MoE layer's decision about a batch. Losses, metrics, analysis and the demo read nothing else. This
module has it for token choice. For expert choice and Soft MoE, subclasses in `routers_soft.py` add what these need and
keep the fields by token, so that code which reads a `Routing` works for every router.

Within `record_routing(model)` every MoE layer of `model` appends its `Routing` to a list. Forward hooks can't do this:
they run zero times under `torch.compile`, and twice under activation checkpointing. A layer that returned its `Routing`
would break timm's Tensor -> Tensor blocks. An intervention (`moevision.analysis.intervention`) changes the decision in
the same method, `Recordable.decide`.

Axes: B images, N tokens of an image (prefix tokens first), T = B·N tokens, D width, E experts, K choices of a token,
R rows.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, Self
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from moevision.config import RouteBy as RouteBy
from moevision.layers.cpu import copy_to_experts, sum_rows
from moevision.layers.experts import Experts

Kind = Literal["token_choice", "expert_choice", "soft"]
JITTER = 0.01  # Switch Transformer, table 1 and its released code
STEPS = ("scores", "shares", "kept", "weights")
Explanation = dict[str, str]
"""What the explorer says of a router's decision, one or two sentences for each of `STEPS`: how it makes logits,
probabilities, the choice of experts and their weights."""


@dataclass(frozen=True)
class Dispatched:
    """Rows ready for the experts, and which token each of them belongs to."""

    rows: Tensor  # [R, D] copies of tokens (or slots), sorted by expert (see `counts`)
    counts: Tensor  # [E] int64, rows of each expert, padding included; they sum to R
    # [R] int64, the token that each row is a copy of (padding: token 0); None for slots, which are mixtures of tokens
    token: Tensor | None = None
    # [T, K] int64, the row of each choice (token choice, where every token has K rows); else None
    position: Tensor | None = None


@dataclass(frozen=True)
class Routing:
    """The decision of one MoE layer about a batch of images (token choice: each token picks K experts).

    Attributes:
        logits: [B, N, E] clean router scores, at least float32.
        noisy_logits: [B, N, E] the scores with noise, by which experts were chosen; `logits` itself without noise.
        probs: [B, N, E] each token's probabilities without noise: softmax of `logits`, for sigmoid gates s / sum(s).
        noise_std: [B, N, E] (or broadcastable) standard deviation of the noise; None without noise, as in eval mode.
        expert_index: [B, N, K] int64, the chosen experts, best first.
        combine_weight: [B, N, K] the weight of each choice in the output.
        kept: [B, N, K] bool, False where an expert's capacity dropped the choice.
        layer: index of the transformer block, None outside a converted model.
        grid: (rows, columns) of the patch grid; None when tokens are not the whole grid (patch dropping).
        num_prefix_tokens: class and register tokens in front of the patches; they are routed too.
        route_by: `token`, or `image` where all tokens of an image share one decision. It is then repeated along the
            token axis (`for_tokens`), so that an image counts as N choices. What is a ratio of counts (CV², balance
            losses) doesn't change by that.
    """

    kind: ClassVar[Kind] = "token_choice"

    logits: Tensor
    noisy_logits: Tensor
    probs: Tensor
    noise_std: Tensor | None
    expert_index: Tensor
    combine_weight: Tensor
    kept: Tensor
    layer: int | None = None
    grid: tuple[int, int] | None = None
    num_prefix_tokens: int = 0
    route_by: RouteBy = "token"

    @property
    def num_experts(self) -> int:
        """E."""
        return self.logits.shape[-1]

    @property
    def top_k(self) -> int:
        """K."""
        return self.expert_index.shape[-1]

    def expert_weights(self) -> Tensor:
        """[B, N, E]: the weight of each expert in the output of each token, zero where it doesn't compute the token."""
        weights = torch.zeros_like(self.logits)
        return weights.scatter(-1, self.expert_index, self.combine_weight * self.kept)

    def requested_counts(self) -> Tensor:
        """[E] int64: how many tokens chose each expert, before any capacity."""
        return replace(self, kept=torch.ones_like(self.kept)).counts()

    def counts(self) -> Tensor:
        """[E] int64: how many choices each expert computes (the load)."""
        return self.image_counts().sum(0)

    def image_counts(self) -> Tensor:
        """[B, E] int64: `counts()` of each image."""
        expert_of_choice = self.expert_index.flatten(1)  # [B, N·K]
        is_kept = self.kept.flatten(1).to(torch.int64)  # [B, N·K]

        # Unlike bincount, scatter_add has a static result shape, so that it compiles and needs no host synchronisation.
        zeros = is_kept.new_zeros(len(self.kept), self.num_experts)  # [B, E]
        return zeros.scatter_add(1, expert_of_choice, is_kept)

    def dispatch(self, x: Tensor, *, pad: bool = True) -> Dispatched:
        """Rows for the experts: each token of x [T, D] is copied once for every expert that it chose.

        `pad`: round the rows of each expert up to what the grouped matrix product likes; see `LocalDispatcher`.
        """
        expert_index = self.expert_index.flatten(0, 1)  # [T, K]
        return Dispatched(*copy_to_experts(x, expert_index, self.num_experts, pad=pad))

    def combine(self, rows: Tensor, dispatched: Dispatched) -> Tensor:
        """Weighted sum [T, D] of each token's rows; `rows` [R, D] is the experts' output for the rows of `dispatch`."""
        assert dispatched.token is not None
        assert dispatched.position is not None
        weight = (self.combine_weight * self.kept).flatten(0, 1)  # [T, K]
        return sum_rows(rows, weight, dispatched.token, dispatched.position)

    def mix_densely(self, x: Tensor, experts: Experts) -> Tensor:
        """The same output without sorting: every expert computes every token of x [T, D] -> [T, out]."""
        outputs = experts.on_all_tokens(x)  # [T, E, out]
        weight = self.expert_weights().flatten(0, 1)  # [T, E]
        mixed = (outputs * weight.unsqueeze(-1)).sum(1)  # [T, out]
        return mixed.to(outputs.dtype)

    def for_tokens(self, tokens: int) -> Self:
        """Expand a decision per image [B, 1, ...] to all its tokens [B, N, ...], without copying; N is `tokens`."""
        return replace(self._map_tensors(lambda x: x.expand(-1, tokens, -1)), route_by="image")

    def detach(self) -> Self:
        """The same decision without its autograd graph, for metrics and traces."""
        return self._map_tensors(Tensor.detach)

    def _map_tensors(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same decision with `function` applied to every tensor."""
        changed: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changed[field.name] = function(value)
        return replace(self, **changed)


@dataclass(frozen=True)
class LayerLoad:
    """How the load of one MoE layer is distributed over its experts."""

    layer: int  # index of the transformer block
    counts: list[int]  # choices that each expert computed
    max_over_mean: float  # largest load over mean load; 1 is perfect, and parallel experts wait for the largest
    cv_squared: float  # variance over squared mean of the counts
    # The CV² that chance alone leads one to expect on a sample of I images, if over all possible images every expert
    # were chosen equally often: (I · mean over experts of var(c_e)) ÷ mean load², with c_e the counts of expert e in
    # each image. Choices within an image are correlated; were they independent it would be (E - 1) / choices, which is
    # used for a single image, from which no variance can be computed.
    cv_squared_floor: float
    dead: int  # experts that computed nothing
    entropy_bits: float  # mean entropy of a token's router probabilities; at most log2(E), where all are equal
    dropped: float  # share of choices that capacity dropped
    # share of tokens that no expert computes: all choices dropped, or (expert choice) none took them
    unrouted: float = 0.0

    @classmethod
    def from_sums(
        cls,
        layer: int,
        counts: Tensor,
        requested: Tensor,
        entropy_bits: Tensor,
        tokens: Tensor,
        unrouted: Tensor,
        *,
        count_squares: Tensor,
        images: Tensor,
    ) -> LayerLoad:
        """Summarise sums over a number of `images` and `tokens`; all arguments but `layer` are tensors.

        By expert [E]: `counts`, the choices computed; `requested`, the choices before any capacity; `count_squares`,
        the squares of each image's counts. Scalars, summed over tokens: `entropy_bits`, and how many are `unrouted`.
        """
        load = counts.double()
        num_choices = load.sum()
        mean_load = load.mean()

        if images > 1:
            # [E] sample variance over images of an expert's count in an image
            variance = (count_squares.double() - load.square() / images) / (images - 1)
            expected_cv_squared = images * variance.mean() / mean_load.square()
        else:
            expected_cv_squared = (len(load) - 1) / num_choices

        return cls(
            layer=layer,
            counts=counts.tolist(),
            max_over_mean=float(load.max() / mean_load),
            cv_squared=float(load.var(correction=0) / mean_load.square()),
            cv_squared_floor=float(expected_cv_squared),
            dead=int((load == 0).sum()),
            entropy_bits=float(entropy_bits / tokens),
            dropped=float(1 - num_choices / requested.sum()),
            unrouted=float(unrouted / tokens),
        )


class Recordable(nn.Module):
    """A layer whose decision an intervention can change and `record_routing` can record.

    Both are context managers that set `intervention` or `recorder` and reset it at their end; neither attribute is part
    of the layer's state.
    """

    layer_index: int | None = None
    recorder: list[Routing] | None = None
    intervention: Callable[[Routing], Routing] | None = None

    def decide(self, routing: Routing) -> Routing:
        """The routing that the layer will use: `routing`, changed by the intervention if there is one, and recorded.

        Interventions and recorders get a `routing` that has the layer's index in `layer`.
        """
        if torch.compiler.is_compiling():
            return _decide_uncompiled(self, routing)
        return _decide(self, routing)

    def __getstate__(self) -> dict[str, object]:
        """State for copies and pickles: without recorder and intervention, and (by the base class) compiled code."""
        state: dict[str, object] = super().__getstate__()  # type: ignore[no-untyped-call]
        state.pop("recorder", None)
        state.pop("intervention", None)
        return state


def _decide(layer: Recordable, routing: Routing) -> Routing:
    # Each attribute is read once: another thread may end its `record_routing` between a check and a use.
    intervention = layer.intervention
    recorder = layer.recorder
    if intervention is None and recorder is None:
        return routing

    routing = replace(routing, layer=layer.layer_index)
    if intervention is not None:
        routing = intervention(routing)
    if recorder is not None:
        recorder.append(routing)
    return routing


# Compiled code must not read `recorder` and `intervention`. It would be compiled again for every length of the
# recorder's list and for every intervention. Under activation checkpointing the recomputation, which has no recorder,
# would save other tensors than the forward pass did. Unlike `torch.compiler.disable`, this decorator imports the
# compiler not at import but on first use.
_decide_uncompiled = _disable_dynamo(_decide)

_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_locks_guard = threading.Lock()


def routing_lock(model: nn.Module) -> threading.RLock:
    """The re-entrant lock that is held while `model` is recorded or intervened on.

    It isn't an attribute of the module, since that would break `copy.deepcopy` and pickling.
    """
    with _locks_guard:
        return _locks.setdefault(model, threading.RLock())


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards each module gets back the mode that it had.

    Other threads can't record the model meanwhile if it was in training mode. A model that is in eval mode already,
    such as a server's, isn't locked.
    """
    training_modules = [module for module in net.modules() if module.training]
    if not training_modules:
        yield
        return
    with routing_lock(net):
        net.eval()
        try:
            yield
        finally:
            for module in training_modules:
                module.training = True


@contextmanager
def record_routing(model: nn.Module) -> Iterator[list[Routing]]:
    """Collect the routing of every MoE layer that runs inside the scope, in order of execution.

    Scopes nest (an outer scope also gets what inner scopes recorded) and exclude other threads on the same model. End
    the scope before `backward()`: activation checkpointing runs the layers again there, which must not be recorded.

    Args:
        model: any module that contains MoE layers, or one MoE layer.

    Yields:
        A list that fills while the model runs; `grid` and `num_prefix_tokens` are filled in when the scope closes.
    """
    layers = [module for module in model.modules() if isinstance(module, Recordable)]
    routings: list[Routing] = []
    with routing_lock(model):
        outer_recorders = [layer.recorder for layer in layers]
        for layer in layers:
            layer.recorder = routings
        try:
            yield routings
        finally:
            for layer, outer_recorder in zip(layers, outer_recorders, strict=True):
                layer.recorder = outer_recorder
            routings[:] = [_with_geometry(routing, model) for routing in routings]
            # An outer scope set the same list on all layers.
            if outer_recorders and outer_recorders[0] is not None:
                outer_recorders[0].extend(routings)


def _with_geometry(routing: Routing, model: nn.Module) -> Routing:
    """`routing` with the patch grid and the number of prefix tokens of `model`, if it is a ViT."""
    num_prefix_tokens = getattr(model, "num_prefix_tokens", None)
    grid_size = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if num_prefix_tokens is None or grid_size is None or routing.grid is not None:
        return routing

    rows, columns = grid_size
    num_patches = routing.logits.shape[1] - num_prefix_tokens
    grid = (rows, columns) if num_patches == rows * columns else None
    return replace(routing, grid=grid, num_prefix_tokens=num_prefix_tokens)


def forward_routing(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Routing]]:
    """Run a converted model and return its output and the decisions of its MoE layers.

    Args:
        model: a model converted by `moevision.convert_to_moe` or created under a `vit_moe*` name.
        x: [B, 3, H, W] images.

    Returns:
        The model's output (logits [B, C] for a classifier) and one `Routing` per MoE layer, in order of depth.
    """
    with record_routing(model) as routings:
        output: Tensor = model(x)
    return output, routings


# ---- what all routers share: interface, precision, capacity


class Router(nn.Module):
    """The interface of a router for MoE layers, training, analysis and the explorer; calling it gives a `Routing`.

    A router of your own sets `num_experts` and `top_k`, implements `forward`, and overrides the defaults below that
    don't fit it. For token choice, interventions also need the methods `gate_logits`, `gates` and `priority` of
    `TopKRouter`.
    """

    kind: ClassVar[Kind] = "token_choice"
    # Whether the router needs the image itself: its method `look` becomes a forward pre-hook of the patch embedding.
    sees_image: ClassVar[bool] = False
    num_experts: int  # E
    top_k: int  # K
    # Class and register tokens in front of the patches; set when a model is converted.
    num_prefix_tokens: int = 0

    @property
    def rows(self) -> nn.Parameter | None:
        """[E, features]: the learned vector of each expert that scores tokens; None without such vectors."""
        return None

    @property
    def losses(self) -> frozenset[str]:
        """Names of the balance losses that this router's `Routing` can supply."""
        return frozenset()

    @property
    def default_losses(self) -> dict[str, float]:
        """Weights of the balance losses that are used unless the user gives others."""
        return {}

    @property
    def needs_load(self) -> bool:
        """Whether `after_step` does anything."""
        return False

    def after_step(self, load: Tensor) -> None:
        """Called after each applied optimizer step; `load` [E] is how many tokens chose each expert in it."""

    def explain(self, *, noisy: bool, top_k: int, capacity: float | None) -> Explanation:
        """Sentences for the explorer: how the router treats a patch in eval mode, with this noise, K and capacity."""
        return {
            "scores": f"The router {type(self).__name__} gives each expert a number.",
            "shares": "The scores become shares that sum to 1.",
            "kept": "It chooses experts.",
            "weights": "It weighs what they compute.",
        }

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"num_experts={self.num_experts}, top_k={self.top_k}"


def routed_unit(router: object) -> RouteBy:
    """Whether a router decides about each `token` or about each `image` as a whole."""
    options = getattr(router, "options", None)
    return getattr(options, "route_by", None) or "token"


def at_least_float32(x: Tensor) -> Tensor:
    """Convert float16 and bfloat16 to float32, the least precision for routers; other dtypes stay as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """A context without autocast on the device of x, for a router's computation."""
    # Only if autocast is on: torch 2.13 can't load an exported program that contains such a context.
    device_type = x.device.type
    active = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if active else nullcontext()


def capacity_of(factor: float, tokens: int, top_k: int, num_experts: int) -> int:
    """The capacity of an expert, ceil(factor · tokens · K / E) choices."""
    # 1.1 times 10 is 11.000000000000002 in floating point: without the subtraction it would be rounded up to 12.
    return math.ceil(factor * tokens * top_k / num_experts - 1e-9)


def within_capacity(
    index: Tensor,
    weight: Tensor,
    kept: Tensor,
    num_experts: int,
    factor: float,
    *,
    priority: bool = True,
    whole_batch: bool = False,
    unit: int = 1,
) -> Tensor:
    """[B, N, K] bool: which choices remain if each expert has a capacity, `factor` times an even share of the choices.

    Capacity and the order in which it is filled: GShard (arXiv:2006.16668), algorithm 1; Switch (arXiv:2101.03961),
    eq. 3. Batch priority routing: V-MoE (arXiv:2106.05974), §4.1.

    All first choices come before all second ones. Among first choices, and so on, earlier tokens come first; with
    `priority`, tokens with a larger gate (of equal ones the earlier). A dropped choice isn't sent to another expert. A
    choice that is False in `kept` uses no capacity.

    Args:
        index: [B, N, K] the chosen experts, `Routing.expert_index`.
        weight: [B, N, K] their gates, whose largest per token decides with `priority`.
        kept: [B, N, K] bool, the choices that compete for capacity.
        num_experts: E.
        factor: the capacity factor.
        priority: whether tokens with larger gates come first.
        whole_batch: whether images share the capacity, so that a prediction depends on the other images of the batch;
            else each image has its own.
        unit: how many tokens share a decision, N where images are routed as a whole: capacity is then an even share of
            images, in tokens.
    """
    shape = kept.shape  # [B, N, K]; sizes from len() would be constants in an exported program
    if whole_batch:
        # One group: [B, N, K] -> [1, B·N, K].
        index = index.flatten(0, 1).unsqueeze(0)
        weight = weight.flatten(0, 1).unsqueeze(0)
        kept = kept.flatten(0, 1).unsqueeze(0)
    groups, tokens, top_k = kept.shape  # shapes below have G groups of N tokens

    # The queue of each group: first choices of all tokens, then second ones, ...
    expert = index.mT.flatten(1)  # [G, K·N]
    competes = kept.mT.flatten(1)  # [G, K·N]
    if priority:
        # By gate within first choices, second ones, ...: choice k of token n is at k·N + n before.
        token_order = weight.amax(-1).argsort(dim=1, descending=True, stable=True)  # [G, N]
        first_of_rank = tokens * torch.arange(top_k, device=index.device).view(-1, 1)  # [K, 1]
        order = (token_order.unsqueeze(1) + first_of_rank).flatten(1)  # [G, K·N]
        expert = expert.gather(1, order)
        competes = competes.gather(1, order)

    # How many choices each expert has up to this place of the queue: the largest tensors here.
    is_chosen = F.one_hot(expert, num_experts).to(torch.int32) * competes.unsqueeze(-1)
    count_so_far = is_chosen.cumsum(1, dtype=torch.int32)  # [G, K·N, E]

    # A choice fits if its place in the queue of its expert, counted from 1, is within the capacity.
    place = count_so_far.gather(-1, expert.unsqueeze(-1)).squeeze(-1)  # [G, K·N]
    capacity = unit * capacity_of(factor, tokens // unit, top_k, num_experts)
    fits = competes & (place <= capacity)

    # Back from the order of the queue to that of tokens.
    if priority:
        fits = torch.zeros_like(fits).scatter(1, order, fits)
    return fits.view(groups, top_k, tokens).mT.reshape(shape)

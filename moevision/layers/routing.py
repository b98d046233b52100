"""What a router answers (`Routing`), the scope that collects the answers, and what all routers share.

`Routing` is one MoE layer's decision about a batch, and the only thing that losses, metrics, analysis and the demo
read. It is written here for token choice; where experts choose tokens or mix them (`routers_soft.py`), a subclass adds
what those need and keeps the token's view, so that a new router costs nothing downstream.
`record_routing(model)` opens a scope in which every MoE layer of `model` appends its `Routing` to a list: a scope
instead of hooks (they fire zero times under `torch.compile`, twice under activation checkpointing) and instead of
returned tuples (they would break timm's Tensor -> Tensor blocks). An intervention changes the decision at the same
place.

Axes: B images, N tokens of an image (prefix tokens first), E experts, K choices of a token.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Final, Literal, Self
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from moevision.config import RouteBy as RouteBy
from moevision.errors import UserError
from moevision.layers.cpu import send_choices, sum_rows
from moevision.layers.experts import Experts

Kind = Literal["token_choice", "expert_choice", "soft"]
JITTER = 0.01  # Switch Transformer, table 1 and its released code
STEPS: Final = ("scores", "shares", "kept", "weights")
Explanation = dict[str, str]
"""What a router does, in one or two sentences for each of `STEPS`."""


@dataclass(frozen=True)
class Dispatched:
    """Rows ready for the experts, and the way back."""

    rows: Tensor  # [R, D] copies of tokens (or slots), sorted by expert; R = T·K plus padding, B·E·C or B·E·P
    counts: Tensor  # [E] int64, rows of each expert, padding included; they sum to R
    # [R] int64, the token that each row is a copy of (padding: token 0); None for slots, which mix tokens
    token: Tensor | None = None
    # [T, K] int64, the rows of each token, where every token has K of them (token choice); else None
    position: Tensor | None = None


@dataclass(frozen=True)
class Routing:
    """The decision of one MoE layer about a batch of images (token choice: each token picks K experts).

    Attributes:
        logits: [B, N, E] clean router scores, at least float32.
        noisy_logits: [B, N, E] the scores that the choice was made on; `logits` itself where there is no noise.
        probs: [B, N, E] each token's clean affinities, summing to 1: softmax of `logits`, for sigmoid gates s / sum(s).
        noise_std: [B, N, E] (or broadcastable) standard deviation of the noise; None without noise, as in eval mode.
        expert_index: [B, N, K] int64, the chosen experts, best first.
        combine_weight: [B, N, K] the weight of each choice in the output.
        kept: [B, N, K] bool, False where an expert's capacity dropped the choice.
        layer: index of the transformer block, None outside a converted model.
        grid: (rows, columns) of the patch grid; None when tokens are not the whole grid (patch dropping).
        num_prefix_tokens: class and register tokens in front of the patches; they are routed too.
        route_by: `token`, or `image` where all tokens of an image share one decision. The token axis is there all the
            same (`for_tokens`), so that a count in choices is N times the one in images; ratios of counts, CV² and all
            balance losses are those over images.
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
        """[B, N, E]: the weight that each token gives to each expert, zero where it is not routed."""
        weights = torch.zeros_like(self.logits)
        return weights.scatter(-1, self.expert_index, self.combine_weight * self.kept)

    def requested_counts(self) -> Tensor:
        """[E] int64: how many choices fell on each expert, before any capacity."""
        return replace(self, kept=torch.ones_like(self.kept)).counts()

    def counts(self) -> Tensor:
        """[E] int64: how many choices each expert computes (the load)."""
        return self.image_counts().sum(0)

    def image_counts(self) -> Tensor:
        """[B, E] int64: `counts()` of each image."""
        chosen = self.expert_index.flatten(1)  # [B, N·K]
        computed = self.kept.flatten(1).to(torch.int64)  # [B, N·K]

        # scatter_add has a static result shape: no host synchronisation, and it compiles, unlike bincount.
        zeros = computed.new_zeros(len(self.kept), self.num_experts)
        return zeros.scatter_add(1, chosen, computed)

    def dispatch(
        self, x: Tensor, row_multiple: int | None = None, max_padding: float | None = None
    ) -> Dispatched:
        """Rows for the experts: each token of x [T, D] is copied once for every expert that it chose.

        The other arguments are those of `LocalDispatcher`.
        """
        expert_index = self.expert_index.flatten(0, 1)  # [T, K]
        rows, counts, token, position = send_choices(
            x, expert_index, self.num_experts, row_multiple, max_padding
        )
        return Dispatched(rows, counts, token, position)

    def combine(self, rows: Tensor, dispatched: Dispatched) -> Tensor:
        """Weighted sum [T, D] of each token's rows: those of `dispatch` [R, D], as the experts computed them."""
        assert dispatched.token is not None
        assert dispatched.position is not None
        weight = (self.combine_weight * self.kept).flatten(0, 1)  # [T, K]
        return sum_rows(rows, weight, dispatched.token, dispatched.position)

    def mix_densely(self, x: Tensor, experts: Experts) -> Tensor:
        """`dispatch`, `experts` and `combine` without sorting: every expert on every token x [T, D] -> [T, out]."""
        outputs = experts.on_all_tokens(x)  # [T, E, out]
        weight = self.expert_weights().flatten(0, 1)  # [T, E]
        return (outputs * weight.unsqueeze(-1)).sum(1).to(outputs.dtype)

    def for_tokens(self, tokens: int) -> Self:
        """One decision per image [B, 1, ...] as that of each of its N tokens [B, N, ...], without a copy."""
        return replace(self._map_tensors(lambda x: x.expand(-1, tokens, -1)), route_by="image")

    def detach(self) -> Self:
        """The same decision without its autograd graph, for metrics and traces."""
        return self._map_tensors(Tensor.detach)

    def _map_tensors(self, function: Callable[[Tensor], Tensor]) -> Self:
        changed: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changed[field.name] = function(value)
        return replace(self, **changed)


@dataclass(frozen=True)
class LayerLoad:
    """How the choices of one MoE layer fell on its experts."""

    layer: int  # index of the transformer block
    counts: list[int]  # choices that each expert computed
    max_over_mean: float  # load of the slowest expert over the mean load; 1 is perfect, and what the others wait for
    cv_squared: float  # variance over squared mean of the counts
    # CV² that chance alone is expected to give on so many images, if over all possible images every expert were chosen
    # equally often: Σ_e I · var(c_e) / E ÷ mean load², with c_e the counts of expert e in each of I images. Choices of
    # one image go together; only independent ones would give (E - 1) / choices, which is said of a single image.
    cv_squared_floor: float
    dead: int  # experts that no token chose
    entropy_bits: float  # mean entropy of a token's router probabilities; log2(E) is undecided
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
        """Summarise sums over images: counts [E], requested [E] choices, squares of the counts [E] of each image.

        `entropy_bits` and `unrouted` are sums over `tokens` tokens.
        """
        load = counts.double()
        total = load.sum()
        mean = load.mean()

        if images > 1:
            # [E] variance of an image's counts
            variance = (count_squares.double() - load.square() / images) / (images - 1)
            floor = images * variance.mean() / mean.square()
        else:
            floor = (len(load) - 1) / total

        return cls(
            layer=layer,
            counts=counts.tolist(),
            max_over_mean=float(load.max() / mean),
            cv_squared=float(load.var(correction=0) / mean.square()),
            cv_squared_floor=float(floor),
            dead=int((load == 0).sum()),
            entropy_bits=float(entropy_bits / tokens),
            dropped=float(1 - total / requested.sum()),
            unrouted=float(unrouted / tokens),
        )


class Recordable(nn.Module):
    """A layer whose decision can be changed by an open intervention and is handed to the open recorder.

    Both are scopes (`moevision.analysis.intervention`, `record_routing`): they are no part of the layer's state.
    """

    layer_index: int | None = None
    recorder: list[Routing] | None = None
    intervention: Callable[[Routing], Routing] | None = None

    def decide(self, routing: Routing) -> Routing:
        """What the layer will compute: `routing` as the open intervention changes it; the open recorder gets it too.

        Both see the number of the layer in it, which the layer itself has no use for.
        """
        if torch.compiler.is_compiling():
            return _decide_uncompiled(self, routing)
        return _decide(self, routing)

    def __getstate__(self) -> dict[str, object]:
        """A copy or a pickle never carries an open recorder or intervention along, nor what `compile` made of it."""
        state: dict[str, object] = super().__getstate__()  # type: ignore[no-untyped-call]
        state.pop("recorder", None)
        state.pop("intervention", None)
        return state


def _decide(layer: Recordable, routing: Routing) -> Routing:
    # Read once: another thread may close its scope between a check and a use.
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


# Compiled code must not look at the scopes: it would be compiled again for every length of the recorder's list and for
# every intervention, and with activation checkpointing the recomputation (recorder closed) would save other tensors
# than the forward pass did. This decorator imports the compiler on first use, `torch.compiler.disable` would at import.
_decide_uncompiled = _disable_dynamo(_decide)

_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_locks_guard = threading.Lock()


def routing_lock(model: nn.Module) -> threading.RLock:
    """The re-entrant lock under which `model` is recorded or intervened on.

    It lives outside the module, since a lock inside would break `copy.deepcopy` and pickling.
    """
    with _locks_guard:
        return _locks.setdefault(model, threading.RLock())


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Eval mode inside the block, and each layer's own mode back afterwards.

    A model in training mode is locked meanwhile; one in eval mode, as a server has it, stays free for others between
    the batches.
    """
    training = [module for module in net.modules() if module.training]
    if not training:
        yield
        return
    with routing_lock(net):
        net.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True


@contextmanager
def record_routing(model: nn.Module) -> Iterator[list[Routing]]:
    """Collect the routing of every MoE layer that runs inside the scope, in order of execution.

    Scopes nest (an outer scope sees what inner scopes recorded) and exclude other threads on the same model. Close
    the scope before `backward()`: activation checkpointing runs the layers again there, and must not be recorded.

    Args:
        model: any module that contains MoE layers, or one MoE layer.

    Yields:
        A list that fills while the model runs; `grid` and `num_prefix_tokens` are filled in when the scope closes.
    """
    layers = [module for module in model.modules() if isinstance(module, Recordable)]
    routings: list[Routing] = []
    with routing_lock(model):
        outer = [layer.recorder for layer in layers]
        for layer in layers:
            layer.recorder = routings
        try:
            yield routings
        finally:
            for layer, recorder in zip(layers, outer, strict=True):
                layer.recorder = recorder
            routings[:] = [_with_geometry(routing, model) for routing in routings]
            if outer and outer[0] is not None:
                outer[0].extend(routings)


def _with_geometry(routing: Routing, model: nn.Module) -> Routing:
    num_prefix_tokens = getattr(model, "num_prefix_tokens", None)
    grid_size = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if num_prefix_tokens is None or grid_size is None or routing.grid is not None:
        return routing
    rows, columns = grid_size
    patches = routing.logits.shape[1] - num_prefix_tokens
    grid = (rows, columns) if patches == rows * columns else None
    return replace(routing, grid=grid, num_prefix_tokens=num_prefix_tokens)


def forward_routing(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Routing]]:
    """Run a converted model and return its output beside what its MoE layers decided.

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
    """What an MoE layer, training, analysis and the explorer need of a router; calling it gives a `Routing`.

    A router of your own sets `num_experts` and `top_k`, computes `forward`, and overrides what isn't as here. Where
    tokens choose, interventions also need its `gate_logits`, `gates` and `priority`, as `TopKRouter` has them.
    """

    kind: ClassVar[Kind] = "token_choice"  # who chooses
    # Whether `look` gets the patch embedding and its arguments before each pass.
    sees_image: ClassVar[bool] = False
    num_experts: int  # E
    top_k: int  # K
    # Class and register tokens in front of the patches; a model's conversion sets it.
    num_prefix_tokens: int = 0

    @property
    def rows(self) -> nn.Parameter | None:
        """[E, features]: the learned row of each expert, by which tokens choose it; None without such rows."""
        return None

    @property
    def losses(self) -> frozenset[str]:
        """Names of the balance losses that this router's `Routing` can supply."""
        return frozenset()

    @property
    def default_losses(self) -> dict[str, float]:
        """Weights of the balance losses where the user gives none."""
        return {}

    @property
    def needs_load(self) -> bool:
        """Whether `after_step` does anything."""
        return False

    def after_step(self, load: Tensor) -> None:
        """What the router does after an applied optimizer step in which `load` [E] choices fell on each expert."""

    def explain(self, *, noisy: bool, top_k: int, capacity: float | None) -> Explanation:
        """What the router does with a patch in evaluation, under the noise, K and capacity factor that are shown."""
        return {
            "scores": f"The router {type(self).__name__} gives each expert a number.",
            "shares": "As shares of 1.",
            "kept": "It chooses experts.",
            "weights": "It gives weights.",
        }

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"num_experts={self.num_experts}, top_k={self.top_k}"


def routed_unit(router: object) -> RouteBy:
    """What a router decides about: each token, or an image as a whole."""
    options = getattr(router, "options", None)
    return getattr(options, "route_by", None) or "token"


def check_top_k(top_k: int, num_experts: int) -> None:
    """Raise a UserError unless 1 <= top_k <= num_experts."""
    if not 1 <= top_k <= num_experts:
        raise UserError(
            f"top_k={top_k} does not fit num_experts={num_experts}: choose top_k between 1 and {num_experts}."
        )


def at_least_float32(x: Tensor) -> Tensor:
    """Promote float16 and bfloat16 to float32, in which routers decide; leave float32 and float64 alone."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """A scope without autocast on the device of x, for a router's computation."""
    device_type = x.device.type
    # Entered only where it changes something: torch 2.13 can't read back an exported program that holds such a scope.
    active = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if active else nullcontext()


def capacity_of(factor: float, tokens: int, top_k: int, num_experts: int) -> int:
    """ceil(factor · tokens · K / E) choices."""
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
    """[B, N, K] bool: which choices remain if an expert computes at most `factor` times an even share of a group's.

    Capacity and its order of filling: GShard (arXiv:2006.16668), algorithm 1; Switch (arXiv:2101.03961), eq. 3. Batch
    priority routing: V-MoE (arXiv:2106.05974), §4.1.

    All first choices come before all second ones. Among those, earlier tokens come first; with `priority` tokens with
    a larger first gate (of equal ones the earlier). A dropped choice goes nowhere else, and one that `kept` has dropped
    already takes no room.

    A group is one image; with `whole_batch` the batch, so that a prediction depends on its batch-mates. `index`,
    `weight` and `kept` [B, N, K] are as in `Routing`, and so many tokens as `unit` says (N where images are routed as a
    whole) are counted as one.
    """
    shape = kept.shape  # not len() below: it would fix the size of an export
    if whole_batch:
        # One group: [B, N, K] -> [1, B·N, K].
        index = index.flatten(0, 1).unsqueeze(0)
        weight = weight.flatten(0, 1).unsqueeze(0)
        kept = kept.flatten(0, 1).unsqueeze(0)
    groups, tokens, top_k = kept.shape

    # The queue of each group: first choices of all tokens, then second ones, ...
    expert = index.mT.flatten(1)  # [B, K·N]
    alive = kept.mT.flatten(1)  # [B, K·N]
    if priority:
        by_gate = weight.amax(-1).argsort(dim=1, descending=True, stable=True)  # [B, N] tokens
        start = tokens * torch.arange(top_k, device=index.device).view(-1, 1)  # [K, 1]
        order = (by_gate.unsqueeze(1) + start).flatten(1)  # [B, K·N]
        expert = expert.gather(1, order)
        alive = alive.gather(1, order)

    # How many choices of the queue each expert has got so far: this is what takes memory.
    chosen = F.one_hot(expert, num_experts).to(torch.int32) * alive.unsqueeze(-1)
    filled = chosen.cumsum(1, dtype=torch.int32)  # [B, K·N, E]

    # A choice fits if its own number at its expert, counted from 1, is within the capacity.
    number = filled.gather(-1, expert.unsqueeze(-1)).squeeze(-1)  # [B, K·N]
    capacity = unit * capacity_of(factor, tokens // unit, top_k, num_experts)
    fits = alive & (number <= capacity)

    # Back from the queue to tokens.
    if priority:
        fits = torch.zeros_like(fits).scatter(1, order, fits)
    return fits.view(groups, top_k, tokens).mT.reshape(shape)

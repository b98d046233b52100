"""The routers by name. Each is exactly as its source defines it; the sources stand in the modules.

Axes: B images, N tokens, D width, E experts, K choices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from moevision.errors import UserError
from moevision.layers.affinity import CosineRouter, SigmoidRouter
from moevision.layers.expert_choice import ExpertChoiceRouter
from moevision.layers.handmade import ColourRouter, HashRouter, LabelRouter, PositionRouter, RandomRouter
from moevision.layers.options import RouterOptions
from moevision.layers.routing import Routing
from moevision.layers.soft import SoftRouter
from moevision.layers.top_k import TopKRouter

# arXiv:2101.03961, §2.2 has 0.01 for every layer, added up; ours is a mean over layers. 0.01 of that left max/mean
# loads of up to 2.0 where 0.05 keeps them below 1.5 (docs/routers.md).
_LOAD_BALANCING = 0.05
_BIAS_RATE = 1e-3  # γ of arXiv:2412.19437, §4.2
_CAPACITY = ("capacity_factor", "eval_capacity_factor", "batch_priority", "capacity_group")


class Router(Protocol):
    """What an MoE layer needs of a router."""

    num_experts: int
    top_k: int

    @property
    def losses(self) -> frozenset[str]:
        """Names of the balance losses that this router's `Routing` can supply."""

    @property
    def default_losses(self) -> dict[str, float]:
        """Weights of the balance losses where the user gives none."""

    def __call__(self, x: torch.Tensor) -> Routing:
        """Route tokens x [B, N, D]."""


@dataclass(frozen=True)
class RouterKind:
    """A router's name in the table.

    Attributes:
        summary: what it does, in words for a help text.
        make: constructor (dim, E, K, options, device, dtype).
        options: the `RouterOptions` that it has a use for.
        top_k: K where the user gives none.
    """

    summary: str
    make: Callable[..., Any]
    options: tuple[str, ...] = ()
    top_k: int = 2


def _noisy_top_k(dim: int, num_experts: int, top_k: int, options: RouterOptions, **place: Any) -> TopKRouter:
    losses = {"importance": 0.05, "load": 0.05}
    return TopKRouter(dim, num_experts, top_k, noise="learned", options=options, default_losses=losses, **place)


def _vmoe(
    router: type[TopKRouter], dim: int, num_experts: int, top_k: int, options: RouterOptions, **place: Any
) -> Any:
    losses = {"importance": 0.05, "load": 0.05}
    return router(
        dim, num_experts, top_k, noise="fixed", softmax_over="all", options=options, default_losses=losses, **place
    )


def _switch(dim: int, num_experts: int, top_k: int, options: RouterOptions, **place: Any) -> TopKRouter:
    if top_k != 1:
        raise UserError(f"The router 'switch' sends a token to one expert: top_k={top_k} must be 1, or left out.")
    losses = {"load_balancing": _LOAD_BALANCING}
    return TopKRouter(
        dim, num_experts, top_k, noise="none", softmax_over="all", options=options, default_losses=losses, **place
    )


def _sigmoid(dim: int, num_experts: int, top_k: int, options: RouterOptions, **place: Any) -> SigmoidRouter:
    losses = {"load_balancing": _LOAD_BALANCING}
    return SigmoidRouter(dim, num_experts, top_k, options=options, default_losses=losses, **place)


def _bias_balanced(dim: int, num_experts: int, top_k: int, options: RouterOptions, **place: Any) -> SigmoidRouter:
    return SigmoidRouter(dim, num_experts, top_k, bias_rate=options.bias_rate or _BIAS_RATE, options=options, **place)


def _expert_choice(dim: int, num_experts: int, top_k: int, options: RouterOptions, **place: Any) -> ExpertChoiceRouter:
    if options.noise in ("learned", "jitter"):
        raise UserError("The router 'expert_choice' has no such noise: use noise 'fixed' or 'none'.")
    return ExpertChoiceRouter(dim, num_experts, top_k, options=options, **place)


def _soft(dim: int, num_experts: int, top_k: int, options: RouterOptions, **place: Any) -> SoftRouter:
    return SoftRouter(dim, num_experts, top_k, options=options, **place)


def _handmade(
    make: Callable[..., Any], dim: int, num_experts: int, top_k: int, options: RouterOptions, **_: Any
) -> Any:
    return make(num_experts, top_k)


def _colour(dim: int, num_experts: int, top_k: int, options: RouterOptions, **place: Any) -> ColourRouter:
    return ColourRouter(num_experts, top_k, device=place["device"])


_TOKEN_CHOICE = ("noise", "normalize_gates", *_CAPACITY)
ROUTERS: dict[str, RouterKind] = {
    "noisy_top_k": RouterKind("noisy top-k with learned noise (Shazeer 2017)", _noisy_top_k, _TOKEN_CHOICE),
    "vmoe_top_k": RouterKind("softmax, fixed noise, top-k (V-MoE)", partial(_vmoe, TopKRouter), _TOKEN_CHOICE),
    "switch": RouterKind("one expert per token, no noise (Switch Transformer)", _switch, _TOKEN_CHOICE, top_k=1),
    "sigmoid": RouterKind("top-k of independent sigmoids", _sigmoid, _TOKEN_CHOICE[1:]),
    "bias_balanced": RouterKind(
        "sigmoids, balanced by a bias instead of a loss (DeepSeek-V3)",
        _bias_balanced,
        (*_TOKEN_CHOICE[1:], "bias_rate"),
    ),
    "cosine": RouterKind("scaled cosine with expert embeddings (X-MoE)", partial(_vmoe, CosineRouter), _TOKEN_CHOICE),
    "expert_choice": RouterKind("experts choose tokens", _expert_choice, ("noise", "normalize_gates")),
    "soft": RouterKind("experts read weighted means of tokens (Soft MoE)", _soft, ("slots_per_expert",)),
    "hash": RouterKind("baseline: by a hash of the position", partial(_handmade, HashRouter)),
    "random": RouterKind("baseline: at random", partial(_handmade, RandomRouter)),
    "position": RouterKind("hand-made: bands of the picture", partial(_handmade, PositionRouter)),
    "colour": RouterKind("hand-made: clusters of the patch's colour", _colour),
    "label": RouterKind("hand-made oracle: by the class, which it must be told", partial(_handmade, LabelRouter)),
}


def router_kind(name: str) -> RouterKind:
    """The table's row of a name.

    Raises:
        UserError: if there is no router of that name.
    """
    if name not in ROUTERS:
        raise UserError(f"There is no router {name!r}; choose one of {', '.join(ROUTERS)}.")
    return ROUTERS[name]


def build_router(
    name: str,
    dim: int,
    num_experts: int,
    top_k: int | None = None,
    *,
    options: RouterOptions = RouterOptions(),  # noqa: B008 (never changed)
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """The router of that name.

    Args:
        name: one of `ROUTERS`.
        dim: D.
        num_experts: E.
        top_k: K; the router's own if None.
        options: what else is asked of it.
        device: where its parameters live.
        dtype: dtype of its parameters.

    Raises:
        UserError: if there is no router of that name, top_k does not fit num_experts, or it has no use for an option.
    """
    kind = router_kind(name)
    useful = options.only(name, kind.options)
    top_k = kind.top_k if top_k is None else top_k
    return kind.make(dim, num_experts, top_k, useful, device=device, dtype=dtype)

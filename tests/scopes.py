"""Each kind of intervention as a scope, in the words of the tests; `Intervention` says what they do."""

from contextlib import AbstractContextManager

from torch import nn

from moevision.analysis.intervention import Fill, Intervention, intervene

Scope = AbstractContextManager[None]


def ablate(model: nn.Module, layer: int, expert: int, fill: Fill = "next_best") -> Scope:
    return intervene(model, Intervention("ablate", layer=layer, expert=expert, fill=fill))


def force(model: nn.Module, layer: int, expert: int) -> Scope:
    return intervene(model, Intervention("force", layer=layer, expert=expert))


def swap(model: nn.Module, layer: int, a: int, b: int) -> Scope:
    return intervene(model, Intervention("swap", layer=layer, expert=a, other=b))


def random_route(model: nn.Module, layer: int | None = None, seed: int = 0) -> Scope:
    return intervene(model, Intervention("random", layer=layer, seed=seed))


def use_top_k(model: nn.Module, k: int) -> Scope:
    return intervene(model, Intervention("top_k", top_k=k))


def limit_capacity(model: nn.Module, factor: float) -> Scope:
    return intervene(model, Intervention("capacity", factor=factor))

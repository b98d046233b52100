"""One MoE layer's routing decision, and the scope that collects it.

`Routing` is what every router returns and the only thing that losses, metrics, analysis and the demo read. Written
here for token choice; where experts choose tokens or mix them (`slots.py`), a subclass adds what those need and keeps
the token's view, so that a new router costs nothing downstream.
`record_routing(model)` opens a scope in which every MoE layer of `model` appends its `Routing` to a list: a scope
instead of hooks (they fire zero times under `torch.compile`, twice under activation checkpointing) and instead of
returned tuples (they would break timm's Tensor -> Tensor blocks). An intervention changes the decision at the same
place.

Axes: B images, N tokens of an image (prefix tokens first), E experts, K choices of a token.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

Kind = Literal["token_choice", "expert_choice", "soft"]


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
        return _count(self.expert_index.flatten(), torch.ones_like(self.kept).flatten(), self.num_experts)

    def counts(self) -> Tensor:
        """[E] int64: how many choices each expert computes (the load)."""
        return _count(self.expert_index.flatten(), self.kept.flatten(), self.num_experts)

    def image_counts(self) -> Tensor:
        """[B, E] int64: `counts()` of each image."""
        zeros = torch.zeros(len(self.kept), self.num_experts, dtype=torch.int64, device=self.kept.device)
        return zeros.scatter_add(1, self.expert_index.flatten(1), self.kept.flatten(1).to(torch.int64))

    def detach(self) -> Self:
        """The same decision without its autograd graph, for metrics and traces."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        detached: dict[str, Any] = {name: x.detach() for name, x in values.items() if isinstance(x, Tensor)}
        return replace(self, **detached)


def _count(expert: Tensor, kept: Tensor, num_experts: int) -> Tensor:
    # scatter_add has a static result shape: no host synchronisation, and it compiles, unlike bincount.
    zeros = torch.zeros(num_experts, dtype=torch.int64, device=expert.device)
    return zeros.scatter_add(0, expert, kept.to(torch.int64))


class Recordable(nn.Module):
    """A layer whose decision can be changed by an open intervention and is handed to the open recorder.

    Both are scopes (`moevision.analysis.intervention`, `record_routing`): they are no part of the layer's state.
    """

    layer_index: int | None = None
    recorder: list[Routing] | None = None
    intervention: Callable[[Routing], Routing] | None = None

    def decide(self, routing: Routing) -> Routing:
        """What the layer will compute: `routing` as the open intervention changes it; the open recorder gets it too."""
        if torch.compiler.is_compiling():
            return _decide_uncompiled(self, routing)
        return _decide(self, routing)

    def __getstate__(self) -> dict[str, object]:
        """A copy or a pickle never carries an open recorder or intervention along."""
        return {name: value for name, value in self.__dict__.items() if name not in ("recorder", "intervention")}


def _decide(layer: Recordable, routing: Routing) -> Routing:
    # Read once: another thread may close its scope between a check and a use.
    intervention, recorder = layer.intervention, layer.recorder
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
    size = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if num_prefix_tokens is None or size is None or routing.grid is not None:
        return routing
    rows, columns = size
    tokens = routing.logits.shape[1] - num_prefix_tokens
    grid = (rows, columns) if tokens == rows * columns else None
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

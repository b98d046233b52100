"""Where the time of a training step goes, and how evenly its experts are used; by hooks that live only while measuring.

Phases nest, and time counts for the innermost one, so that all phases together are exactly the step. Hooks split the
forward pass; in a backward pass there are no modules, so it is one phase (but for what activation checkpointing
computes again in it).

Axes: R rows that the experts computed, E experts.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers import Attention, Mlp
from torch import nn

from benchmarks.timing import rounded, synchronize
from moevision.layers import MoEMlp, moe_layers, record_routing
from moevision.layers.moe import SharedExperts

ORDER = (
    "router",
    "dispatch and combine",
    "experts",
    "attention",
    "dense MLPs",
    "rest of the forward pass",
    "losses",
    "backward",
    "clip and optimizer",
    "rest",
)


class PhaseClock:
    """Exclusive wall seconds by phase.

    Args:
        device: an accelerator is waited for at every change of phase, which makes the step itself slower there: use
            shares, not the total.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self._stack: list[str] = []
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time that passes inside counts for `name`, but for phases within it."""
        self._enter(name)
        try:
            yield
        finally:
            self._leave()

    def _enter(self, name: str) -> None:
        self._count()
        self._stack.append(name)

    def _leave(self) -> None:
        self._count()
        self._stack.pop()

    def _count(self) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        if self._stack:
            self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    @contextmanager
    def watching(self, net: nn.Module) -> Iterator[None]:
        """Split the forward passes of `net` inside."""
        hooks: list[Any] = []
        for module, name in named_phases(net):
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: self._enter(name)))
            hooks.append(module.register_forward_hook(lambda *_: self._leave()))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def named_phases(net: nn.Module) -> list[tuple[nn.Module, str]]:
    """Modules of a ViT, dense or MoE, whose forward pass is a phase."""
    found: list[tuple[nn.Module, str]] = []
    for module in net.modules():
        if isinstance(module, MoEMlp):
            # What is left of the layer once router and experts are taken out.
            found += [
                (module, "dispatch and combine"),
                (module.router, "router"),
                (module.experts, "experts"),
            ]
        elif isinstance(module, SharedExperts):
            found.append((module, "experts"))
        elif isinstance(module, Attention):
            found.append((module, "attention"))
        elif isinstance(module, Mlp):
            found.append((module, "dense MLPs"))
    return found


def breakdown(seconds: dict[str, float], steps: int) -> dict[str, Any]:
    """Milliseconds per step and share of each phase, in the order of a step."""
    total = sum(seconds.values())
    phases = {}
    for name in sorted(seconds, key=ORDER.index):
        ms, share = 1e3 * seconds[name] / steps, seconds[name] / total
        phases[name] = {"ms": rounded(ms), "share": rounded(share)}
    return {"step_ms": rounded(1e3 * total / steps), "steps": steps, "phases": phases}


def measure_load(model: nn.Module, run: Callable[[], object]) -> list[dict[str, Any]]:
    """Run a forward pass once, and say what every MoE layer did, in order of execution.

    Padding waste is 1 − useful rows ÷ computed rows: groups may be rounded up for the sake of matrix kernels, and a
    choice that an expert's capacity dropped is computed for nothing. None where the experts weren't given rows (the
    dense backend).
    """
    layers = moe_layers(model)
    rows: list[int | None] = [None] * len(layers)
    hooks = [
        layer.experts.register_forward_pre_hook(
            lambda _, arguments, place=place: rows.__setitem__(place, len(arguments[0]))
        )
        for place, layer in enumerate(layers)
    ]
    with record_routing(model) as routings:
        run()
    for hook in hooks:
        hook.remove()
    loads = []
    for routing, computed in zip(routings, rows, strict=True):
        counts = routing.counts()
        busiest = rounded(float(counts.max() / counts.float().mean()))
        waste = None if computed is None else rounded(1 - int(counts.sum()) / computed)
        load = {"slowest_over_mean": busiest, "padding_waste": waste}
        loads.append({"block": routing.layer, "counts": counts.tolist(), **load})
    return loads

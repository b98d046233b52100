"""Where the time of a training step goes: exclusive seconds per phase, by hooks that live only while measuring.

Phases nest, and time counts for the innermost one, so that all phases together are exactly the step. Hooks split the
forward pass; in a backward pass there are no modules, so it is one phase (but for what activation checkpointing
computes again in it), which the operators' table of `operator_kinds` looks into.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers import Attention, Mlp
from torch import nn
from torch.profiler import ProfilerActivity, profile

from moevision.commands.benchmark.timing import rounded, synchronize
from moevision.layers import MoEMlp
from moevision.layers.moe import SharedExperts

ORDER = (
    "data wait",
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

# Parts of operators' names, the first that fits decides.
_KINDS = (
    ("attention", ("scaled_dot_product", "flash_attention")),
    ("optimizer", ("_fused_adam", "_foreach_", "linalg_vector_norm")),
    ("matrix products", ("addmm", "::mm", "bmm", "_linear", "grouped_mm", "convolution", "einsum", "matmul")),
    ("norms", ("layer_norm", "batch_norm", "group_norm")),
    ("activations", ("gelu", "relu", "silu", "softmax", "softplus", "sigmoid")),
    (
        "gather, scatter, sort",
        (
            "index",
            "gather",
            "scatter",
            "sort",
            "topk",
            "cumsum",
            "repeat_interleave",
            "embedding",
            "unique",
            "bincount",
        ),
    ),
    ("copies and casts", ("copy", "::cat", "clone", "contiguous", "zero", "fill", "empty", "::to", "stack", "::split")),
    ("random numbers", ("randn", "rand", "normal", "uniform", "bernoulli", "dropout")),
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
        self._book()
        self._stack.append(name)

    def _leave(self) -> None:
        self._book()
        self._stack.pop()

    def _book(self) -> None:
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
            hooks.append(module.register_forward_pre_hook(self._on_enter(name)))
            hooks.append(module.register_forward_hook(self._on_leave()))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _on_enter(self, name: str) -> Callable[..., None]:
        return lambda module, arguments: self._enter(name)

    def _on_leave(self) -> Callable[..., None]:
        return lambda module, arguments, output: self._leave()


def named_phases(net: nn.Module) -> list[tuple[nn.Module, str]]:
    """Modules of a ViT, dense or MoE, whose forward pass is a phase."""
    found: list[tuple[nn.Module, str]] = []
    for module in net.modules():
        if isinstance(module, MoEMlp):
            # What is left of the layer once router and experts are taken out.
            found += [(module, "dispatch and combine"), (module.router, "router"), (module.experts, "experts")]
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
    return {
        "step_ms": rounded(1e3 * total / steps),
        "steps": steps,
        "phases": {
            name: {"ms": rounded(1e3 * seconds[name] / steps), "share": rounded(seconds[name] / total)}
            for name in sorted(seconds, key=ORDER.index)
        },
    }


def operator_kinds(run: Callable[[], object], device: torch.device | str) -> dict[str, float]:
    """Share of the operators' own time by kind, backward included, from torch's profiler over one call of `run`.

    On an accelerator it is the kernels' time, on a CPU that of the calls without what they call.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its notes on starting and stopping go to the terminal
    on_cuda = torch.device(device).type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities) as profiler:
        run()
        synchronize(device)
    times: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        own = float(event.self_device_time_total if on_cuda else event.self_cpu_time_total)
        if own > 0 and ("::" in event.key or on_cuda):
            times[kind_of(event.key)] += own
    total = sum(times.values())
    return {name: rounded(value / total) for name, value in sorted(times.items(), key=lambda item: -item[1])}


def kind_of(operator: str) -> str:
    """The kind that an operator counts for, by its name."""
    name = operator.lower()
    return next((kind for kind, parts in _KINDS if any(part in name for part in parts)), "other elementwise and sums")

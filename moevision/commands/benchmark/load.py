"""How evenly experts are used, and how many of the rows that they compute nobody asked for.

Axes: R rows that the experts computed, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from moevision.commands.benchmark.timing import rounded
from moevision.layers import moe_layers, record_routing


def measure_load(model: nn.Module, run: Callable[[], object]) -> list[dict[str, Any]]:
    """Run once, and say what every MoE layer did.

    Padding waste is 1 − useful rows ÷ computed rows: groups may be rounded up for the sake of matrix kernels, and a
    choice that an expert's capacity dropped is computed for nothing.

    Args:
        model: a model with MoE layers, or one MoE layer.
        run: one forward pass of it.

    Returns:
        For each layer in order of execution its block, the choices of each expert, the busiest expert's over the
        mean, and `padding_waste`; None there where the experts weren't given rows (the dense backend).
    """
    with record_routing(model) as routings, _rows_of(model) as rows:
        run()
    return [
        {
            "block": routing.layer,
            "counts": (counts := routing.counts()).tolist(),
            "slowest_over_mean": rounded(float(counts.max() / counts.float().mean())),
            "padding_waste": None if not computed else rounded(1 - int(counts.sum()) / computed[0]),
        }
        for routing, computed in zip(routings, rows, strict=True)
    ]


@contextmanager
def _rows_of(model: nn.Module) -> Iterator[list[list[int]]]:
    """Rows that each MoE layer's experts were given, a list per layer with one number per pass."""
    layers = moe_layers(model)
    rows: list[list[int]] = [[] for _ in layers]

    def count(place: list[int]) -> Callable[..., None]:
        return lambda module, arguments: place.append(arguments[0].shape[0])

    hooks = [layer.experts.register_forward_pre_hook(count(place)) for layer, place in zip(layers, rows, strict=True)]
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()

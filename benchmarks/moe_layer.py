"""Forward and backward of one MoE layer beside a dense MLP of equal active FLOPs, with and without rounded groups.

    python benchmarks/moe_layer.py --out benchmarks/moe_layer.json

bf16 autocast, training mode with noise, E = 8, expert hidden width 4 D / K. The three take turns in one run; ratios
are medians over pairs. Counts change with the input's routing, so every step gets a new batch of noise.
"""

from __future__ import annotations

import json
import statistics
import time
from argparse import ArgumentParser
from pathlib import Path

import torch
from timm.layers import Mlp
from torch import nn

from moevision.layers import LocalDispatcher, MoEMlp
from moevision.train.provenance import cpu_model

SHAPES = ((4160, 192, 2), (8192, 384, 1), (8192, 384, 2))  # tokens, width, choices


def seconds(layer: nn.Module, x: torch.Tensor) -> float:
    """One forward and backward pass."""
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().square().mean().backward()
    return time.perf_counter() - start


def compare(tokens: int, width: int, top_k: int, router: str, steps: int) -> dict[str, object]:
    """Medians of the MoE layer, the same without rounding, and the dense MLP."""
    rounded, plain = (MoEMlp(width, 4 * width // top_k, top_k=top_k, router=router) for _ in range(2))
    plain.dispatcher = LocalDispatcher(row_multiple=1)
    layers = {"dense": Mlp(width, 4 * width), "moe": rounded, "moe_unrounded": plain}
    times: dict[str, list[float]] = {name: [] for name in layers}
    for step in range(steps + 5):
        x = torch.randn(tokens // 64, 64, width, requires_grad=True)
        for name, layer in layers.items():
            elapsed = seconds(layer, x)
            if step >= 5:
                times[name].append(elapsed)
    ratio = {
        name: round(statistics.median(m / d for m, d in zip(times[name], times["dense"], strict=True)), 3)
        for name in ("moe", "moe_unrounded")
    }
    milliseconds = {name: round(1e3 * statistics.median(values), 1) for name, values in times.items()}
    shape = {"tokens": tokens, "width": width, "top_k": top_k, "router": router}
    return {**shape, "median_ms": milliseconds, "ratio_to_dense": ratio}


def main() -> None:
    """Measure and print."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = [compare(*shape, router, options.steps) for router in ("vmoe_top_k", "noisy_top_k") for shape in SHAPES]
    machine = f"{cpu_model()}, {torch.get_num_threads()} threads"
    text = json.dumps({"machine": machine, "torch": torch.__version__, "steps": options.steps, "rows": rows}, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()

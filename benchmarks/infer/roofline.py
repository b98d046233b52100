"""What bounds one image in a MoE layer on one thread: bytes of weights, products, calls; beside the dense Mlp's.

    python -m benchmarks infer-roofline --out benchmarks/infer/roofline.json

Each part is measured by itself on what `configs/cifar10.yaml` has in a layer, right after a forward pass of the dense
twin, which leaves in the caches what a layer of the model finds there. The bound is the Mlp's own time and what a layer
of perfectly even loads can't avoid: reading (in bf16: casting) the weights of all experts, and its further calls.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness import DTYPES, about, argument_parser, print_line
from benchmarks.infer.before import images_of, models_of
from benchmarks.lines import write_lines
from benchmarks.subject import inference
from benchmarks.timing import rounded
from moevision.layers import MoEMlp

TOKENS, WIDTH, HIDDEN, EXPERTS, TOP_K = 64, 128, 256, 8, 2
ROUNDS = 100
VIEWS = (
    "view",
    "t",
    "transpose",
    "unbind",
    "split",
    "expand",
    "select",
    "slice",
    "unsqueeze",
    "squeeze",
    "alias",
    "_unsafe_view",
    "detach",
    "lift_fresh",
    "split_with_sizes",
)


class Calls(TorchDispatchMode):
    """Counts what reaches torch's kernels, without views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func.overloadpacket.__name__ not in VIEWS
        return func(*args, **(kwargs or {}))


def calls_of(layer: nn.Module, precision: str) -> int:
    """Calls of one forward pass in evaluation."""
    x = torch.randn(1, TOKENS, WIDTH)
    with (
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
        (calls := Calls()),
    ):
        layer(x)
    return calls.number


def microseconds(
    works: Mapping[str, Callable[[], object]], between: Callable[[], object]
) -> dict[str, float]:
    """Lower quartile of each one's times, by turns, each after `between`: other programs only add to them."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(ROUNDS):
        for name, work in works.items():
            between()
            start = time.perf_counter()
            work()
            found[name].append(1e6 * (time.perf_counter() - start))
    return {name: rounded(statistics.quantiles(times)[0], 4) for name, times in found.items()}


def measure(precision: str) -> dict[str, Any]:
    """The parts, and the bound that they make."""
    dtype = DTYPES[precision]
    torch.manual_seed(0)
    layer = MoEMlp(WIDTH, HIDDEN, num_experts=EXPERTS, top_k=TOP_K, router="vmoe_top_k").eval()
    mlp = Mlp(WIDTH, TOP_K * HIDDEN).eval()
    between = inference(models_of("vmoe_top_k")[1], images_of(1), precision)
    packed, dense = (torch.randn(n, HIDDEN, WIDTH) for n in (EXPERTS, TOP_K))
    weight, small = packed.to(dtype), dense.to(dtype).flatten(0, 1)
    rows = torch.randn(EXPERTS, TOKENS * TOP_K // EXPERTS, WIDTH, dtype=dtype)
    tokens, bias = rows.flatten(0, 1)[:TOKENS], torch.randn(EXPERTS, 1, HIDDEN, dtype=dtype)
    number = torch.arange(TOKENS)
    loads = [17, 14, 13, 20, 15, 18, 12, 19]
    uneven = rows.flatten(0, 1).split(loads)

    def loop() -> None:
        for group, one, shift in zip(uneven, weight.unbind(), bias.unbind(), strict=True):
            torch.addmm(shift, group, one.t())

    def small_calls() -> None:
        (
            number.add(1),
            number.cumsum(0),
            number.gather(0, number),
            torch.ones_like(number),
            number.mul(2),
        )

    def run(net: nn.Module) -> Callable[[], object]:
        x = torch.randn(1, TOKENS, WIDTH)

        def call() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                net(x)

        return call

    with torch.inference_mode():
        times = microseconds(
            {
                "read or cast the weights of all experts, one product": packed.sum
                if precision == "fp32"
                else lambda: packed.to(dtype),
                "of the Mlp": dense.sum if precision == "fp32" else lambda: dense.to(dtype),
                "product of the Mlp": lambda: F.linear(tokens, small),
                "products of all experts, batched, even loads": lambda: torch.baddbmm(
                    bias, rows, weight.mT
                ),
                "the same, a call for each, loads of 12 to 20": loop,
                "five small calls": small_calls,
                "layer": run(layer),
                "Mlp": run(mlp),
            },
            between,
        )
    calls = {"layer": calls_of(layer, precision), "Mlp": calls_of(mlp, precision)}
    more_calls = (calls["layer"] - calls["Mlp"]) * times["five small calls"] / 5
    names = list(times)
    more_bytes = 2 * (times[names[0]] - times[names[1]])
    twin = inference(models_of("vmoe_top_k")[1], images_of(1), precision)
    whole = microseconds({"twin": twin}, between)["twin"]
    return {
        "precision": precision,
        "microseconds": times,
        "calls": calls,
        "mib_of_weights": {"layer": 2 * packed.nbytes / 2**20, "Mlp": 2 * dense.nbytes / 2**20},
        "more_for_bytes": rounded(more_bytes, 4),
        "more_for_calls": rounded(more_calls, 4),
        "twin_microseconds": whole,
        "bound_of_two_layers": rounded(1 + 2 * (more_bytes + more_calls) / whole, 4),
    }


def main() -> None:
    """Measure and write."""
    parser = argument_parser("infer-roofline", __doc__)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = {**about(), "rows": [measure(precision) for precision in ("fp32", "bf16")]}
    for row in record["rows"]:
        print_line(str(row))
    if options.out is not None:
        write_lines(options.out, record)

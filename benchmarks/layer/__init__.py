"""Time one MoE layer: forward under autocast and backward to its input and parameters, in training mode with noise.

Beside it: timm's Mlp of hidden width k·H (equal active FLOPs), and other libraries' dropless layers where they are
installed: transformers' Mixtral and NemotronH experts, torchtitan's. They get our router's decisions and the same
active FLOPs; what isn't installed or fails is reported, and the rest goes on.

Several values of an option are measured in all combinations. Gradients are cleared outside the measured time, as a
training step does. Every round has a new input and new noise, since the time depends on the groups' sizes; within a
round all candidates get the same. MFU is against matrix products measured just before.

Axes: T tokens, D width, H hidden width of one expert, E experts, K choices.
"""

from __future__ import annotations

import copy
from argparse import ArgumentParser, Namespace
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import product
from typing import Any, cast

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.harness import DTYPES, Json, positive
from benchmarks.layer.figure import DENSE, draw
from benchmarks.layer.peers import PEERS, build_peer, flops_beside_ours
from benchmarks.phases import measure_load
from benchmarks.timing import Candidate, interleave, reason, rounded, rows_of
from moevision.layers import MoEMlp

BARS = ((4160, 192, 2), (8192, 384, 1), (8192, 384, 2))
"""Tokens, width and choices of the shapes whose ratio is held to a bar; 4160 = 64 images of 64 patches and a class
token."""
MLP_RATIO = 4  # hidden width of the dense MLP of equal active FLOPs over D, as in a ViT
QUICK = {"tokens": [128], "width": [32], "experts": [4], "repetitions": 3, "warm_up": 1}
EXAMPLES = """\
  python -m benchmarks layer --tokens 4160 --width 192 --experts 8 32 --top-k 2
  python -m benchmarks layer --preset bars --precision bf16 fp32 --out benchmarks/layer/bars
"""
_IMAGE_TOKENS = 64


@dataclass(frozen=True, order=True)
class Shape:
    """One comparison: T, D, E and K; an expert has 4 D / K hidden units. `bf16` is autocast, parameters are float32."""

    tokens: int
    width: int
    experts: int
    top_k: int
    precision: str = "bf16"

    @property
    def hidden(self) -> int:
        """H."""
        return MLP_RATIO * self.width // self.top_k

    @property
    def flops(self) -> int:
        """FLOPs of the dense MLP of equal active FLOPs, forward and backward: 3 · 2 · T · (D · K H + K H · D)."""
        return 12 * self.tokens * self.width * self.hidden * self.top_k

    def __str__(self) -> str:
        """For titles and the progress bar."""
        tokens = f"{self.tokens:,}".replace(",", " ")
        return f"T = {tokens}, D = {self.width}, E = {self.experts}, k = {self.top_k}, {self.precision}"


def parser() -> ArgumentParser:
    """The command line."""
    parser = harness.argument_parser("layer", __doc__, EXAMPLES)
    from_preset = "; a preset brings its own"
    for name, default, text in (
        ("--tokens", 4160, f"tokens T of a batch (%(default)s{from_preset})"),
        ("--width", 192, f"width D of a token (%(default)s{from_preset})"),
        ("--experts", 8, "experts E (%(default)s)"),
        ("--top-k", 2, f"experts k of a token (%(default)s{from_preset})"),
    ):
        parser.add_argument(
            name, type=positive, nargs="+", default=[default], metavar="N", help=text
        )
    add, precisions = parser.add_argument, tuple(DTYPES)
    add("--router", nargs="+", metavar="NAME", help="routers, such as vmoe_top_k noisy_top_k")
    add("--backend", nargs="+", default=["auto"], help="auto, loop, grouped or dense (auto)")
    add("--precision", nargs="+", choices=precisions, default=["bf16"], help="(bf16: autocast)")
    add("--preset", choices=("bars",), help="three shapes of small ViTs, with two routers")
    add("--peers", nargs="*", choices=tuple(PEERS), default=list(PEERS), help="(all)")
    harness.add_measuring(parser, repetitions=20)
    return parser


def main() -> None:
    """Measure all shapes, print a table of each and write the record."""
    options = harness.parse(parser(), QUICK)
    both = ["vmoe_top_k", "noisy_top_k"]
    options.router = options.router or (both if options.preset == "bars" else both[:1])
    shapes, device = shapes_of(options), harness.set_up(options)
    peak = harness.measure_peaks(options, device, options.precision)
    record = {**harness.new_record("layer", options, device), "measured_peak_flops": peak}
    record["comparisons"] = [compare(shape, options, peak, device) for shape in shapes]
    show(record)
    harness.write_record(options.out, record, draw)


def shapes_of(options: Namespace) -> list[Shape]:
    """The comparisons that are asked for."""
    if options.preset == "bars":
        sizes = [(*bar[:2], experts, bar[2]) for bar in BARS for experts in options.experts]
    else:
        sizes = list(product(options.tokens, options.width, options.experts, options.top_k))
    return [Shape(*size, precision) for precision in options.precision for size in sizes]


def compare(
    shape: Shape, options: Namespace, peaks: dict[str, float], device: torch.device
) -> dict[str, Any]:
    """All candidates at one shape: the shape and a row for each."""
    torch.manual_seed(0)
    layers, left_out = _layers(shape, options, device)
    turn = _Turn(shape, device)
    candidates = [
        Candidate(name, partial(turn.run, layer), turn.reset, optional=name in PEERS)
        for name, layer in layers.items()
    ]
    how = {"device": device, "prepare": turn.prepare, "title": str(shape)}
    timings = interleave(
        candidates, repetitions=options.repetitions, warm_up=options.warm_up, **how
    )
    timings.failures.update(left_out)
    facts = {name: _facts(name, layers[name], shape, turn) for name in timings.seconds}
    rows = rows_of(timings, [DENSE], facts)
    peak = peaks.get(shape.precision)
    for row in rows:
        if "time_ms" in row:
            rate = shape.flops / (row["time_ms"]["median"] / 1e3)
            row["active_flops_per_s"] = rounded(rate)
            row["mfu"] = None if peak is None else rounded(rate / peak)
    return {**asdict(shape), "hidden": shape.hidden, "flops": shape.flops, "rows": rows}


def _layers(
    shape: Shape, options: Namespace, device: torch.device
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The candidates by name, and why others can't be."""
    sizes = {"num_experts": shape.experts, "top_k": shape.top_k}
    layers: dict[str, nn.Module] = {DENSE: Mlp(shape.width, shape.top_k * shape.hidden)}
    for router, backend in product(options.router, options.backend):
        name = f"moevision {router}" + (f" {backend}" if len(options.backend) > 1 else "")
        layers[name] = MoEMlp(shape.width, shape.hidden, router=router, backend=backend, **sizes)
    for layer in layers.values():
        layer.to(device).train()
    first = next(layer for layer in layers.values() if isinstance(layer, MoEMlp))
    left_out: dict[str, str] = {}
    for name in options.peers:
        # The same router with the same weights, and its own gradients.
        router = copy.deepcopy(first.router)
        where = {"dtype": DTYPES[shape.precision], "device": device}
        try:
            peer = build_peer(
                name, router, width=shape.width, hidden=shape.hidden, **where, **sizes
            )
            layers[name] = peer.train()
        except Exception as error:  # another library's fault must not end ours
            left_out[name] = reason(error)
    return layers, left_out


class _Turn:
    """The input of a round, and one candidate's forward and backward on it."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape, self.device, self.round = shape, device, 0
        self.layer: nn.Module | None = None
        self.x = self.gradient = torch.empty(0)

    def prepare(self, number: int) -> None:
        """A new input [B, N, D] and a new gradient of the output."""
        tokens = self.shape.tokens
        images = 1 if tokens % _IMAGE_TOKENS else tokens // _IMAGE_TOKENS
        size = (images, tokens // images, self.shape.width)
        torch.manual_seed(number)
        self.round = number
        self.x = torch.randn(size, device=self.device, requires_grad=True)
        self.gradient = torch.randn(size, device=self.device).to(DTYPES[self.shape.precision])

    def run(self, layer: nn.Module) -> None:
        """Forward and backward."""
        self.layer = layer
        y = self.forward(layer)
        y.backward(self.gradient.to(y.dtype))

    def forward(self, layer: nn.Module) -> Tensor:
        """Forward under autocast."""
        is_bf16 = self.shape.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=is_bf16):
            return cast(Tensor, layer(self.x))

    def reset(self) -> None:
        """No gradients, and the noise of this round."""
        torch.manual_seed(self.round)
        self.x.grad = None
        if self.layer is not None:
            self.layer.zero_grad(set_to_none=True)


def _facts(name: str, layer: nn.Module, shape: Shape, turn: _Turn) -> dict[str, Any]:
    """What a row says beside times."""
    parameters = sum(parameter.numel() for parameter in layer.parameters())
    facts: dict[str, Any] = {"parameters": parameters}
    if name in PEERS:
        facts["active_flops_beside_ours"] = rounded(flops_beside_ours(name, shape.hidden))
    if isinstance(layer, MoEMlp):
        with torch.no_grad():
            (load,) = measure_load(layer, lambda: turn.forward(layer))
        facts |= {key: load[key] for key in ("slowest_over_mean", "padding_waste")}
    return facts


def show(record: Json) -> None:
    """One table per shape."""
    harness.print_machine(record)
    for comparison in record["comparisons"]:
        shape = Shape(*(comparison[field.name] for field in fields(Shape)))
        harness.print_rows(str(shape), comparison["rows"], DENSE)
    harness.print_line(
        "dense k·H: timm's Mlp of equal active FLOPs; a ratio above 1 is slower, pair by pair, median and quartiles. "
        "The record of --out also has the load of the busiest expert and the share of padding."
    )

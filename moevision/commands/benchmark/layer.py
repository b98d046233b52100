"""`moevision benchmark layer`: forward and backward of one MoE layer beside dense MLPs and other libraries' layers.

What is timed is the layer alone, in training mode with the router's noise: its forward pass under autocast and the
backward pass from a given gradient, to the input and to all parameters. Gradients are cleared outside the measured
time, as a training step does. Every round has a new input and new noise, since the time depends on the groups' sizes;
within a round all candidates get the same.

Axes: T tokens, D width, H hidden width of one expert, E experts, K choices.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from moevision.commands.benchmark.load import measure_load
from moevision.commands.benchmark.machine import DTYPES
from moevision.commands.benchmark.peers import PEERS, build_peer, flops_beside_ours
from moevision.commands.benchmark.record import new_record, progress_bar
from moevision.commands.benchmark.timing import Candidate, interleave, reason, rounded, rows_of
from moevision.errors import UserError
from moevision.layers import MoEMlp
from moevision.layers.experts import Backend

BARS = ((4160, 192, 2), (8192, 384, 1), (8192, 384, 2))
"""Tokens, width and choices of the shapes whose ratio is held to a bar; 4160 = 64 images of 64 patches and a class
token."""
GROWTH_EXPERTS = (1, 2, 4, 8, 16, 32, 64)
GROWTH_TOKENS = (256, 1024, 4096, 16384, 65536)
GROWTH_WIDTHS = (96, 192, 384, 768)
MLP_RATIO = 4  # hidden width of the dense MLP of equal active FLOPs over D, as in a ViT
_TOTAL_PARAMS_UP_TO = 8  # times the active FLOPs: a larger dense MLP of equal parameters is left out
_IMAGE_TOKENS = 64
COMPILED = ", compiled"
_PATIENCE = 50.0  # times the dense MLP: no peer is waited for longer


@dataclass(frozen=True, order=True)
class Shape:
    """One comparison.

    Attributes:
        tokens: T.
        width: D.
        experts: E.
        top_k: K; an expert has 4 D / K hidden units.
        precision: `bf16` (autocast, float32 parameters) or `fp32`.
    """

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


@dataclass(frozen=True)
class LayerSettings:
    """What the command line asks for; lists are measured in all combinations, a preset brings its own sizes.

    Attributes:
        tokens: T.
        width: D.
        experts: E.
        top_k: K.
        router: names of routers.
        backend: how the experts are computed.
        precision: `bf16`, `fp32`.
        preset: `bars` or `growth` in the place of tokens, width and top_k.
        peers: other libraries' layers to time.
        total_params: also time the dense MLP of equal total parameters.
        compile: also time ours and the dense ones compiled by torch.compile.
        repetitions: measured rounds.
        warm_up: rounds before them.
        device: where.
        peak: measured matrix throughput in FLOP/s by precision, for MFU; empty: none is told.
        out: folder for the record and the figure.
        command: the command line.
    """

    tokens: Sequence[int] = (4160,)
    width: Sequence[int] = (192,)
    experts: Sequence[int] = (8,)
    top_k: Sequence[int] = (2,)
    router: Sequence[str] = ("vmoe_top_k",)
    backend: Sequence[str] = ("auto",)
    precision: Sequence[str] = ("bf16",)
    preset: str | None = None
    peers: Sequence[str] = tuple(PEERS)
    total_params: bool = True
    compile: bool = False
    repetitions: int = 20
    warm_up: int = 20
    device: str = "cpu"
    peak: dict[str, float] = field(default_factory=dict)
    out: Path | None = None
    command: str = ""


def shapes_of(settings: LayerSettings) -> list[Shape]:
    """The comparisons that are asked for.

    Raises:
        UserError: if K > E, or K doesn't divide the hidden width.
    """
    if settings.preset == "growth":
        sizes = _growth()
    elif settings.preset == "bars":
        sizes = [(tokens, width, experts, top_k) for (tokens, width, top_k) in BARS for experts in settings.experts]
    else:
        sizes = list(product(settings.tokens, settings.width, settings.experts, settings.top_k))
    shapes = [Shape(*size, precision) for precision in settings.precision for size in sizes]
    for shape in shapes:
        if shape.top_k > shape.experts:
            raise UserError(f"--top-k {shape.top_k} does not fit --experts {shape.experts}: a token can't choose more.")
        if MLP_RATIO * shape.width % shape.top_k:
            raise UserError(f"--top-k {shape.top_k} does not divide the hidden width {MLP_RATIO * shape.width}.")
    return shapes


def _growth() -> list[tuple[int, int, int, int]]:
    """One size grows at a time, around T = 16 384, D = 192, E = 8."""
    sizes = [(16384, 192, experts, top_k) for top_k in (1, 2) for experts in GROWTH_EXPERTS if experts >= top_k]
    sizes += [(tokens, 192, 8, 2) for tokens in GROWTH_TOKENS]
    sizes += [(16384, width, 8, 2) for width in GROWTH_WIDTHS]
    return list(dict.fromkeys(sizes))


def benchmark_layer(settings: LayerSettings) -> dict[str, Any]:
    """Measure all shapes.

    Returns:
        The record, JSON primitives only: `comparisons`, each with its shape and a row per candidate.
    """
    device = torch.device(settings.device)
    asked = {name: value for name, value in asdict(settings).items() if name not in ("out", "command", "peak")}
    record = new_record("layer", settings.command, device, asked)
    record["measured_peak_flops"] = settings.peak
    shapes = shapes_of(settings)
    record["comparisons"] = [_compare(shape, settings, device) for shape in shapes]
    return record


def _compare(shape: Shape, settings: LayerSettings, device: torch.device) -> dict[str, Any]:
    """All candidates at one shape."""
    torch.manual_seed(0)
    layers, left_out = _layers(shape, settings, device)
    turn = _Turn(shape, device)
    candidates = [
        Candidate(
            name,
            partial(turn.run, layer),
            turn.reset,
            optional=name in PEERS or name.endswith(COMPILED),
            patience=_PATIENCE if name in PEERS else math.inf,
        )
        for name, layer in layers.items()
    ]
    rounds = settings.warm_up + settings.repetitions
    with progress_bar(str(shape), rounds * len(candidates)) as step:
        timings = interleave(
            candidates,
            repetitions=settings.repetitions,
            warm_up=settings.warm_up,
            device=device,
            prepare=turn.prepare,
            on_step=step,
        )
    timings.failures.update(left_out)
    facts = {name: _facts(name, layer, shape, turn) for name, layer in layers.items() if name in timings.seconds}
    rows = rows_of(timings, [name for name in layers if name.startswith("dense")], facts)
    for row in rows:
        if "time_ms" in row:
            rate = shape.flops / (row["time_ms"]["median"] / 1e3)
            row["active_flops_per_s"] = rounded(rate)
            peak = settings.peak.get(shape.precision)
            row["mfu"] = None if peak is None or "total" in row["name"] else rounded(rate / peak)
    return {**asdict(shape), "hidden": shape.hidden, "flops": shape.flops, "rows": rows}


def _layers(shape: Shape, settings: LayerSettings, device: torch.device) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The candidates by name, and why others can't be."""
    sizes = {"num_experts": shape.experts, "top_k": shape.top_k}
    layers: dict[str, nn.Module] = {"dense k·H": Mlp(shape.width, shape.top_k * shape.hidden)}
    left_out: dict[str, str] = {}
    if settings.total_params and shape.experts > shape.top_k:
        times = shape.experts / shape.top_k
        if times <= _TOTAL_PARAMS_UP_TO:
            layers["dense E·H (total parameters)"] = Mlp(shape.width, shape.experts * shape.hidden)
        else:
            left_out["dense E·H (total parameters)"] = f"left out: {times:g} times the active FLOPs"
    for router, backend in product(settings.router, settings.backend):
        name = f"moevision {router}" + (f" {backend}" if len(settings.backend) > 1 else "")
        layers[name] = MoEMlp(
            shape.width, shape.hidden, router=router, backend=cast(Backend, backend), **cast(Any, sizes)
        )
    for layer in layers.values():
        layer.to(device).train()
    if settings.compile:
        layers |= {name + COMPILED: copy.deepcopy(layer) for name, layer in layers.items()}
        for name, layer in layers.items():
            if name.endswith(COMPILED):
                layer.compile()
    for name in settings.peers:
        # The same router with the same weights, and its own gradients.
        ours = MoEMlp(shape.width, 8, router=settings.router[0], **cast(Any, sizes)).to(device).train().router
        first = next(layer for layer in layers.values() if isinstance(layer, MoEMlp))
        ours.load_state_dict(first.router.state_dict())
        try:
            layers[name] = build_peer(
                name,
                ours,
                tokens=shape.tokens,
                width=shape.width,
                hidden=shape.hidden,
                dtype=DTYPES[shape.precision],
                device=device,
                **sizes,
            ).train()
        except Exception as error:  # another library's fault must not end ours
            left_out[name] = str(error) if isinstance(error, UserError) else reason(error)
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
        images, length = (tokens // _IMAGE_TOKENS, _IMAGE_TOKENS) if tokens % _IMAGE_TOKENS == 0 else (1, tokens)
        torch.manual_seed(number)
        self.round = number
        self.x = torch.randn(images, length, self.shape.width, device=self.device, requires_grad=True)
        self.gradient = torch.randn(images, length, self.shape.width, device=self.device)
        self.gradient = self.gradient.to(DTYPES[self.shape.precision])

    def run(self, layer: nn.Module) -> None:
        """Forward and backward."""
        self.layer = layer
        y = self.forward(layer)
        y.backward(self.gradient.to(y.dtype))

    def forward(self, layer: nn.Module) -> Tensor:
        """Forward under autocast."""
        dtype = DTYPES[self.shape.precision]
        with torch.autocast(self.device.type, dtype if dtype != torch.float32 else None, dtype != torch.float32):
            return cast(Tensor, layer(self.x))

    def reset(self) -> None:
        """No gradients, and the noise of this round."""
        torch.manual_seed(self.round)
        self.x.grad = None
        if self.layer is not None:
            self.layer.zero_grad(set_to_none=True)


def _facts(name: str, layer: nn.Module, shape: Shape, turn: _Turn) -> dict[str, Any]:
    """What a row says beside times."""
    facts: dict[str, Any] = {"parameters": sum(parameter.numel() for parameter in layer.parameters())}
    if name in PEERS:
        facts["active_flops_beside_ours"] = rounded(flops_beside_ours(name, shape.hidden))
    if isinstance(layer, MoEMlp) and not name.endswith(COMPILED):
        with torch.no_grad():
            load = measure_load(layer, lambda: turn.forward(layer))
        facts |= {key: load[0][key] for key in ("slowest_over_mean", "padding_waste")}
    return facts

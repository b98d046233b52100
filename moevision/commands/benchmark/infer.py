"""`moevision benchmark infer`: images per second and latency of a model beside its dense twins."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn

from moevision.commands.benchmark.energy import energy_of
from moevision.commands.benchmark.record import new_record, progress_bar
from moevision.commands.benchmark.subject import NAMES, Which, find_subject
from moevision.commands.benchmark.timing import Candidate, interleave, rounded, rows_of
from moevision.efficiency import inference_flops
from moevision.errors import UserError
from moevision.layers import moe_layers
from moevision.models.io import load_model, model_folder
from moevision.models.twin import dense_twin


@dataclass(frozen=True)
class InferSettings:
    """What the command line asks for.

    Attributes:
        model: a run folder, its model/ folder, a timm address, a config or a timm name.
        batch_size: pictures per call.
        image_size: side in pixels, where only a name is given.
        precision: `fp32` and `bf16` (autocast).
        compile: also with each block compiled by torch.compile.
        energy: measure joules per image where there is a counter.
        repetitions: measured calls.
        warm_up: calls before them.
        device: where.
        peak: measured matrix throughput in FLOP/s by precision, for MFU.
        out: folder for the record and the figure.
        command: the command line.
    """

    model: str
    batch_size: Sequence[int] = (1, 8, 64)
    image_size: int | None = None
    precision: Sequence[str] = ("fp32", "bf16")
    compile: bool = False
    energy: bool = True
    repetitions: int = 40
    warm_up: int = 5
    device: str = "cpu"
    peak: Mapping[str, float] | None = None
    out: Path | None = None
    command: str = ""


def benchmark_infer(settings: InferSettings) -> dict[str, Any]:
    """Measure.

    Returns:
        The record: `comparisons`, one per batch size, each with a row per model and precision.

    Raises:
        UserError: if there is no such model, or it has no MoE layers.
    """
    device = torch.device(settings.device)
    asked = {name: value for name, value in asdict(settings).items() if name not in ("out", "command", "peak")}
    record = new_record("infer", settings.command, device, asked)
    net, size = find_net(settings.model, settings.image_size)
    nets = {NAMES[which]: (net if which == "moe" else dense_twin(net, which)) for which in get_args(Which)}
    nets = {name: each.to(device).eval() for name, each in nets.items()}
    image = torch.randn(1, 3, size, size, device=device)
    facts = {
        name: {
            "parameters": sum(parameter.numel() for parameter in each.parameters()),
            "flops_per_image": inference_flops(each, image).useful_per_image,
        }
        for name, each in nets.items()
    }
    record["image_size"], record["models"] = size, facts
    record["measured_peak_flops"] = dict(settings.peak or {})
    variants = {name: (name, each) for name, each in nets.items()}
    if settings.compile:
        variants |= {f"{name}, compiled": (name, compiled(each)) for name, each in nets.items()}
    record["comparisons"] = [
        _compare(variants, batch, size, precision, facts, settings, device)
        for batch in settings.batch_size
        for precision in settings.precision
    ]
    record["energy"] = _energies(nets, size, settings, device)
    return record


def find_net(name: str, image_size: int | None) -> tuple[nn.Module, int]:
    """A saved model, or an untrained one by a config's or a timm name, and the side of its pictures.

    Raises:
        UserError: if there is none, or it is dense.
    """
    if model_folder(Path(name)) is not None or ":" in name:
        saved = load_model(name)
        net, size = saved.net, saved.image_size
    else:
        subject = find_subject(name, batch_size=None, image_size=image_size, num_classes=None)
        net, size = subject.build().eval(), subject.image_size
    if not moe_layers(net):
        raise UserError(f"{name} has no MoE layers, so there is nothing to compare: give a MoE model.")
    return net, size


def compiled(net: nn.Module) -> nn.Module:
    """A copy whose blocks are compiled; that happens at the first calls."""
    net = copy.deepcopy(net)
    for block in cast(Any, net).blocks:
        block.compile()
    return net


def _compare(
    variants: Mapping[str, tuple[str, nn.Module]],
    batch: int,
    size: int,
    precision: str,
    facts: Mapping[str, Mapping[str, Any]],
    settings: InferSettings,
    device: torch.device,
) -> dict[str, Any]:
    """All models on batches of one size."""
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    candidates = [
        Candidate(name, caller(net, images, precision), optional="compiled" in name)
        for name, (_, net) in variants.items()
    ]
    rounds = settings.warm_up + settings.repetitions
    with progress_bar(f"{batch} images, {precision}", rounds * len(candidates)) as on_step:
        timings = interleave(
            candidates, repetitions=settings.repetitions, warm_up=settings.warm_up, device=device, on_step=on_step
        )
    rows = rows_of(timings, list(NAMES.values()))
    peak = (settings.peak or {}).get(precision)
    for row in rows:
        if "seconds" in row:
            milliseconds = 1e3 * np.array(row["seconds"])
            row["latency_ms"] = {f"p{q}": rounded(float(np.percentile(milliseconds, q))) for q in (50, 95)}
            row["images_per_s"] = rounded(1e3 * batch / row["time_ms"]["median"])
            rate = row["images_per_s"] * facts[variants[row["name"]][0]]["flops_per_image"]
            row["mfu"] = None if peak is None else rounded(rate / peak)
    return {"batch_size": batch, "precision": precision, "rows": rows}


def caller(net: nn.Module, images: Tensor, precision: str) -> Callable[[], Tensor]:
    """A function that classifies these images."""

    def scope() -> AbstractContextManager[object]:
        return torch.autocast(images.device.type, torch.bfloat16) if precision == "bf16" else nullcontext()

    def call() -> Tensor:
        with torch.inference_mode(), scope():
            return cast(Tensor, net(images))

    return call


def _energies(
    nets: Mapping[str, nn.Module], size: int, settings: InferSettings, device: torch.device
) -> dict[str, Any]:
    """Joules per image at the largest batch, in the first precision."""
    if not settings.energy:
        return {name: {"energy": "not measured", "reason": "not asked for"} for name in nets}
    batch, precision = max(settings.batch_size), settings.precision[0]
    images = torch.randn(batch, 3, size, size, device=device)
    return {name: energy_of(caller(net, images, precision), batch, device) for name, net in nets.items()}

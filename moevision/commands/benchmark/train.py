"""`moevision benchmark train`: training steps of a MoE model beside both dense twins, and where their time goes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor

from moevision.commands.benchmark import lightning_peer
from moevision.commands.benchmark.energy import energy_of
from moevision.commands.benchmark.load import measure_load
from moevision.commands.benchmark.memory import RUNS, beside_twin, memory_of
from moevision.commands.benchmark.phases import PhaseClock, breakdown, operator_kinds
from moevision.commands.benchmark.record import new_record, progress_bar
from moevision.commands.benchmark.step import TrainingStep, noise_batch
from moevision.commands.benchmark.subject import NAMES, Subject, Which, find_subject
from moevision.commands.benchmark.timing import Candidate, Timings, interleave, rounded, rows_of
from moevision.data import ImageDataModule
from moevision.efficiency import training_flops

Batch = tuple[Tensor, Tensor]
COMPILED = ", compiled"
_LOADER_BATCHES = 4  # fetched before the data wait is measured: workers start


@dataclass(frozen=True)
class TrainSettings:
    """What the command line asks for.

    Attributes:
        model: a config, a run folder or a timm name.
        data: `noise`, or `own` for the config's data set.
        batch_size: in the place of the config's.
        image_size: in the place of the config's.
        num_classes: C; the data's with `own`, else 10.
        root: folder of named data sets.
        precision: `bf16` or `fp32`.
        peers: `lightning`, or nothing.
        compile: also time all three with compiled blocks.
        memory_runs: processes per model in which peak memory is measured; 0: not at all.
        energy: measure joules per image where there is a counter.
        repetitions: measured steps.
        warm_up: steps before them.
        breakdown_steps: further steps for the breakdown.
        device: where.
        peak: measured matrix throughput in FLOP/s by precision, for MFU.
        out: folder for the record and the figure.
        command: the command line.
    """

    model: str
    data: str = "noise"
    batch_size: int | None = None
    image_size: int | None = None
    num_classes: int | None = None
    root: str | None = None
    precision: str = "bf16"
    peers: Sequence[str] = ()
    compile: bool = False
    memory_runs: int = RUNS
    energy: bool = True
    repetitions: int = 30
    warm_up: int = 20
    breakdown_steps: int = 10
    device: str = "cpu"
    peak: Mapping[str, float] | None = None
    out: Path | None = None
    command: str = ""


def benchmark_train(settings: TrainSettings) -> dict[str, Any]:
    """Measure.

    Returns:
        The record, JSON primitives only.

    Raises:
        UserError: if there is no such model or data.
    """
    device = torch.device(settings.device)
    asked = {name: value for name, value in asdict(settings).items() if name not in ("out", "command", "peak")}
    record = new_record("train", settings.command, device, asked)
    subject = find_subject(
        settings.model,
        batch_size=settings.batch_size,
        image_size=settings.image_size,
        num_classes=settings.num_classes,
    )
    batches = None
    if settings.data == "own":
        module = open_data(subject, settings.root)
        subject = replace(subject, num_classes=module.num_classes)
        batches = _endless(module)
    record["model"] = subject.as_json()
    record["measured_peak_flops"] = dict(settings.peak or {})
    steps = {NAMES[which]: TrainingStep(subject, which, settings.precision, device) for which in get_args(Which)}
    every = {**steps, **_compiled(subject, settings, device)}
    rows = _measure_steps(every, subject, batches, settings, device)
    record["rows"] = [_with_flops(row, every, subject, settings, device) for row in rows if "error" not in row]
    record["failures"] = {row["name"]: row["error"] for row in rows if "error" in row}
    del every
    record["load"] = _load(steps[NAMES["moe"]], subject, device)
    record["breakdown"] = {name: _breakdown(step, subject, batches, settings, device) for name, step in steps.items()}
    record["energy"] = _energies(steps, subject, settings, device)
    del steps
    record["memory"] = _memories(subject, settings, device)
    record["peers"] = _peers(subject, settings, device)
    return record


def _compiled(subject: Subject, settings: TrainSettings, device: torch.device) -> dict[str, TrainingStep]:
    if not settings.compile:
        return {}
    return {
        name + COMPILED: TrainingStep(subject, which, settings.precision, device, compiled=True)
        for which, name in NAMES.items()
    }


def open_data(subject: Subject, root: str | None) -> ImageDataModule:
    """The config's data, read."""
    own = {**subject.data, "image_size": subject.image_size, "batch_size": subject.batch_size}
    if root is not None:
        own["root"] = root
    module = ImageDataModule(**own)
    module.prepare_data()
    module.setup("fit")
    return module


def _endless(module: ImageDataModule) -> Iterator[Batch]:
    while True:
        for batch in module.train_dataloader():
            yield batch["image"], batch["label"]


def _measure_steps(
    steps: Mapping[str, TrainingStep],
    subject: Subject,
    batches: Iterator[Batch] | None,
    settings: TrainSettings,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Times of all models, the same batch for each within a round."""
    batch = list(noise_batch(subject, device))

    def prepare(number: int) -> None:
        if batches is not None:
            batch[:] = [tensor.to(device) for tensor in next(batches)]

    candidates = [
        Candidate(name, lambda step=step: step(*batch), optional=name.endswith(COMPILED))  # type: ignore[misc]
        for name, step in steps.items()
    ]
    with progress_bar("training steps", (settings.warm_up + settings.repetitions) * len(steps)) as on_step:
        timings = interleave(
            candidates,
            repetitions=settings.repetitions,
            warm_up=settings.warm_up,
            device=device,
            prepare=prepare,
            on_step=on_step,
        )
    return rows_of(timings, list(steps))


def _with_flops(
    row: dict[str, Any],
    steps: Mapping[str, TrainingStep],
    subject: Subject,
    settings: TrainSettings,
    device: torch.device,
) -> dict[str, Any]:
    """A row with images per second, FLOPs and MFU."""
    step = steps[row["name"]]
    images, labels = noise_batch(replace(subject, batch_size=min(4, subject.batch_size)), device)
    flops = training_flops(step.net, images, labels=labels)
    rate = subject.batch_size / (row["time_ms"]["median"] / 1e3)
    peak = (settings.peak or {}).get(settings.precision)
    return {
        "name": row["name"],
        "images_per_s": rounded(rate),
        "parameters": sum(parameter.numel() for parameter in step.net.parameters()),
        "training_flops_per_image": flops.useful_per_image,
        "flops_per_s": rounded(rate * flops.useful_per_image),
        "mfu": None if peak is None else rounded(rate * flops.useful_per_image / peak),
        **{name: value for name, value in row.items() if name != "name"},
    }


def _load(step: TrainingStep, subject: Subject, device: torch.device) -> list[dict[str, Any]]:
    """Balance and padding of one forward pass in training mode."""
    images, _ = noise_batch(subject, device)
    with torch.no_grad(), step.autocast():
        return measure_load(step.net, lambda: step.net(images))


def _breakdown(
    step: TrainingStep,
    subject: Subject,
    batches: Iterator[Batch] | None,
    settings: TrainSettings,
    device: torch.device,
) -> dict[str, Any]:
    """Phases over some further steps, then the kinds of operators of one more."""
    clock, batch = PhaseClock(device), noise_batch(subject, device)
    for _ in range(_LOADER_BATCHES if batches is not None else 0):
        next(cast(Iterator[Batch], batches))
    with clock.watching(step.net):
        for _ in range(settings.breakdown_steps):
            with clock.phase("data wait") if batches is not None else nullcontext():
                images, labels = batch if batches is None else (tensor.to(device) for tensor in next(batches))
            step(images, labels, clock)
    found = breakdown(clock.seconds, settings.breakdown_steps)
    if batches is None:
        found["data_wait"] = "not measured: batches of noise"
    return {**found, "operators": operator_kinds(lambda: step(*batch), device)}


def _energies(
    steps: Mapping[str, TrainingStep], subject: Subject, settings: TrainSettings, device: torch.device
) -> dict[str, Any]:
    if not settings.energy:
        return {name: {"energy": "not measured", "reason": "not asked for"} for name in steps}
    batch = noise_batch(subject, device)
    return {
        name: energy_of(lambda step=step: step(*batch), subject.batch_size, device)  # type: ignore[misc]
        for name, step in steps.items()
    }


def _memories(subject: Subject, settings: TrainSettings, device: torch.device) -> dict[str, Any]:
    """Peak memory by model, and the MoE model's beside each twin's."""
    if not settings.memory_runs:
        return {"error": "not asked for"}
    found: dict[str, Any] = {}
    with progress_bar("peak memory", len(NAMES)) as on_step:
        for which, name in NAMES.items():
            found[name] = memory_of(
                subject, which, precision=settings.precision, device=device, runs=settings.memory_runs
            )
            on_step()
    moe = found[NAMES["moe"]]
    ratios = {
        name: beside_twin(moe, found[name])
        for which, name in NAMES.items()
        if which != "moe" and "error" not in found[name] and "error" not in moe
    }
    return {"models": found, "moe_beside": ratios}


def _peers(subject: Subject, settings: TrainSettings, device: torch.device) -> dict[str, Any]:
    """Trainings inside Lightning, which take turns among themselves."""
    if "lightning" not in settings.peers:
        return {}
    with progress_bar("in Lightning", lightning_peer.turns(settings.repetitions)) as on_step:
        timings: Timings = lightning_peer.compare_in_lightning(
            subject,
            precision=settings.precision,
            device=device,
            repetitions=settings.repetitions,
            on_step=on_step,
        )
    rows = rows_of(timings, list(timings.seconds))
    for row in rows:
        row["images_per_s"] = rounded(subject.batch_size / (row["time_ms"]["median"] / 1e3))
    return {"lightning": rows}

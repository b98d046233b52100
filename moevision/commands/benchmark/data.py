"""`moevision benchmark data`: how fast pictures are made ready, and what a training step waits for them.

Each pipeline is an `ImageDataModule` as `moevision fit` uses it; variants differ in its options: pictures kept in
memory or decoded from files, the config's augmentation or none, and the number of workers. They take turns.
What decoding alone costs is the difference between both without augmentation, in the main process.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moevision.commands.benchmark.record import new_record, progress_bar
from moevision.commands.benchmark.step import TrainingStep
from moevision.commands.benchmark.subject import Subject, find_subject
from moevision.commands.benchmark.timing import rounded, spread, synchronize
from moevision.data import ImageDataModule
from moevision.train.recipe import shipped_configs

_SKIPPED = 2  # batches before a round's clock starts, besides those that workers have prefetched by then
_WAIT_WARM_UP = 3  # steps before the data wait is measured


@dataclass(frozen=True)
class DataSettings:
    """What the command line asks for.

    Attributes:
        what: a config, a run folder, a folder of pictures, or a named data set.
        model: the config whose model and recipe go with a folder of pictures.
        root: folder of named data sets.
        workers: numbers of worker processes.
        batch_size: in the place of the config's.
        image_size: in the place of the config's.
        precision: of the training step, `bf16` or `fp32`.
        batches: batches per round.
        steps: training steps in which the data wait is measured; 0: it isn't.
        repetitions: rounds.
        device: where the training step runs.
        out: folder for the record and the figure.
        command: the command line.
    """

    what: str
    model: str = "quickstart"
    root: str | None = None
    workers: Sequence[int] = (0, 1, 2)
    batch_size: int | None = None
    image_size: int | None = None
    precision: str = "bf16"
    batches: int = 20
    steps: int = 20
    repetitions: int = 5
    device: str = "cpu"
    out: Path | None = None
    command: str = ""


@dataclass(frozen=True)
class Variant:
    """One pipeline.

    Attributes:
        cached: pictures are decoded once and kept in memory.
        augmented: with the config's augmentation, or none.
        workers: processes that prepare batches; 0: the main process does.
    """

    cached: bool
    augmented: bool
    workers: int


def benchmark_data(settings: DataSettings) -> dict[str, Any]:
    """Measure.

    Returns:
        The record: `rows`, one per pipeline, `decode`, and the `data_wait` of a training step.

    Raises:
        UserError: if there is no such data.
    """
    device = torch.device(settings.device)
    asked = {name: value for name, value in asdict(settings).items() if name not in ("out", "command")}
    record = new_record("data", settings.command, device, asked)
    subject = _subject(settings)
    modules, filling = _open_all(_few_drawn(subject, settings))
    rates: dict[Variant, list[float]] = {
        Variant(cached, augmented, workers): []
        for cached, augmented in modules
        for workers in (settings.workers if augmented else (0,))
    }
    with progress_bar("batches", settings.repetitions * len(rates)) as on_step:
        for number in range(settings.repetitions):
            for variant in list(rates)[:: 1 if number % 2 == 0 else -1]:
                rates[variant].append(rounded(_images_per_s(_prepared(modules, variant), variant, settings.batches)))
                on_step()
    record["data"] = {**subject.data, "image_size": subject.image_size, "batch_size": subject.batch_size}
    record["split"] = next(iter(modules.values())).split_note
    record["rows"] = [
        {**asdict(variant), "images_per_s": spread(values), "rounds": values} for variant, values in rates.items()
    ]
    record["filling_the_cache"] = filling
    record["decode"] = _decode(rates)
    record["data_wait"] = [
        _wait(subject, _prepared(modules, variant), variant, settings, device)
        for variant in rates
        # As it is trained: from memory where the pictures fit, and augmented.
        if settings.steps and variant.augmented and variant.cached == ((True, True) in modules)
    ]
    return record


def _prepared(modules: Mapping[tuple[bool, bool], ImageDataModule], variant: Variant) -> ImageDataModule:
    """The data of a variant, with its number of workers."""
    module = modules[variant.cached, variant.augmented]
    module.num_workers = variant.workers
    return module


def _subject(settings: DataSettings) -> Subject:
    """The config; for pictures without one, the config `settings.model` on them."""
    path = Path(settings.what)
    is_run = (path / "config.yaml").is_file()
    sizes: dict[str, Any] = {"batch_size": settings.batch_size, "image_size": settings.image_size, "num_classes": None}
    if is_run or path.is_file() or (settings.what in shipped_configs() and not path.is_dir()):
        subject = find_subject(settings.what, **sizes)
        own = dict(subject.data)
    else:
        subject = find_subject(settings.model, **sizes)
        own = {"path": settings.what}
    return replace(subject, data={**own, **({} if settings.root is None else {"root": settings.root})})


def _few_drawn(subject: Subject, settings: DataSettings) -> Subject:
    """Where pictures are drawn by code, no more of them than are used, so that nobody waits for the others."""
    enough = (settings.batches + _SKIPPED) * subject.batch_size
    own = {"train_size": min(enough, subject.data.get("train_size", enough)), "val_size": 1, "test_size": 1}
    return replace(subject, data={**subject.data, **own}) if subject.data.get("path") == "synthetic_pets" else subject


def _open_all(subject: Subject) -> tuple[dict[tuple[bool, bool], ImageDataModule], dict[str, Any]]:
    """Data by (cached, augmented), those in memory only where they fit; and how fast memory was filled."""
    modules: dict[tuple[bool, bool], ImageDataModule] = {}
    filling: dict[str, Any] = {}
    for cached, augmented in product((True, False), repeat=2):
        options: dict[str, Any] = {
            **subject.data,
            "image_size": subject.image_size,
            "batch_size": subject.batch_size,
        }
        if not cached:
            options["cache_mb"] = 0
        if not augmented:
            options |= {"augment": "none", "mixup": 0.0, "cutmix": 0.0, "random_erasing": 0.0}
        module = ImageDataModule(**options)
        module.prepare_data()
        start = time.perf_counter()
        module.setup("fit")
        elapsed = time.perf_counter() - start
        if cached and module.contents.datasets["train"].cache is None:
            filling["note"] = "the pictures don't fit into cache_mb, so nothing is kept in memory"
            continue
        if cached and "seconds" not in filling:
            images = sum(sum(module.class_counts[split].values()) for split in ("train", "val"))
            filling |= {"seconds": rounded(elapsed), "images": images, "images_per_s": rounded(images / elapsed)}
        modules[cached, augmented] = module
    return modules, filling


def _batches(module: ImageDataModule) -> Iterator[dict[str, Tensor]]:
    """Training batches, epoch after epoch."""
    loader = module.train_dataloader()
    while True:
        yield from loader


def _images_per_s(module: ImageDataModule, variant: Variant, count: int) -> float:
    """Pictures per second over so many batches, after the first ones."""
    batches = _batches(module)
    for _ in range(_SKIPPED):
        next(batches)
    # What workers have made in advance must not count for much.
    count = max(count, 8 * variant.workers)
    start = time.perf_counter()
    images = sum(len(next(batches)["label"]) for _ in range(count))
    elapsed = time.perf_counter() - start
    batches.close()  # type: ignore[attr-defined]  # ends the workers
    return images / elapsed


def _decode(rates: Mapping[Variant, Sequence[float]]) -> dict[str, Any]:
    """Milliseconds per picture: from files less from memory, without augmentation, round by round."""
    files, memory = (rates.get(Variant(cached, False, 0)) for cached in (False, True))
    if files is None or memory is None:
        return {"error": "not measured: it is the difference to pictures in memory, and they don't fit"}
    cost = [1e3 / slow - 1e3 / fast for slow, fast in zip(files, memory, strict=True)]
    return {"ms_per_image": spread(cost), "images_per_s_of_one_process": rounded(1e3 / spread(cost)["median"])}


def _wait(
    subject: Subject, module: ImageDataModule, variant: Variant, settings: DataSettings, device: torch.device
) -> dict[str, Any]:
    """The share of a training step that goes by until its batch is there."""
    subject = replace(subject, num_classes=module.num_classes)
    step = TrainingStep(subject, "moe", settings.precision, device)
    batches, wait, work = _batches(module), [], []
    for number in range(_WAIT_WARM_UP + settings.steps):
        start = time.perf_counter()
        batch = next(batches)
        images, labels = batch["image"].to(device), batch["label"].to(device)
        synchronize(device)
        middle = time.perf_counter()
        step(images, labels)
        synchronize(device)
        if number >= _WAIT_WARM_UP:
            wait.append(middle - start)
            work.append(time.perf_counter() - middle)
    batches.close()  # type: ignore[attr-defined]  # ends the workers
    return {
        "workers": variant.workers,
        "cached": variant.cached,
        "share": rounded(sum(wait) / (sum(wait) + sum(work))),
        "wait_ms": spread(wait, 1e3),
        "step_ms": spread(work, 1e3),
        "model": subject.name,
    }

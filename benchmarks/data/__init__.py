"""Time the input pipeline alone, and how long a training step waits for its batch.

From memory and from files, with augmentation and without, for several numbers of worker processes. WHAT is a config, a
run folder, a folder with one subfolder per class, or a data set's name.

Each pipeline is an `ImageDataModule` as `moevision fit` uses it, and all take turns. What decoding costs is the
difference between files and memory without augmentation, in the main process.
"""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Json, count, positive
from benchmarks.subject import Subject, TrainingStep, find_subject
from benchmarks.timing import rounded, spread, synchronize
from moevision.data import ImageDataModule
from moevision.train.recipe import shipped_configs

QUICK = {"workers": [0], "batches": 2, "steps": 2, "repetitions": 2}
EXAMPLES = """\
  python -m benchmarks data cifar10 --root datasets
  python -m benchmarks data path/to/images --workers 0 4 --out pipeline
"""
_SKIPPED = (
    2  # batches before a round's clock starts, besides those that workers have prefetched by then
)
_WAIT_WARM_UP = 3  # steps before the data wait is measured


@dataclass(frozen=True)
class Variant:
    """One pipeline.

    Attributes:
        cached: images are decoded once and kept in memory.
        augmented: with the config's augmentation, or none.
        workers: processes that prepare batches; 0: the main process does.
    """

    cached: bool
    augmented: bool
    workers: int


Modules = Mapping[tuple[bool, bool], ImageDataModule]
"""By `cached` and `augmented`."""


def parser() -> ArgumentParser:
    """The command line."""
    parser = harness.argument_parser("data", __doc__, EXAMPLES)
    add = parser.add_argument
    add(
        "what",
        metavar="WHAT",
        help="a config, a run folder, a folder of images, or a data set's name",
    )
    add("--root", help="folder of named data sets (the config's, or data)")
    add(
        "--model",
        default="quickstart",
        metavar="CONFIG",
        help="whose model trains on a folder of images (quickstart)",
    )
    add(
        "--workers",
        type=count,
        nargs="+",
        default=[0, 1, 2],
        metavar="N",
        help="worker processes (0 1 2)",
    )
    harness.add_image_sizes(parser)
    add("--batches", type=positive, default=20, metavar="N", help="batches per round (%(default)s)")
    add(
        "--steps",
        type=count,
        default=20,
        metavar="N",
        help="training steps for the data wait (20; 0: none)",
    )
    harness.add_measuring(parser, repetitions=5, warm_up=None)
    return parser


def main() -> None:
    """Measure, print tables and write the record."""
    options = harness.parse(parser(), QUICK)
    device = harness.set_up(options)
    record = harness.new_record("data", options, device)
    subject = _subject(options)
    modules = _open_all(_few_drawn(subject, options))
    rates: dict[Variant, list[float]] = {
        Variant(cached, augmented, workers): []
        for cached, augmented in modules
        for workers in (options.workers if augmented else (0,))
    }
    with harness.progress_bar("batches", options.repetitions * len(rates)) as on_step:
        for number in range(options.repetitions):
            for variant in list(rates)[:: 1 if number % 2 == 0 else -1]:
                rates[variant].append(rounded(_images_per_s(modules, variant, options.batches)))
                on_step()
    record["data"] = {
        **subject.data,
        "image_size": subject.image_size,
        "batch_size": subject.batch_size,
    }
    record["split"] = next(iter(modules.values())).split_note
    record["rows"] = [
        {**asdict(variant), "images_per_s": spread(values), "rounds": values}
        for variant, values in rates.items()
    ]
    # As it is trained: from memory where the images fit, and augmented.
    trained = [
        each for each in rates if each.augmented and each.cached == ((True, True) in modules)
    ]
    record["data_wait"] = [
        _wait(subject, modules, variant, options, device) for variant in trained if options.steps
    ]
    show(record)
    harness.write_record(options.out, record)


def _subject(options: Namespace) -> Subject:
    """The config; for images without one, the config `--model` on them."""
    path = Path(options.what)
    sizes = {"batch_size": options.batch_size, "image_size": options.image_size}
    a_config = options.what in shipped_configs() and not path.is_dir()
    if (path / "config.yaml").is_file() or path.is_file() or a_config:
        subject = find_subject(options.what, **sizes)
        own = dict(subject.data)
    else:
        subject, own = find_subject(options.model, **sizes), {"path": options.what}
    return replace(
        subject, data={**own, **({} if options.root is None else {"root": options.root})}
    )


def _few_drawn(subject: Subject, options: Namespace) -> Subject:
    """Where images are drawn by code, no more of them than are used, so that nobody waits for the others."""
    enough = (options.batches + _SKIPPED) * subject.batch_size
    own = {
        "train_size": min(enough, subject.data.get("train_size", enough)),
        "val_size": 1,
        "test_size": 1,
    }
    return (
        replace(subject, data={**subject.data, **own})
        if subject.data.get("path") == "synthetic_pets"
        else subject
    )


def _open_all(subject: Subject) -> Modules:
    """The data, in memory only where they fit."""
    modules: dict[tuple[bool, bool], ImageDataModule] = {}
    for cached, augmented in product((True, False), repeat=2):
        options = {
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
        module.setup("fit")
        if not cached or module.contents.datasets["train"].cache is not None:
            modules[cached, augmented] = module
    return modules


def _batches(modules: Modules, variant: Variant) -> Iterator[dict[str, Tensor]]:
    """Training batches of a variant, epoch after epoch; closing it ends its workers."""
    module = modules[variant.cached, variant.augmented]
    module.num_workers = variant.workers
    loader = module.train_dataloader()
    while True:
        yield from loader


def _images_per_s(modules: Modules, variant: Variant, number: int) -> float:
    """Images per second over so many batches, after the first ones."""
    with closing(_batches(modules, variant)) as batches:  # type: ignore[type-var]
        for _ in range(_SKIPPED):
            next(batches)
        # What workers have made in advance must not count for much.
        number = max(number, 8 * variant.workers)
        start = time.perf_counter()
        images = sum(len(next(batches)["label"]) for _ in range(number))
        return images / (time.perf_counter() - start)


def _wait(
    subject: Subject, modules: Modules, variant: Variant, options: Namespace, device: torch.device
) -> dict[str, Any]:
    """The share of a training step that goes by until its batch is there."""
    subject = replace(subject, num_classes=modules[variant.cached, variant.augmented].num_classes)
    step = TrainingStep(subject, "moe", options.precision, device)
    wait, work = [], []
    with closing(_batches(modules, variant)) as batches:  # type: ignore[type-var]
        for number in range(_WAIT_WARM_UP + options.steps):
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
    return {
        "workers": variant.workers,
        "cached": variant.cached,
        "share": rounded(sum(wait) / (sum(wait) + sum(work))),
        "wait_ms": spread(wait, 1e3),
        "step_ms": spread(work, 1e3),
        "model": subject.name,
    }


def show(record: Json) -> None:
    """Rates, decoding, data wait."""
    data = record["data"]
    harness.print_machine(record)
    harness.print_line(
        f"{data['path']}: {data['image_size']} px, batches of {data['batch_size']}. {record['split']}"
    )
    rows = []
    for row in record["rows"]:
        rate, cells = row["images_per_s"], ("in memory" if row["cached"] else "made each time",)
        cells += ("yes" if row["augmented"] else "no", str(row["workers"]))
        rows.append(
            [*cells, f"{rate['median']:,.0f} ({rate['quartile_1']:,.0f}–{rate['quartile_3']:,.0f})"]
        )
    harness.print_table(
        "input pipeline alone", ["images", "augmented", "workers", "images/s (quartiles)"], rows
    )
    for wait in record["data_wait"]:
        harness.print_line(
            f"data wait, {wait['workers']} workers: {wait['share']:.1%} of a training step of {wait['model']} "
            f"({wait['wait_ms']['median']:.1f} ms beside {wait['step_ms']['median']:.1f} ms)"
        )

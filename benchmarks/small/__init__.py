"""Three questions to one small model (protocol.md): heads that read places, instability, large batches.

    nice -n 19 python -m benchmarks small run --cifar path/to/cifar10 --limit 0   # all runs; two such queues may run
    python -m benchmarks small report                                             # README.md's tables

Axes: B images, N test images.
"""

from __future__ import annotations

import functools
import hashlib
import math
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import HERE, about, argument_parser
from benchmarks.places import MICRO, PLACES, SHIFTS, shifted
from benchmarks.queue import add_study, do_runs, fill_readme, read_records, refuse_changes
from benchmarks.routers.report import rate_beyond
from benchmarks.small.report import BASE_LR, BATCHES, COMPARED, FACTORS, TUNING_SEED, parts_of
from benchmarks.study import BATCH, make_task, open_data, small, train
from moevision.data import ImageDataModule
from moevision.files import file_sha256
from moevision.layers.routing import evaluating
from moevision.train.guard import GuardConfig, StabilityGuard, TrainingDiverged

FOLDER = HERE / "small"
PROTOCOL = FOLDER / "protocol.md"
IMAGES = 500 * BATCH  # of every training
SEEDS = range(5)
ARMS: dict[str, dict[str, Any]] = {
    "dense": {
        "router": "vmoe_top_k",
        "twin": "active_flops",
    },  # the router draws, so that shared weights are equal
    "learned": {"router": "vmoe_top_k"},
    "position": {"router": "position"},
    "hash": {"router": "hash"},
}
HEADS = {"mean": MICRO, "places": PLACES[MICRO]}


@dataclass(frozen=True)
class Job:
    """One run."""

    question: str
    arm: str
    lr: float
    seed: int
    head: str = "mean"
    batch: int = BATCH
    guard: bool = False

    @property
    def name(self) -> str:
        """What its record is called."""
        return f"{self.question}-{self.arm}-{self.head}-b{self.batch}-lr{self.lr:g}-g{self.guard:d}-s{self.seed}"


def queue(records: Sequence[dict[str, Any]]) -> Iterator[Job]:
    """All runs in the protocol's order, as far as these records decide them."""
    yield from tuned(
        records, [Job("heads", arm, BASE_LR, 0, head) for head in HEADS for arm in ARMS]
    )
    for seed in SEEDS:
        for factor in FACTORS:
            for guard in (False, True):
                yield from (
                    Job("rates", arm, BASE_LR * factor, seed, guard=guard) for arm in COMPARED
                )
    middle = {batch: BASE_LR * math.sqrt(batch / BATCH) for batch in BATCHES}
    rows = [
        Job("batches", arm, middle[batch], 0, batch=batch) for batch in BATCHES for arm in COMPARED
    ]
    yield from tuned(records, rows)
    for seed in SEEDS:  # the first amendment: at the rate of the other rows
        yield from (Job("common", arm, BASE_LR, seed, "places") for arm in ("position", "hash"))
    yield from tuned(records, [replace(row, head="places") for row in rows])  # the second one


def tuned(records: Sequence[dict[str, Any]], rows: Sequence[Job]) -> Iterator[Job]:
    """For each row the rates of the tuning seed; then seed by seed those rows whose rate is decided."""
    for row in rows:
        rates = [row.lr / 2, row.lr, row.lr * 2]
        while True:
            yield from (_of(row, lr, TUNING_SEED) for lr in rates)
            tried = validation(records, row)
            if not all(lr in tried for lr in rates) or (further := rate_beyond(tried)) is None:
                break
            rates = [further]
    for seed in SEEDS:
        for row in rows:
            if (lr := rate_of(records, row)) is not None:
                yield _of(row, lr, seed)


def _of(row: Job, lr: float, seed: int) -> Job:
    return Job(row.question, row.arm, lr, seed, row.head, row.batch, row.guard)


def validation(records: Sequence[dict[str, Any]], row: Job) -> dict[float, float]:
    """Validation accuracy of every rate that was tried for a row; a failed run counts 0."""
    own = {
        "question": row.question,
        "arm": row.arm,
        "head": row.head,
        "batch": row.batch,
        "seed": TUNING_SEED,
    }
    return {run["lr"]: run["val_top1"] or 0.0 for run in records if own.items() <= run.items()}


def rate_of(records: Sequence[dict[str, Any]], row: Job) -> float | None:
    """The best rate of a row, the lowest of those that tie; None as long as it isn't decided."""
    tried = validation(records, row)
    if not {row.lr / 2, row.lr, row.lr * 2} <= tried.keys() or rate_beyond(tried) is not None:
        return None
    return max(sorted(tried), key=lambda lr: tried[lr])


def run_job(job: Job, options: Namespace, data: ImageDataModule) -> dict[str, Any]:
    """Train and test; a run whose numbers aren't finite is recorded as failed."""
    origin = {**about(), "protocol_sha256": file_sha256(PROTOCOL)}
    data.batch_size = job.batch
    arch = {**ARMS[job.arm], "name": HEADS[job.head]}
    subject = small(job.arm, lr=job.lr, num_classes=data.num_classes)
    task = make_task(replace(subject, arch={**subject.arch, **arch}), job.seed)
    guard = StabilityGuard(GuardConfig(enabled=job.guard))
    steps, start, cpu, failed = (
        options.images // job.batch,
        time.monotonic(),
        time.process_time(),
        None,
    )
    try:
        train(task, data, steps, job.seed, callbacks=[guard])
    except TrainingDiverged as error:
        failed = str(error)
    spent = {
        "cpu_s": round(time.process_time() - cpu, 1),
        "wall_s": round(time.monotonic() - start, 1),
    }
    if not all(value.isfinite().all() for value in task.parameters()):
        failed = failed or "the weights are not finite"
    nothing = dict.fromkeys(("val_top1", "test_top1", *(f"shifted_{by}" for by in SHIFTS)))
    data.batch_size = 256
    return {
        **vars(job),
        "steps": steps,
        "failed": failed,
        **(nothing if failed else test(task.net, data)),
        "refused": guard.record.skipped,
        "returns": guard.record.rollbacks,
        **spent,
        **origin,
    }


def test(net: torch.nn.Module, data: ImageDataModule) -> dict[str, Any]:
    """Top-1 of the validation and test images, of the test images shifted; the test's predictions and their hash."""
    right: dict[str, list[Tensor]] = {}
    predicted = []
    with evaluating(net), torch.inference_mode():
        for batch in data.val_dataloader():
            right.setdefault("val_top1", []).append(
                net(batch["image"]).argmax(-1) == batch["label"]
            )
        for batch in data.test_dataloader():
            predicted.append(net(batch["image"]).argmax(-1))
            right.setdefault("test_top1", []).append(predicted[-1] == batch["label"])
            for by in SHIFTS:
                answers = net(shifted(batch["image"], by, batch["index"])).argmax(-1)
                right.setdefault(f"shifted_{by}", []).append(answers == batch["label"])
    found = {
        name: round(float(torch.cat(values).double().mean()), 6) for name, values in right.items()
    }
    classes = torch.cat(predicted)
    digits = "".join(map(str, classes.tolist()))  # in the order of the test images, by class
    return {**found, "predictions": hash_of(classes), "predicted": digits}


def hash_of(predictions: Tensor) -> str:
    """SHA-256 of the predicted classes [N], a byte each."""
    return hashlib.sha256(bytes(predictions.tolist())).hexdigest()


def main() -> None:
    """Run or report."""
    parser = argument_parser("small", __doc__)
    parser.add_argument("verb", choices=("run", "report"))
    parser.add_argument(
        "--cifar", default="cifar10", help="CIFAR-10 as a folder, or a name (%(default)s)"
    )
    parser.add_argument(
        "--images", type=int, default=IMAGES, help="of a training; the protocol has %(default)s"
    )
    add_study(parser, FOLDER)
    options = parser.parse_args()
    if options.verb == "report":
        fill_readme(options.readme, parts_of(read_records(options.out)))
        return
    refuse_changes(PROTOCOL, allowed=options.allow_dirty)
    torch.set_num_threads(1)
    data = open_data("cifar10", options.cifar)
    do_runs(queue, functools.partial(run_job, data=data), told, options)


def told(job: Job, record: dict[str, Any]) -> str:
    """A line about a finished run."""
    return f"{job.name}: {record['failed'] or 100 * record['test_top1']:.1f} %, {record['cpu_s']:.0f} s CPU"

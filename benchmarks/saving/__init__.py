"""What does sparsity save, and what do two levers cost: a MoE ViT and its dense twins after the same training time.

    python -m benchmarks saving --stage speed --cifar path/to/cifar10          # images/s, interleaved; adds one
    python -m benchmarks saving --stage memory                                 # peak training memory
    python -m benchmarks saving --stage train --cifar path/to/cifar10 --jobs 2 # goes on where it stopped
    python -m benchmarks saving --stage report > tables.md                     # tables and two figures

The model, the batch and the recipe are those of configs/cifar10.yaml. Arms of the first question: the MoE, the dense
twin of equal active FLOPs, and the dense twin of equal total parameters. Arms of the second: the MoE with gradient
checkpointing, and with a quarter or half of the patches left out in training.

"The same time" must not depend on what else the machine was doing while one arm trained. So images/s of all arms are
measured in one interleaved process, and every arm gets the optimizer steps that fit into `--budget-s` at its measured
rate: budget · images/s ÷ batch, with its own one-cycle schedule over just that number. The rate is that of one thread
by CPU time, the median over the measurements with one thread that the record holds when the first training begins; from
then on the steps stand in the record, and a later measurement is set beside them, never in their place.
"""

from __future__ import annotations

import functools
import multiprocessing
import statistics
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import HERE, Record, about, argument_parser, read_record
from benchmarks.memory import memory_of
from benchmarks.saving.report import MOE, SAVING, TRAINED_LEVERS, draw_levers, draw_saving, tables
from benchmarks.study import BATCH, IMAGE_SIZE, evaluate, make_task, open_data, train
from benchmarks.subject import Subject, TrainingStep, inference
from benchmarks.timing import Candidate, interleave
from moevision.allocator import keep_freed_memory
from moevision.data import ImageDataModule
from moevision.efficiency import measure_cost
from moevision.errors import UserError
from moevision.train.optim import OptimizerConfig

PRECISION = "bf16-mixed"
WARM_UP = 10  # rounds that allocate, and in which oneDNN compiles kernels
ARMS: dict[str, dict[str, Any]] = {
    MOE: {},
    "dense, equal FLOPs": {"arch": {"twin": "active_flops"}},
    "dense, equal parameters": {"arch": {"twin": "total_params"}},
    "checkpointing": {"grad_checkpointing": True},
    "patch drop 25 %": {"arch": {"patch_drop_rate": 0.25}},
    "patch drop 50 %": {"arch": {"patch_drop_rate": 0.5}},
}


def model_of(arm: str) -> Subject:
    """One arm: the recipe with what the arm changes."""
    subject = base()
    own = ARMS[arm]
    return replace(
        subject,
        arch={**subject.arch, **own.get("arch", {})},
        grad_checkpointing=own.get("grad_checkpointing", subject.grad_checkpointing),
    )


def base() -> Subject:
    """What all arms start from: the CIFAR-10 recipe of before the hybrids, which the record was made with."""
    return Subject(
        "cifar10",
        {"name": "vit_moe_micro_patch4_32", "router": "vmoe_top_k"},
        {"lr": 1e-3, "weight_decay": 0.05, "warmup_fraction": 0.2},
        {"importance": 0.05, "load": 0.05},
        image_size=IMAGE_SIZE,
        batch_size=BATCH,
    )


def recipe() -> dict[str, Any]:
    """The `model` section of that recipe, with what it leaves to the defaults."""
    subject = base()
    optim = asdict(OptimizerConfig(**subject.optim))
    return {"arch": subject.arch, "optim": optim, "aux": subject.aux, "label_smoothing": subject.label_smoothing}


def measure_speed(data: ImageDataModule, rounds: int) -> dict[str, Any]:
    """Training and inference speed of every arm, and its ratio to the first arm, from `rounds` interleaved rounds.

    A training step is a batch from the loader (drawn once per round, its time added to every arm's), forward under
    bf16 autocast, losses, backward, clipping and AdamW; times are CPU seconds of one thread.
    """
    origin = about()
    steps = {arm: TrainingStep(model_of(arm)) for arm in ARMS}
    batches = endless(data)
    first = next(batches)
    images, labels = first["image"].clone(), first["label"].clone()
    loading: list[float] = []

    def load(number: int) -> None:
        start = time.process_time()
        batch = next(batches)
        images.copy_(batch["image"])
        labels.copy_(batch["label"])
        loading.append(time.process_time() - start)

    candidates = []
    for arm, step in steps.items():
        classify = inference(step.net, images, "bf16")
        candidates.append(Candidate(f"train {arm}", functools.partial(step, images, labels), step.net.train))
        candidates.append(Candidate(f"infer {arm}", classify, step.net.eval))
    times = interleave(candidates, repetitions=rounds, warm_up=WARM_UP, prepare=load).cpu
    found: dict[str, dict[str, Any]] = {}
    for phase, waits in (("train", loading[WARM_UP:]), ("infer", [0.0] * rounds)):
        spent = {arm: [a + b for a, b in zip(times[f"{phase} {arm}"], waits, strict=True)] for arm in ARMS}
        ratios = {arm: [moe / own for moe, own in zip(spent[MOE], spent[arm], strict=True)] for arm in ARMS}
        found[phase] = {
            arm: {
                "cpu_ms": [round(1000 * value, 2) for value in quartiles(spent[arm])],
                "cpu_ratio": [round(value, 3) for value in quartiles(ratios[arm])],
            }
            for arm in ARMS
        }
    return {"threads": torch.get_num_threads(), "rounds": rounds, **found, **origin}


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median and upper quartile, none outside of what was measured."""
    return statistics.quantiles(values, n=4, method="inclusive")


def endless(data: ImageDataModule) -> Iterator[dict[str, torch.Tensor]]:
    """Training batches, epoch after epoch."""
    while True:
        yield from data.train_dataloader()


def measure_memory(arms: Sequence[str], repeats: int) -> dict[str, dict[str, Any]]:
    """Peak memory in MiB of a few training steps of each arm, every time in a fresh process with one thread.

    `before_mib`, the weights, is what a model that isn't trained holds of `peak_mib`.
    """
    torch.set_num_threads(1)
    found = {}
    for arm in arms:
        memory = memory_of(model_of(arm), precision="bf16", runs=repeats)
        if "error" in memory:
            raise UserError(f"Memory of {arm!r}: {memory['error']}.")
        found[arm] = {"peak_mib": memory["peaks_mib"], "before_mib": [memory["weights_mib"]] * repeats}
    return found


def set_budget(record: Record, budget_s: float) -> dict[str, Any]:
    """Optimizer steps of every arm; from the measurements that there are now, unless the record says them already.

    Raises:
        UserError: if no speed was measured, or the record holds trainings of another budget.
    """
    found = record.read()
    if "budget" in found:
        if found["budget"]["budget_s"] != budget_s:
            raise UserError(f"{record.path} holds trainings of {found['budget']['budget_s']:g} s: give another --out.")
        return found["budget"]
    used = [number for number, speed in enumerate(found.get("speed", [])) if speed["threads"] == 1]
    if not used:
        raise UserError("No speed has been measured yet: run `--stage speed` first, best three times.")
    step_ms = {
        arm: statistics.median(found["speed"][number]["train"][arm]["cpu_ms"][1] for number in used) for arm in ARMS
    }
    budget = {
        "budget_s": budget_s,
        "measurements": used,
        "images_per_s": {arm: round(1000 * BATCH / value, 1) for arm, value in step_ms.items()},
        "steps": {arm: round(1000 * budget_s / value) for arm, value in step_ms.items()},
    }
    record.put("budget", budget)
    return budget


def plan(steps: dict[str, int], seeds: int) -> Iterator[dict[str, Any]]:
    """Keys of all trainings: the first question seed by seed, then the levers at equal time and at equal steps.

    Checkpointing computes the same gradients (tests/layers/test_moe.py), so there is nothing to train.
    """
    for seed in range(seeds):
        for arm in SAVING:
            yield {"arm": arm, "steps": steps[arm], "seed": seed}
    for seed in range(seeds):
        for arm in TRAINED_LEVERS:
            for count in dict.fromkeys((steps[arm], steps[MOE])):  # once, if they are the same
                yield {"arm": arm, "steps": count, "seed": seed}


@functools.cache
def data_of(cifar: str) -> ImageDataModule:
    """CIFAR-10, decoded once per process."""
    return open_data("cifar10", cifar)


def one_run(key: dict[str, Any], cifar: str) -> dict[str, Any]:
    """Train one arm and test it on the whole test split."""
    torch.set_num_threads(1)
    keep_freed_memory()  # as `moevision fit` does
    data, origin = data_of(cifar), about()
    task = make_task(model_of(key["arm"]), key["seed"])
    start, cpu = time.monotonic(), time.process_time()
    train(task, data, key["steps"], key["seed"], precision=PRECISION)
    # The wall time belongs to a machine that is doing other work; images/s are compared by `--stage speed`.
    spent = {"cpu_s": round(time.process_time() - cpu, 1), "wall_s": round(time.monotonic() - start, 1)}
    return {**key, **evaluate(task, data, PRECISION), **spent, **origin}


def study(record: Record, options: Namespace) -> None:
    """Do the trainings that the record lacks, `jobs` at a time, each on one thread."""
    steps = set_budget(record, options.budget_s)["steps"]
    todo = [key for key in plan(steps, options.seeds) if record.find(**key) is None]
    work = functools.partial(one_run, cifar=options.cifar)
    if options.jobs == 1:
        for key in todo:
            note(record, work(key))
        return
    # Only this process writes the record. `spawn`: a forked child would inherit torch's threads in an unknown state.
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(work, key) for key in todo]):
            note(record, done.result())


def note(record: Record, run: dict[str, Any]) -> None:
    """Keep a finished run and say so."""
    record.add(run)
    name = f"{run['arm']}  {run['steps']} steps  seed {run['seed']}"
    print(f"{name}: test {run['test_top1']:.3f}  {run['cpu_s']:.0f} s CPU, {run['wall_s']:.0f} s", flush=True)


def main() -> None:
    """Measure, train or report."""
    parser = argument_parser("saving", __doc__)
    parser.add_argument("--stage", choices=("speed", "memory", "train", "report"), required=True)
    parser.add_argument("--cifar", default="cifar10", help="CIFAR-10 as a folder, or a name (%(default)s)")
    parser.add_argument("--out", type=Path, default=HERE / "saving" / "record.json", help="the record (%(default)s)")
    parser.add_argument("--budget-s", type=float, default=240.0, help="training time of one thread (%(default)g s)")
    parser.add_argument("--seeds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side (%(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="of --stage speed (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="processes per arm of --stage memory (%(default)s)")
    parser.add_argument("--figures", type=Path, default=HERE / "saving", help="folder (%(default)s)")
    options = parser.parse_args()
    if options.stage == "report":
        found = read_record(options.out)
        print(tables(found))
        draw_saving(found, options.figures / "saving.png")
        draw_levers(found, options.figures / "levers.png")
        return
    record = Record(options.out, {
        "model": recipe(), "image_size": IMAGE_SIZE, "batch": BATCH, "precision": PRECISION,
        "schedule": "AdamW, one cycle over the arm's own steps",
    })  # fmt: skip
    if options.stage == "speed":
        torch.set_num_threads(1)
        keep_freed_memory()
        record.put("cost", {arm: vars(measure_cost(model_of(arm).build(), IMAGE_SIZE)) for arm in ARMS})
        speed = measure_speed(data_of(options.cifar), options.rounds)
        record.put("speed", [*record.read().get("speed", []), speed])
    elif options.stage == "memory":
        record.put("memory", {**measure_memory(list(ARMS), options.repeats), "about": about()})
    else:
        study(record, options)

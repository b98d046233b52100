"""What does sparsity save, and what do two levers cost: a MoE ViT and its dense twins after the same training time.

    python benchmarks/saving.py --stage speed --threads 1 --cifar path/to/cifar10  # images/s, interleaved; adds one
    python benchmarks/saving.py --stage memory                                    # peak training memory
    python benchmarks/saving.py --stage train --cifar path/to/cifar10 --jobs 2    # goes on where it stopped
    python benchmarks/saving.py --stage report > tables.md                        # tables, docs/img/{saving,levers}.png

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
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from _saving_measure import measure_costs, measure_memory, measure_speed
from _saving_report import MOE, SAVING, TRAINED_LEVERS, draw_levers, draw_saving, tables
from _study import BATCH, IMAGE_SIZE, Record, open_data, provenance, quiet_trainer, read_record, train

from moevision.allocator import keep_freed_memory
from moevision.data import ImageDataModule
from moevision.errors import UserError
from moevision.losses import AuxLossWeights
from moevision.models.config import MoEConfig
from moevision.train.recipe import find_config
from moevision.train.task import ClassificationTask, OptimizerConfig

HERE = Path(__file__).parent
CLASSES = 10
PRECISION = "bf16-mixed"
ARMS: dict[str, dict[str, Any]] = {
    MOE: {},
    "dense, equal FLOPs": {"arch": {"twin": "active_flops"}},
    "dense, equal parameters": {"arch": {"twin": "total_params"}},
    "checkpointing": {"grad_checkpointing": True},
    "patch drop 25 %": {"arch": {"patch_drop_rate": 0.25}},
    "patch drop 50 %": {"arch": {"patch_drop_rate": 0.5}},
}


def recipe() -> dict[str, Any]:
    """The `model` section of configs/cifar10.yaml, with what it leaves to the defaults."""
    config = yaml.safe_load(find_config("cifar10").read_text(encoding="utf-8"))
    assert (config["data"]["batch_size"], config["data"]["image_size"]) == (BATCH, IMAGE_SIZE)
    model = config["model"]
    return {
        "arch": model["arch"],
        "optim": asdict(OptimizerConfig(**model["optim"])),
        "aux": model["aux"],
        "label_smoothing": model["label_smoothing"],
    }


def build(arm: str, seed: int) -> ClassificationTask:
    """The task of one arm."""
    L.seed_everything(seed, verbose=False)
    model, own = recipe(), ARMS[arm]
    return ClassificationTask(
        arch=MoEConfig(**{**model["arch"], **own.get("arch", {})}),
        optim=OptimizerConfig(**model["optim"]),
        aux=AuxLossWeights(**model["aux"]),
        label_smoothing=model["label_smoothing"],
        grad_checkpointing=own.get("grad_checkpointing", False),
        num_classes=CLASSES,
        image_size=IMAGE_SIZE,
    )


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
        raise UserError("No speed has been measured yet: run `--stage speed --threads 1` first, best three times.")
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


def one_run(key: dict[str, Any], cifar: str, stop_at: float) -> dict[str, Any] | None:
    """Train one arm and test it on the whole test split; None if it would have begun too late."""
    if time.time() > stop_at:
        return None
    torch.set_num_threads(1)
    keep_freed_memory()  # as `moevision fit` does
    data, about = data_of(cifar), provenance()
    task = build(key["arm"], key["seed"])
    start, cpu = time.monotonic(), time.process_time()
    train(task, data, key["steps"], key["seed"], precision=PRECISION)
    # The wall time belongs to a machine that is doing other work; images/s are compared by `--stage speed`.
    spent = {"cpu_s": round(time.process_time() - cpu, 1), "wall_s": round(time.monotonic() - start, 1)}
    (test,) = quiet_trainer(precision=PRECISION).test(task, data, verbose=False)
    layers = [asdict(load) for load in task.test_loads]
    return {**key, "test_top1": test["test/top1"], "test_loss": test["test/loss"], "layers": layers, **spent, **about}


def study(record: Record, options: Namespace) -> None:
    """Do the trainings that the record lacks, `jobs` at a time, each on one thread."""
    steps = set_budget(record, options.budget_s)["steps"]
    todo = [key for key in plan(steps, options.seeds) if record.find(**key) is None]
    work = functools.partial(one_run, cifar=options.cifar, stop_at=time.time() + 60 * options.minutes)
    if options.jobs == 1:
        for key in todo:
            note(record, work(key))
        return
    # Only this process writes the record. `spawn`: a forked child would inherit torch's threads in an unknown state.
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(work, key) for key in todo]):
            note(record, done.result())


def note(record: Record, run: dict[str, Any] | None) -> None:
    """Keep a finished run and say so."""
    if run is None:
        print("The minutes are over: start the same command again to go on.", flush=True)
        return
    record.add(run)
    name = f"{run['arm']}  {run['steps']} steps  seed {run['seed']}"
    print(f"{name}: test {run['test_top1']:.3f}  {run['cpu_s']:.0f} s CPU, {run['wall_s']:.0f} s", flush=True)


def main() -> None:
    """Measure, train or report."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("speed", "memory", "train", "report"), required=True)
    parser.add_argument("--cifar", default="cifar10", help="CIFAR-10 as a folder, or a name (%(default)s)")
    parser.add_argument("--out", type=Path, default=HERE / "saving.json", help="the record (%(default)s)")
    parser.add_argument("--budget-s", type=float, default=240.0, help="training time of one thread (%(default)g s)")
    parser.add_argument("--seeds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side (%(default)s)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no training after so many minutes")
    parser.add_argument("--threads", type=int, default=1, help="of --stage speed (%(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="of --stage speed (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="processes per arm of --stage memory (%(default)s)")
    parser.add_argument("--figures", type=Path, default=HERE.parent / "docs" / "img", help="folder (%(default)s)")
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
        torch.set_num_threads(options.threads)
        keep_freed_memory()
        tasks = {arm: build(arm, seed=0) for arm in ARMS}
        record.put("cost", measure_costs(tasks, IMAGE_SIZE))
        speed = measure_speed(tasks, data_of(options.cifar), options.rounds)
        record.put("speed", [*record.read().get("speed", []), speed])
    elif options.stage == "memory":
        record.put("memory", {**measure_memory(list(ARMS), options.repeats), **{"about": provenance()}})
    else:
        study(record, options)


if __name__ == "__main__":
    main()

"""Every router on one small model: accuracy over seeds, load, drops and cost, tuned alike.

    OMP_NUM_THREADS=1 python benchmarks/routers.py --cifar path/to/cifar10     # the trainings; goes on where it stopped
    OMP_NUM_THREADS=1 python benchmarks/routers.py --speed                     # images/s, interleaved in one process
    python benchmarks/routers.py --report > tables.md                          # tables, and docs/img/routers.png

All rows share the model, E = 8 (32 in the fine-grained row), the steps, the batch, the schedule and the images; one
expert's width follows from K so that active FLOPs are those of the dense twin (measured and recorded; the report shows
what difference is left). Balance losses are each router's own defaults. Every row is tuned alike on the validation
split with seed 0: the learning rates of `LEARNING_RATES`, and further ones by factors of 2 until the row's best lies
between two worse ones. All rows then take one rate, the best on average; a row keeps its own only if that is better by
more than `TOLERANCE`. Test accuracies select nothing. One data set comes after the other, and within it seed 1 of all
rows before seed 2 of any: stopped early, it compares alike.

The router `label`, an oracle that is told the class, has no place in a table of accuracies.
"""

from __future__ import annotations

import statistics
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _router_report import chosen_rates, draw, rate_beyond, tables, tuned
from _study import (
    BATCH,
    IMAGE_SIZE,
    MODEL,
    PRECISION,
    Record,
    evaluate,
    make_task,
    open_data,
    provenance,
    read_record,
    train,
    training_step,
)

from moevision.data import ImageDataModule
from moevision.efficiency import measure_cost
from moevision.layers import ROUTERS
from moevision.losses import AuxLossWeights
from moevision.models.config import MoEConfig
from moevision.train.task import ClassificationTask

HERE = Path(__file__).parent
DATASETS = ("cifar10", "synthetic_pets")
LEARNING_RATES = (1e-3, 2e-3, 4e-3)
ROWS: dict[str, dict[str, Any]] = {
    "dense twin": {"twin": "active_flops"},
    **{name: {"router": name} for name in ROUTERS if name != "label"},
    "vmoe_top_k, 1 + 1 shared": {"router": "vmoe_top_k", "top_k": 1, "num_shared_experts": 1},
    "vmoe_top_k, 8 of 32": {"router": "vmoe_top_k", "num_experts": 32, "top_k": 8},
    "switch, capacity 1.25": {"router": "switch", "capacity_factor": 1.25, "eval_capacity_factor": 2.0},  # ST-MoE's
}


def plan(record: Record, options: Namespace) -> Iterator[dict[str, Any]]:
    """Keys of all runs in order; which rates come next is looked up when their turn comes."""
    for dataset in options.datasets:
        for row in options.rows:
            for lr in LEARNING_RATES:
                yield {"dataset": dataset, "row": row, "lr": lr, "seed": 0}
            while (further := rate_beyond(tuned(record.read()["runs"], dataset)[row])) is not None:
                yield {"dataset": dataset, "row": row, "lr": further, "seed": 0}
        for seed in options.seeds:
            for row in options.rows:
                rates = chosen_rates(tuned(record.read()["runs"], dataset))
                yield {"dataset": dataset, "row": row, "lr": rates[row], "seed": seed}


def study(record: Record, options: Namespace) -> None:
    """Do the runs that the record lacks, until the minutes are over."""
    start, about = time.monotonic(), provenance()
    data = {name: open_data(name, options.cifar, pets=options.pets) for name in options.datasets}
    for key in plan(record, options):
        if record.find(**key) is not None:
            continue
        if time.monotonic() - start > 60 * options.minutes:
            print(f"{options.minutes:g} minutes are over: start the same command again to go on.")
            return
        run = {**key, **one_run(data[key["dataset"]], key, options.steps), **about}
        record.add(run)
        loads = ", ".join(f"{layer['max_over_mean']:.2f}" for layer in run["layers"])
        name = f"{key['dataset']}  {key['row']}  lr {key['lr']:g}  seed {key['seed']}"
        print(f"{name}: val {run['val_top1']:.3f}  load {loads}  {run['cpu_s']:.0f} s CPU", flush=True)


def one_run(data: ImageDataModule, key: dict[str, Any], steps: int) -> dict[str, Any]:
    """Train and evaluate one row."""
    task = make_task(data, key["lr"], key["seed"], **ROWS[key["row"]])
    start, cpu = time.monotonic(), time.process_time()
    train(task, data, steps, key["seed"])
    found = evaluate(task, data)
    # The wall time belongs to a machine that may be doing other work; `--speed` is what compares speeds.
    return {**found, "cpu_s": round(time.process_time() - cpu, 1), "wall_s": round(time.monotonic() - start, 1)}


def build(row: str) -> ClassificationTask:
    """The task of one row, for ten classes."""
    torch.manual_seed(0)
    arch = MoEConfig(**{**MODEL, **ROWS[row]})
    return ClassificationTask(arch=arch, aux=AuxLossWeights(), num_classes=10, image_size=IMAGE_SIZE)


def measure_rows(rows: list[str]) -> dict[str, dict[str, int]]:
    """Parameters and FLOPs per image of every row; one training step of each shows at once what can't run."""
    costs = {}
    for row in rows:
        task = build(row)
        training_step(task, torch.randn(4, 3, IMAGE_SIZE, IMAGE_SIZE), torch.randint(10, (4,)), bf16=False)()
        costs[row] = vars(measure_cost(task.net, IMAGE_SIZE))
    return costs


def measure_speed(rows: list[str], rounds: int) -> dict[str, Any]:
    """Training images/s of every row and its ratio to the dense twin, taken round by round in one process.

    By CPU time: on one thread of an idle machine that is the wall time, on a busy one what an idle one would take.
    """
    images, labels = torch.randn(BATCH, 3, IMAGE_SIZE, IMAGE_SIZE), torch.randint(10, (BATCH,))
    steps = {row: training_step(build(row), images, labels, bf16=PRECISION != "32-true") for row in rows}
    times: dict[str, list[float]] = {row: [] for row in rows}
    for count in range(rounds + 3):
        for row, step in steps.items():
            start = time.process_time()
            step()
            if count >= 3:  # the first steps allocate
                times[row].append(time.process_time() - start)
    found = {}
    for row, seconds in times.items():
        ratios = [twin / own for twin, own in zip(times["dense twin"], seconds, strict=True)]
        quartiles = statistics.quantiles(ratios, n=4)
        found[row] = {
            "images_per_s": round(BATCH / statistics.median(seconds), 1),
            "to_twin": round(statistics.median(ratios), 3),
            "to_twin_quartiles": [round(quartiles[0], 3), round(quartiles[2], 3)],
        }
    return {"rounds": rounds, "rows": found, **provenance()}


def main() -> None:
    """Train, measure or report."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", default="cifar10", help="CIFAR-10 as a folder, or a name (%(default)s)")
    parser.add_argument("--out", type=Path, default=HERE / "routers.json", help="the record (%(default)s)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="default: all")
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=list(DATASETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=range(6), help="seeds of the chosen rate (0 to 5)")
    parser.add_argument("--steps", type=int, default=500, help=f"optimizer steps of {BATCH} images (%(default)s)")
    parser.add_argument("--pets", nargs=3, type=int, default=(16_384, 2_000, 4_000), help="drawn images per split")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after so many minutes")
    parser.add_argument("--speed", action="store_true", help="measure images/s instead (about a minute)")
    parser.add_argument("--rounds", type=int, default=40, help="steps of each row for --speed (%(default)s)")
    parser.add_argument("--report", action="store_true", help="print tables and draw the figure instead")
    parser.add_argument("--figure", type=Path, default=HERE.parent / "docs" / "img" / "routers.png")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.report:
        found = read_record(options.out)
        print(tables(found))
        draw(found, options.figure)
        return
    settings = {
        "model": MODEL, "image_size": IMAGE_SIZE, "batch": BATCH, "steps": options.steps, "precision": PRECISION,
        "pets": options.pets, "schedule": "AdamW, one cycle, 20 % warm-up",
    }  # fmt: skip
    record = Record(options.out, settings)
    record.put("cost", {**record.read().get("cost", {}), **measure_rows(options.rows)})
    if options.speed:
        record.put("speed", measure_speed(options.rows, options.rounds))
    else:
        study(record, options)


if __name__ == "__main__":
    main()

"""Every router on one small model: accuracy over seeds, load, drops and cost, tuned alike.

    OMP_NUM_THREADS=1 python -m benchmarks routers --cifar path/to/cifar10     # the trainings; goes on where it stopped
    OMP_NUM_THREADS=1 python -m benchmarks routers --speed                     # images/s, interleaved in one process
    python -m benchmarks routers --report > tables.md                          # tables and figure

All rows share the model, E = 8 (32 in the fine-grained row), the steps, the batch, the schedule and the images; one
expert's width follows from K so that active FLOPs are those of the dense twin (measured and recorded; the report shows
what difference is left). Balance losses are each router's own defaults. Every row is tuned alike on the validation
split with seed 0: the learning rates of `LEARNING_RATES`, and further ones by factors of 2 until the row's best lies
between two worse ones. All rows then take one rate, the best on average; a row keeps its own only if that is better by
more than `TOLERANCE`. Test accuracies select nothing. One data set comes after the other, and within it seed 1 of all
rows before seed 2 of any: stopped early, it compares alike.
"""

from __future__ import annotations

import statistics
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import HERE, Record, about, argument_parser, read_record
from benchmarks.routers.report import chosen_rates, draw, rate_beyond, tables, tuned
from benchmarks.study import (
    BATCH,
    IMAGE_SIZE,
    SETTINGS,
    evaluate,
    make_task,
    open_data,
    small,
    train,
)
from benchmarks.subject import TrainingStep, noise_batch
from benchmarks.timing import Candidate, interleave
from moevision.data import ImageDataModule
from moevision.efficiency import measure_cost
from moevision.layers import ROUTERS

DATASETS = ("cifar10", "synthetic_pets")
LEARNING_RATES = (1e-3, 2e-3, 4e-3)
ROWS: dict[str, dict[str, Any]] = {
    "dense twin": {"twin": "active_flops"},
    **{name: {"router": name} for name in ROUTERS},
    "vmoe_top_k, 1 + 1 shared": {"router": "vmoe_top_k", "top_k": 1, "num_shared_experts": 1},
    "vmoe_top_k, 8 of 32": {"router": "vmoe_top_k", "num_experts": 32, "top_k": 8},
    "switch, capacity 1.25": {
        "router": "switch",
        "capacity_factor": 1.25,
        "eval_capacity_factor": 2.0,
    },  # ST-MoE's
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
    """Do the runs that the record lacks."""
    origin = about()
    data = {name: open_data(name, options.cifar, pets=options.pets) for name in options.datasets}
    for key in plan(record, options):
        if record.find(**key) is not None:
            continue
        run = {**key, **one_run(data[key["dataset"]], key, options.steps), **origin}
        record.add(run)
        loads = ", ".join(f"{layer['max_over_mean']:.2f}" for layer in run["layers"])
        name = f"{key['dataset']}  {key['row']}  lr {key['lr']:g}  seed {key['seed']}"
        print(
            f"{name}: val {run['val_top1']:.3f}  load {loads}  {run['cpu_s']:.0f} s CPU", flush=True
        )


def one_run(data: ImageDataModule, key: dict[str, Any], steps: int) -> dict[str, Any]:
    """Train and evaluate one row."""
    subject = small(key["row"], lr=key["lr"], num_classes=data.num_classes, **ROWS[key["row"]])
    task = make_task(subject, key["seed"])
    start, cpu = time.monotonic(), time.process_time()
    train(task, data, steps, key["seed"])
    found = evaluate(task, data)
    # The wall time belongs to a machine that may be doing other work; `--speed` is what compares speeds.
    return {
        **found,
        "cpu_s": round(time.process_time() - cpu, 1),
        "wall_s": round(time.monotonic() - start, 1),
    }


def measure_rows(rows: list[str]) -> dict[str, dict[str, int]]:
    """Parameters and FLOPs per image of every row; one training step of each shows at once what can't run."""
    costs = {}
    for row in rows:
        step = TrainingStep(small(row, **ROWS[row]), precision="fp32")
        step(*(tensor[:4] for tensor in noise_batch(step.subject)))
        costs[row] = vars(measure_cost(step.net, IMAGE_SIZE))
    return costs


def measure_speed(rows: list[str], rounds: int) -> dict[str, Any]:
    """Training images/s of every row and its ratio to the dense twin, taken round by round in one process."""
    steps = {row: TrainingStep(small(row, **ROWS[row]), precision="fp32") for row in rows}
    batch = noise_batch(small("any"))
    candidates = [Candidate(row, lambda step=step: step(*batch)) for row, step in steps.items()]  # type: ignore[misc]
    found = {}
    times = interleave(candidates, repetitions=rounds).cpu
    for row, seconds in times.items():
        ratios = [twin / own for twin, own in zip(times["dense twin"], seconds, strict=True)]
        low, middle, high = (round(quartile, 3) for quartile in statistics.quantiles(ratios, n=4))
        speed = round(BATCH / statistics.median(seconds), 1)
        found[row] = {"images_per_s": speed, "to_twin": middle, "to_twin_quartiles": [low, high]}
    return {"rounds": rounds, "rows": found, **about()}


def main() -> None:
    """Train, measure or report."""
    parser = argument_parser("routers", __doc__)
    add = parser.add_argument
    add("--cifar", default="cifar10", help="CIFAR-10 as a folder, or a name (%(default)s)")
    add(
        "--out",
        type=Path,
        default=HERE / "routers" / "record.json",
        help="the record (%(default)s)",
    )
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="default: all")
    add("--datasets", nargs="+", choices=DATASETS, default=list(DATASETS))
    add("--seeds", nargs="+", type=int, default=range(6), help="seeds of the chosen rate (0 to 5)")
    add("--steps", type=int, default=500, help=f"optimizer steps of {BATCH} images (%(default)s)")
    add("--pets", nargs=3, type=int, default=(16_384, 2_000, 4_000), help="drawn images per split")
    add("--speed", action="store_true", help="measure images/s instead (about a minute)")
    add("--rounds", type=int, default=40, help="steps of each row for --speed (%(default)s)")
    add("--report", action="store_true", help="print tables and draw the figure instead")
    add("--figure", type=Path, default=HERE / "routers" / "routers.png")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.report:
        found = read_record(options.out)
        print(tables(found))
        draw(found, options.figure)
        return
    recipe = {
        "steps": options.steps,
        "pets": options.pets,
        "schedule": "AdamW, one cycle, 20 % warm-up",
    }
    record = Record(options.out, {**SETTINGS, **recipe})
    record.put("cost", {**record.read().get("cost", {}), **measure_rows(options.rows)})
    if options.speed:
        record.put("speed", measure_speed(options.rows, options.rounds))
    else:
        study(record, options)

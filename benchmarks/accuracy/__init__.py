"""What the shipped recipes reach: one record for each finished run of `moevision fit`.

    python -m benchmarks accuracy runs/cifar10-0 runs/cifar10-1    # a line each in benchmarks/accuracy/runs.jsonl
    python -m benchmarks accuracy runs/cats_vs_dogs_two --classes  # also which class goes where

A record has the test result, what it cost (images, FLOPs, CPU seconds, the time that was expected), what a pretrained
start was compared with, the load of every expert, the validation curve, and where it comes from. With --classes the
test images pass once more, for the share of each class in each expert.

Axes: C classes, E experts.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

from benchmarks.harness import HERE, argument_parser, without_places
from benchmarks.lines import put_run
from moevision.analysis import collect_routing
from moevision.analysis.readings import Load
from moevision.errors import UserError


def class_shares(run: Path, data: str) -> dict[int, list[list[float]]]:
    """Of each layer the share [C, E] of each class's choices that falls on each expert, over the test images."""
    trace = collect_routing(run, data, progress=False)
    loads = {
        layer.layer: Load.of(layer.image_takes()[:, None], trace.labels, len(trace.class_names))
        for layer in trace.layers
    }
    return {layer: load.class_share.round(4).tolist() for layer, load in loads.items()}


def record_of(run: Path, *, classes: bool = False) -> dict[str, Any]:
    """The record of a finished run folder; `classes`: its layers also have the `class_share` of the test images.

    Raises:
        UserError: if it isn't finished.
    """
    if not (run / "summary.json").is_file():
        raise UserError(f"{run} has no summary.json: its training isn't finished.")
    summary, provenance = (
        json.loads((run / name).read_text()) for name in ("summary.json", "provenance.json")
    )
    test, cost, images = summary["test"], summary["cost"], summary["steps"] * summary["batch_size"]
    shares = class_shares(run, summary["data"]) if classes else {}
    flops = (
        3 * (cost["flops_per_image"] + cost["router_flops_per_image"]) * images
    )  # backward is twice forward
    return {
        "name": summary["name"],
        "model": summary["model"],
        "data": Path(summary["data"]).name,
        "image_size": summary["image_size"],
        "seed": summary["seed"],
        "test": {
            "correct": test["correct"],
            "total": test["total"],
            "balanced_accuracy": test["balanced_accuracy"],
        },
        "cost": {
            **cost,
            "images": images,
            "training_flops": flops,
            "cpu_s": summary.get("cpu_s"),
            "duration_s": summary["duration_s"],
            "expected_s": summary.get("expected_s"),
            "images_per_s": summary["images_per_s"],
            "gpu_peak_bytes": summary.get("gpu_peak_bytes"),
            "device": summary["device"],
            "precision": summary["precision"],
        },
        "layers": [
            {
                name: layer[name]
                for name in ("layer", "counts", "max_over_mean", "cv_squared", "dead")
            }
            | ({"class_share": shares[layer["layer"]]} if classes else {})
            for layer in summary["layers"]
        ],
        "choice": summary.get("choice"),
        "curve": curve_of(run / "metrics.csv", summary["batch_size"]),
        "command": without_places(provenance["command_line"]),
        **{name: provenance[name] for name in ("code", "started_utc", "hardware", "libraries")},
    }


def curve_of(metrics: Path, batch_size: int) -> list[tuple[int, float, float | None]]:
    """One for each validation: training images seen, validation accuracy, and that of the epoch's logged batches.

    Its batches are augmented and counted before their own steps, so that is less than the images themselves would give.
    """
    curve, trained = [], []
    with metrics.open(newline="") as lines:
        for row in csv.DictReader(lines):
            if row.get("train/top1"):
                trained.append(float(row["train/top1"]))
            if row.get("val/top1"):
                train = sum(trained) / len(trained) if trained else None
                curve.append(((int(row["step"]) + 1) * batch_size, float(row["val/top1"]), train))
                trained = []
    return curve


def main() -> None:
    """Write the records."""
    parser = argument_parser("accuracy", __doc__)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run folders of `moevision fit`"
    )
    parser.add_argument(
        "--classes", action="store_true", help="also the share of each class in each expert"
    )
    parser.add_argument(
        "--out", type=Path, default=HERE / "accuracy" / "runs.jsonl", help=argparse.SUPPRESS
    )
    parser.add_argument(
        "--quick", action="store_true", help="the runs show that they run: their records say so"
    )
    options = parser.parse_args()
    for run in options.runs:
        record = record_of(run, classes=options.classes) | (
            {"dry_run": True} if options.quick else {}
        )
        put_run(options.out, record)
        share = record["test"]["correct"] / record["test"]["total"]
        print(f"{record['name']}: {share:.2%} of {record['test']['total']:,} test images")

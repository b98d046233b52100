"""Many narrow experts in the recipes? Arms and rules: `protocol.md`.

    nice -n 19 python -m benchmarks narrow --cifar10 FOLDER --photos FOLDER --weights FILE

FOLDERs have train/ and test/, and the photos that `benchmarks photo-model photos` of commit 1a1f32d2 copies; FILE has
the weights of a ViT-S/14. The runs that are left are done, and it goes on where it stopped.
"""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.harness import HERE, about, argument_parser
from benchmarks.queue import do_runs, rate_beyond, refuse_changes
from moevision.limits import keep_freed_memory
from moevision.train.report import read_summary

FOLDER = HERE / "narrow"
PROTOCOL = FOLDER / "protocol.md"
CIFAR10, PHOTOS = "cifar10", "photos"
SEARCH, COMPARISON = "search", "comparison"

RATES = {CIFAR10: (0.006, 0.012), PHOTOS: (3e-4,)}
SEARCH_SEEDS = (100, 101)
EPOCHS = {
    (CIFAR10, SEARCH): 4,
    (CIFAR10, COMPARISON): 10,
    (PHOTOS, SEARCH): 1,
    (PHOTOS, COMPARISON): 1,
}
COMMON = {
    CIFAR10: ("--config", "cifar10", "--trainer.precision", "bf16-mixed"),
    PHOTOS: (
        *(
            "--model.arch.depth",
            "10",
            "--model.arch.global_pool",
            "avg",
            "--data.image_size",
            "112",
        ),
        *(
            "--data.batch_size",
            "32",
            "--model.optim.freeze",
            "6",
            "--trainer.precision",
            "bf16-mixed",
        ),
    ),
}


def experts(number: int, of_a_token: int, hidden: int | None = None) -> tuple[str, ...]:
    """Options of the MoE layers: experts, how many a token gets, and their hidden units."""
    options = ("--model.arch.num_experts", str(number), "--model.arch.top_k", str(of_a_token))
    return options if hidden is None else (*options, "--model.arch.expert_hidden", str(hidden))


ARMS = {
    CIFAR10: {"8-k2": (), **{f"{number}-half": experts(number, 1, 256) for number in (8, 16, 32)}},
    PHOTOS: {
        "8-k2": experts(8, 2),
        **{f"{number}-k1": experts(number, 1) for number in (8, 16, 32)},
        "dense": ("--dense",),
    },
}
SEARCHED = {
    CIFAR10: ("8-half", "16-half", "32-half"),
    PHOTOS: ("8-k1", "16-k1", "32-k1"),
}
COMPARED = {
    CIFAR10: ((), range(200, 206)),  # arms beside the candidate, seeds
    PHOTOS: (("8-k2", "dense"), range(6)),
}


@dataclass(frozen=True)
class Run:
    """A training."""

    task: str
    stage: str
    arm: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """What its record is called, and its folder."""
        return f"{self.task}-{self.stage}-{self.arm}-{self.lr:g}-s{self.seed}"

    @property
    def options(self) -> list[str]:
        """Those of `moevision fit`, but for places."""
        return [
            *COMMON[self.task],
            *ARMS[self.task][self.arm],
            *("--lr", f"{self.lr:g}", "--seed_everything", str(self.seed)),
            *("--trainer.max_epochs", str(EPOCHS[self.task, self.stage])),
            *("--record_routing.images", "null"),
        ]


def all_runs(records: Sequence[dict[str, Any]]) -> Iterator[Run]:
    """Search and comparison of photos, then of CIFAR-10, as far as these records decide them."""
    for task in (PHOTOS, CIFAR10):
        searched = [
            record for record in records if (record["task"], record["stage"]) == (task, SEARCH)
        ]
        best = {}
        for arm in SEARCHED[task]:
            validation = {
                record["lr"]: record["val_top1"]
                for record in searched
                if (record["arm"], record["seed"]) == (arm, SEARCH_SEEDS[0])
            }
            for lr in RATES[task]:
                yield Run(task, SEARCH, arm, lr, SEARCH_SEEDS[0])
            if not set(RATES[task]) <= validation.keys():
                continue
            beyond = rate_beyond(validation) if len(RATES[task]) > 1 else None
            if beyond is not None:
                yield Run(task, SEARCH, arm, beyond, SEARCH_SEEDS[0])
                continue
            best[arm] = max(sorted(validation), key=lambda lr: validation[lr])
            yield Run(task, SEARCH, arm, best[arm], SEARCH_SEEDS[1])

        means = {}
        for arm, lr in best.items():
            values = [
                record["val_top1"]
                for record in searched
                if (record["arm"], record["lr"]) == (arm, lr)
            ]
            if len(values) == len(SEARCH_SEEDS):
                means[arm] = fmean(values)
        if means.keys() != set(SEARCHED[task]):
            continue
        candidate = max(means, key=lambda arm: means[arm])
        others, seeds = COMPARED[task]
        for seed in seeds:
            yield Run(task, COMPARISON, candidate, best[candidate], seed)
            for arm in others:
                yield Run(task, COMPARISON, arm, RATES[task][0], seed)


def record_of(run: Run, options: Namespace) -> dict[str, Any]:
    """Train, and what the run's files say."""
    refuse_changes(PROTOCOL, allowed=options.allow_dirty)  # before each run: a queue takes hours
    origin = about()
    folder = options.work / run.name
    shutil.rmtree(folder, ignore_errors=True)
    places = ["--runs_root", str(options.work), "--name", run.name]
    if run.task == CIFAR10:
        command = ["fit", *run.options, "--data.path", str(options.cifar10), *places]
    else:
        places += ["--pretrained", str(options.weights)]
        command = ["fit", str(options.photos / "all"), *run.options, *places]
    with (options.work / f"{run.name}.log").open("w", encoding="utf-8") as log:
        subprocess.run(
            [sys.executable, "-m", "moevision", *command], stdout=log, stderr=log, check=True
        )

    summary = read_summary(folder / "summary.json")
    shutil.rmtree(folder / "checkpoints")
    shutil.rmtree(folder / "model")
    found = {
        **vars(run),
        "options": run.options,
        "steps": summary.steps,
        "cpu_s": round(summary.cpu_s or 0),
        "parameters": summary.cost.total_parameters,
        "val_top1": last_validation(folder / "metrics.csv"),
        "weights": summary.test.weights,
        "busiest": [round(layer.max_over_mean, 3) for layer in summary.layers],
    }
    if run.stage == COMPARISON:
        found |= {"correct": summary.test.correct, "total": summary.test.total}
    return {**found, **origin}


def last_validation(metrics: Path) -> float:
    """Accuracy on the validation images at the end."""
    with metrics.open(encoding="utf-8", newline="") as file:
        values = [row["val/top1"] for row in csv.DictReader(file) if row.get("val/top1")]
    return float(values[-1])


def main() -> None:
    """Do the runs that are left."""
    parser = argument_parser("narrow", __doc__)
    add = parser.add_argument
    add("--cifar10", type=Path, required=True, help="folder of CIFAR-10")
    add("--photos", type=Path, required=True, help="folder of the photos of eleven classes")
    add("--weights", type=Path, required=True, help="weights of a ViT-S/14, a .safetensors file")
    add("--limit", type=int, default=0, help="runs to do; 0: all that are left")
    add("--out", type=Path, default=FOLDER / "runs.jsonl", help="records (%(default)s)")
    add("--work", type=Path, default=Path("runs/narrow"), help="runs, locks (%(default)s)")
    add("--allow-dirty", action="store_true", help="try things out on an uncommitted tree")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as in `moevision fit`
    options.work.mkdir(parents=True, exist_ok=True)
    do_runs(
        all_runs,
        record_of,
        lambda run, record: f"{run.name}: val {record['val_top1']:.1%}, {record['cpu_s']} CPU s",
        options,
    )

"""Arms, the runs of the search and of the comparison, and one run: `moevision fit`, and what it is judged by."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.demo.needed import measure
from benchmarks.photo_model.photos import ALL, SEARCH
from moevision.analysis.images import open_pictures
from moevision.models.io import load_model
from moevision.train.report import read_summary

COMMON = (
    *("--model.arch.depth", "10", "--model.arch.global_pool", "avg", "--data.image_size", "112"),
    *("--data.batch_size", "32", "--model.optim.freeze", "6", "--trainer.precision", "bf16-mixed"),
    *("--record_routing.images", "null"),
)


def experts_in(block: int, number: int, redrawn: float, *more: str) -> tuple[str, ...]:
    """Options of experts in one block, of which a patch gets one; `redrawn` is the share of hidden units drawn anew."""
    return (
        *("--model.arch.moe_layers", f"[{block}]", "--model.arch.num_experts", str(number)),
        *("--model.arch.top_k", "1", "--model.arch.upcycle_reinit", str(redrawn), *more),
    )


ARMS: dict[str, tuple[str, ...]] = {
    "dense": ("--dense",),
    "block-8": experts_in(8, 8, 1.0),
    # Three blocks behind learn faster than the experts do, and rely on what is peculiar to each.
    "block-6": experts_in(6, 8, 1.0),
    # Noise that is as large as the scores at first: the second choice learns a patch too, so that a patch moved alone
    # changes little, and all patches of two experts still change much.
    "block-8-noisy": experts_in(8, 8, 1.0, "--model.arch.noise", "learned"),
}
SEARCHED: tuple[tuple[str, float], ...] = (  # arm, highest rate
    ("dense", 3e-4),
    ("block-8-noisy", 3e-4),
    # The control changes answers of small margin alone: a higher rate, for fewer of them.
    ("block-8", 1e-3),
    ("block-6", 3e-4),
    ("block-8", 1e-4),
    ("dense", 1e-3),
    ("dense", 1e-4),
    # Between the two rates of block 8 that were tried: a lower one makes experts needed and costs accuracy.
    ("block-8", 2e-4),
)
SEARCH_SEED, SEEDS = 100, (0, 1, 2)
COMPARED: tuple[tuple[str, float], ...] = (  # chosen by the search
    ("block-8", 2e-4),
    ("dense", 3e-4),
)
SEARCH_EPOCHS, EPOCHS = 1, 3
AGAIN_EPOCHS = 2  # of the second comparison, see the protocol's amendments
IMAGES = {SEARCH: 20, ALL: 60}  # of each class, for what changes without experts


@dataclass(frozen=True)
class Run:
    """A training: `photos` says whether it is of the search or of the comparison, and what it sees."""

    photos: str
    arm: str
    lr: float
    seed: int
    epochs: int

    @property
    def name(self) -> str:
        """What its record is called, and its folder."""
        again = "-again" if self.epochs == AGAIN_EPOCHS else ""
        return f"{self.photos}-{self.arm}-{self.lr:g}-s{self.seed}{again}"

    @property
    def options(self) -> list[str]:
        """Those of `moevision fit`, but for places."""
        return [
            *COMMON,
            *ARMS[self.arm],
            *("--lr", f"{self.lr:g}", "--trainer.max_epochs", str(self.epochs)),
            *("--seed_everything", str(self.seed)),
        ]


def all_runs(_records: list[dict[str, Any]]) -> Iterator[Run]:
    """The search, then both comparisons, whose arms take turns."""
    for arm, lr in SEARCHED:
        yield Run(SEARCH, arm, lr, SEARCH_SEED, SEARCH_EPOCHS)
    for epochs in (EPOCHS, AGAIN_EPOCHS):
        for seed in SEEDS:
            for arm, lr in COMPARED:
                yield Run(ALL, arm, lr, seed, epochs)


def record_of(run: Run, given: Namespace) -> dict[str, Any]:
    """Train, and measure on validation photos; in the comparison on the test."""
    folder = trained(run, given)
    summary = read_summary(folder / "summary.json")
    found = {
        **vars(run),
        "options": run.options,
        "epochs": summary.epochs,
        "steps": summary.steps,
        "cpu_s": round(summary.cpu_s or 0),
        "parameters": summary.cost.total_parameters,
        "val_top1": last_validation(folder / "metrics.csv"),
        "busiest": [round(layer.max_over_mean, 3) for layer in summary.layers],
    }
    if run.photos == ALL:
        found |= {"correct": summary.test.correct, "total": summary.test.total}
    if summary.layers:
        found["needed"] = needed_of(folder, run, given.photos)
    shutil.rmtree(folder / "checkpoints")
    return found


def trained(run: Run, given: Namespace) -> Path:
    """Train in a folder of its own, from the beginning; that folder."""
    folder: Path = given.work / run.name
    if folder.exists():
        shutil.rmtree(folder)
    places = (
        "--runs_root",
        str(given.work),
        "--name",
        run.name,
        "--pretrained",
        str(given.weights),
    )
    command = [sys.executable, "-m", "moevision", "fit", str(given.photos / run.photos)]
    with (given.work / f"{run.name}.log").open("w", encoding="utf-8") as log:
        subprocess.run([*command, *places, *run.options], stdout=log, stderr=log, check=True)
    return folder


def last_validation(metrics: Path) -> float:
    """Accuracy on the validation photos at the end."""
    with metrics.open(encoding="utf-8", newline="") as file:
        values = [row["val/top1"] for row in csv.DictReader(file) if row.get("val/top1")]
    return float(values[-1])


def needed_of(folder: Path, run: Run, photos: Path) -> dict[str, Any]:
    """Right answers that change without few experts; in the search in bfloat16, which takes half the time."""
    model = load_model(str(folder))
    is_search = run.photos == SEARCH
    pictures = open_pictures(
        photos / ALL,
        model.image_size,
        framing=model.framing,
        split="val" if is_search else "test",
        limit=IMAGES[run.photos] * len(model.class_names),
        class_names=model.class_names,
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=is_search):
        return measure(model, pictures)

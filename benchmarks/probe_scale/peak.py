"""The lower peak of `protocol.md`: draws three folders of photos and trains nine pairs.

nice -n 19 python -m benchmarks.probe_scale.peak DATA WEIGHTS WORK
"""

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.harness import about
from benchmarks.queue import is_recorded, write_run
from moevision.train.report import read_summary

OUT = Path(__file__).parent / "peak.jsonl"
FOLDERS = {  # source, training photos of a class, test photos of a class
    "cats_dogs": ("cats_vs_dogs", 140, 150),
    "things": ("imagenette128", 36, 40),
    "cifar10": ("cifar10", 36, 40),
}
RATES = {"peak": "3e-4", "third": "1e-4"}


def draw(data: Path, folder: Path, source: str, train: int, test: int) -> None:
    """Photos of each class, as links."""
    if folder.exists():
        return
    rng = np.random.default_rng(0)
    held_out = next(name for name in ("test", "val") if (data / source / name).exists())
    for split, count, of in (("train", train, "train"), ("test", test, held_out)):
        for kind in sorted((data / source / of).iterdir()):
            photos = sorted(kind.iterdir())
            place = folder / split / kind.name
            place.mkdir(parents=True)
            for row in rng.permutation(len(photos))[:count]:
                (place / photos[row].name).symlink_to(photos[row])


def train(folder: Path, weights: Path, work: Path, name: str, rate: str, seed: int) -> dict:
    """`moevision fit`, and what it found."""
    shutil.rmtree(work / name, ignore_errors=True)
    options = ["--pretrained", str(weights), "--epochs", "3", "--data.image_size", "112"]
    options += ["--lr", rate, "--seed_everything", str(seed)]
    command = [sys.executable, "-m", "moevision", "fit", str(folder), *options]
    with (work / f"{name}.log").open("w", encoding="utf-8") as log:
        places = ["--runs_root", str(work), "--name", name]
        subprocess.run([*command, *places], stdout=log, stderr=log, check=True)
    summary = read_summary(work / name / "summary.json")
    with (work / name / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("val/loss")]
    shutil.rmtree(work / name / "checkpoints")
    return {
        "correct": summary.test.correct,
        "total": summary.test.total,
        "val_top1": [round(float(row["val/top1"]), 4) for row in rows],
        "val_loss": [round(float(row["val/loss"]), 5) for row in rows],
        "steps": summary.steps,
        "cpu_s": summary.cpu_s,
    }


def main() -> None:
    """Do the runs that are left."""
    data, weights, work = map(Path, sys.argv[1:])
    for folder, drawn in FOLDERS.items():
        draw(data, work / folder, *drawn)
    for seed in (1, 2, 3):
        for folder in FOLDERS:
            for arm, rate in RATES.items():
                name = f"{arm}-{folder}-s{seed}"
                if is_recorded(OUT, name):
                    continue
                origin = about()
                found = train(work / folder, weights, work, name, rate, seed)
                write_run(
                    OUT, name, {"arm": arm, "folder": folder, "seed": seed, **found, **origin}
                )
                print(name, found["correct"], found["total"], found["val_loss"], flush=True)


if __name__ == "__main__":
    main()

"""How much of an image's difficulty do its experts tell, beside as many directions of pooled features?

    python -m benchmarks difficulty --work runs/label_noise --out benchmarks/label_noise/difficulty.json

Of the runs of `label_noise` with random flips, with and without experts, and of their images with right labels: the
share of the variance of the mean probability of the label that a linear regression explains, on the shares of all
experts (of the last third of the training), and on the first principal directions of the finished model's pooled
features, as many as the shares have. With 18,000 images and 14 directions, chance explains less than .001.

Axes: n images, k directions.
"""

from __future__ import annotations

from argparse import ArgumentParser
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import about, argument_parser
from benchmarks.label_noise import FOLDER, SEEDS, _images_in
from benchmarks.lines import write_lines
from benchmarks.queue import refuse_changes
from benchmarks.timing import rounded
from moevision.analysis.good_data import examine, images_of
from moevision.data.scores import FILE, Scores
from moevision.errors import csv_name
from moevision.models.io import load_model

ARMS = ("moe", "dense")
DIRECTIONS = 14  # two layers of 8 shares that sum to 1


def told(values: np.ndarray, by: np.ndarray) -> float:
    """Share of the variance of [n] that a linear regression on [n, k] explains."""
    x = np.column_stack([np.ones(len(by)), by]).astype(np.float64)
    fitted = x @ np.linalg.lstsq(x, values, rcond=None)[0]
    return float(1 - np.var(values - fitted) / np.var(values))


def directions(features: np.ndarray, count: int) -> np.ndarray:
    """[n, count] the first principal components of [n, D]."""
    centred = features.astype(np.float64) - features.mean(0)
    return np.asarray(centred @ np.linalg.svd(centred.T @ centred)[0][:, :count])


def measure(work: Path, arm: str, seed: int) -> dict[str, Any]:
    """What experts, if there are some, and features tell about the images whose labels are right."""
    torch.set_num_threads(1)
    run, wrong = work / f"random-{arm}-s{seed}", _images_in(work / f"random-s{seed}-flips.csv")
    images = images_of(run)
    known = examine(images, Scores.read(run / FILE), load_model(str(run)))
    assert known.features is not None
    right = np.array([csv_name(sample.sample_id) not in wrong for sample in images.samples["train"]])
    value, shares = known.scores["p_mean"].astype(np.float64), list(known.experts.values())
    right &= np.isfinite(np.column_stack([value, *shares])).all(1)  # visited, and in the last third
    by = np.concatenate(shares, 1)[right] if shares else None
    own = directions(known.features[: len(right)][right], DIRECTIONS)
    return {
        "arm": arm,
        "seed": seed,
        "images": int(right.sum()),
        "experts": None if by is None else rounded(told(value[right], by), 4),
        "features": rounded(told(value[right], own), 4),
    }


def parser() -> ArgumentParser:
    """The command line."""
    known = argument_parser("difficulty", __doc__)
    known.add_argument("--work", type=Path, default=Path("runs/label_noise"), help="its runs (%(default)s)")
    known.add_argument("--out", type=Path, default=FOLDER / "difficulty.json", help="the record (%(default)s)")
    known.add_argument("--allow-dirty", action="store_true", help="try it out")
    return known


def main() -> None:
    """Measure all runs."""
    options = parser().parse_args()
    refuse_changes(FOLDER / "README.md", allowed=options.allow_dirty)
    origin = about()
    with get_context("spawn").Pool(2) as pool:
        rows = pool.starmap(measure, [(options.work, arm, seed) for arm in ARMS for seed in SEEDS], chunksize=1)
    print(*rows, sep="\n")
    write_lines(options.out, {"directions": DIRECTIONS, "rows": rows, **origin})

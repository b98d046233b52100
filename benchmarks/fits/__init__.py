"""Which fit suits photos that aren't square: crop, pad or squash, by a linear head on frozen features.

    python -m benchmarks fits run --cats path/to/cats_vs_dogs --pretrained FILE    # features of each fit, then heads
    python -m benchmarks fits report                                               # README.md's tables

All photos are divided anew by each seed, the same for every fit. The head is logistic regression on standardized
features; a fit's features are computed once, as evaluation prepares an image, since the trunk is frozen.
"""

from __future__ import annotations

import statistics
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from benchmarks.harness import HERE, about, argument_parser, usual_precision
from benchmarks.markdown import table
from benchmarks.queue import fill_readme, read_records, write_run
from benchmarks.strangers import features_of
from benchmarks.study import contrasts
from moevision.analysis.images import open_pictures
from moevision.config import Fit
from moevision.models.io import architecture_of, describe
from moevision.models.upcycle import load_dense

FOLDER = HERE / "fits"
RUNS = FOLDER / "runs.jsonl"
SIDE, SEEDS, TESTED = 112, 3, 832  # px; divisions; photos to test on, the others train


def run(options: Namespace) -> None:
    """Features of every fit, and a head for each seed."""
    origin = about()
    net = load_dense(architecture_of(options.pretrained), options.pretrained, num_classes=2, image_size=SIDE).eval()
    model = describe(net)
    for fit in get_args(Fit):
        pictures = open_pictures(options.cats, SIDE, framing=replace(model, fit=fit).framing, split="all")
        labels = np.array([pictures.label(row) for row in range(len(pictures))])
        with torch.autocast("cpu", torch.bfloat16, enabled=usual_precision() == "bf16"):
            features, _ = features_of(model, pictures)
        for seed in range(SEEDS):
            correct, total = head(features, labels, seed)
            found = {"fit": fit, "seed": seed, "correct": correct, "total": total, "image_size": SIDE, **origin}
            write_run(options.out, f"{fit}-{seed}", found)
            print(f"{fit} {seed}: {correct} of {total}", flush=True)


def head(features: np.ndarray, labels: np.ndarray, seed: int) -> tuple[int, int]:
    """Test photos that a linear head on features [n, D] recognizes, and how many there are."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    order = np.random.default_rng(seed).permutation(len(labels))
    test, train = order[:TESTED], order[TESTED:]
    regression = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    regression.fit(features[train], labels[train])
    return int((regression.predict(features[test]) == labels[test]).sum()), len(test)


def parts_of(records: list[dict[str, Any]]) -> list[str]:
    """What stands in the README."""
    shares: dict[str, dict[int, float]] = {}
    for record in records:
        shares.setdefault(record["fit"], {})[record["seed"]] = record["correct"] / record["total"]
    gaps = {each.first: each for each in contrasts(shares, [(fit, "crop") for fit in shares if fit != "crop"])}
    rows = []
    for fit, by_seed in shares.items():
        gap = gaps.get(fit)
        said = "" if gap is None else f"{100 * gap.mean:+.2f} ± {100 * gap.half:.2f}"
        rows.append([f"`{fit}`", *(f"{by_seed[seed]:.1%}" for seed in sorted(by_seed)),
                     f"{statistics.fmean(by_seed.values()):.1%}", said])  # fmt: skip
    seeds = [f"seed {seed}" for seed in range(SEEDS)]
    return [table(["fit", *seeds, "mean", "less crop, points (95 %)"], rows, "l" + "r" * (SEEDS + 2))]


def main() -> None:
    """Run with command-line arguments."""
    parser = argument_parser("fits", __doc__)
    parser.add_argument("verb", choices=("run", "report"))
    parser.add_argument("--cats", type=Path, help="folder of photos of cats and dogs")
    parser.add_argument("--pretrained", type=Path, help="weights of a ViT (.safetensors)")
    parser.add_argument("--out", type=Path, default=RUNS, help="records (%(default)s)")
    parser.add_argument("--readme", type=Path, default=FOLDER / "README.md", help="where tables go (%(default)s)")
    options = parser.parse_args()
    if options.verb == "report":
        fill_readme(options.readme, parts_of(read_records(options.out)))
    elif options.cats is None or options.pretrained is None:
        parser.error("run takes --cats and --pretrained")
    else:
        run(options)

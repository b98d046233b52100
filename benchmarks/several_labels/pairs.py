"""Two images side by side, of one class or of two, with the labels of both.

    python -m benchmarks.several_labels.pairs IMAGENETTE OUT [--count 4000] [--seed 0]

IMAGENETTE has `train/` and `val/` with a folder for each class. OUT gets `labels.csv` with the columns path, label and
split, and 128 x 128 px JPEGs. A pair of train is of train images alone, one of test of val images alone; both halves
are squeezed to half the width. A tenth of the pairs shows one class twice, and so has one label.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
from PIL import Image

from moevision.data.collection import readable_class_names

SIDE = 128
ONE_CLASS = 0.1  # share of the pairs
TEST = 0.25  # number of test pairs, beside those of train


def write_pairs(source: Path, out: Path, count: int, seed: int) -> None:
    """`count` pairs of train images and a quarter as many of val images, with `labels.csv`."""
    rng = np.random.default_rng(seed)
    rows = []
    for split, folder, pairs in (("train", "train", count), ("test", "val", round(TEST * count))):
        classes = sorted(path.name for path in (source / folder).iterdir() if path.is_dir())
        files = {name: sorted((source / folder / name).iterdir()) for name in classes}
        names = dict(zip(classes, readable_class_names(classes), strict=True))
        (out / split).mkdir(parents=True, exist_ok=True)
        for number in range(pairs):
            left, right = rng.choice(classes, 2, replace=False)
            if rng.random() < ONE_CLASS:
                right = left
            path = f"{split}/{number:05d}.jpg"
            side_by_side([rng.choice(files[left]), rng.choice(files[right])]).save(
                out / path, quality=90
            )
            labels = sorted({names[left], names[right]})
            rows.append((path, "|".join(labels), split))

    with (out / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "label", "split"))
        writer.writerows(rows)


def side_by_side(files: list[Path]) -> Image.Image:
    """Two images, each squeezed to half the width."""
    pair = Image.new("RGB", (SIDE, SIDE))
    for position, file in enumerate(files):
        half = Image.open(file).convert("RGB").resize((SIDE // 2, SIDE), Image.Resampling.BICUBIC)
        pair.paste(half, (position * SIDE // 2, 0))
    return pair


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_pairs(args.source, args.out, args.count, args.seed)

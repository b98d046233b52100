"""The photos of eleven classes: Imagenette's ten, whose springers are dogs here, with other dogs and with cats.

Of what the two sets hold out, half is for validation and half for the test. A second folder is for the search: it has
the same training photos, and in the place of the test photos some of validation.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

CLASSES = {  # class -> folders of the data, SPLIT being train or val
    "tench": ("imagenette128/SPLIT/n01440764",),
    "dog": ("imagenette128/SPLIT/n02102040", "cats_vs_dogs/SPLIT/dog"),
    "cassette player": ("imagenette128/SPLIT/n02979186",),
    "chain saw": ("imagenette128/SPLIT/n03000684",),
    "church": ("imagenette128/SPLIT/n03028079",),
    "French horn": ("imagenette128/SPLIT/n03394916",),
    "garbage truck": ("imagenette128/SPLIT/n03417042",),
    "gas pump": ("imagenette128/SPLIT/n03425413",),
    "golf ball": ("imagenette128/SPLIT/n03445777",),
    "parachute": ("imagenette128/SPLIT/n03888257",),
    "cat": ("cats_vs_dogs/SPLIT/cat",),
}
MOST = {"train": 600, "val": 178, "test": 178}  # of a class; 178: half of the smallest
SEARCH_VAL, SEARCH_TEST = 100, 5  # of a class, both of validation
ALL, SEARCH = "all", "search"  # folders of OUT


def copy_photos(data: Path, out: Path) -> int:
    """Copy the photos of all classes to OUT/all, and link those of the search in OUT/search; how many are copied."""
    pairs = list(chosen_photos(data))
    for photo, place in pairs:
        target = out / ALL / place
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(photo, target)
    for name in CLASSES:
        for split, photos in search_photos(out / ALL, name).items():
            folder = out / SEARCH / split / name
            folder.mkdir(parents=True)
            for photo in photos:
                os.link(photo, folder / photo.name)
    return len(pairs)


def chosen_photos(data: Path) -> Iterator[tuple[Path, Path]]:
    """Each photo, and its place: SPLIT/CLASS/FILE."""
    for name, folders in CLASSES.items():
        for folder in folders:
            held_out = in_drawn_order(data / folder.replace("SPLIT", "val"))
            half = len(held_out) // 2
            splits = {
                "train": in_drawn_order(data / folder.replace("SPLIT", "train")),
                "val": held_out[:half],
                "test": held_out[half:],
            }
            for split, photos in splits.items():
                for photo in photos[: MOST[split] // len(folders)]:
                    yield photo, Path(split, name, photo.name)


def in_drawn_order(folder: Path) -> list[Path]:
    """The photos of a folder in an order that is drawn, always the same one."""
    photos = sorted(folder.iterdir())
    return [photos[row] for row in np.random.default_rng(0).permutation(len(photos))]


def search_photos(photos: Path, name: str) -> dict[str, Sequence[Path]]:
    """By split, the photos of a class that the search sees; none is of the test."""
    val = in_drawn_order(photos / "val" / name)
    return {
        "train": in_drawn_order(photos / "train" / name),
        "val": val[:SEARCH_VAL],
        "test": val[SEARCH_VAL:][:SEARCH_TEST],
    }

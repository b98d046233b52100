"""From what the user names to a collection: the one place that decides what kind of thing a path is."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from moevision.data.collection import (
    Collection,
    DrawnCollection,
    access_error,
    explain_access_errors,
)
from moevision.data.folder import read_folder, split_folders, walk
from moevision.data.images import is_image_path
from moevision.data.named import DATASET_NAMES, DRAWN_SIZES, HF, NAMED, SYNTHETIC, read_named
from moevision.data.tables import Columns, count_rows, read_dataset, read_table
from moevision.errors import UserError

DataKind = Literal["drawn", "named", "csv", "dataset", "folder"]
UNKNOWN_COUNT = 10_000  # images that a dataset is taken to have before it is fetched


def kind_of(path: str) -> DataKind:
    """What a path names, by names alone: a known dataset, a CSV, or one of Hugging Face.

    Everything else is a folder of images, also what isn't there: `read_folder` says what is wrong with it.
    """
    if path in DATASET_NAMES:
        return "drawn" if path == SYNTHETIC else "named"
    if path.startswith(HF):
        return "dataset"
    location = Path(path).expanduser()
    if location.suffix.lower() == ".csv" and os.path.isfile(location):
        return "csv"
    try:
        if any((location / name).is_file() for name in ("dataset_dict.json", "state.json")):
            return "dataset"
    except OSError as error:
        raise access_error(location, error) from error
    return "folder"


def open_collection(
    path: str,
    *,
    root: str = "data",
    download: bool = False,
    image_size: int = 64,
    seed: int = 0,
    sizes: Mapping[str, int] = DRAWN_SIZES,
    columns: Columns = (None, None),
) -> Collection:
    """Find the dataset that ``path`` names.

    That is one of `DATASET_NAMES`, a folder (write ``./pets`` for a folder that bears such a name) of images, a CSV
    manifest, or a Hugging Face dataset (``hf:NAME[:CONFIG]``, or a folder that it was saved to). ``image_size``,
    ``seed`` and ``sizes`` (per split) are of the drawn images, ``root`` and ``download`` of named ones; ``columns`` are
    those of a table with image and label, which None finds.
    """
    kind = kind_of(path)
    location = Path(path).expanduser()
    if kind == "drawn":
        return DrawnCollection.of(image_size, seed, sizes)
    if kind == "named":
        return read_named(path, root, download=download)
    if kind == "dataset":
        return read_dataset(path, columns, download=download)
    try:
        with explain_access_errors(location):
            if kind == "csv":
                return read_table(location, columns)
            return read_folder(location)
    except UserError as error:
        if kind == "folder" and [*location.glob("*.tar"), *location.glob("*/*.tar")]:
            raise UserError(
                f"{error}; tars in the WebDataset format are read as {HF}{path}"
            ) from error
        if os.path.exists(location) or isinstance(error.__cause__, OSError):
            raise
        alike = difflib.get_close_matches(path, DATASET_NAMES, n=1)
        hint = f"did you mean {alike[0]!r}?" if alike else ", ".join(DATASET_NAMES)
        raise UserError(f"{error}; or a dataset's name: {hint}") from None


def count_images(path: str | Path) -> int:
    """Images of a dataset, without reading one: of a folder files by their suffix, 0 of what isn't there."""
    path = str(path)
    kind = kind_of(path)
    location = Path(path).expanduser()
    if path in NAMED:
        return NAMED[path].images
    if kind == "dataset":
        try:
            return count_rows(path)
        except UserError:
            return UNKNOWN_COUNT
    if kind == "csv":
        with location.open("rb") as file:
            return max(0, sum(1 for _ in file) - 1)
    return sum(is_image_path(entry.name) for entry in walk(location))


def contains_path(path: str, location: Path) -> bool:
    """Whether images at `location`, which needn't exist, belong to the folder of images at `path`."""
    root = Path(path).expanduser().resolve()
    if kind_of(path) != "folder" or not root.is_dir():
        return False
    for folder in split_folders(root).values() or [root]:
        if location.resolve().is_relative_to(folder):
            below = location.resolve().relative_to(folder).parts
            return bool(below) and below[0][0] not in "._@"
    return False

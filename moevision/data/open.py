"""Open the dataset that the user named: the only module that decides whether a path is a folder, a table or a name."""

from __future__ import annotations

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
from moevision.data.folder import (
    DATASET_NAMES,
    HF,
    is_saved_dataset,
    read_folder,
    split_folders,
    walk,
)
from moevision.data.images import is_image_path
from moevision.data.named import DRAWN, DRAWN_SIZES, NAMED, read_named
from moevision.data.tables import Columns, count_rows, read_dataset, read_table
from moevision.errors import UserError

DataKind = Literal["drawn", "named", "csv", "dataset", "folder"]
UNKNOWN_COUNT = 10_000  # images that a dataset is assumed to have while it isn't downloaded


def kind_of(path: str) -> DataKind:
    """What kind of dataset a path names, without reading the data: a dataset of ours, a CSV, or one of Hugging Face.

    Everything else counts as a folder of images, even if it doesn't exist: `read_folder` then raises the error.
    """
    if path in DATASET_NAMES:
        return "drawn" if path in DRAWN else "named"
    if path.startswith(HF):
        return "dataset"
    location = Path(path).expanduser()
    if location.suffix.lower() == ".csv" and os.path.isfile(location):
        return "csv"
    try:
        return "dataset" if is_saved_dataset(location) else "folder"
    except OSError as error:
        raise access_error(location, error) from error


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
    """Open the dataset that ``path`` names.

    ``path`` is one of `DATASET_NAMES`, a folder of images (write ``./pets`` if its name is one of those), a CSV
    manifest, or a Hugging Face dataset (``hf:NAME[:CONFIG]``, or a folder that it was saved to).

    ``image_size``, ``seed`` and ``sizes`` (images per split) apply to drawn datasets only, ``root`` to named ones,
    and ``download`` to these and Hugging Face's. ``columns`` names the image and the label column of a table; None
    finds them.
    """
    kind = kind_of(path)
    location = Path(path).expanduser()

    if kind == "drawn":
        return DrawnCollection.of(DRAWN[path], image_size, seed, sizes)
    if kind == "named":
        return read_named(path, root, download=download)
    if kind == "dataset":
        return read_dataset(path, columns, download=download)

    with explain_access_errors(location):
        if kind == "csv":
            return read_table(location, columns)
        return read_folder(location)


def count_images(path: str | Path) -> int:
    """Number of images of a dataset, without opening any; 0 if the path doesn't exist.

    In a folder, files with the suffix of an image are counted.
    """
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
            return max(0, sum(1 for _ in file) - 1)  # lines without the header
    return sum(is_image_path(entry.name) for entry in walk(location))


def contains_path(path: str, location: Path) -> bool:
    """Whether images in the folder `location`, which needn't exist, would be read with the folder of images `path`."""
    root = Path(path).expanduser().resolve()
    if kind_of(path) != "folder" or not root.is_dir():
        return False
    for folder in split_folders(root).values() or [root]:
        if location.resolve().is_relative_to(folder):
            parts = location.resolve().relative_to(folder).parts
            # A class folder whose name begins with one of these isn't read, see `subfolders`.
            return bool(parts) and parts[0][0] not in "._@"
    return False

"""`PictureSet`: pictures as the model sees them, opened as training and testing open them.

Whatever the pictures come from (a folder, a dataset by name, a torch dataset), they go through the data package: the
same split, the same decoding, the same central square. So the explorer shows the pictures that `moevision test`
measures, and none that the model was trained on unless asked to.

Axes: S = ``image_size``; a patch is an index into the row-major grid.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from moevision.analysis.picture_sources import Collected, FromDataset, View, balanced_subset, labels_in
from moevision.data.named import open_collection
from moevision.data.sources import SPLITS, Collection, FileCollection, Sample
from moevision.data.splits import Cut, make_splits, read_splits
from moevision.data.synthetic import SyntheticPets
from moevision.errors import DataWarning, UserError
from moevision.names import shown

Pixels = npt.NDArray[np.uint8]

DRAWN_SIZES = {"train": 16_000, "val": 1_000, "test": 2_000}
"""Pictures of synthetic_pets per split, as `ImageDataModule` has them by default."""


@runtime_checkable
class PictureSet(Protocol):
    """Labelled pictures of one size, by index.

    Attributes:
        class_names: names of the labels.
        name: what the pictures are, in words.
        part_names: names of the values of a part mask; empty where parts aren't known.
    """

    class_names: tuple[str, ...]
    name: str
    part_names: tuple[str, ...]

    def __len__(self) -> int:
        """Number of pictures, unreadable ones included."""

    def image(self, index: int) -> Pixels:
        """The picture, uint8 [S, S, 3] in RGB order; raises `BadImageError` if it can't be read."""

    def label(self, index: int) -> int:
        """The class, an index into `class_names`; -1 if it isn't known."""

    def picture_name(self, index: int) -> str:
        """A name that stays the same across runs and machines: never an absolute path."""

    def part_mask(self, index: int) -> Pixels | None:
        """The part seen at each pixel, uint8 [S, S], an index into `part_names`; None without parts."""


Data = str | Path | Dataset[Any] | PictureSet


def open_pictures(
    data: Data,
    image_size: int,
    *,
    split: str = "test",
    limit: int | None = None,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
    root: str | Path = "data",
    download: bool = False,
    run_dir: str | Path | None = None,
) -> PictureSet:
    """Open pictures as evaluation sees them.

    Args:
        data: `synthetic_pets`, another dataset's name (`cifar10`, ...), a folder with one subfolder per class (also
            inside train/, val/, test/), a torch dataset of (PIL image, label), or a `PictureSet`.
        image_size: S, side of the square pictures in pixels.
        split: `test`, `val`, `train`, or `all`; cut as `ImageDataModule` cuts it where the data came unsplit. A torch
            dataset or a `PictureSet` is taken as it is.
        limit: take at most so many pictures, the same number of each class as far as there are enough. They are drawn
            by a hash of seed and name: a larger limit adds pictures and removes none.
        seed: of the cut, of drawn pictures and of `limit`; 0 is the data module's default.
        class_names: the model's classes. Labels become indices into them by name (case and underscores don't count);
            where the model knows none of the data's classes the data keeps its own.
        root: folder in which named datasets live.
        download: fetch a named dataset that isn't there.
        run_dir: a run's folder; its splits.csv says which pictures were held out.

    Raises:
        UserError: if the data are missing, laid out otherwise, or have no such split.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}: it must be at least 1 picture.")
    pictures: PictureSet
    if isinstance(data, PictureSet):
        pictures = data
    elif isinstance(data, SyntheticPets):  # drawn again at the model's size, with its part masks
        pets = SyntheticPets(len(data), image_size, data.seed, data.split)
        pictures = Collected.of_drawn(pets, f"synthetic_pets, {data.split} set, seed {data.seed}")
    elif isinstance(data, str | Path):
        pictures = _from_collection(data, image_size, split, seed, root, download, run_dir)
    else:
        pictures = FromDataset(data, image_size, class_names)
    return _viewed(pictures, limit, seed, class_names)


def _from_collection(
    data: str | Path,
    image_size: int,
    split: str,
    seed: int,
    root: str | Path,
    download: bool,
    run_dir: str | Path | None,
) -> PictureSet:
    if split not in (*SPLITS, "all"):
        raise UserError(f"There is no split {split!r}: choose one of {', '.join(SPLITS)}, all.")
    collection = open_collection(
        str(data), root=str(root), download=download, image_size=image_size, seed=seed, sizes=DRAWN_SIZES
    )
    samples, class_names, sentences = _samples(collection, split, seed, run_dir)
    for sentence in [*collection.notes, *sentences]:
        warnings.warn(sentence, DataWarning, stacklevel=4)
    what = shown(Path(data).expanduser().resolve().name) if isinstance(collection, FileCollection) else str(data)
    which = "all pictures" if split == "all" else f"{split} set"
    return Collected(collection, samples, image_size, tuple(class_names), f"{what}, {which}, seed {seed}")


def _samples(
    collection: Collection, split: str, seed: int, run_dir: str | Path | None
) -> tuple[list[Sample], list[str], list[str]]:
    """The split's pictures, the names of their labels, and warnings."""
    if split == "all":
        return [sample for part in collection.given.values() for sample in part], collection.class_names, []
    table = None if run_dir is None else Path(run_dir) / "splits.csv"
    if table is not None and table.exists():
        splits, class_names = read_splits(table, collection)
    else:
        splits, class_names = make_splits(collection, Cut(seed=seed)), collection.class_names
    if split not in splits.samples:
        raise UserError(f"There is no {split} set in this data: choose one of {', '.join(splits.samples)}, all.")
    return splits.samples[split], class_names, splits.warnings


def _viewed(pictures: PictureSet, limit: int | None, seed: int, class_names: Sequence[str] | None) -> PictureSet:
    """The pictures with the model's labels, and as many of them as wanted."""
    names, new_label = labels_in(pictures.class_names, class_names)
    if names == pictures.class_names and (limit is None or limit >= len(pictures)):
        return pictures
    indices: Sequence[int] = range(len(pictures))
    name = pictures.name
    if limit is not None and limit < len(pictures):
        indices = balanced_subset(pictures, limit, seed)
        name = f"{name}, {len(indices)} of {len(pictures)} pictures"
    return View(pictures, indices, names, new_label, name)


def patch_crop(image: Pixels, grid: tuple[int, int], patch: int, context: int = 1) -> Pixels:
    """A patch with its surroundings, always in the middle of its crop.

    Where the surroundings leave the picture it is mirrored at its edge, so that all crops have one size and the patch
    covers the same part of each: the middle 1 / (1 + 2 · context) of either side.

    Args:
        image: uint8 [H, W, 3].
        grid: (rows, columns) of the patches.
        patch: row-major index of the patch.
        context: number of patches shown on each side.

    Returns:
        uint8 [(1 + 2 · context) · patch height, (1 + 2 · context) · patch width, 3].

    Raises:
        UserError: if there is no such patch or patches don't tile the picture.
    """
    rows, columns = grid
    height, width = image.shape[0] // rows, image.shape[1] // columns
    if (height * rows, width * columns) != image.shape[:2] or not height or not width:
        raise UserError(f"A grid of {rows} x {columns} patches does not tile {image.shape[0]} x {image.shape[1]} px.")
    if not 0 <= patch < rows * columns or context < 0:
        raise UserError(
            f"There is no patch {patch} with {context} around it: a grid of {rows} x {columns} has the patches 0 to "
            f"{rows * columns - 1}, and the context is at least 0."
        )
    top, left = patch // columns * height, patch % columns * width
    margin = ((context * height, context * height), (context * width, context * width), (0, 0))
    padded = np.pad(image, margin, mode="symmetric")  # so the window starts at the patch's own place
    return padded[top : top + (1 + 2 * context) * height, left : left + (1 + 2 * context) * width].copy()

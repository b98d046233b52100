"""The data set that the user names: this module alone decides whether that is a folder, a table or a name.

`NAMED` has the data sets that a name selects, with their terms of use: those drawn by this package, torchvision's and
ImageNet-1k. torchvision downloads and indexes them; the images themselves are opened by `safe_open` like any others, so
that one damaged file doesn't stop a run. If a dataset has no validation set, or papers report its "val" as test results
(ImageNet), ``splits.py`` takes one from the training images.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from torchvision import datasets

from moevision.data.collection import (
    ArrayCollection,
    Collection,
    DrawnCollection,
    FileCollection,
    Sample,
    access_error,
    explain_access_errors,
)
from moevision.data.emoji import DrawnImages, EmojiKinds, EmojiPages
from moevision.data.folder import (
    DATASET_NAMES,
    HF,
    fetching,
    is_saved_dataset,
    read_folder,
    split_folders,
    walk,
)
from moevision.data.images import is_image_path
from moevision.data.synthetic import SyntheticPets
from moevision.data.tables import Columns, count_rows, read_dataset, read_table
from moevision.errors import UserError, escape_controls

UNKNOWN = "unknown: check before you publish"  # terms of use of the user's own images
DRAWN: dict[str, type[DrawnImages]] = {
    kind.name: kind for kind in (EmojiPages, EmojiKinds, SyntheticPets)
}
# Images that are drawn of each split, unless the user says otherwise.
DRAWN_SIZES = {"train": 16_000, "val": 1_000, "test": 2_000}
_IMAGENET_ARCHIVES = (
    "ILSVRC2012_img_train.tar",
    "ILSVRC2012_img_val.tar",
    "ILSVRC2012_devkit_t12.tar.gz",
)


def read_named(name: str, root: str, *, download: bool = False) -> Collection:
    """Read the dataset `name` of `NAMED` in the folder ``root``; if it is missing there and `download`, fetch it."""
    folder = Path(root).expanduser()
    dataset = NAMED[name]
    if name == "imagenet":  # it is never downloaded, and says itself what is missing
        return _imagenet(folder, download)

    # First what is there already.
    try:
        return dataset.read(folder, False)
    # a file or a subfolder of the dataset is missing
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise UserError(
            f"the dataset {name} is in {folder} in part only ({error}), as after an interrupted unpacking: delete "
            f"{folder / dataset.unpacked} and fetch it anew by {fetching(name, root)}"
        ) from error
    except OSError:
        with explain_access_errors(folder):  # as a UserError that says what is denied
            raise
    except RuntimeError as error:  # torchvision's, if the dataset isn't there, or corrupted
        if not download:
            hint = f"; for your own folder write ./{name}" if Path(name).is_dir() else ""
            raise UserError(
                f"the dataset {name} is not in {folder}: fetch it by {fetching(name, root)}, or say where it is by "
                f"--root, for fit, validate and test by --data.root{hint}"
            ) from error

    folder.mkdir(parents=True, exist_ok=True)
    try:
        return dataset.read(folder, True)
    except UserError:
        raise
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(
            f"{name} could not be fetched into {folder} ({error}): check the network and try again"
        ) from error


# ---- readers of the table NAMED: folder, whether to download -> collection


def _drawn(kind: type[DrawnImages], root: Path, download: bool) -> Collection:
    return DrawnCollection.of(kind, 64, 0, DRAWN_SIZES)  # image size, seed


def _cifar10(root: Path, download: bool) -> Collection:
    samples = {}
    arrays = {}
    for split in ("train", "test"):
        dataset = datasets.CIFAR10(root, train=split == "train", download=download)
        arrays[split] = np.asarray(dataset.data, dtype=np.uint8)  # [n, 32, 32, 3]
        samples[split] = [
            Sample(f"{split}/{number:05d}", int(label))
            for number, label in enumerate(dataset.targets)
        ]
    return ArrayCollection(_without_underscores(dataset.classes), samples, arrays=arrays)


def _without_underscores(class_names: list[str]) -> list[str]:
    return [name.replace("_", " ") for name in class_names]


def _imagenette(root: Path, download: bool) -> Collection:
    # The release whose photos have a short side of 320 px: that is enough for most training sizes.
    dataset = datasets.Imagenette(root, split="train", size="320px", download=download)
    folder = Path(dataset._image_root).parent
    collection = read_folder(folder)
    num_classes = len(dataset._WNID_TO_CLASS)
    has_splits = {"train", "val"} <= collection.samples.keys()
    if not has_splits or len(collection.class_names) != num_classes:
        raise ValueError(f"train and val of {folder.name} must have {num_classes} classes each")
    return collection


def _pets(binary: bool, root: Path, download: bool) -> Collection:
    """Oxford-IIIT Pet with its 37 breeds as classes, or with two (`binary`): cat and dog."""
    target = "binary-category" if binary else "category"
    samples = {}
    for split, name in (("train", "trainval"), ("test", "test")):
        dataset = datasets.OxfordIIITPet(root, split=name, target_types=target, download=download)
        labels = dataset._bin_labels if binary else dataset._labels
        samples[split] = [
            Sample(Path(path).relative_to(root).as_posix(), int(label))
            for path, label in zip(dataset._images, labels, strict=True)
        ]
    class_names = dataset.bin_classes if binary else dataset.classes
    return FileCollection(_without_underscores(class_names), samples, root=root)


def _imagenet(root: Path, download: bool) -> Collection:
    """ImageNet-1k in ``root`` or ``root/imagenet``; with `download`, torchvision unpacks archives that lie there."""
    folders = [folder for folder in (root, root / "imagenet") if folder.is_dir()]
    for folder in folders:
        if all((folder / split).is_dir() for split in ("train", "val")):
            return read_folder(folder)

    for folder in folders:
        if download and all((folder / name).is_file() for name in _IMAGENET_ARCHIVES):
            for split in ("train", "val"):
                datasets.ImageNet(folder, split)
            return read_folder(folder)
    raise UserError(
        f"ImageNet is not in {root} and can't be downloaded without an account: put train/ and val/ (one "
        f"folder per WordNet id) there, or its archives ({', '.join(_IMAGENET_ARCHIVES)}), which "
        f"{fetching('imagenet', root)} unpacks"
    )


@dataclass(frozen=True)
class DataTerms:
    """Name, terms of use and address of a dataset, as far as they are certain."""

    title: str  # its name as people write it
    terms: str  # licence or terms of use, with the page that states them
    hub_id: str  # id on huggingface.co/datasets, if its makers or many others use one; else empty


@dataclass(frozen=True)
class Named(DataTerms):
    """A dataset that is chosen by its name: terms, size and reader."""

    images: int  # in all splits; of drawn ones those for training
    read: Callable[[Path, bool], Collection]  # arguments: root folder, whether to download
    unpacked: str = ""  # the folder below the root folder that torchvision unpacks it into


# Terms of use for the model card. Each sentence follows the page that it names. If the makers of a dataset state none,
# the card says "unknown": a guess would be worse.
_CIFAR = "unknown: https://www.cs.toronto.edu/~kriz/cifar.html states no licence and asks to cite Krizhevsky 2009"
_OXFORD = "CC BY-SA 4.0 (https://www.robots.ox.ac.uk/~vgg/data/pets/)"
_IMAGENET = "for non-commercial research and education only (terms of access on https://image-net.org/download)"
_EMOJI = "Noto Emoji (Apache-2.0), whose flags are in the public domain, arranged by moevision's own code"
_DRAWN = "drawn by moevision's own code (Apache-2.0): no photo is involved"
NAMED = {
    "emoji": Named("EmojiPages", _EMOJI, "", 16_000, partial(_drawn, EmojiPages)),
    "emoji_kinds": Named("EmojiKinds", _EMOJI, "", 16_000, partial(_drawn, EmojiKinds)),
    "synthetic_pets": Named("SyntheticPets", _DRAWN, "", 16_000, partial(_drawn, SyntheticPets)),
    "cifar10": Named(
        "CIFAR-10", _CIFAR, "uoft-cs/cifar10", 60_000, _cifar10, "cifar-10-batches-py"
    ),
    "imagenette": Named(
        "Imagenette",
        f"a selection of ImageNet's photos, which are {_IMAGENET}",
        "frgfm/imagenette",
        13_394,
        _imagenette,
        "imagenette2-320",
    ),
    "pets": Named(
        "Oxford-IIIT Pet",
        _OXFORD,
        "timm/oxford-iiit-pet",
        7_349,
        partial(_pets, False),
        "oxford-iiit-pet",
    ),
    "pets_cat_dog": Named(
        "Oxford-IIIT Pet, cat or dog",
        _OXFORD,
        "timm/oxford-iiit-pet",
        7_349,
        partial(_pets, True),
        "oxford-iiit-pet",
    ),
    "imagenet": Named("ImageNet-1k", _IMAGENET, "ILSVRC/imagenet-1k", 1_331_167, _imagenet),
}


def terms_of(path: str) -> DataTerms:
    """The terms of the data that `--data` names. Of a path only its last part appears, the rest may be private."""
    if path.startswith(HF):
        name = escape_controls(path.removeprefix(HF).partition(":")[0])
        return DataTerms(name, f"unknown: see https://huggingface.co/datasets/{name}", name)
    if path in NAMED:
        return NAMED[path]
    if path.lower().endswith(".csv"):
        name = escape_controls(Path(path).name)
        return DataTerms(f"own images (listed in “{name}”)", UNKNOWN, "")
    name = escape_controls(Path(path).expanduser().resolve().name)
    return DataTerms(f"own images (a folder called “{name}”)", UNKNOWN, "")


# ---- from what the user names to a collection

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
    """Whether reading the folder of images `path` would also read images in `location`, which needn't exist yet."""
    root = Path(path).expanduser().resolve()
    if kind_of(path) != "folder" or not root.is_dir():
        return False
    for folder in split_folders(root).values() or [root]:
        if location.resolve().is_relative_to(folder):
            parts = location.resolve().relative_to(folder).parts
            # Class folders with these first characters aren't read, see `subfolders`.
            return bool(parts) and parts[0][0] not in "._@"
    return False

"""Datasets known by name: the drawn `SyntheticPets`, torchvision's, and ImageNet-1k; and their terms of use.

torchvision fetches and indexes; the images themselves are opened by `safe_open` like any others, so that one damaged
file doesn't stop a run. Where a dataset comes without a validation set (or with a "val" that the field reports as its
test), ``splits.py`` cuts one from the training images.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torchvision import datasets

from moevision.data.folder import read_folder
from moevision.data.sources import (
    SPLITS,
    ArrayCollection,
    Collection,
    DrawnCollection,
    FileCollection,
    Sample,
)
from moevision.data.synthetic import SyntheticPets
from moevision.errors import UserError
from moevision.names import shown

SYNTHETIC = "synthetic_pets"
_IMAGENET_ARCHIVES = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz")
UNKNOWN = "unknown: check before you publish"
_IMAGENET = "for non-commercial research and education only (terms of access on https://image-net.org/download)"


def open_collection(
    path: str, *, root: str, download: bool, image_size: int, seed: int, sizes: dict[str, int]
) -> Collection:
    """Find the dataset that ``path`` names.

    Args:
        path: one of `DATASET_NAMES`, or a folder (write ``./pets`` for a folder that bears such a name).
        root: folder in which named datasets live.
        download: fetch a named dataset that isn't there.
        image_size: side of the drawn images, in pixels.
        seed: seed of the drawn images.
        sizes: number of drawn images per split.

    Raises:
        UserError: if it isn't there, can't be fetched, or isn't laid out as a dataset.
    """
    if path == SYNTHETIC:
        return synthetic_pets(image_size, seed, sizes)
    if path not in DATASET_NAMES:
        try:
            return read_folder(Path(path).expanduser())
        except UserError as error:
            alike = difflib.get_close_matches(path, DATASET_NAMES, n=1)
            names = f"did you mean {alike[0]!r}?" if alike else ", ".join(DATASET_NAMES)
            if Path(path).expanduser().exists():
                raise
            raise UserError(f"{error}; or a dataset's name: {names}") from None
    folder = Path(root).expanduser()
    if path == "imagenet":
        return _imagenet(folder, download)
    try:
        return _NAMED[path](folder, False)
    except RuntimeError as error:  # torchvision: not found or corrupted
        if not download:
            raise UserError(
                f"the dataset {path} is not in {folder}: add --data.download true to fetch it, or set --data.root to "
                "where it is" + (f"; for your own folder write ./{path}" if Path(path).is_dir() else "")
            ) from error
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return _NAMED[path](folder, True)
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"{path} could not be fetched into {folder} ({error}): check the network and try again"
        ) from error


def synthetic_pets(image_size: int, seed: int, sizes: dict[str, int]) -> DrawnCollection:
    """The drawn dataset, ``sizes[split]`` images per split."""
    pets = {split: SyntheticPets(sizes[split], image_size, seed, split) for split in SPLITS}
    given = {
        split: [Sample(f"{split}/{number:06d}", pets[split].label(number)) for number in range(sizes[split])]
        for split in SPLITS
    }
    return DrawnCollection(list(SyntheticPets.classes), given, [], pets)


def _cifar(factory: Callable[..., Any], root: Path, download: bool) -> Collection:
    parts = {
        "train": factory(root, train=True, download=download),
        "test": factory(root, train=False, download=download),
    }
    given = {
        split: [Sample(f"{split}/{number:05d}", int(label)) for number, label in enumerate(part.targets)]
        for split, part in parts.items()
    }
    arrays = {split: np.asarray(part.data, dtype=np.uint8) for split, part in parts.items()}
    return ArrayCollection(_in_words(parts["train"].classes), given, [], arrays)


def _in_words(names: list[str]) -> list[str]:
    return [name.replace("_", " ") for name in names]


def _files(root: Path, classes: list[str], parts: dict[str, tuple[list[Any], list[int]]]) -> Collection:
    """A collection from torchvision's lists of paths and labels."""
    given = {
        split: [
            Sample(Path(path).relative_to(root).as_posix(), int(label))
            for path, label in zip(paths, labels, strict=True)
        ]
        for split, (paths, labels) in parts.items()
    }
    return FileCollection(_in_words(classes), given, [], root)


def _imagenette(root: Path, download: bool) -> Collection:
    # the smallest release that is larger than most training sizes; photos have a short side of 320 px
    part = datasets.Imagenette(root, split="train", size="320px", download=download)
    return read_folder(Path(part._image_root).parent)


def _pets(root: Path, download: bool, binary: bool = False) -> Collection:
    target = "binary-category" if binary else "category"
    parts = {
        split: datasets.OxfordIIITPet(root, split=name, target_types=target, download=download)
        for split, name in (("train", "trainval"), ("test", "test"))
    }
    classes = parts["train"].bin_classes if binary else parts["train"].classes
    labels = {split: part._bin_labels if binary else part._labels for split, part in parts.items()}
    return _files(root, classes, {split: (part._images, labels[split]) for split, part in parts.items()})


def _pets_cat_dog(root: Path, download: bool) -> Collection:
    return _pets(root, download, binary=True)


def _flowers102(root: Path, download: bool) -> Collection:
    parts = {split: datasets.Flowers102(root, split=split, download=download) for split in SPLITS}
    lists = {split: (part._image_files, part._labels) for split, part in parts.items()}
    return _files(root, parts["train"].classes, lists)


def _food101(root: Path, download: bool) -> Collection:
    parts = {split: datasets.Food101(root, split=split, download=download) for split in ("train", "test")}
    lists = {split: (part._image_files, part._labels) for split, part in parts.items()}
    return _files(root, parts["train"].classes, lists)


def _imagenet(root: Path, download: bool) -> Collection:
    """ImageNet-1k in ``root`` or ``root/imagenet``; archives lying there are unpacked by torchvision."""
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
        f"folder per WordNet id) there, or its archives ({', '.join(_IMAGENET_ARCHIVES)}) with "
        "--data.download true"
    )


_NAMED: dict[str, Callable[[Path, bool], Collection]] = {
    "cifar10": lambda root, download: _cifar(datasets.CIFAR10, root, download),
    "cifar100": lambda root, download: _cifar(datasets.CIFAR100, root, download),
    "imagenette": _imagenette,
    "pets": _pets,
    "pets_cat_dog": _pets_cat_dog,
    "flowers102": _flowers102,
    "food101": _food101,
}
DATASET_NAMES = (SYNTHETIC, *_NAMED, "imagenet")

# Terms of use, as far as they are certain: a published model's card says them. Where a dataset's makers state nothing,
# or this table knows nothing, the card says "unknown": a guess would be worse. Each sentence follows the page it names.


@dataclass(frozen=True)
class DataTerms:
    """What is certain about one dataset.

    Attributes:
        title: its name in words.
        terms: licence or terms of use, with the page that states them.
        hub_id: its address on huggingface.co/datasets; empty if it has none that is its makers' or widely used.
        kind: what a model card calls its type: the dataset's name, or `imagefolder`.
    """

    title: str
    terms: str = UNKNOWN
    hub_id: str = ""
    kind: str = "imagefolder"


_KNOWN = {
    SYNTHETIC: ("SyntheticPets", "drawn by moevision's own code (Apache-2.0): no photo is involved", ""),
    "cifar10": (
        "CIFAR-10",
        "unknown: https://www.cs.toronto.edu/~kriz/cifar.html states no licence and asks to cite Krizhevsky 2009",
        "uoft-cs/cifar10",
    ),
    "cifar100": (
        "CIFAR-100",
        "unknown: https://www.cs.toronto.edu/~kriz/cifar.html states no licence and asks to cite Krizhevsky 2009",
        "uoft-cs/cifar100",
    ),
    "imagenette": ("Imagenette", f"a selection of ImageNet's photos, which are {_IMAGENET}", "frgfm/imagenette"),
    "imagenet": ("ImageNet-1k", _IMAGENET, "ILSVRC/imagenet-1k"),
    "pets": ("Oxford-IIIT Pet", "CC BY-SA 4.0 (https://www.robots.ox.ac.uk/~vgg/data/pets/)", "timm/oxford-iiit-pet"),
    "pets_cat_dog": (
        "Oxford-IIIT Pet, cat or dog",
        "CC BY-SA 4.0 (https://www.robots.ox.ac.uk/~vgg/data/pets/)",
        "timm/oxford-iiit-pet",
    ),
    "food101": (
        "Food-101",
        "photos of Foodspotting's users: more than scientific fair use must be negotiated with each of them (the "
        "dataset's license_agreement.txt)",
        "ethz/food101",
    ),
}


def terms_of(path: str) -> DataTerms:
    """What is certain about the data that `--data` names.

    Args:
        path: a name of `DATASET_NAMES`, or a folder. Of a folder only its last part is told: the rest may be private.
    """
    if path in _KNOWN:
        title, terms, hub_id = _KNOWN[path]
        return DataTerms(title, terms, hub_id, path)
    if path in DATASET_NAMES:
        return DataTerms(path, kind=path)
    return DataTerms(f"own images (a folder called “{shown(Path(path).expanduser().resolve().name)}”)")

"""What a dataset is to the rest: labelled images that are opened one by one.

A `Collection` lists its samples per given split; it decides nothing about training, validation and test (``splits.py``)
and nothing about pixels (``transforms.py``). A sample is named by its path relative to the collection's root, which
stays the same across runs and machines. ``open.py`` finds the collection that a path names.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from moevision.data.images import BadImageError, read_image, safe_open
from moevision.data.synthetic import SyntheticPets
from moevision.errors import UserError, escape_controls, escape_csv_cell, name_bytes

SPLITS: Final = ("train", "val", "test")
SPLIT_NAMES: Final = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
_PROBED_BYTES: Final = 64 * 1024  # from here on a probe is cheaper than the digest


class Sample(NamedTuple):
    """One image: its stable name (path relative to the root, with forward slashes) and its class index."""

    sample_id: str
    label: int


@dataclass
class Collection(ABC):
    """Labelled images."""

    class_names: list[str]  # class names in words; a label is an index into them
    given: dict[
        str, list[Sample]
    ]  # samples per split the data came with ("train", "val", "test"), or all under "all"
    notes: list[str] = field(
        default_factory=list
    )  # sentences about what was left out while reading
    group_column: str | None = (
        None  # the column whose equal values are kept together, where the data say so themselves
    )
    # other columns of a table, name -> sample id -> value
    columns: dict[str, dict[str, str]] = field(default_factory=dict)

    @abstractmethod
    def open(self, sample: Sample, short_side: int | None = None) -> Image.Image:
        """Return the RGB image; raises `BadImageError` if it can't be used.

        A ``short_side`` in pixels allows a large photo to come reduced, see `safe_open`.
        """

    @abstractmethod
    def stored(self, sample: Sample) -> bytes:
        """The stored bytes, of pixels theirs; raises OSError or BadImageError if they can't be read."""

    def size_bytes(self, sample: Sample) -> int:
        """Number of stored bytes, 0 if there are none; samples of different size differ."""
        return len(self.stored(sample))

    def probe(self, sample: Sample) -> bytes:
        """What is equal for equal images, and cheaper than the digest."""
        return b""

    def digest(self, sample: Sample) -> bytes:
        """SHA-256 of the stored bytes; an unreadable image is unlike any other (opening it will say why)."""
        try:
            return hashlib.sha256(self.stored(sample)).digest()
        except (OSError, BadImageError):
            return hashlib.sha256(name_bytes(sample.sample_id)).digest()

    def identity(self, sample: Sample) -> Hashable:
        """What two samples share only if one file is behind both, which links can bring about."""
        return sample.sample_id

    def column(self, name: str) -> Mapping[str, str] | None:
        """Values by sample id of a column, if the data are a table that has it."""
        return self.columns.get(name)


@dataclass
class FileCollection(Collection):
    """Image files below ``root``."""

    root: Path = Path()

    def open(self, sample: Sample, short_side: int | None = None) -> Image.Image:
        """Decode the file through `safe_open`."""
        return safe_open(self.root / sample.sample_id, short_side)

    def size_bytes(self, sample: Sample) -> int:
        """Size of the file; 0 if it has vanished since the folder was read."""
        try:
            return os.stat(self.root / sample.sample_id).st_size
        except OSError:
            return 0

    def stored(self, sample: Sample) -> bytes:
        """The file."""
        return read_image(self.root / sample.sample_id)

    def probe(self, sample: Sample) -> bytes:
        """1 KiB from the middle of 64 KiB or more (headers are alike), read to spare the digest of large images."""
        size = self.size_bytes(sample)
        if size < _PROBED_BYTES:
            return b""
        with (
            suppress(OSError),
            (self.root / sample.sample_id).open("rb") as handle,
        ):  # the digest knows what to do
            handle.seek(size // 2)
            return handle.read(1024)
        return b""

    def identity(self, sample: Sample) -> Hashable:
        """Device and number of the file."""
        return file_identity(self.root / sample.sample_id)


@dataclass
class ArrayCollection(Collection):
    """Images held as arrays, uint8 [n, H, W, 3] per given split; sample ids are ``split/number``."""

    arrays: dict[str, npt.NDArray[np.uint8]] = field(default_factory=dict)

    def _pixels(self, sample: Sample) -> npt.NDArray[np.uint8]:
        split, number = sample.sample_id.rsplit("/", 1)
        return np.asarray(self.arrays[split][int(number)])

    def open(self, sample: Sample, short_side: int | None = None) -> Image.Image:
        """Wrap the pixels."""
        return Image.fromarray(self._pixels(sample))

    def stored(self, sample: Sample) -> bytes:
        """The bytes of the pixels."""
        return self._pixels(sample).tobytes()


@dataclass
class DrawnCollection(Collection):
    """`SyntheticPets`, drawn when opened; sample ids are ``split/number``."""

    pets: dict[str, SyntheticPets] = field(default_factory=dict)

    @classmethod
    def of(cls, image_size: int, seed: int, sizes: Mapping[str, int]) -> DrawnCollection:
        """``sizes[split]`` images per split."""
        pets = {
            split: SyntheticPets(size, image_size, seed, split) for split, size in sizes.items()
        }
        given = {
            split: [
                Sample(f"{split}/{number:06d}", drawn.label(number)) for number in range(len(drawn))
            ]
            for split, drawn in pets.items()
        }
        return cls(list(SyntheticPets.classes), given, pets=pets)

    def open(self, sample: Sample, short_side: int | None = None) -> Image.Image:
        """Draw the image."""
        return self.draw(sample)

    def draw(self, sample: Sample, side: int | None = None) -> Image.Image:
        """The scene of an image in ``side`` pixels; None: as the set has it."""
        split, number = sample.sample_id.rsplit("/", 1)
        pets = self.pets[split]
        if side is not None:
            pets = SyntheticPets(pets.size, side, pets.seed, split)
        return Image.fromarray(pets.image(int(number)))

    def stored(self, sample: Sample) -> bytes:
        """Nothing: every image is drawn from a random seed of its own."""
        return b""


def file_identity(path: str | Path) -> Hashable:
    """What tells whether two paths lead to one file or folder; the path itself where the system doesn't say."""
    try:
        found = os.stat(path)
    except OSError:
        return str(path)
    return (found.st_dev, found.st_ino) if found.st_ino else str(path)


@contextmanager
def access_advice(path: str | Path) -> Iterator[None]:
    """Say in a sentence what the system doesn't let us read, where nothing can be left out."""
    try:
        yield
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: str | Path, error: OSError) -> UserError:
    """What the system doesn't let us read, in a sentence."""
    return UserError(
        f"{error.filename or path} can't be read ({error.strerror or error}): permit this user to read it, or give "
        "another path"
    )


# ---- classes and splits, which are checked alike wherever they come from


def readable_class_names(class_folders: list[str]) -> list[str]:
    """Class names in words: WordNet ids become their first lemma (n01440764 -> tench), others are shown names.

    Two ids with one lemma (ImageNet has two "crane"s) keep their id in brackets.
    """
    if not all(re.fullmatch(r"n\d{8}", name) for name in class_folders):
        return list(map(escape_controls, class_folders))
    from timm.data import ImageNetInfo  # timm is needed for nothing else in this package

    info = ImageNetInfo("imagenet-22k")
    known = set(info.label_names())
    lemmas = [
        info.label_name_to_description(name).split(",")[0] if name in known else name
        for name in class_folders
    ]
    often = Counter(lemmas)
    both = zip(lemmas, class_folders, strict=True)
    return [lemma if often[lemma] == 1 else f"{lemma} ({name})" for lemma, name in both]


def check_distinct(names: Iterable[str]) -> None:
    """Names must differ, also when they are written into a file."""
    known: dict[str, str] = {}
    for name in names:
        written = unicodedata.normalize("NFC", escape_csv_cell(name))  # a Mac writes accents apart
        if (other := known.get(written)) is not None:
            raise UserError(
                f"{other!r} and {name!r} look the same when they are written down: rename one of them"
            )
        known[written] = name


def differ_in_case(names: Iterable[str]) -> list[str]:
    """A sentence on the class names that only upper and lower case tells apart, if there are any."""
    listed = sorted(names)
    folded = Counter(map(str.casefold, listed))
    alike = [name for name in listed if folded[name.casefold()] > 1]
    what = f"{some_of(alike)} differ only in upper and lower case: put them together if they are one class"
    return [what] if alike else []


def check_same_classes(
    train: Path | str, classes: Iterable[str], other: Path | str, found: Iterable[str]
) -> None:
    """Each split must hold every class, else its score would mean something else than the training's."""
    known, here = set(classes), set(found)
    if missing := sorted(known - here):
        raise UserError(
            f"{other} has no images of the class {some_of(missing)}, which {train} has: add some there"
        )
    if surplus := sorted(here - known):
        raise UserError(
            f"{other} has the class {some_of(surplus)}, which {train} lacks: add it there or remove it"
        )


def check_splits(given: Mapping[str, Sequence[Sample]], names: Sequence[str], where: str) -> None:
    """Two classes at least; a dataset that came split has a train set, and every class in every split."""
    if "all" not in given and "train" not in given:
        raise UserError(
            f"{where} has no train split, only {', '.join(given)}: add one, or give them as one split."
        )
    used = {split: {names[sample.label] for sample in samples} for split, samples in given.items()}
    train = "train" if "train" in used else "all"
    if len(used[train]) < 2:
        raise UserError(
            f"{where} has {len(used[train])} classes, and a classifier needs two: add images of another."
        )
    for split, found in used.items():
        check_same_classes(
            f"the {train} split of {where}", used[train], f"its {split} split", found
        )


def interleave_by_class(labels: Sequence[int]) -> list[int]:
    """Indices of images of these classes, such that classes take turns."""
    of_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        of_class.setdefault(label, []).append(index)
    return [
        index for turn in zip_longest(*of_class.values()) for index in turn if index is not None
    ]


def some_of(names: Sequence[str]) -> str:
    """The first five names, quoted, and how many more there are."""
    listed = ", ".join(map(repr, names[:5]))
    return listed + (f" and {len(names) - 5} more" if len(names) > 5 else "")

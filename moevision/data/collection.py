"""What a dataset is to the rest: labelled images that are opened one by one.

A `Collection` lists its samples per split that it came with; it decides nothing about training, validation and test
(``splits.py``) and nothing about pixels (``transforms.py``). A sample is named by its path relative to the collection's
root, which stays the same across runs and machines. ``open.py`` finds the collection that a path names.
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
from itertools import chain, zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from moevision.data.images import BadImageError, read_image, safe_open
from moevision.data.synthetic import SyntheticPets
from moevision.errors import UserError, escape_controls, escape_csv_cell, name_bytes

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
_PROBED_BYTES = 64 * 1024  # from here on a probe is cheaper than the digest


class Sample(NamedTuple):
    """One image: its stable name (path relative to the root, with forward slashes) and its class index."""

    sample_id: str
    label: int


SplitSamples = dict[
    str, list[Sample]
]  # by split: "train", "val", "test", or "all" of an unsplit dataset


@dataclass
class Collection(ABC):
    """Labelled images."""

    class_names: list[str]  # class names in words; a label is an index into them
    # samples per split the data came with ("train", "val", "test"), or all under "all"
    samples: SplitSamples
    notes: list[str] = field(
        default_factory=list
    )  # sentences about what was left out while reading
    # the column whose equal values are kept together, where the data say so themselves
    group_column: str | None = None
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
        if size >= _PROBED_BYTES:
            with suppress(OSError), (self.root / sample.sample_id).open("rb") as handle:
                handle.seek(size // 2)
                return handle.read(1024)
        return b""  # also of what can't be read: the digest knows what to do

    def identity(self, sample: Sample) -> Hashable:
        """Device and number of the file."""
        return file_identity(self.root / sample.sample_id)


@dataclass
class ArrayCollection(Collection):
    """Images held as arrays, uint8 [n, H, W, 3] per split; sample ids are ``split/number``."""

    arrays: dict[str, NDArray[np.uint8]] = field(default_factory=dict)

    def _pixels(self, sample: Sample) -> NDArray[np.uint8]:
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
        pets = {}
        samples = {}
        for split, size in sizes.items():
            pets[split] = SyntheticPets(size, image_size, seed, split)
            samples[split] = [
                Sample(f"{split}/{number:06d}", pets[split].label(number)) for number in range(size)
            ]
        return cls(list(SyntheticPets.classes), samples, pets=pets)

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
        status = os.stat(path)
    except OSError:
        return str(path)
    if not status.st_ino:
        return str(path)
    return status.st_dev, status.st_ino


@contextmanager
def explain_access_errors(path: str | Path) -> Iterator[None]:
    """Say in a sentence what the system doesn't let us read, where nothing can be left out."""
    try:
        yield
    except OSError as error:
        raise access_error(path, error) from error


def access_error(path: str | Path, error: OSError) -> UserError:
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
    wordnet_ids = set(info.label_names())
    lemmas = []
    for name in class_folders:
        description = info.label_name_to_description(name) if name in wordnet_ids else name
        lemmas.append(description.split(",")[0])
    counts = Counter(lemmas)
    return [
        lemma if counts[lemma] == 1 else f"{lemma} ({name})"
        for lemma, name in zip(lemmas, class_folders, strict=True)
    ]


def check_distinct(names: Iterable[str]) -> None:
    """Names must differ, also when they are written into a file."""
    name_of: dict[str, str] = {}
    for name in names:
        written = unicodedata.normalize("NFC", escape_csv_cell(name))  # a Mac writes accents apart
        other = name_of.setdefault(written, name)
        if other is not name:
            raise UserError(
                f"{other!r} and {name!r} look the same when they are written down: rename one of them"
            )


def differ_in_case(names: Iterable[str]) -> list[str]:
    """A sentence on the class names that only upper and lower case tells apart, if there are any."""
    ordered = sorted(names)
    counts = Counter(map(str.casefold, ordered))
    alike = [name for name in ordered if counts[name.casefold()] > 1]
    if not alike:
        return []
    return [
        f"{quoted_names(alike)} differ only in upper and lower case: put them together if they are one class"
    ]


def check_same_classes(
    train: Path | str, train_classes: Iterable[str], other: Path | str, other_classes: Iterable[str]
) -> None:
    """Each split must hold every class, else its score would mean something else than the training's."""
    expected = set(train_classes)
    actual = set(other_classes)
    if missing := sorted(expected - actual):
        raise UserError(
            f"{other} has no images of the class {quoted_names(missing)}, which {train} has: add some there"
        )
    if surplus := sorted(actual - expected):
        raise UserError(
            f"{other} has the class {quoted_names(surplus)}, which {train} lacks: add it there or remove it"
        )


def check_splits(
    samples: Mapping[str, Sequence[Sample]], class_names: Sequence[str], where: str
) -> None:
    """Two classes at least; a dataset that came split has a train set, and every class in every split."""
    classes: dict[str, set[str]] = {}
    for split, members in samples.items():
        classes[split] = {class_names[sample.label] for sample in members}
    if "all" not in classes and "train" not in classes:
        raise UserError(
            f"{where} has no train split, only {', '.join(classes)}: add one, or give them as one split."
        )
    train = "train" if "train" in classes else "all"
    if len(classes[train]) < 2:
        raise UserError(
            f"{where} has {len(classes[train])} classes, and a classifier needs two: add images of another."
        )
    for split in classes:
        check_same_classes(
            f"the {train} split of {where}", classes[train], f"its {split} split", classes[split]
        )


def interleave_by_class(labels: Sequence[int]) -> list[int]:
    """Indices of images of these classes, such that classes take turns."""
    of_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        of_class.setdefault(label, []).append(index)
    turns = chain.from_iterable(zip_longest(*of_class.values()))
    return [index for index in turns if index is not None]


def quoted_names(names: Sequence[str]) -> str:
    """The first five names, quoted, and how many more there are."""
    text = ", ".join(map(repr, names[:5]))
    if len(names) > 5:
        text += f" and {len(names) - 5} more"
    return text

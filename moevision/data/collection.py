"""The interface of a dataset: labelled images that are opened one by one.

A `Collection` lists its samples by the splits in which the dataset is published. Which images are used for training,
validation and test is decided in ``splits.py``, how pixels are prepared in ``transforms.py``. A sample is named by its
path relative to the collection's root, which stays the same across runs and machines. ``named.py`` finds the collection
for a path or a dataset's name.
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
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from moevision.data.images import BadImageError, read_image, safe_open
from moevision.errors import UserError, escape_controls, escape_csv_cell, name_bytes
from moevision.types import Pixels

if TYPE_CHECKING:  # it imports torch, and folders are checked before that
    from moevision.data.emoji import DrawnImages

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
# Size of a file from which on reading a part is faster than the digest of all.
_MIN_PROBED_BYTES = 64 * 1024


class Sample(NamedTuple):
    """One image: its stable name (path relative to the root, with forward slashes) and its class index.

    Where images have several labels, `label` is the one that the fewest images have: by it the data are split and
    balanced. `labels` are all of them, ascending; else empty.
    """

    sample_id: str
    label: int
    labels: tuple[int, ...] = ()

    @property
    def all_labels(self) -> tuple[int, ...]:
        """The labels, or the only one."""
        return self.labels or (self.label,)

    def renumbered(self, numbers: Sequence[int]) -> Sample:
        """The sample with `numbers[label]` for each label."""
        labels = tuple(sorted(numbers[label] for label in self.labels))
        return Sample(self.sample_id, numbers[self.label], labels)

    def written(self, class_names: Sequence[str]) -> str:
        """Its class, or its labels with `|` between them, as they stand in CSV files."""
        return "|".join(escape_csv_cell(class_names[label]) for label in self.all_labels)


SplitSamples = dict[
    str, list[Sample]
]  # by split: "train", "val", "test", or "all" of an unsplit dataset


@dataclass
class Collection(ABC):
    """Labelled images."""

    class_names: list[str]  # readable names; a label is an index into them
    # by the split in which the dataset has them, "train", "val" or "test"; all under "all" if it has no splits
    samples: SplitSamples
    notes: list[str] = field(
        default_factory=list
    )  # sentences about what was left out while reading
    # name of the column whose equal values must be in the same split, where the dataset itself declares one
    group_column: str | None = None
    # other columns, where the dataset is a table: name -> sample id -> value
    columns: dict[str, dict[str, str]] = field(default_factory=dict)

    @abstractmethod
    def open(self, sample: Sample, short_side: int | None = None) -> Image.Image:
        """Return the RGB image; raises `BadImageError` if it can't be used.

        A ``short_side`` in pixels allows a large photo to come reduced, see `safe_open`.
        """

    @abstractmethod
    def stored(self, sample: Sample) -> bytes:
        """Bytes of the file, or of the pixels if there is no file; OSError or BadImageError if they can't be read."""

    def size_bytes(self, sample: Sample) -> int:
        """Number of stored bytes, 0 if there are none; samples with different numbers can't be duplicates."""
        return len(self.stored(sample))

    def probe(self, sample: Sample) -> bytes:
        """Bytes that are equal for duplicates and faster to read than the digest; empty if there are none."""
        return b""

    def digest(self, sample: Sample) -> bytes:
        """SHA-256 of the stored bytes; for an unreadable image that of its name, which no other sample has."""
        try:
            return hashlib.sha256(self.stored(sample)).digest()
        except (OSError, BadImageError):
            return hashlib.sha256(name_bytes(sample.sample_id)).digest()

    def identity(self, sample: Sample) -> Hashable:
        """A value that is equal for two samples only if they are the same file, for instance through a link."""
        return sample.sample_id

    def column(self, name: str) -> Mapping[str, str] | None:
        """Sample id -> value in a column; None if the dataset has no such column."""
        return self.columns.get(name)

    @property
    def multilabel(self) -> bool:
        """Whether an image may have several labels."""
        return any(samples[0].labels for samples in self.samples.values() if samples)


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
        """The bytes of the file."""
        return read_image(self.root / sample.sample_id)

    def probe(self, sample: Sample) -> bytes:
        """1 KiB from the middle of a file of 64 KiB or more, which tells most large images apart without a digest.

        From the middle, because headers are often equal.
        """
        size = self.size_bytes(sample)
        if size >= _MIN_PROBED_BYTES:
            with suppress(OSError), (self.root / sample.sample_id).open("rb") as handle:
                handle.seek(size // 2)
                return handle.read(1024)
        return b""  # also for a file that can't be read: `digest` handles it

    def identity(self, sample: Sample) -> Hashable:
        """Device and inode of the file."""
        return file_identity(self.root / sample.sample_id)


@dataclass
class ArrayCollection(Collection):
    """Images held as arrays, uint8 [n, H, W, 3] per split; sample ids are ``split/number``."""

    arrays: dict[str, Pixels] = field(default_factory=dict)

    def _pixels(self, sample: Sample) -> Pixels:
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
    """Images drawn when opened (`DrawnImages`); sample ids are ``split/number``."""

    drawn: dict[str, DrawnImages] = field(default_factory=dict)  # by split

    @classmethod
    def of(
        cls, kind: type[DrawnImages], image_size: int, seed: int, sizes: Mapping[str, int]
    ) -> DrawnCollection:
        """A collection with ``sizes[split]`` images per split."""
        drawn = {split: kind(size, image_size, seed, split) for split, size in sizes.items()}
        samples = {
            split: [Sample(f"{split}/{n:06d}", images.label(n)) for n in range(len(images))]
            for split, images in drawn.items()
        }
        return cls(list(kind.classes), samples, drawn=drawn)

    @property
    def part_names(self) -> tuple[str, ...]:
        """Names of the values of a part mask."""
        return next(iter(self.drawn.values())).parts

    def open(self, sample: Sample, short_side: int | None = None) -> Image.Image:
        """Draw the image."""
        return self.draw(sample)

    def draw(self, sample: Sample, side: int | None = None) -> Image.Image:
        """Draw an image with sides of ``side`` pixels; None: the collection's own image size."""
        images, number = self._find(sample)
        if side is not None:
            images = type(images)(len(images), side, images.seed, images.split)
        return Image.fromarray(images.image(number))

    def part_mask(self, sample: Sample) -> Pixels:
        """The part at each pixel, uint8 [S, S], an index into `part_names`."""
        images, number = self._find(sample)
        return images.part_mask(number)

    def stored(self, sample: Sample) -> bytes:
        """Empty: nothing is stored, and no duplicates need be found, as every image has a random seed of its own."""
        return b""

    def _find(self, sample: Sample) -> tuple[DrawnImages, int]:
        split, number = sample.sample_id.rsplit("/", 1)
        return self.drawn[split], int(number)


def file_identity(path: str | Path) -> Hashable:
    """A value that is equal for paths to the same file or folder; the path itself if the system provides no inode."""
    try:
        status = os.stat(path)
    except OSError:
        return str(path)
    if not status.st_ino:
        return str(path)
    return status.st_dev, status.st_ino


@contextmanager
def explain_access_errors(path: str | Path) -> Iterator[None]:
    """Turn an OSError in this scope into a UserError, where a file or folder is required."""
    try:
        yield
    except OSError as error:
        raise access_error(path, error) from error


def access_error(path: str | Path, error: OSError) -> UserError:
    """The UserError for a file or folder that the system doesn't allow to be read."""
    return UserError(
        f"{error.filename or path} can't be read ({error.strerror or error}): permit this user to read it, or give "
        "another path"
    )


# ---- checks of classes and splits, the same for every source of data


def readable_class_names(class_folders: list[str]) -> list[str]:
    """Names to show for class folders: WordNet ids become their first lemma (n01440764 -> tench).

    Ids with the same lemma (ImageNet has two "crane"s) are added in brackets. Other names have control characters
    escaped.
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
    """Refuse names that are equal as written into a CSV file, by a UserError."""
    original_names: dict[str, str] = {}  # by the written form
    for name in names:
        # macOS stores accents as separate characters, which NFC joins.
        written = unicodedata.normalize("NFC", escape_csv_cell(name))
        other = original_names.setdefault(written, name)
        if other is not name:
            raise UserError(
                f"{other!r} and {name!r} look the same when they are written down: rename one of them"
            )


def differ_in_case(names: Iterable[str]) -> list[str]:
    """A note on class names that differ only in upper and lower case; an empty list if there are none."""
    ordered = sorted(names)
    counts = Counter(map(str.casefold, ordered))
    ambiguous = [name for name in ordered if counts[name.casefold()] > 1]
    if not ambiguous:
        return []
    return [
        f"{quoted_names(ambiguous)} differ only in upper and lower case: put them together if they are one class"
    ]


def check_same_classes(
    train: Path | str, train_classes: Iterable[str], other: Path | str, other_classes: Iterable[str]
) -> None:
    """Refuse splits with different classes, whose accuracies couldn't be compared with those on the training set."""
    if differences := class_differences(train, train_classes, other, other_classes):
        raise UserError("; ".join(differences))


def class_differences(
    train: Path | str, train_classes: Iterable[str], other: Path | str, other_classes: Iterable[str]
) -> list[str]:
    """What `check_same_classes` refuses, half a sentence each."""
    expected = set(train_classes)
    actual = set(other_classes)
    differences = []
    if missing := sorted(expected - actual):
        differences.append(
            f"{other} has no images of the class {quoted_names(missing)}, which {train} has: add some there"
        )
    if surplus := sorted(actual - expected):
        differences.append(
            f"{other} has the class {quoted_names(surplus)}, which {train} lacks: add it there or remove it"
        )
    return differences


def check_splits(
    samples: Mapping[str, Sequence[Sample]], class_names: Sequence[str], where: str
) -> None:
    """Refuse fewer than two classes, splits without a train split, and splits that lack a class."""
    classes: dict[str, set[str]] = {}  # split -> names of its classes
    for split, split_samples in samples.items():
        classes[split] = {class_names[label] for label in labels_in(split_samples)}

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


def labels_in(samples: Iterable[Sample]) -> set[int]:
    """The labels of these samples."""
    return {label for sample in samples for label in sample.all_labels}


def interleave_by_class(labels: Sequence[int]) -> list[int]:
    """Indices of images in an order in which the classes alternate; `labels` are the images' classes."""
    indices_by_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        indices_by_class.setdefault(label, []).append(index)
    interleaved = chain.from_iterable(zip_longest(*indices_by_class.values()))
    return [index for index in interleaved if index is not None]


def quoted_names(names: Sequence[str]) -> str:
    """The first five names, quoted, and how many more there are."""
    text = ", ".join(map(repr, names[:5]))
    if len(names) > 5:
        text += f" and {len(names) - 5} more"
    return text

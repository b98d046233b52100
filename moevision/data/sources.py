"""Where images come from: files below a folder, arrays in memory, or images drawn by code.

A `Collection` lists its samples per given split and opens them one by one; it decides nothing about
training, validation and test (see ``splits.py``) and nothing about pixels (see ``transforms.py``). A sample is
named by its path relative to the collection's root, which stays the same across runs and machines.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from moevision.data.images import safe_open
from moevision.data.synthetic import SyntheticPets
from moevision.names import name_bytes

SPLITS = ("train", "val", "test")


class Sample(NamedTuple):
    """One image: its stable name (path relative to the root, with forward slashes) and its class index."""

    sample_id: str
    label: int


@dataclass
class Collection(ABC):
    """Labelled images.

    Attributes:
        class_names: class names in words; a label is an index into them.
        given: samples per split the data came with ("train", "val", "test"), or all under "all".
        notes: sentences about what was left out while reading.
    """

    class_names: list[str]
    given: dict[str, list[Sample]]
    notes: list[str] = field(default_factory=list)

    @abstractmethod
    def open(self, sample: Sample, short_side: int | None = None) -> Image.Image:
        """Return the RGB image; raises `BadImageError` if it can't be used.

        A ``short_side`` in pixels allows a large photo to come reduced, see `safe_open`.
        """

    @abstractmethod
    def size_bytes(self, sample: Sample) -> int:
        """Number of stored bytes; samples of different size differ."""

    def probe(self, sample: Sample) -> bytes:
        """A few stored bytes, read to spare the digest of large samples that differ in them."""
        return b""

    @abstractmethod
    def digest(self, sample: Sample) -> bytes:
        """SHA-256 of the stored bytes."""

    def identity(self, sample: Sample) -> Hashable:
        """What two samples share only if one file is behind both, which links can bring about."""
        return sample.sample_id


@dataclass
class FileCollection(Collection):
    """Image files below ``root``; ``has_links`` says whether a symbolic link leads to any of them."""

    root: Path = Path()
    has_links: bool = False

    def open(self, sample: Sample, short_side: int | None = None) -> Image.Image:
        """Decode the file through `safe_open`."""
        return safe_open(self.root / sample.sample_id, short_side)

    def size_bytes(self, sample: Sample) -> int:
        """Size of the file; 0 if it has vanished since the folder was read."""
        try:
            return os.stat(self.root / sample.sample_id).st_size
        except OSError:
            return 0

    def probe(self, sample: Sample) -> bytes:
        """1 KiB from the middle of a file (headers are alike); nothing of a file under 64 KiB."""
        half = self.size_bytes(sample) // 2
        if half < 32 * 1024:
            return b""
        with (self.root / sample.sample_id).open("rb") as handle:
            handle.seek(half)
            return handle.read(1024)

    def digest(self, sample: Sample) -> bytes:
        """SHA-256 of the file; an unreadable one is unlike any other (opening it will say why)."""
        try:
            return hashlib.sha256((self.root / sample.sample_id).read_bytes()).digest()
        except OSError:
            return hashlib.sha256(name_bytes(sample.sample_id)).digest()

    def identity(self, sample: Sample) -> Hashable:
        """Device and number of the file; nothing is read where there are no links."""
        return file_identity(self.root / sample.sample_id) if self.has_links else sample.sample_id


def file_identity(path: str | Path) -> Hashable:
    """What tells whether two paths lead to one file or folder; the path itself where the system doesn't say."""
    try:
        found = os.stat(path)
    except OSError:
        return str(path)
    return (found.st_dev, found.st_ino) if found.st_ino else str(path)


@dataclass
class ArrayCollection(Collection):
    """Images held as arrays, uint8 [n, H, W, 3] per given split; sample ids are ``split/number``."""

    arrays: dict[str, npt.NDArray[np.uint8]] = field(default_factory=dict)

    def _pixels(self, sample: Sample) -> npt.NDArray[np.uint8]:
        split, number = sample.sample_id.rsplit("/", 1)
        pixels: npt.NDArray[np.uint8] = self.arrays[split][int(number)]
        return pixels

    def open(self, sample: Sample, short_side: int | None = None) -> Image.Image:
        """Wrap the pixels."""
        return Image.fromarray(self._pixels(sample))

    def size_bytes(self, sample: Sample) -> int:
        """Number of bytes of the pixels."""
        return self._pixels(sample).nbytes

    def digest(self, sample: Sample) -> bytes:
        """SHA-256 of the pixels."""
        return hashlib.sha256(self._pixels(sample).tobytes()).digest()


@dataclass
class DrawnCollection(Collection):
    """`SyntheticPets`, drawn when opened; sample ids are ``split/number``."""

    pets: dict[str, SyntheticPets] = field(default_factory=dict)

    def open(self, sample: Sample, short_side: int | None = None) -> Image.Image:
        """Draw the image."""
        split, number = sample.sample_id.rsplit("/", 1)
        return Image.fromarray(self.pets[split].image(int(number)))

    def size_bytes(self, sample: Sample) -> int:
        """0: nothing is stored."""
        return 0

    def digest(self, sample: Sample) -> bytes:
        """SHA-256 of the sample id: every image is drawn from a random seed of its own."""
        return hashlib.sha256(name_bytes(sample.sample_id)).digest()

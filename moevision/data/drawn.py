"""What data sets that code draws have in common: every image has a random generator of its own."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from typing import ClassVar

from numpy.random import PCG64, Generator
from PIL import Image
from torch.utils.data import Dataset

from moevision.errors import UserError
from moevision.types import Pixels


class DrawnImages(ABC, Dataset[tuple[Image.Image, int]]):
    """Labelled images with part masks, drawn when they are asked for.

    An image depends on (seed, split, index) alone, not on the order of access, the size of the set or the process.
    The same index shows the same scene at every image size. Image i has label i mod C, so that class sizes differ by
    one image at most.
    """

    name: ClassVar[str]  # what `--data` calls it
    classes: ClassVar[tuple[str, ...]]  # name of each label
    parts: ClassVar[tuple[str, ...]]  # name of each value of a part mask
    splits: ClassVar[tuple[str, ...]] = ("train", "val", "test")
    drawing_version: ClassVar[int] = 1  # part of every seed: another one draws other images

    def __init__(
        self, size: int, image_size: int = 64, seed: int = 0, split: str = "train"
    ) -> None:
        """Stores the arguments; each image is drawn on access.

        Args:
            size: Number of images, at least 1.
            image_size: Side of an image in pixels, at least 16.
            seed: Any integer; other seeds give other images.
            split: One of `splits`, which share no image.
        """
        name = type(self).__name__
        if size < 1:
            raise UserError(f"{name} needs a size of at least 1 image, not {size}")
        if image_size < 16:
            raise UserError(f"{name} needs an image_size of at least 16 pixels, not {image_size}")
        if split not in self.splits:
            raise UserError(f"{name} has the splits {', '.join(self.splits)}, not {split!r}")
        self.size = size
        self.image_size = image_size
        self.seed = seed
        self.split = split

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """The image, as a PIL image in mode RGB, and its label."""
        return Image.fromarray(self.image(index)), self.label(index)

    @abstractmethod
    def image(self, index: int) -> Pixels:
        """The image, uint8 [S, S, 3] in RGB order."""

    @abstractmethod
    def part_mask(self, index: int) -> Pixels:
        """The part at the middle of each pixel, uint8 [S, S], an index into `parts`."""

    def label(self, index: int) -> int:
        """The class, an index into `classes`."""
        return self._checked(index) % len(self.classes)

    def generator(self, index: int) -> Generator:
        """The random generator of one image."""
        return generator_for(
            f"{type(self).__name__} {self.drawing_version} {self.seed} {self.split} {self._checked(index)}"
        )

    def _checked(self, index: int) -> int:
        """The index as a non-negative number; `IndexError` outside of the set, which also ends iteration."""
        if not -self.size <= index < self.size:
            raise IndexError(f"index {index} is outside of a set of {self.size} images")
        return int(index) % self.size


def generator_for(key: str) -> Generator:
    """A generator of its own for each key, the same on every machine."""
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    return Generator(PCG64(int.from_bytes(digest, "little")))

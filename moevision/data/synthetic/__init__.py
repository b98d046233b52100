"""SyntheticPets: eight animal faces drawn by code, the data set that needs no download and no network.

The classes differ by shape and parts alone (ears, muzzle, nose, eyes). Coats, eye and nose colours, pose,
background, occlusion and light come from one distribution for all classes, so neither colour nor raw pixels
give the class away. Every image has a ground-truth part mask, which lets a study ask whether an expert has
specialised on ears or on eyes.
"""

from __future__ import annotations

import hashlib
from typing import ClassVar, Final

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch.utils.data import Dataset

from moevision.data.synthetic.drawing import Scene, part_mask, render, sample_scene
from moevision.data.synthetic.faces import CLASSES, PARTS
from moevision.errors import UserError

__all__ = ["SyntheticPets"]

# Part of every image's key. Raise it when the drawing changes: then no image of the old set comes back
# slightly altered, and results are not compared across versions by mistake.
_DRAWING_VERSION: Final = 1


class SyntheticPets(Dataset[tuple[Image.Image, int]]):
    """Drawn animal faces with labels and part masks.

    An image depends on nothing but (seed, split, index): not on the order of access, the size of the set or
    the process, and the same index shows the same scene at every image size. Image i has label i mod 8, so
    classes are balanced to within one image.

    Attributes:
        classes: Names of the labels.
        parts: Names of the values of a part mask.
    """

    classes: ClassVar[tuple[str, ...]] = CLASSES
    parts: ClassVar[tuple[str, ...]] = PARTS
    splits: ClassVar[tuple[str, ...]] = ("train", "val", "test")

    def __init__(self, size: int, image_size: int = 64, seed: int = 0, split: str = "train") -> None:
        """Describes the set; images are drawn when asked for.

        Args:
            size: Number of images, at least 1.
            image_size: Side of an image in pixels, at least 16.
            seed: Any integer; other seeds give other images.
            split: `"train"`, `"val"` or `"test"`; splits share no image.

        Raises:
            UserError: If an argument is out of its range.
        """
        if size < 1:
            raise UserError(f"SyntheticPets needs a size of at least 1 image, not {size}")
        if image_size < 16:
            raise UserError(f"SyntheticPets needs an image_size of at least 16 pixels, not {image_size}")
        if split not in self.splits:
            raise UserError(f"SyntheticPets has the splits {', '.join(self.splits)}, not {split!r}")
        self.size, self.image_size, self.seed, self.split = size, image_size, seed, split

    def __len__(self) -> int:
        """Number of images."""
        return self.size

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """The image, as a PIL image in mode RGB, and its label."""
        return Image.fromarray(self.image(index)), self.label(index)

    def image(self, index: int) -> npt.NDArray[np.uint8]:
        """The image, uint8 [S, S, 3] in RGB order."""
        scene, rng = self._scene(index)
        return render(scene, self.image_size, rng)

    def label(self, index: int) -> int:
        """The class, an index into `classes`."""
        return self._checked(index) % len(self.classes)

    def part_mask(self, index: int) -> npt.NDArray[np.uint8]:
        """The part seen at the middle of each pixel, uint8 [S, S], an index into `parts`."""
        return part_mask(self._scene(index)[0], self.image_size)

    def _scene(self, index: int) -> tuple[Scene, np.random.Generator]:
        """The scene, and its generator in the state from which the pixel noise is drawn."""
        index = self._checked(index)
        key = f"SyntheticPets {_DRAWING_VERSION} {self.seed} {self.split} {index}"
        digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
        rng = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))
        return sample_scene(self.label(index), rng), rng

    def _checked(self, index: int) -> int:
        """The index counted from the start; `IndexError` outside of the set, which also ends iteration."""
        if not -self.size <= index < self.size:
            raise IndexError(f"index {index} is outside of a set of {self.size} images")
        return int(index) % self.size

"""A `PictureSet` made of a function, for tests that need neither files nor a collection."""

from collections.abc import Callable

import numpy as np


class MadePictures:
    """Images by a function of their index; classes take turns."""

    part_names = ()

    def __init__(self, count: int, image: Callable[[int], np.ndarray], class_names, name="made"):
        self.count, self.image, self.class_names, self.name = count, image, class_names, name

    def __len__(self) -> int:
        return self.count

    def label(self, index: int) -> int:
        return index % len(self.class_names)

    def picture_name(self, index: int) -> str:
        return f"picture {index}"

    def part_mask(self, index: int) -> None:
        return None

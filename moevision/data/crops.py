"""Where random crops and erased rectangles lie: those of a whole batch at once, from uniform random numbers.

The distributions are those of torchvision's ``v2.RandomCrop``, ``v2.RandomResizedCrop`` and ``v2.RandomErasing``.
These draw once per call, so a batch handed to them would be cropped in one place; here every picture has numbers of
its own.

Sources: random resized crop arXiv:1409.4842 (section 6), random erasing arXiv:1708.04896 (algorithm 1).

Axis legend: B pictures, T tries, u uniform numbers in [0, 1).
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

Uniform = npt.NDArray[np.float64]
Boxes = npt.NDArray[np.int64]
"""[B, 4]: top, left, height, width in pixels."""

TRIES: Final = 10
"""How often a rectangle is drawn anew that doesn't fit into its picture."""
CROP_RATIO: Final = (3 / 4, 4 / 3)
"""Width / height of a random resized crop."""
ERASED_SHARE: Final = (0.02, 0.33)
"""Area of an erased rectangle, as a share of the picture's."""
ERASED_RATIO: Final = (0.3, 3.3)
"""Height / width of an erased rectangle."""


def pad_shifts(u: Uniform, padding: int) -> Boxes:
    """How far windows are moved over pictures that have a border of ``padding`` pixels.

    Args:
        u: [B, 2].
        padding: width of the border on each side.

    Returns:
        int64 [B, 2], down and right, uniform over -padding ... padding.
    """
    return np.floor(u * (2 * padding + 1)).astype(np.int64) - padding


def resized_crop_boxes(
    u: Uniform, sizes: npt.NDArray[np.int64], scale: tuple[float, float], ratio: tuple[float, float] = CROP_RATIO
) -> Boxes:
    """Crops of random area and shape; the central one of the nearest shape where no try fits.

    Args:
        u: [B, T, 4]: area, shape, top, left of each try.
        sizes: int64 [B, 2], height and width of the pictures.
        scale: smallest and largest share of a picture's area.
        ratio: smallest and largest width / height.
    """
    height, width = sizes[:, :1], sizes[:, 1:]
    crop_width, crop_height = _sides(u, height * width, scale, ratio)
    fits = (crop_width > 0) & (crop_width <= width) & (crop_height > 0) & (crop_height <= height)
    boxes = _first_that_fits(u, fits, crop_height, crop_width, sizes)
    return np.where(fits.any(axis=1, keepdims=True), boxes, _central(sizes, ratio))


def erasing_boxes(u: Uniform, size: int) -> Boxes:
    """Rectangles to erase in pictures of ``size`` x ``size``; of height 0, nothing, where no try fits.

    Args:
        u: [B, T, 4]: area, shape, top, left of each try.
        size: side of the pictures in pixels.
    """
    sizes = np.full((len(u), 2), size)
    height, width = _sides(u, sizes[:, :1] * sizes[:, 1:], ERASED_SHARE, ERASED_RATIO)
    fits = (height < size) & (width < size)
    return _first_that_fits(u, fits, height, width, sizes) * fits.any(axis=1, keepdims=True)


def _sides(u: Uniform, area: Boxes, scale: tuple[float, float], ratio: tuple[float, float]) -> tuple[Boxes, Boxes]:
    """Two sides, [B, T] each, with a uniform product and a log-uniform quotient (first / second)."""
    target = area * (scale[0] + (scale[1] - scale[0]) * u[..., 0])
    low, high = np.log(ratio)
    quotient = np.exp(low + (high - low) * u[..., 1])
    # to the nearest even number, like Python's round, which torchvision uses
    first, second = np.rint(np.sqrt(target * quotient)), np.rint(np.sqrt(target / quotient))
    return first.astype(np.int64), second.astype(np.int64)


def _first_that_fits(
    u: Uniform, fits: npt.NDArray[np.bool_], height: Boxes, width: Boxes, sizes: npt.NDArray[np.int64]
) -> Boxes:
    """The first try of each picture that fits, at a uniform position; the first of all where none does."""
    rows, chosen = np.arange(len(u)), fits.argmax(axis=1)
    sides = np.stack([height[rows, chosen], width[rows, chosen]], axis=1)
    corner = np.floor(u[rows, chosen, 2:] * (sizes - sides + 1)).astype(np.int64)
    return np.concatenate([corner, sides], axis=1)


def _central(sizes: npt.NDArray[np.int64], ratio: tuple[float, float]) -> Boxes:
    """The largest central crops whose width / height lies within ``ratio``."""
    height, width = sizes.T
    crop_height = np.minimum(height, np.rint(width / ratio[0])).astype(np.int64)
    crop_width = np.minimum(width, np.rint(height * ratio[1])).astype(np.int64)
    return np.stack([(height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width], axis=1)

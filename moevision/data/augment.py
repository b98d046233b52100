"""From a picture to pixels: the fixed preparation, and the random augmentation of a batch.

Preparation is deterministic and its result may be cached. Augmentation draws the numbers of each picture from a hash
of ``(seed, stream, epoch, index)`` (see ``keyed.py``), so a picture gets the same crop whatever the number of worker
processes, the batch it travels in, or the point from which a run was resumed. The numbers of a batch are drawn at
once; its pixels are copied crop by crop, which took less than half the time of gathering them by index arrays
(2.7 against 6.4 us a picture of 32 px, 5 against 22 at 64 px). The policies are torchvision's (``transforms.v2``) and
work on one picture after the other.

Sources: RandAugment arXiv:1909.13719, TrivialAugment arXiv:2103.10158, random erasing arXiv:1708.04896,
random resized crop arXiv:1409.4842 (section 6).

Axis legend: B batch, H height, W width, S = ``image_size``; pixels are uint8 unless said so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import v2

from moevision.data.crops import TRIES, erasing_boxes, pad_shifts, resized_crop_boxes
from moevision.data.jpeg import full_size
from moevision.data.keyed import seeded_torch, uniform

Augment = Literal["none", "light", "randaugment", "trivialaugment"]
CropMode = Literal["pad", "random_resized"]
Pixels = npt.NDArray[np.uint8]

BASE_SCALE = 1.15
"""Short side, in units of ``image_size``, at which photos are kept for random resized crops: large enough
that crops are not enlarged much, small enough that tens of thousands of photos fit into memory."""

# Streams of random numbers that must never coincide for equal (seed, epoch, index). 2 is mix.py's.
_POLICY, _CROP, _FLIP, _ERASE, _RECTANGLE = 1, 3, 4, 5, 6


def base_side(image_size: int) -> int:
    """Short side of the pictures that random resized crops are cut from, in pixels: 1.15 S."""
    return round(BASE_SCALE * image_size)


def square_pixels(image: Image.Image, image_size: int) -> Pixels:
    """The picture as evaluation sees it: its central square, resized to S x S (bicubic, antialiased).

    Equal to resizing the short side and then cropping the centre, but a picture of 10 x 10 000 pixels never
    becomes a huge one in between. A picture that is S x S already is returned as it is.

    Args:
        image: an RGB picture of any size, perhaps decoded at a reduced size by `safe_open`.
        image_size: side of the result, S, in pixels.

    Returns:
        uint8 [S, S, 3].
    """
    (width, height), reduction = full_size(image)
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    if side == image_size:
        image = image.crop((left, top, left + side, top + side))
    else:
        image = _resized(image, (image_size, image_size), (left, top, left + side, top + side), reduction)
    return np.array(image)


def base_pixels(image: Image.Image, image_size: int) -> Pixels:
    """The picture as random resized crops are cut from it: short side at most 1.15 S, never enlarged.

    A long side beyond four times the short one is cut off around the centre (a strip would fill the memory).

    Returns:
        uint8 [H, W, 3].
    """
    (full_width, full_height), reduction = full_size(image)
    short = min(full_width, full_height)
    width, height = min(full_width, 4 * short), min(full_height, 4 * short)
    left, top = (full_width - width) // 2, (full_height - height) // 2
    box = (left, top, left + width, top + height)
    scale = min(1.0, base_side(image_size) / short)
    if scale < 1.0:
        image = _resized(image, (max(1, round(width * scale)), max(1, round(height * scale))), box, reduction)
    elif (width, height) != image.size:
        image = image.crop(box)
    return np.array(image)


def _resized(image: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int], reduction: int) -> Image.Image:
    """The box, given in pixels of the full picture, as a picture of ``size`` (width, height)."""
    left, top, right, bottom = (edge / reduction for edge in box)
    return image.resize(size, Image.Resampling.BICUBIC, box=(left, top, right, bottom))


class TrainTransform:
    """Random crop, flip, policy and erasing of a batch; every decision on a picture follows from its key."""

    def __init__(
        self,
        image_size: int,
        *,
        augment: Augment,
        crop: CropMode,
        min_crop_scale: float,
        hflip: bool,
        random_erasing: float,
        mean: Sequence[float],
    ) -> None:
        """Choose the steps.

        Args:
            image_size: side of the result, S.
            augment: "none" leaves out crop, flip and policy.
            crop: "pad" expects S x S pixels; "random_resized" any size.
            min_crop_scale: smallest share of the picture's area in a random resized crop.
            hflip: mirror half of the pictures.
            random_erasing: probability that a random rectangle is filled with the mean colour.
            mean: mean colour in [0, 1], the filling of what lies outside the picture.
        """
        self.image_size, self.min_crop_scale, self.random_erasing = image_size, min_crop_scale, random_erasing
        self.crop: CropMode | None = None if augment == "none" else crop
        self.hflip = hflip and augment != "none"
        fill = [round(255 * channel) for channel in mean]
        self.fill = np.array(fill, np.uint8)[:, None, None]
        bilinear = v2.InterpolationMode.BILINEAR
        self.policy: v2.Transform | None = None
        if augment == "randaugment":
            self.policy = v2.RandAugment(interpolation=bilinear, fill=fill)
        if augment == "trivialaugment":
            self.policy = v2.TrivialAugmentWide(interpolation=bilinear, fill=fill)

    def __call__(self, pictures: Sequence[Pixels], seed: int, epochs: Sequence[int], indices: Sequence[int]) -> Tensor:
        """Augment a batch.

        Args:
            pictures: B pictures, uint8 [3, H, W] each; they are not written to.
            seed: seed of the run.
            epochs: epoch number of each.
            indices: index of each in its split.

        Returns:
            uint8 [B, 3, S, S]; row b is a function of picture, seed, epoch and index b alone.
        """
        epoch, index = np.asarray(epochs, np.int64), np.asarray(indices, np.int64)
        out = np.empty((len(pictures), 3, self.image_size, self.image_size), np.uint8)
        rows = list(out)
        if self.hflip:  # what is written into the mirrored view of a row stands mirrored in the row
            mirrored = uniform(1, seed, _FLIP, epoch, index)[:, 0] < 0.5
            rows = [row[:, :, ::-1] if flip else row for row, flip in zip(rows, mirrored, strict=True)]
        if self.crop == "pad":
            out[:] = self.fill
            padding = max(1, self.image_size // 8)
            shifts = pad_shifts(uniform(2, seed, _CROP, epoch, index), padding)
            for row, picture, (down, right) in zip(rows, pictures, shifts.tolist(), strict=True):
                _write_shifted(row, picture, down, right)
        elif self.crop == "random_resized":
            u = uniform(4 * TRIES, seed, _CROP, epoch, index).reshape(-1, TRIES, 4)
            sizes = np.array([picture.shape[1:] for picture in pictures], np.int64).reshape(-1, 2)
            boxes = resized_crop_boxes(u, sizes, (self.min_crop_scale, 1.0))
            for row, picture, box in zip(rows, pictures, boxes.tolist(), strict=True):
                _write_resized(row, picture, *box)
        else:
            for row, picture in zip(rows, pictures, strict=True):
                row[:] = picture
        if self.policy is not None:
            self._apply_policy(self.policy, out, seed, epoch, index)
        if self.random_erasing > 0:
            self._erase(out, seed, epoch, index)
        return torch.from_numpy(out)

    def _apply_policy(
        self, policy: v2.Transform, out: Pixels, seed: int, epoch: npt.NDArray[np.int64], index: npt.NDArray[np.int64]
    ) -> None:
        """Change each picture by operations of its own, on PIL pictures: two to four times as fast as on tensors."""
        for row, *key in zip(out, epoch.tolist(), index.tolist(), strict=True):
            with seeded_torch(seed, _POLICY, *key):
                changed = policy(Image.fromarray(np.ascontiguousarray(row.transpose(1, 2, 0))))
            row[:] = np.asarray(changed).transpose(2, 0, 1)

    def _erase(self, out: Pixels, seed: int, epoch: npt.NDArray[np.int64], index: npt.NDArray[np.int64]) -> None:
        """Fill a rectangle of some pictures."""
        erased = np.flatnonzero(uniform(1, seed, _ERASE, epoch, index)[:, 0] < self.random_erasing)
        u = uniform(4 * TRIES, seed, _RECTANGLE, epoch[erased], index[erased]).reshape(-1, TRIES, 4)
        boxes = erasing_boxes(u, self.image_size)
        for row, (top, left, height, width) in zip(erased.tolist(), boxes.tolist(), strict=True):
            out[row, :, top : top + height, left : left + width] = self.fill


def _write_shifted(row: Pixels, picture: Pixels, down: int, right: int) -> None:
    """Copy the window that lies ``down`` and ``right`` of the picture's corner; what is outside stays as it was."""
    size = row.shape[-1]
    row[:, max(0, -down) : size - max(0, down), max(0, -right) : size - max(0, right)] = picture[
        :, max(0, down) : size + min(0, down), max(0, right) : size + min(0, right)
    ]


def _write_resized(row: Pixels, picture: Pixels, top: int, left: int, height: int, width: int) -> None:
    """Resize a box of the picture to the row's size (bicubic, antialiased, as ``v2.functional.resized_crop`` does)."""
    crop = torch.from_numpy(picture[:, top : top + height, left : left + width])[None]
    # with the channels last torch's uint8 kernel takes half the time; cached photos lie so already
    crop = crop.contiguous(memory_format=torch.channels_last)
    row[:] = interpolate(crop, row.shape[1:], mode="bicubic", antialias=True)[0].numpy()


def normalize(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Scale uint8 pixels [B, 3, H, W] to [0, 1], subtract the mean and divide by the deviation; float32."""
    center = torch.tensor(mean).view(1, 3, 1, 1).mul_(255)
    inverse = torch.tensor(std).view(1, 3, 1, 1).mul_(255).reciprocal_()
    return pixels.float().sub_(center).mul_(inverse)

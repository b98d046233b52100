"""From an image to the pixels of a batch: fixed preparation, random augmentation, normalisation, Mixup and CutMix.

Preparation is deterministic and its result may be cached. Augmentation draws the numbers of each image from a hash of
``(seed, stream, epoch, index)``, so an image gets the same crop whatever the number of worker processes, the batch it
travels in, or the point from which a run was resumed. The numbers of a batch are drawn at once; its pixels are copied
crop by crop, which took less than half the time of gathering them by index arrays (2.7 against 6.4 us an image of
32 px, 5 against 22 at 64 px). The policies are torchvision's (``transforms.v2``) and work on one image after the other.
torchvision's own crops, flips and erasing draw once per call, so a whole batch handed to them would be cropped in one
place; here every image has numbers of its own, of the same distributions.

Sources: RandAugment arXiv:1909.13719, TrivialAugment arXiv:2103.10158, random erasing arXiv:1708.04896 (algorithm 1),
random resized crop arXiv:1409.4842 (section 6), Mixup arXiv:1710.09412, CutMix arXiv:1905.04899; numbers by key:
Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, with the finaliser of SplitMix64 (Steele, Lea and
Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014, fig. 16) as mixing function.

Axis legend: B images, H height, W width, S = ``image_size``, C classes, T tries, n numbers per key; u uniform numbers
in [0, 1). Pixels are uint8 unless said so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import v2

from moevision.config import CROP, Data, Framing
from moevision.data.images import full_size

CropMode = Literal["pad", "random_resized"]
Pixels = npt.NDArray[np.uint8]
Uniform = npt.NDArray[np.float64]
Boxes = npt.NDArray[np.int64]  # [B, 4]: top, left, height, width in pixels
_Key = int | npt.NDArray[np.int64]

# Short side, in units of `image_size`, at which photos are kept for random resized crops: large enough that crops are
# not enlarged much, small enough that tens of thousands of photos fit into memory.
BASE_SCALE = 1.15
TRIES: Final = 10  # rectangles that are drawn for an image; the first that fits is used
CROP_RATIO: Final = (3 / 4, 4 / 3)  # width / height of a random resized crop
ERASED_SHARE: Final = (0.02, 0.33)  # area of an erased rectangle, as a share of the image's
ERASED_RATIO: Final = (0.3, 3.3)  # height / width of an erased rectangle
# Streams of random numbers that must never coincide for equal (seed, epoch, index).
_POLICY, _MIX, _CROP, _FLIP, _ERASE, _RECTANGLE = range(1, 7)


def base_side(image_size: int) -> int:
    """Short side of the images that random resized crops are cut from, in pixels: 1.15 S."""
    return round(BASE_SCALE * image_size)


def square_pixels(image: Image.Image, image_size: int, framing: Framing = CROP) -> Pixels:
    """The image as evaluation sees it, uint8 [S, S, 3]: its central square, or the whole padded or squashed, resized.

    Bicubic, antialiased. `crop` equals resizing the short side and then cropping the centre, but an image of
    10 x 10 000 pixels never becomes a huge one in between. An image that is S x S already is returned as it is.
    The three are the `crop_mode`s of timm's transforms: center, border, squash. `safe_open` may have decoded the image
    at a reduced size.
    """
    (width, height), reduction = full_size(image)
    if framing.fit != "crop" and width != height:
        size, whole = (image_size, image_size), (0, 0, width, height)
        if framing.fit == "squash":
            return np.array(_resized(image, size, whole, reduction))
        inner = [max(1, round(image_size * side / max(width, height))) for side in (width, height)]
        padded = Image.new("RGB", size, tuple(round(255 * channel) for channel in framing.mean))
        left, top = ((image_size - side) // 2 for side in inner)
        padded.paste(_resized(image, (inner[0], inner[1]), whole, reduction), (left, top))
        return np.array(padded)
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    if side == image_size:
        image = image.crop((left, top, left + side, top + side))
    else:
        image = _resized(
            image, (image_size, image_size), (left, top, left + side, top + side), reduction
        )
    return np.array(image)


def base_pixels(image: Image.Image, image_size: int, framing: Framing = CROP) -> Pixels:
    """The image as random resized crops are cut from it, uint8 [H, W, 3]: short side at most 1.15 S, never enlarged.

    A long side beyond four times the short one is cut off around the centre (a strip would fill the memory). What is to
    be padded or squashed is so before it is cropped, to a square of 1.15 S.
    """
    if framing.fit != "crop":
        return square_pixels(image, base_side(image_size), framing)
    (full_width, full_height), reduction = full_size(image)
    short = min(full_width, full_height)
    width, height = min(full_width, 4 * short), min(full_height, 4 * short)
    left, top = (full_width - width) // 2, (full_height - height) // 2
    box = (left, top, left + width, top + height)
    scale = min(1.0, base_side(image_size) / short)
    if scale < 1.0:
        image = _resized(
            image, (max(1, round(width * scale)), max(1, round(height * scale))), box, reduction
        )
    elif (width, height) != image.size:
        image = image.crop(box)
    return np.array(image)


def _resized(
    image: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int], reduction: int
) -> Image.Image:
    """The box, given in pixels of the full image, as an image of ``size`` (width, height)."""
    left, top, right, bottom = (edge / reduction for edge in box)
    return image.resize(size, Image.Resampling.BICUBIC, box=(left, top, right, bottom))


class TrainTransform:
    """Random crop, flip, policy and erasing of a batch; every decision on an image follows from its key."""

    def __init__(self, data: Data, crop: CropMode) -> None:
        """Choose the steps by `data`; images come in S x S for the crop "pad", in any size for "random_resized".

        `augment` "none" leaves out crop, flip and policy, and the mean colour fills what lies outside the image.
        """
        self.image_size, self.min_crop_scale = data.image_size, data.min_crop_scale
        self.random_erasing = data.random_erasing
        self.crop: CropMode | None = None if data.augment == "none" else crop
        self.hflip = data.hflip and data.augment != "none"
        fill = [round(255 * channel) for channel in data.mean]
        self.fill = np.array(fill, np.uint8)[:, None, None]
        policy = {"randaugment": v2.RandAugment, "trivialaugment": v2.TrivialAugmentWide}.get(
            data.augment
        )
        self.policy = policy and policy(interpolation=v2.InterpolationMode.BILINEAR, fill=fill)

    def __call__(
        self, images: Sequence[Pixels], seed: int, epochs: Sequence[int], indices: Sequence[int]
    ) -> Tensor:
        """Augment B images, uint8 [3, H, W] each, by the seed of the run and the epoch and index of each.

        They are not written to. The result is uint8 [B, 3, S, S]; row b is a function of image, seed, epoch and index b
        alone.
        """
        epoch, index = np.asarray(epochs, np.int64), np.asarray(indices, np.int64)  # [B] each
        out = np.empty((len(images), 3, self.image_size, self.image_size), np.uint8)
        rows = list(out)
        if self.hflip:  # what is written into the mirrored view of a row is mirrored in the row
            first = uniform(1, seed, _FLIP, 0, index)[:, 0] < 0.5  # [B]
            mirrored = first ^ (
                epoch % 2 == 1
            )  # two epochs in a row show both sides (arXiv:2404.00498, section 3.6)
            rows = [
                row[:, :, ::-1] if flip else row for row, flip in zip(rows, mirrored, strict=True)
            ]
        if self.crop == "pad":
            out[:] = self.fill
            padding = max(1, self.image_size // 8)
            shifts = pad_shifts(uniform(2, seed, _CROP, epoch, index), padding)  # [B, 2]
            size = self.image_size
            for row, image, (down, right) in zip(rows, images, shifts.tolist(), strict=True):
                # The window that starts down and right of the image's corner; the row keeps what lies outside.
                row[
                    :, max(0, -down) : size - max(0, down), max(0, -right) : size - max(0, right)
                ] = image[
                    :, max(0, down) : size + min(0, down), max(0, right) : size + min(0, right)
                ]
        elif self.crop == "random_resized":
            u = uniform(4 * TRIES, seed, _CROP, epoch, index).reshape(-1, TRIES, 4)  # [B, T, 4]
            sizes = np.array([image.shape[1:] for image in images], np.int64).reshape(-1, 2)
            boxes = resized_crop_boxes(u, sizes, (self.min_crop_scale, 1.0))  # [B, 4]
            for row, image, (top, left, height, width) in zip(
                rows, images, boxes.tolist(), strict=True
            ):
                # [1, 3, h, w]; with the channels last torch's uint8 kernel takes half the time (cached photos are so)
                crop = torch.from_numpy(image[:, top : top + height, left : left + width])[None]
                crop = crop.contiguous(memory_format=torch.channels_last)
                row[:] = interpolate(crop, row.shape[1:], mode="bicubic", antialias=True)[0].numpy()
        else:
            for row, image in zip(rows, images, strict=True):
                row[:] = image
        if self.policy is not None:  # on PIL images: two to four times as fast as on tensors
            for row, number in zip(
                out, hash_u64_array(seed, _POLICY, epoch, index).tolist(), strict=True
            ):
                with seeded_torch(number):
                    changed = self.policy(
                        Image.fromarray(np.ascontiguousarray(row.transpose(1, 2, 0)))
                    )
                row[:] = np.asarray(changed).transpose(2, 0, 1)
        if self.random_erasing > 0:
            erased = np.flatnonzero(
                uniform(1, seed, _ERASE, epoch, index)[:, 0] < self.random_erasing
            )
            u = uniform(4 * TRIES, seed, _RECTANGLE, epoch[erased], index[erased]).reshape(
                -1, TRIES, 4
            )
            boxes = erasing_boxes(u, self.image_size)
            for number, (top, left, height, width) in zip(
                erased.tolist(), boxes.tolist(), strict=True
            ):
                out[number, :, top : top + height, left : left + width] = self.fill
        return torch.from_numpy(out)


def normalize(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Scale uint8 pixels [B, 3, H, W] to [0, 1], subtract the mean and divide by the deviation; float32."""
    center = torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1).mul_(255)  # [1, 3, 1, 1]
    inverse = torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1).mul_(255).reciprocal_()
    return pixels.float().sub_(center).mul_(inverse)


class BatchMixer:
    """Mixup and/or CutMix of a whole batch, with soft targets; decided by (seed, epoch, first index)."""

    def __init__(self, mixup: float, cutmix: float, num_classes: int) -> None:
        """Choose the mixers by the alphas of their Beta distributions; 0 turns one off."""
        kinds = (v2.MixUp, mixup), (v2.CutMix, cutmix)
        self.mixers = [
            kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha > 0
        ]

    def __call__(
        self, image: Tensor, label: Tensor, seed: int, epoch: int, index: int
    ) -> tuple[Tensor, Tensor]:
        """Every image float32 [B, 3, H, W] mixed with its neighbour, and soft targets [B, C], whose rows sum to 1."""
        with seeded_torch(hash_u64(seed, _MIX, epoch, index)):
            choice = int(torch.randint(len(self.mixers), ())) if len(self.mixers) > 1 else 0
            image, target = self.mixers[choice](image, label)
        return image, target


# Where random crops and erased rectangles lie: those of a whole batch at once. The distributions are those of
# torchvision's v2.RandomCrop, v2.RandomResizedCrop and v2.RandomErasing.


def pad_shifts(u: Uniform, padding: int) -> Boxes:
    """[B, 2], down and right in -padding ... padding, from u [B, 2]: moves over images with such a border."""
    return np.floor(u * (2 * padding + 1)).astype(np.int64) - padding


def resized_crop_boxes(
    u: Uniform, sizes: npt.NDArray[np.int64], scale: tuple[float, float]
) -> Boxes:
    """Crops of random area and shape of images of these sizes [B, 2]; the central one where no try fits.

    u is [B, T, 4]: area, shape, top, left of each try; `scale` the smallest and largest share of an image's area.
    """
    height, width = sizes[:, :1], sizes[:, 1:]
    crop_width, crop_height = _sides(u, height * width, scale, CROP_RATIO)
    fits = (crop_width > 0) & (crop_width <= width) & (crop_height > 0) & (crop_height <= height)
    boxes = _first_that_fits(u, fits, crop_height, crop_width, sizes)
    return np.where(fits.any(axis=1, keepdims=True), boxes, _central(sizes))


def erasing_boxes(u: Uniform, size: int) -> Boxes:
    """Rectangles to erase in images of ``size`` x ``size``; of height 0, nothing, where no try fits.

    ``u`` is [B, T, 4]: area, shape, top, left of each try.
    """
    sizes = np.full((len(u), 2), size)
    height, width = _sides(u, sizes[:, :1] * sizes[:, 1:], ERASED_SHARE, ERASED_RATIO)
    fits = (height < size) & (width < size)
    return _first_that_fits(u, fits, height, width, sizes) * fits.any(axis=1, keepdims=True)


def _sides(
    u: Uniform, area: Boxes, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[Boxes, Boxes]:
    """Two sides, [B, T] each, with a uniform product and a log-uniform quotient (first / second)."""
    target = area * (scale[0] + (scale[1] - scale[0]) * u[..., 0])
    low, high = np.log(ratio)
    quotient = np.exp(low + (high - low) * u[..., 1])
    # to the nearest even number, like Python's round, which torchvision uses
    first, second = np.rint(np.sqrt(target * quotient)), np.rint(np.sqrt(target / quotient))
    return first.astype(np.int64), second.astype(np.int64)


def _first_that_fits(
    u: Uniform,
    fits: npt.NDArray[np.bool_],
    height: Boxes,
    width: Boxes,
    sizes: npt.NDArray[np.int64],
) -> Boxes:
    """The first try of each image that fits, at a uniform position; the first of all where none does."""
    rows, chosen = np.arange(len(u)), fits.argmax(axis=1)
    sides = np.stack([height[rows, chosen], width[rows, chosen]], axis=1)
    corner = np.floor(u[rows, chosen, 2:] * (sizes - sides + 1)).astype(np.int64)
    return np.concatenate([corner, sides], axis=1)


def _central(sizes: npt.NDArray[np.int64]) -> Boxes:
    """The largest central crops whose width / height lies within `CROP_RATIO`."""
    height, width = sizes.T
    crop_height = np.minimum(height, np.rint(width / CROP_RATIO[0])).astype(np.int64)
    crop_width = np.minimum(width, np.rint(height * CROP_RATIO[1])).astype(np.int64)
    return np.stack(
        [(height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width], axis=1
    )


# Random numbers by key: a pure function of integers, independent of what was drawn before, elsewhere or in another
# process. (With a sequential generator an image's numbers would depend on how many images came before it.)

_MASK = (1 << 64) - 1
_GAMMA, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def hash_u64(*values: int) -> int:
    """Mix integers, in their order, into one number in [0, 2**64), the same on every machine and in every process."""
    return int(hash_u64_array(*values)[0])


def hash_u64_array(*values: _Key) -> npt.NDArray[np.uint64]:
    """`hash_u64` of every element of integers and integer arrays, broadcast against each other; uint64.

    SplitMix64's finaliser, chained over the values; Python's ``hash`` is not promised to be stable.
    """
    state = np.zeros((), np.uint64)
    for value in values:
        # a negative number counts modulo 2**64
        term = np.uint64(value & _MASK) if isinstance(value, int) else value.astype(np.uint64)
        state = np.atleast_1d(state + term)  # arrays wrap around silently, NumPy's scalars warn
        state += np.uint64(_GAMMA)
        state ^= state >> np.uint64(30)
        state *= np.uint64(_FIRST)
        state ^= state >> np.uint64(27)
        state *= np.uint64(_SECOND)
        state ^= state >> np.uint64(31)
    return state


def uniform(count: int, *key: _Key) -> npt.NDArray[np.float64]:
    """float64 [B, count], uniform in [0, 1), for each key of integers or arrays [B]: upper 53 bits of ``hash_u64``."""
    columns = [part if isinstance(part, int) else part[:, None] for part in key]
    bits = hash_u64_array(*columns, np.arange(count)[None, :])
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


@contextmanager
def seeded_torch(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator inside the block and put its state back afterwards.

    ``torch.manual_seed`` isn't used because it would reseed the GPU generators too, and so tie the dropout
    of the model to the last image that was loaded.
    """
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)

"""From an image to the pixels of a batch: fixed preparation, random augmentation, normalisation, Mixup and CutMix.

Preparation is deterministic and its result may be cached. Augmentation takes the random numbers of each image from a
hash of ``(seed, stream, epoch, index)``, where a stream is one purpose such as cropping. An image therefore gets the
same crop whatever the number of worker processes, its batch, or the point from which a run was resumed. The random
numbers of a batch are drawn at once; its pixels are copied crop by crop, which took less than half the time of
gathering them by index arrays. The policies are torchvision's (``transforms.v2``) and work on one image after the
other. torchvision's own crops, flips and erasing draw once per call, so they would crop a whole batch at the same
place; here every image has its own random numbers, from the same distributions.

Sources: RandAugment arXiv:1909.13719, TrivialAugment arXiv:2103.10158, random erasing arXiv:1708.04896 (algorithm 1),
random resized crop arXiv:1409.4842 (section 6), Mixup arXiv:1710.09412, CutMix arXiv:1905.04899; numbers by key:
Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, with the finaliser of SplitMix64 (Steele, Lea and
Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014, fig. 16) as mixing function.

Axis legend: B images, H height, W width, S = ``image_size``, C classes, T tries; ``u`` are uniform random numbers in
[0, 1). Pixels are uint8 unless stated otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import v2

from moevision.config import CROP, Data, Framing
from moevision.data.images import full_size
from moevision.types import Flags, Floats, Ints, Pixels

CropMode = Literal["pad", "random_resized"]
Boxes = Ints  # [B, 4]: top, left, height, width in pixels
Bounds = tuple[float, float]  # smallest, largest
Size = tuple[int, int]  # width, height
Box = tuple[int, int, int, int]  # left, top, right, bottom
_Key = int | Ints

# Short side, in units of `image_size`, at which photos are kept for random resized crops: large enough that crops are
# not enlarged much, small enough that tens of thousands of photos fit into memory.
BASE_SCALE = 1.15
TRIES = 10  # T: rectangles that are drawn for an image, of which the first that fits is used
CROP_RATIO = (3 / 4, 4 / 3)  # width / height of a random resized crop
ERASED_SHARE = (0.02, 0.33)  # area of an erased rectangle, as a share of the image's
ERASED_RATIO = (0.3, 3.3)  # height / width of an erased rectangle
_POLICIES = {"randaugment": v2.RandAugment, "trivialaugment": v2.TrivialAugmentWide}
# Streams: part of the hashed key, so that each purpose has other random numbers for equal (seed, epoch, index).
_POLICY, _MIX, _CROP, _FLIP, _ERASE, _RECTANGLE, _VERTICAL_FLIP, _TURN = range(1, 9)


def base_side(image_size: int) -> int:
    """Short side of the images that random resized crops are cut from, in pixels: 1.15 S."""
    return round(BASE_SCALE * image_size)


def square_pixels(image: Image.Image, image_size: int, framing: Framing = CROP) -> Pixels:
    """The image as in evaluation, uint8 [S, S, 3], resized with antialiased bicubic interpolation.

    `framing.fit` says how it becomes square: its central square (`crop`), the whole image between borders of the mean
    colour (`pad`), or the whole image distorted (`squash`), which are timm's `crop_mode`s center, border and squash.
    `crop` equals resizing the short side and then cropping the centre, but an image of 10 x 10 000 pixels never becomes
    a huge one in between. An image that is S x S already is returned unchanged. `safe_open` may have decoded the image
    at a reduced size.
    """
    (width, height), _ = full_size(image)
    square = (image_size, image_size)

    if framing.fit == "crop" or width == height:
        side = min(width, height)
        box = _centered((side, side), (width, height))
        return np.array(_resized(image, box, square))

    whole_image = (0, 0, width, height)
    if framing.fit == "squash":
        return np.array(_resized(image, whole_image, square))

    longest = max(width, height)
    inner_width = max(1, round(image_size * width / longest))
    inner_height = max(1, round(image_size * height / longest))
    inner = _resized(image, whole_image, (inner_width, inner_height))

    padded = Image.new("RGB", square, tuple(round(255 * channel) for channel in framing.mean))
    padded.paste(inner, _centered(inner.size, square))
    return np.array(padded)


def base_pixels(image: Image.Image, image_size: int, framing: Framing = CROP) -> Pixels:
    """The image from which random resized crops are cut, uint8 [H, W, 3]: short side at most 1.15 S, never enlarged.

    A long side of more than four times the short one is cropped to that around the centre, because a long strip would
    fill the memory. With a `framing` that pads or squashes, this is done first, and crops are cut from a square of
    1.15 S.
    """
    if framing.fit != "crop":
        return square_pixels(image, base_side(image_size), framing)

    (full_width, full_height), _ = full_size(image)
    short_side = min(full_width, full_height)
    width = min(full_width, 4 * short_side)
    height = min(full_height, 4 * short_side)
    box = _centered((width, height), (full_width, full_height))

    scale = base_side(image_size) / short_side
    if scale < 1.0:
        scaled_size = max(1, round(width * scale)), max(1, round(height * scale))
        return np.array(_resized(image, box, scaled_size))
    return np.array(image.crop(box))


def _centered(inner: Size, outer: Size) -> Box:
    """The box of size ``inner`` in the middle of ``outer``."""
    left = (outer[0] - inner[0]) // 2
    top = (outer[1] - inner[1]) // 2
    return left, top, left + inner[0], top + inner[1]


def _resized(image: Image.Image, box: Box, size: Size) -> Image.Image:
    """The part of an image inside a box, resized to ``size``; the box is in pixels of the image at its full size."""
    _, reduction = full_size(image)
    left, top, right, bottom = (edge / reduction for edge in box)
    return image.resize(size, Image.Resampling.BICUBIC, box=(left, top, right, bottom))


@dataclass(frozen=True)
class BatchKeys:
    """The keys of a batch's random numbers: the seed of the run, and the epoch and index of each image."""

    seed: int
    epoch: Ints  # [B]
    index: Ints  # [B]

    def uniform(self, count: int, stream: int) -> Floats:
        """float64 [B, count] random numbers in [0, 1), from one of the streams."""
        return uniform(count, self.seed, stream, self.epoch, self.index)

    def rectangles(self, stream: int) -> Floats:
        """float64 [B, T, 4] in [0, 1): area, shape, top and left of each try."""
        return self.uniform(4 * TRIES, stream).reshape(-1, TRIES, 4)


class TrainTransform:
    """Random crop, flip, policy and erasing of a batch; all random decisions on an image depend on its key alone."""

    def __init__(self, data: Data, crop: CropMode) -> None:
        """Choose the steps by `data`; images must be S x S, except for the crop "random_resized", which takes any size.

        With `data.augment` "none" there is no crop, mirroring from left to right, or policy. Pixels that a step takes
        from outside of the image have the mean colour.
        """
        is_plain = data.augment == "none"
        self.image_size = data.image_size
        self.min_crop_scale = data.min_crop_scale
        self.random_erasing = data.random_erasing
        self.crop: CropMode | None = None if is_plain else crop
        self.hflip = data.hflip and not is_plain
        self.vflip = data.vflip
        self.rotate90 = data.rotate90

        mean = [round(255 * channel) for channel in data.mean]
        self.fill = np.array(mean, np.uint8)[:, None, None]  # [3, 1, 1]

        self.policy: v2.Transform | None = None
        if data.augment in _POLICIES:
            bilinear = v2.InterpolationMode.BILINEAR
            self.policy = _POLICIES[data.augment](interpolation=bilinear, fill=mean)

    def __call__(
        self, images: Sequence[Pixels], seed: int, epochs: Sequence[int], indices: Sequence[int]
    ) -> Tensor:
        """Augment B images, uint8 [3, H, W] each, by the seed of the run and the epoch and index of each image.

        The result is uint8 [B, 3, S, S]. Row b depends only on the seed and on image, epoch and index b. The images
        themselves are not changed.
        """
        keys = BatchKeys(seed, np.asarray(epochs, np.int64), np.asarray(indices, np.int64))
        crops = images
        if self.crop == "pad":
            crops = self._pad_crop(images, keys)
        elif self.crop == "random_resized":
            crops = self._resized_crop(images, keys)
        pixels = stack(crops, self.image_size)

        if self.hflip:
            self._flip(pixels, keys)
        if self.vflip:
            self._flip_vertically(pixels, keys)
        if self.rotate90:
            self._turn(pixels, keys)
        if self.policy is not None:
            self._apply_policy(self.policy, pixels, keys)
        if self.random_erasing > 0:
            self._erase(pixels, keys)
        return torch.from_numpy(pixels)

    def _pad_crop(self, images: Sequence[Pixels], keys: BatchKeys) -> list[Pixels]:
        """Each image, moved by up to S / 8; what it leaves free has the mean colour."""
        size = self.image_size
        padding = max(1, size // 8)
        starts = pad_crop_starts(keys.uniform(2, _CROP), padding)  # [B, 2]
        padded_size = size + 2 * padding
        padded = np.tile(self.fill, (padded_size, padded_size))

        crops = []
        for image, (top, left) in zip(images, starts.tolist(), strict=True):
            padded[:, padding:-padding, padding:-padding] = image
            crops.append(_cut(padded, [top, left, size, size]).copy())
        return crops

    def _resized_crop(self, images: Sequence[Pixels], keys: BatchKeys) -> list[Pixels]:
        """A random crop of each image, resized to S x S."""
        sizes = np.array([image.shape[1:] for image in images], np.int64).reshape(-1, 2)  # [B, 2]
        u = keys.rectangles(_CROP)  # [B, T, 4]
        boxes = resized_crop_boxes(u, sizes, (self.min_crop_scale, 1.0))  # [B, 4]

        size = (self.image_size, self.image_size)
        crops = []
        for image, box in zip(images, boxes.tolist(), strict=True):
            crop = torch.from_numpy(_cut(image, box))[None]
            # torch's uint8 kernel takes half the time with channels last, the layout of cached photos.
            crop = crop.contiguous(memory_format=torch.channels_last)  # [1, 3, h, w]
            crops.append(interpolate(crop, size, mode="bicubic", antialias=True)[0].numpy())
        return crops

    def _flip(self, pixels: Pixels, keys: BatchKeys) -> None:
        """Mirror each image in every other epoch (arXiv:2404.00498, section 3.6), from epoch 0 or 1 on, at random."""
        in_even_epochs = uniform(1, keys.seed, _FLIP, 0, keys.index)[:, 0] < 0.5  # [B]
        is_odd_epoch = keys.epoch % 2 == 1  # [B]
        is_flipped = in_even_epochs ^ is_odd_epoch
        pixels[is_flipped] = pixels[is_flipped, :, :, ::-1]

    def _flip_vertically(self, pixels: Pixels, keys: BatchKeys) -> None:
        """Turn a random half of the images upside down, by mirroring."""
        is_flipped = keys.uniform(1, _VERTICAL_FLIP)[:, 0] < 0.5  # [B]
        pixels[is_flipped] = pixels[is_flipped, :, ::-1]

    def _turn(self, pixels: Pixels, keys: BatchKeys) -> None:
        """Turn each image counterclockwise by 0, 90, 180 or 270 degrees, each as likely."""
        quarter_turns = np.floor(4 * keys.uniform(1, _TURN)[:, 0])  # [B]
        for turns in (1, 2, 3):
            is_turned = quarter_turns == turns  # [B]
            pixels[is_turned] = np.rot90(pixels[is_turned], turns, axes=(2, 3))

    def _apply_policy(self, policy: v2.Transform, pixels: Pixels, keys: BatchKeys) -> None:
        """Apply the policy to each image, as a PIL image, which is two to four times as fast as a tensor."""
        seeds = hash_u64_array(keys.seed, _POLICY, keys.epoch, keys.index)  # [B]
        for row, seed in zip(pixels, seeds.tolist(), strict=True):
            image = Image.fromarray(np.ascontiguousarray(row.transpose(1, 2, 0)))
            with seeded_torch(seed):
                changed = policy(image)
            row[:] = np.asarray(changed).transpose(2, 0, 1)

    def _erase(self, pixels: Pixels, keys: BatchKeys) -> None:
        """Fill a random rectangle of a random share of the images with the mean colour."""
        is_erased = keys.uniform(1, _ERASE)[:, 0] < self.random_erasing  # [B]
        boxes = erasing_boxes(keys.rectangles(_RECTANGLE), self.image_size)
        for row in np.flatnonzero(is_erased):
            _cut(pixels[row], boxes[row].tolist())[:] = self.fill


def _cut(image: Pixels, box: list[int]) -> Pixels:
    """The part of an image [3, H, W] inside a box (top, left, height, width), as a view."""
    top, left, height, width = box
    return image[:, top : top + height, left : left + width]


def stack(images: Sequence[Pixels], image_size: int) -> Pixels:
    """Images [3, S, S] as a batch [B, 3, S, S], which may be empty."""
    return np.array(images, np.uint8).reshape(-1, 3, image_size, image_size)


def normalize(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """float32: uint8 pixels [B, 3, H, W] scaled to [0, 1], less the mean, divided by the standard deviation."""
    center = torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1).mul_(255)  # [1, 3, 1, 1]
    inverse = torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1).mul_(255).reciprocal_()
    return pixels.float().sub_(center).mul_(inverse)


class BatchMixer:
    """Mixup and/or CutMix of a whole batch, with soft targets; its random numbers depend on seed, epoch and index."""

    def __init__(self, mixup: float, cutmix: float, num_classes: int) -> None:
        """`mixup` and `cutmix` are the alphas of their Beta distributions; 0 turns one off."""
        self.mixers: list[v2.Transform] = []
        if mixup > 0:
            self.mixers.append(v2.MixUp(alpha=mixup, num_classes=num_classes))
        if cutmix > 0:
            self.mixers.append(v2.CutMix(alpha=cutmix, num_classes=num_classes))

    def __call__(
        self, image: Tensor, label: Tensor, seed: int, epoch: int, index: int
    ) -> tuple[Tensor, Tensor]:
        """Mix each image, float32 [B, 3, H, W], with its neighbour, and their `label` [B] or [B, C] alike.

        Returns soft targets [B, C]; of single labels the rows sum to 1. `index` is that of the batch's first image.
        """
        with seeded_torch(hash_u64(seed, _MIX, epoch, index)):
            choice = 0
            if len(self.mixers) > 1:
                choice = int(torch.randint(len(self.mixers), ()))
            mixed, target = self.mixers[choice](image, label)
        return mixed, target


# Positions of random crops and of erased rectangles, computed for a whole batch at once. The distributions are those of
# torchvision's v2.RandomCrop, v2.RandomResizedCrop and v2.RandomErasing.


def pad_crop_starts(u: Floats, padding: int) -> Ints:
    """[B, 2] top and left of crops from padded images, uniform in 0 ... 2 · padding; u is [B, 2]."""
    return np.floor(u * (2 * padding + 1)).astype(np.int64)


def resized_crop_boxes(u: Floats, sizes: Ints, scale: Bounds) -> Boxes:
    """[B, 4] crops of random area and shape; the largest central one where no try fits.

    `sizes` [B, 2] are heights and widths of the images; u is [B, T, 4]: area, shape, top, left of each try; `scale` the
    smallest and largest share of an image's area.
    """
    sides = _sides(u, sizes, scale, CROP_RATIO)[..., ::-1]  # [B, T, 2]
    fits = np.all((sides > 0) & (sides <= sizes[:, None]), axis=2)  # [B, T]
    return _first_that_fits(u, fits, sides, sizes, _central(sizes))


def erasing_boxes(u: Floats, size: int) -> Boxes:
    """[B, 4] rectangles to erase in images of ``size`` x ``size``; empty ones (height 0) where no try fits.

    ``u`` is [B, T, 4]: area, shape, top, left of each try.
    """
    sizes = np.full((len(u), 2), size)  # [B, 2]
    sides = _sides(u, sizes, ERASED_SHARE, ERASED_RATIO)  # [B, T, 2]
    fits = np.all(sides < size, axis=2)  # [B, T]
    return _first_that_fits(u, fits, sides, sizes, np.zeros((len(u), 4), np.int64))


def _sides(u: Floats, sizes: Ints, scale: Bounds, ratio: Bounds) -> Ints:
    """[B, T, 2] the two sides of random rectangles; their quotient, first / second, lies within `ratio`.

    The area is uniform between the shares `scale` of the image's, the quotient is log-uniform. `sizes` is [B, 2], u is
    [B, T, 4], of which the first two are used.
    """
    area = sizes.prod(axis=1, keepdims=True)  # [B, 1]
    smallest, largest = scale
    product = area * (smallest + (largest - smallest) * u[..., 0])  # [B, T]
    low, high = np.log(ratio)
    quotient = np.exp(low + (high - low) * u[..., 1])  # [B, T]
    # np.rint rounds halves to even numbers like Python's round, which torchvision uses.
    squares = np.stack([product * quotient, product / quotient], axis=2)
    result: Ints = np.rint(np.sqrt(squares)).astype(np.int64)
    return result


def _first_that_fits(u: Floats, fits: Flags, sides: Ints, sizes: Ints, fallback: Boxes) -> Boxes:
    """[B, 4] the first try of each image that fits, at a uniform position; `fallback` [B, 4] where none fits.

    u is [B, T, 4], `fits` [B, T], `sides` [B, T, 2] height and width of each try, `sizes` [B, 2] those of the images.
    """
    rows = np.arange(len(u))
    tries = fits.argmax(axis=1)  # [B]
    chosen_sides = sides[rows, tries]  # [B, 2]
    relative_position = u[rows, tries, 2:]  # [B, 2], from 0 (top, left) to 1
    corner = np.floor(relative_position * (sizes - chosen_sides + 1)).astype(np.int64)
    boxes: Boxes = np.concatenate([corner, chosen_sides], axis=1)
    fits_none = ~fits.any(axis=1)  # [B]
    boxes[fits_none] = fallback[fits_none]
    return boxes


def _central(sizes: Ints) -> Boxes:
    """[B, 4] the largest central crops whose width / height lies within `CROP_RATIO`; `sizes` is [B, 2]."""
    min_ratio, max_ratio = CROP_RATIO
    height, width = sizes.T  # [B] each
    crop_height = np.minimum(height, np.rint(width / min_ratio)).astype(np.int64)
    crop_width = np.minimum(width, np.rint(height * max_ratio)).astype(np.int64)
    top = (height - crop_height) // 2
    left = (width - crop_width) // 2
    return np.stack([top, left, crop_height, crop_width], axis=1)


# Random numbers by key: pure functions of integers, independent of earlier draws and of other processes. (From a
# sequential generator an image's numbers would depend on how many images came before it.)

_MASK = (1 << 64) - 1
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FIRST_FACTOR = np.uint64(0xBF58476D1CE4E5B9)
_SECOND_FACTOR = np.uint64(0x94D049BB133111EB)


def hash_u64(*values: int) -> int:
    """Mix integers, in their order, into one number in [0, 2**64), the same on every machine and in every process."""
    return int(hash_u64_array(*values)[0])


def hash_u64_array(*values: _Key) -> NDArray[np.uint64]:
    """`hash_u64` elementwise over integers and integer arrays, which are broadcast against each other; uint64.

    SplitMix64's finaliser, chained over the values. Python's ``hash`` is not guaranteed to be stable.
    """
    state = np.zeros(1, np.uint64)  # an array: on overflow NumPy's scalars warn
    for value in values:
        # Negative numbers become their value modulo 2**64.
        unsigned = np.uint64(value & _MASK) if isinstance(value, int) else value.astype(np.uint64)
        state = state + unsigned + _GAMMA
        state ^= state >> np.uint64(30)
        state *= _FIRST_FACTOR
        state ^= state >> np.uint64(27)
        state *= _SECOND_FACTOR
        state ^= state >> np.uint64(31)
    return state


def uniform(count: int, *key: _Key) -> Floats:
    """float64 [B, count], uniform in [0, 1): ``count`` numbers for each key; its parts are integers or arrays [B].

    The upper 53 bits of ``hash_u64``, as many as float64 represents exactly.
    """
    columns = [part if isinstance(part, int) else part[:, None] for part in key]  # int, or [B, 1]
    bits = hash_u64_array(*columns, np.arange(count)[None, :])  # [B, count]
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


@contextmanager
def seeded_torch(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator inside the block and put its state back afterwards.

    ``torch.manual_seed`` isn't used because it would reseed the GPU generators too, and so tie the dropout
    of the model to the last image that was loaded.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield

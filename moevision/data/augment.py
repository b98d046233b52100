"""From a picture to pixels: the fixed preparation, the random augmentation, and Mixup / CutMix of a batch.

Preparation is deterministic and its result may be cached; augmentation draws its randomness from a hash of
``(seed, epoch, index)``, so a picture gets the same crop whatever the number of worker processes, the batch
it travels in, or the point from which a run was resumed. The transforms are torchvision's
(``transforms.v2``), which draw from torch's CPU generator; it is seeded for one picture, then put back.

Sources: RandAugment arXiv:1909.13719, TrivialAugment arXiv:2103.10158, random erasing arXiv:1708.04896,
Mixup arXiv:1710.09412, CutMix arXiv:1905.04899, random resized crop arXiv:1409.4842 (section 6).

Axis legend: B batch, C classes, H height, W width, S = ``image_size``; pixels are uint8 unless said so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from moevision.data.sampler import hash_u64

Augment = Literal["none", "light", "randaugment", "trivialaugment"]
CropMode = Literal["pad", "random_resized"]

BASE_SCALE = 1.15
"""Short side, in units of ``image_size``, at which photos are kept for random resized crops: large enough
that crops are not enlarged much, small enough that tens of thousands of photos fit into memory."""

# streams of random numbers that must never coincide for equal (seed, epoch, index)
_PIXEL_STREAM, _MIX_STREAM = 1, 2


@contextmanager
def seeded_torch(*key: int) -> Iterator[None]:
    """Seed torch's CPU generator from ``key`` inside the block and put its state back afterwards.

    ``torch.manual_seed`` isn't used because it would reseed the GPU generators too, and so tie the dropout
    of the model to the last picture that was loaded.
    """
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(hash_u64(*key))
    try:
        yield
    finally:
        generator.set_state(state)


def square_pixels(image: Image.Image, image_size: int) -> npt.NDArray[np.uint8]:
    """The picture as evaluation sees it: its central square, resized to S x S (bicubic, antialiased).

    Equal to resizing the short side and then cropping the centre, but a picture of 10 x 10 000 pixels never
    becomes a huge one in between. A picture that is S x S already is returned as it is.

    Args:
        image: an RGB picture of any size.
        image_size: side of the result, S, in pixels.

    Returns:
        uint8 [S, S, 3].
    """
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    if side == image_size:
        image = image.crop((left, top, left + side, top + side))
    else:
        box = (left, top, left + side, top + side)
        image = image.resize((image_size, image_size), Image.Resampling.BICUBIC, box=box)
    return np.array(image)


def base_pixels(image: Image.Image, image_size: int) -> npt.NDArray[np.uint8]:
    """The picture as random resized crops are cut from it: short side at most 1.15 S, never enlarged.

    A long side beyond four times the short one is cut off around the centre (a strip would fill the memory).

    Returns:
        uint8 [H, W, 3].
    """
    short = min(image.size)
    width, height = min(image.width, 4 * short), min(image.height, 4 * short)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    box = (left, top, left + width, top + height)
    scale = min(1.0, round(BASE_SCALE * image_size) / short)
    if scale < 1.0:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC, box=box)
    elif (width, height) != image.size:
        image = image.crop(box)
    return np.array(image)


class TrainTransform:
    """Random crop, flip, policy and erasing of one picture; every decision follows from the key."""

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
        """Build the chain of torchvision transforms.

        Args:
            image_size: side of the result, S.
            augment: "none" leaves out crop, flip and policy.
            crop: "pad" expects S x S pixels; "random_resized" any size.
            min_crop_scale: smallest share of the picture's area in a random resized crop.
            hflip: mirror half of the pictures.
            random_erasing: probability that a random rectangle is filled with the mean colour.
            mean: mean colour in [0, 1], the filling of what lies outside the picture.
        """
        fill = [round(255 * channel) for channel in mean]
        bilinear = v2.InterpolationMode.BILINEAR
        steps: list[torch.nn.Module] = []
        if augment != "none":
            if crop == "pad":
                steps.append(v2.RandomCrop(image_size, padding=max(1, image_size // 8), fill=fill))
            else:
                bicubic = v2.InterpolationMode.BICUBIC
                steps.append(v2.RandomResizedCrop(image_size, (min_crop_scale, 1.0), interpolation=bicubic))
            if hflip:
                steps.append(v2.RandomHorizontalFlip())
        # the policies run on PIL pictures: two to four times as fast as on tensors
        if augment == "randaugment":
            steps += [v2.ToPILImage(), v2.RandAugment(interpolation=bilinear, fill=fill), v2.PILToTensor()]
        if augment == "trivialaugment":
            policy = v2.TrivialAugmentWide(interpolation=bilinear, fill=fill)
            steps += [v2.ToPILImage(), policy, v2.PILToTensor()]
        if random_erasing > 0:
            steps.append(v2.RandomErasing(p=random_erasing, value=[float(value) for value in fill]))
        self.steps = steps

    def __call__(self, pixels: Tensor, seed: int, epoch: int, index: int) -> Tensor:
        """Augment one picture.

        Args:
            pixels: uint8 [3, H, W].
            seed: seed of the run.
            epoch: epoch number.
            index: index of the picture in its split.

        Returns:
            uint8 [3, S, S], a function of the arguments alone.
        """
        with seeded_torch(seed, _PIXEL_STREAM, epoch, index):
            for step in self.steps:
                pixels = step(pixels)
        return pixels


class BatchMixer:
    """Mixup and/or CutMix of a whole batch, with soft targets; decided by (seed, epoch, first index)."""

    def __init__(self, mixup: float, cutmix: float, num_classes: int) -> None:
        """Choose the mixers.

        Args:
            mixup: alpha of Mixup's Beta distribution; 0 turns Mixup off.
            cutmix: alpha of CutMix's Beta distribution; 0 turns CutMix off.
            num_classes: number of classes, C.
        """
        self.mixers: list[v2.Transform] = []
        if mixup > 0:
            self.mixers.append(v2.MixUp(alpha=mixup, num_classes=num_classes))
        if cutmix > 0:
            self.mixers.append(v2.CutMix(alpha=cutmix, num_classes=num_classes))

    def __call__(self, image: Tensor, label: Tensor, seed: int, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        """Mix every picture with its neighbour in the batch.

        Args:
            image: float32 [B, 3, H, W].
            label: int64 [B], hard.
            seed: seed of the run.
            epoch: epoch number.
            index: index of the batch's first picture.

        Returns:
            Mixed image float32 [B, 3, H, W] and soft target float32 [B, C], whose rows sum to 1.
        """
        with seeded_torch(seed, _MIX_STREAM, epoch, index):
            choice = int(torch.randint(len(self.mixers), ())) if len(self.mixers) > 1 else 0
            image, target = self.mixers[choice](image, label)
        return image, target


def normalize(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Scale uint8 pixels [B, 3, H, W] to [0, 1], subtract the mean and divide by the deviation; float32."""
    center = torch.tensor(mean).view(1, 3, 1, 1).mul_(255)
    inverse = torch.tensor(std).view(1, 3, 1, 1).mul_(255).reciprocal_()
    return pixels.float().sub_(center).mul_(inverse)

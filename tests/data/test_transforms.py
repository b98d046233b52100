"""Pixels are functions of (seed, epoch, index) and of nothing else, and each step does what torchvision's does."""

import random
from collections import defaultdict
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import Normalize, v2
from torchvision.transforms.v2 import functional

from moevision.config import Data, Framing
from moevision.data.transforms import (
    TRIES,
    TrainTransform,
    base_pixels,
    erasing_boxes,
    hash_u64,
    normalize,
    pad_crop_starts,
    resized_crop_boxes,
    seeded_torch,
    square_pixels,
    uniform,
)

MEAN = (0.5, 0.25, 0.75)


def transform(size: int = 16, **options) -> TrainTransform:
    crop = options.pop("crop", "pad")
    return TrainTransform(Data(image_size=size, **({"mean": MEAN} | options)), crop)


def noise(height: int = 16, width: int = 16, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (3, height, width), dtype=np.uint8)


def one(chain: TrainTransform, image: np.ndarray, epoch: int, index: int) -> np.ndarray:
    """The pixels of a batch of one image."""
    return chain([image], 0, [epoch], [index])[0].numpy()


ALL = [
    {"augment": augment, "crop": crop, "random_erasing": 0.5}
    for augment in ("none", "light", "randaugment", "trivialaugment")
    for crop in ("pad", "random_resized")
]


def test_global_generators_are_left_alone():
    chain = transform(augment="randaugment", random_erasing=1.0)
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    expected = torch.rand(4), random.random(), np.random.rand()
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    one(chain, noise(), 2, 3)
    assert torch.equal(torch.rand(4), expected[0])
    assert (random.random(), np.random.rand()) == expected[1:]


def photos(square: bool) -> list[np.ndarray]:
    """Six images of different sizes, in the layouts of a cache and of a decoder."""
    made = [noise(16, 16, n) if square else noise(20 + n, 40 - 3 * n, n) for n in range(6)]
    return [
        image.transpose(1, 2, 0).copy().transpose(2, 0, 1) if n % 2 else image
        for n, image in enumerate(made)
    ]


@pytest.mark.parametrize(
    "options", ALL, ids=lambda options: f"{options['augment']}-{options['crop']}"
)
@given(data=st.data())
def test_a_batch_is_its_pictures_however_it_is_put_together(options, data):
    """Any division of any order of the images into batches gives each the pixels it has alone."""
    is_square = options["crop"] == "pad" or options["augment"] == "none"
    chain, pictures = transform(**options), photos(is_square)
    epochs = data.draw(st.lists(st.integers(0, 2**31), min_size=6, max_size=6))
    order = data.draw(st.permutations(range(6)))
    cut = data.draw(st.integers(0, 6))
    alone = [chain([pictures[n]], 9, [epochs[n]], [n])[0] for n in range(6)]
    before = [picture.copy() for picture in pictures]
    for part in (order[:cut], order[cut:]):
        batch = chain([pictures[n] for n in part], 9, [epochs[n] for n in part], part)
        assert batch.shape == (len(part), 3, 16, 16)
        for row, n in zip(batch, part, strict=True):
            assert torch.equal(row, alone[n])
    assert all(np.array_equal(*pair) for pair in zip(pictures, before, strict=True)), (
        "a cache is only read"
    )


def test_rows_of_a_batch_have_decisions_of_their_own():
    """The trap: torchvision's v2 on a batched tensor decides once for all."""
    same, keys = [noise()] * 64, (3, [1] * 64, list(range(64)))
    for options in (
        {"crop": "pad"},
        {"crop": "random_resized"},
        {"augment": "none", "random_erasing": 1.0},
    ):
        rows = transform(**options)(same, *keys)
        assert len({row.numpy().tobytes() for row in rows}) > 30, options


# torchvision's functions, given the same numbers. Expected streams: 3 crop, 4 flip, 5 and 6 erasing.

FILL = [128, 64, 191]  # the mean colour
EPOCHS, INDICES = [2] * 40, list(range(100, 140))
KEY = (np.array(EPOCHS), np.array(INDICES))


IMAGES = [noise(seed=n) for n in range(40)]


def flipped(rows: list[torch.Tensor]) -> torch.Tensor:
    mirrored = uniform(1, 7, 4, 0, KEY[1])[:, 0] < 0.5  # of even epochs
    assert 10 < mirrored.sum() < 30
    return torch.stack(
        [row.flip(2) if flip else row for row, flip in zip(rows, mirrored, strict=True)]
    )


def test_light_pad_is_torchvision_s_pad_crop_and_flip():
    starts = pad_crop_starts(uniform(2, 7, 3, *KEY), 2).tolist()
    padded = [functional.pad(torch.from_numpy(image), [2], fill=FILL) for image in IMAGES]
    rows = [functional.crop(p, *start, 16, 16) for p, start in zip(padded, starts, strict=True)]
    assert torch.equal(transform()(IMAGES, 7, EPOCHS, INDICES), flipped(rows))


def test_light_resized_is_torchvision_s_resized_crop_and_flip():
    images = [noise(24 + n, 60 - n, n) for n in range(40)]
    u = uniform(4 * TRIES, 7, 3, *KEY).reshape(-1, TRIES, 4)
    boxes = resized_crop_boxes(u, np.array([image.shape[1:] for image in images]), (0.4, 1.0))
    bicubic = {"interpolation": v2.InterpolationMode.BICUBIC, "antialias": True}
    rows = [
        functional.resized_crop(torch.from_numpy(image), *box, [16, 16], **bicubic)
        for image, box in zip(images, boxes.tolist(), strict=True)
    ]
    chain = transform(crop="random_resized", min_crop_scale=0.4)
    assert torch.equal(chain(images, 7, EPOCHS, INDICES), flipped(rows))


def test_erasing_is_torchvision_s_erase():
    chosen = uniform(1, 7, 5, *KEY)[:, 0] < 0.6
    assert 15 < chosen.sum() < 33
    boxes = erasing_boxes(uniform(4 * TRIES, 7, 6, *KEY).reshape(-1, TRIES, 4), 16).tolist()
    fill = torch.tensor(FILL, dtype=torch.uint8).view(3, 1, 1)
    found = transform(augment="none", random_erasing=0.6)(IMAGES, 7, EPOCHS, INDICES)
    for row, image, box, erased in zip(
        found, map(torch.from_numpy, IMAGES), boxes, chosen, strict=True
    ):
        assert torch.equal(row, functional.erase(image, *box, fill) if erased else image)


@pytest.mark.parametrize(
    ("name", "policy"), [("randaugment", v2.RandAugment), ("trivialaugment", v2.TrivialAugmentWide)]
)
def test_a_policy_is_torchvision_s_on_each_picture(name, policy):
    """On an image that is only shifted and mirrored before, drawn from the generator that its key seeds (stream 1)."""
    keys = (7, EPOCHS[:20], INDICES[:20])
    light, found = (transform(augment=augment)(IMAGES[:20], *keys) for augment in ("light", name))
    chain = policy(interpolation=v2.InterpolationMode.BILINEAR, fill=FILL)
    for row, before, epoch, index in zip(found, light, *keys[1:], strict=True):
        with seeded_torch(hash_u64(7, 1, epoch, index)):
            expected = chain(functional.to_pil_image(before))
        assert torch.equal(row, functional.pil_to_tensor(expected))
    assert (found != light).flatten(1).any(dim=1).sum() > 10


def test_two_epochs_in_a_row_show_both_sides():
    """The alternating flip of arXiv:2404.00498: from a random start, never the same side twice."""
    image, chain = noise(), transform(crop="random_resized", min_crop_scale=1.0)
    starts = defaultdict(set)  # index -> whether it is mirrored in even epochs
    for index, epoch in product(range(100), range(6)):
        found = one(chain, image, epoch, index)
        for mirrored, side in ((False, image), (True, image[:, :, ::-1])):
            if np.array_equal(found, side):  # the whole square was cropped
                starts[index].add(mirrored ^ (epoch % 2 == 1))
    assert len(starts) > 50
    assert all(len(start) == 1 for start in starts.values())
    assert set.union(*starts.values()) == {False, True}


def ramp(size: tuple[int, int]) -> Image.Image:
    """A smooth image."""
    y, x = np.mgrid[: size[1], : size[0]]
    return Image.fromarray(np.stack([3 * x, 3 * y, 2 * (x + y)], axis=2).astype(np.uint8))


def test_square_pixels_is_the_centre_at_full_size():
    pixels = np.arange(6 * 10 * 3, dtype=np.uint8).reshape(6, 10, 3)
    assert np.array_equal(square_pixels(Image.fromarray(pixels), 6), pixels[:, 2:8])


@pytest.mark.parametrize(("size", "target"), [((40, 30), 16), ((30, 40), 16), ((20, 20), 32)])
def test_square_pixels_equals_resize_then_centre_crop(size, target):
    """The half-pixel in which the two orders may differ stays small."""
    image = ramp(size)
    scale = target / min(size)
    resized = image.resize(
        (round(size[0] * scale), round(size[1] * scale)), Image.Resampling.BICUBIC
    )
    left, top = (resized.width - target) // 2, (resized.height - target) // 2
    expected = np.asarray(resized.crop((left, top, left + target, top + target))).astype(int)
    assert np.abs(square_pixels(image, target).astype(int) - expected)[2:-2, 2:-2].max() <= 5


@pytest.mark.parametrize("size", [(40, 30), (31, 77), (20, 20)])
@pytest.mark.parametrize(("fit", "mode"), [("pad", "border"), ("squash", "squash")])
def test_whole_images_are_prepared_as_timm_prepares_them(fit, mode, size):
    timms = create_transform(
        (3, 16, 16), mean=MEAN, interpolation="bicubic", crop_pct=1.0, crop_mode=mode
    )
    timms.transforms = [each for each in timms.transforms if not isinstance(each, Normalize)]
    expected = (255 * timms(ramp(size))).permute(1, 2, 0).round().numpy()
    assert np.array_equal(square_pixels(ramp(size), 16, Framing(fit, MEAN)), expected)


@pytest.mark.parametrize("fit", ["pad", "squash"])
def test_random_crops_are_cut_from_the_whole_squared_image(fit):
    """So that training sees what evaluation sees; 1.15 x 64 = 73.6."""
    image, framing = ramp((90, 40)), Framing(fit)
    assert np.array_equal(base_pixels(image, 64, framing), square_pixels(image, 74, framing))


@pytest.mark.parametrize(
    ("size", "shape"),  # 1.15 x 64 = 73.6
    [
        ((400, 200), (74, 148, 3)),
        ((80, 60), (60, 80, 3)),
        ((74, 74), (74, 74, 3)),
        ((4, 8000), (16, 4, 3)),
    ],
)
def test_base_pixels_shrinks_to_what_crops_need_and_never_enlarges(size, shape):
    assert base_pixels(Image.new("RGB", size), 64).shape == shape
    assert square_pixels(Image.new("RGB", size), 64).shape == (64, 64, 3)


def test_normalize_by_hand():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    out = normalize(pixels, (0.5, 0.2, 0.0), (0.25, 0.5, 2.0))
    # (0 - 0.5) / 0.25, (0.2 - 0.2) / 0.5, (1 - 0) / 2
    torch.testing.assert_close(out.flatten(), torch.tensor([-2.0, 0.0, 0.5]))
    assert out.dtype == torch.float32

"""Pixels are functions of (seed, epoch, index) and of nothing else, and each step does what torchvision's does."""

import random

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
from moevision.data import transforms
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


def noise(height: int = 16, width: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def one(
    chain: TrainTransform, pixels: torch.Tensor, seed: int, epoch: int, index: int
) -> torch.Tensor:
    """A batch of one image."""
    return chain([pixels.numpy()], seed, [epoch], [index])[0]


ALL = [
    {"augment": augment, "crop": crop, "random_erasing": 0.5}
    for augment in ("none", "light", "randaugment", "trivialaugment")
    for crop in ("pad", "random_resized")
]


@pytest.mark.parametrize(
    "options", ALL, ids=lambda options: f"{options['augment']}-{options['crop']}"
)
def test_pixels_follow_from_the_key_alone(options):
    chain, pixels = transform(**options), noise()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    first = [one(chain, pixels, 5, epoch, index) for epoch in range(3) for index in range(6)]
    torch.manual_seed(2), random.seed(2), np.random.seed(2)
    again = [
        one(transform(**options), pixels, 5, epoch, index)
        for epoch in range(3)
        for index in range(6)
    ]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(result.shape == (3, 16, 16) and result.dtype == torch.uint8 for result in first)
    assert (
        len({result.numpy().tobytes() for result in first}) > 6
    )  # epochs and indices do make a difference


def test_global_generators_are_left_alone():
    chain = transform(augment="randaugment", random_erasing=1.0)
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    expected = torch.rand(4), random.random(), np.random.rand()
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    one(chain, noise(), 1, 2, 3)
    assert torch.equal(torch.rand(4), expected[0])
    assert (random.random(), np.random.rand()) == expected[1:]


def photos(count: int = 6, square: bool = False) -> list[np.ndarray]:
    """Pictures of different sizes, in both orders that a cache keeps them in."""
    made = [noise(16, 16, n) if square else noise(20 + n, 40 - 3 * n, n) for n in range(count)]
    return [
        p.permute(1, 2, 0).contiguous().permute(2, 0, 1).numpy() if n % 2 else p.numpy()
        for n, p in enumerate(made)
    ]


@pytest.mark.parametrize(
    "options", ALL, ids=lambda options: f"{options['augment']}-{options['crop']}"
)
@given(data=st.data())
def test_a_batch_is_its_pictures_however_it_is_put_together(options, data):
    """Any division of any order of the images into batches gives each the pixels it has alone."""
    chain, pictures = (
        transform(**options),
        photos(square="pad" in options["crop"] or options["augment"] == "none"),
    )
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
    same, keys = [noise().numpy()] * 64, (3, [1] * 64, list(range(64)))
    for options in (
        {"crop": "pad"},
        {"crop": "random_resized"},
        {"augment": "none", "random_erasing": 1.0},
    ):
        rows = transform(**options)(same, *keys)
        assert len({row.numpy().tobytes() for row in rows}) > 30, options


# torchvision's functions, given the same numbers. Expected streams: 3 crop, 4 flip, 5 and 6 erasing.

EPOCHS, INDICES = [2] * 40, list(range(100, 140))
KEY = (np.array(EPOCHS), np.array(INDICES))


def flipped(rows: list[torch.Tensor], seed: int) -> torch.Tensor:
    mirrored = uniform(1, seed, 4, 0, KEY[1])[:, 0] < 0.5  # of even epochs
    assert 10 < mirrored.sum() < 30
    return torch.stack(
        [
            functional.horizontal_flip(r) if flip else r
            for r, flip in zip(rows, mirrored, strict=True)
        ]
    )


def test_light_pad_is_torchvision_s_pad_crop_and_flip():
    pictures = [noise(seed=n) for n in range(40)]
    shifts = pad_crop_starts(uniform(2, 7, 3, *KEY), 2)
    padded = [functional.pad(p, [2], fill=[128, 64, 191]) for p in pictures]
    rows = [
        functional.crop(p, y, x, 16, 16) for p, (y, x) in zip(padded, shifts.tolist(), strict=True)
    ]
    found = transform()([p.numpy() for p in pictures], 7, EPOCHS, INDICES)
    assert torch.equal(found, flipped(rows, 7))


def test_light_resized_is_torchvision_s_resized_crop_and_flip():
    pictures = [noise(24 + n, 60 - n, n) for n in range(40)]
    u = uniform(4 * TRIES, 7, 3, *KEY).reshape(-1, TRIES, 4)
    boxes = resized_crop_boxes(u, np.array([p.shape[1:] for p in pictures]), (0.4, 1.0))
    bicubic = v2.InterpolationMode.BICUBIC
    rows = [
        functional.resized_crop(p, *box, [16, 16], interpolation=bicubic, antialias=True)
        for p, box in zip(pictures, boxes.tolist(), strict=True)
    ]
    chain = transform(crop="random_resized", min_crop_scale=0.4)
    found = chain([p.numpy() for p in pictures], 7, EPOCHS, INDICES)
    assert torch.equal(found, flipped(rows, 7))


def test_erasing_is_torchvision_s_erase():
    pictures = [noise(seed=n) for n in range(40)]
    chosen = uniform(1, 7, 5, *KEY)[:, 0] < 0.6
    assert 15 < chosen.sum() < 33
    boxes = erasing_boxes(uniform(4 * TRIES, 7, 6, *KEY).reshape(-1, TRIES, 4), 16).tolist()
    fill = torch.tensor([128, 64, 191], dtype=torch.uint8).view(3, 1, 1)
    rows = [
        functional.erase(p, *box, fill) if erased else p
        for p, box, erased in zip(pictures, boxes, chosen, strict=True)
    ]
    found = transform(augment="none", random_erasing=0.6)(
        [p.numpy() for p in pictures], 7, EPOCHS, INDICES
    )
    assert torch.equal(found, torch.stack(rows))


@pytest.mark.parametrize(
    ("name", "policy"), [("randaugment", v2.RandAugment), ("trivialaugment", v2.TrivialAugmentWide)]
)
def test_a_policy_is_torchvision_s_on_each_picture(name, policy):
    """On an image that is only shifted and mirrored before, drawn from the generator that its key seeds (stream 1)."""
    pictures = [noise(seed=n).numpy() for n in range(20)]
    keys = (7, EPOCHS[:20], INDICES[:20])
    light, found = transform()(pictures, *keys), transform(augment=name)(pictures, *keys)
    chain = policy(interpolation=v2.InterpolationMode.BILINEAR, fill=[128, 64, 191])
    for row, before, epoch, index in zip(found, light, *keys[1:], strict=True):
        with seeded_torch(hash_u64(7, 1, epoch, index)):
            expected = chain(functional.to_pil_image(before))
        assert torch.equal(row, functional.pil_to_tensor(expected))
    assert (found != light).flatten(1).any(dim=1).sum() > 10


def test_streams_are_apart():
    streams = [
        transforms._POLICY,
        transforms._CROP,
        transforms._FLIP,
        transforms._ERASE,
        transforms._RECTANGLE,
        transforms._MIX,
    ]
    assert len(set(streams)) == len(streams)


def test_two_epochs_in_a_row_show_both_sides():
    """The alternating flip of arXiv:2404.00498: from a random start, never the same side twice."""
    pixels, chain = noise(), transform(crop="random_resized", min_crop_scale=1.0)
    sides = {index: {} for index in range(100)}
    for index, own in sides.items():
        for epoch in range(6):
            result = one(chain, pixels, 0, epoch, index)
            for mirrored, side in ((False, pixels), (True, pixels.flip(2))):
                if torch.equal(result, side):  # the whole square was cropped
                    own[epoch] = mirrored ^ (epoch % 2 == 1)
    seen = [set(own.values()) for own in sides.values() if len(own) > 1]
    assert len(seen) > 50
    assert all(len(own) == 1 for own in seen)
    assert {side for own in seen for side in own} == {False, True}


def test_augment_none_changes_nothing():
    pixels = noise()
    assert torch.equal(one(transform(augment="none"), pixels, 0, 0, 0), pixels)


def test_square_pixels_is_the_centre_at_full_size():
    pixels = np.arange(6 * 10 * 3, dtype=np.uint8).reshape(6, 10, 3)
    assert np.array_equal(square_pixels(Image.fromarray(pixels), 6), pixels[:, 2:8])


@pytest.mark.parametrize(("size", "target"), [((40, 30), 16), ((30, 40), 16), ((20, 20), 32)])
def test_square_pixels_equals_resize_then_centre_crop(size, target):
    # Smooth, so that the half-pixel in which the two orders may differ stays small.
    y, x = np.mgrid[: size[1], : size[0]]
    image = Image.fromarray(np.stack([3 * x, 3 * y, 2 * (x + y)], axis=2).astype(np.uint8))
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
    y, x = np.mgrid[: size[1], : size[0]]
    image = Image.fromarray(np.stack([3 * x, 3 * y, 2 * (x + y)], axis=2).astype(np.uint8))
    mean = (0.5, 0.25, 0.75)
    timms = create_transform(
        (3, 16, 16), mean=mean, interpolation="bicubic", crop_pct=1.0, crop_mode=mode
    )
    timms.transforms = [each for each in timms.transforms if not isinstance(each, Normalize)]
    expected = (255 * timms(image)).permute(1, 2, 0).round().numpy()
    assert np.array_equal(square_pixels(image, 16, Framing(fit, mean)), expected)


def test_padding_by_hand():
    """20 x 10 px become 8 x 4, in the middle of 8 x 8 of the mean colour."""
    padded = square_pixels(
        Image.new("RGB", (20, 10), (9, 9, 9)), 8, Framing("pad", (0.2, 0.4, 1.0))
    )
    assert (padded[2:6] == 9).all()
    assert (padded[[0, 1, 6, 7]] == (51, 102, 255)).all()


@pytest.mark.parametrize("fit", ["pad", "squash"])
def test_random_crops_are_cut_from_the_whole_squared_image(fit):
    """So that training sees what evaluation sees; 1.15 x 64 = 73.6."""
    image = Image.fromarray(np.arange(90 * 40 * 3, dtype=np.uint8).reshape(40, 90, 3))
    assert np.array_equal(
        base_pixels(image, 64, Framing(fit)), square_pixels(image, 74, Framing(fit))
    )


def test_a_thin_strip_stays_small():
    strip = Image.new("RGB", (4, 8000))
    assert square_pixels(strip, 64).shape == (64, 64, 3)
    assert base_pixels(strip, 64).shape == (16, 4, 3)


@pytest.mark.parametrize(
    ("size", "shape"),
    [
        ((400, 200), (74, 148, 3)),
        ((80, 60), (60, 80, 3)),
        ((74, 74), (74, 74, 3)),
    ],  # 1.15 x 64 = 73.6
)
def test_base_pixels_shrinks_to_what_crops_need_and_never_enlarges(size, shape):
    assert base_pixels(Image.new("RGB", size), 64).shape == shape


def test_normalize_by_hand():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    out = normalize(pixels, (0.5, 0.2, 0.0), (0.25, 0.5, 2.0))
    # (0 - 0.5) / 0.25, (0.2 - 0.2) / 0.5, (1 - 0) / 2
    torch.testing.assert_close(out.flatten(), torch.tensor([-2.0, 0.0, 0.5]))
    assert out.dtype == torch.float32

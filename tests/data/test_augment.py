"""Pixels and mixtures are functions of (seed, epoch, index) and of nothing else."""

import contextlib
import random

import numpy as np
import pytest
import torch
from PIL import Image

from moevision.data.augment import (
    BatchMixer,
    TrainTransform,
    base_pixels,
    normalize,
    seeded_torch,
    square_pixels,
)

MEAN = (0.5, 0.25, 0.75)


def transform(size: int = 16, **options) -> TrainTransform:
    defaults = {
        "augment": "light",
        "crop": "pad",
        "min_crop_scale": 0.25,
        "hflip": True,
        "random_erasing": 0.0,
        "mean": MEAN,
    }
    return TrainTransform(size, **(defaults | options))


def noise(height: int = 16, width: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


ALL = [
    {"augment": augment, "crop": crop, "random_erasing": 0.5}
    for augment in ("none", "light", "randaugment", "trivialaugment")
    for crop in ("pad", "random_resized")
]


@pytest.mark.parametrize("options", ALL, ids=lambda options: f"{options['augment']}-{options['crop']}")
def test_pixels_follow_from_the_key_alone(options):
    chain, pixels = transform(**options), noise()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    first = [chain(pixels, 5, epoch, index) for epoch in range(3) for index in range(6)]
    torch.manual_seed(2), random.seed(2), np.random.seed(2)
    again = [transform(**options)(pixels, 5, epoch, index) for epoch in range(3) for index in range(6)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(result.shape == (3, 16, 16) and result.dtype == torch.uint8 for result in first)
    assert len({result.numpy().tobytes() for result in first}) > 6  # epochs and indices do make a difference


def test_global_generators_are_left_alone():
    chain = transform(augment="randaugment", random_erasing=1.0)
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    expected = torch.rand(4), random.random(), np.random.rand()
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    chain(noise(), 1, 2, 3)
    assert torch.equal(torch.rand(4), expected[0])
    assert (random.random(), np.random.rand()) == expected[1:]


def test_the_generator_is_put_back_after_an_error():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    with contextlib.suppress(RuntimeError), seeded_torch(7):
        torch.rand(1)
        raise RuntimeError
    assert torch.equal(torch.rand(1), expected)


def test_pad_crop_is_a_shift_by_at_most_an_eighth_filled_with_the_mean_colour():
    fill = torch.tensor([128, 64, 191], dtype=torch.uint8)  # 255 x MEAN, rounded
    pixels = noise()
    padded = fill.view(3, 1, 1).repeat(1, 20, 20)
    padded[:, 2:18, 2:18] = pixels  # 16 / 8 = 2 pixels on each side
    windows = {
        padded[:, top : top + 16, left : left + 16].numpy().tobytes(): (top, left)
        for top in range(5)
        for left in range(5)
    }
    seen = {windows[transform(hflip=False)(pixels, 0, 0, index).numpy().tobytes()] for index in range(300)}
    assert seen == set(windows.values())  # each of the 25 shifts, and nothing else


def test_hflip_mirrors_about_half():
    pixels, chain = noise(), transform(crop="random_resized", min_crop_scale=1.0)
    mirrored = [
        # the whole square is cropped in most draws; those are the picture or its mirror image
        (torch.equal(result, pixels.flip(2)), torch.equal(result, pixels))
        for result in (chain(pixels, 0, 0, index) for index in range(400))
    ]
    flips, stays = (sum(column) for column in zip(*mirrored, strict=True))
    assert flips + stays > 50
    # binomial: outside of 5 standard deviations once in a million
    assert abs(flips - stays) < 5 * (flips + stays) ** 0.5


def test_min_crop_scale_bounds_the_area():
    # A picture whose red channel is the column and green the row, so a crop tells its own extent.
    side = 200
    ramp = torch.arange(side, dtype=torch.uint8)
    pixels = torch.stack([ramp.expand(side, side), ramp.view(-1, 1).expand(side, side), torch.zeros(side, side)])
    pixels = pixels.to(torch.uint8)
    for scale in (0.1, 0.6):
        chain = transform(32, crop="random_resized", min_crop_scale=scale)
        areas = []
        for index in range(200):
            out = chain(pixels, 0, 0, index).float()
            # pixel centres of a crop of width w span w - w/32
            width = (out[0].max() - out[0].min()) / (1 - 1 / 32)
            height = (out[1].max() - out[1].min()) / (1 - 1 / 32)
            areas.append(float(width * height) / side**2)
        assert scale - 0.05 < min(areas) < scale + 0.1
        assert max(areas) > 0.85


def test_augment_none_changes_nothing():
    pixels = noise()
    assert torch.equal(transform(augment="none")(pixels, 0, 0, 0), pixels)


def test_random_erasing_fills_with_the_mean_colour():
    pixels = torch.zeros(3, 16, 16, dtype=torch.uint8)
    out = transform(augment="none", random_erasing=1.0)(pixels, 0, 0, 0)
    erased = out[0] > 0
    assert 0 < erased.sum() < 256
    assert out[:, erased].unique(dim=1).flatten().tolist() == [128, 64, 191]


def test_square_pixels_is_the_centre_at_full_size():
    pixels = np.arange(6 * 10 * 3, dtype=np.uint8).reshape(6, 10, 3)
    assert np.array_equal(square_pixels(Image.fromarray(pixels), 6), pixels[:, 2:8])


@pytest.mark.parametrize(("size", "target"), [((40, 30), 16), ((30, 40), 16), ((20, 20), 32)])
def test_square_pixels_equals_resize_then_centre_crop(size, target):
    # Smooth, so that the half-pixel in which the two orders may differ stays small.
    y, x = np.mgrid[: size[1], : size[0]]
    image = Image.fromarray(np.stack([3 * x, 3 * y, 2 * (x + y)], axis=2).astype(np.uint8))
    scale = target / min(size)
    resized = image.resize((round(size[0] * scale), round(size[1] * scale)), Image.Resampling.BICUBIC)
    left, top = (resized.width - target) // 2, (resized.height - target) // 2
    expected = np.asarray(resized.crop((left, top, left + target, top + target))).astype(int)
    assert np.abs(square_pixels(image, target).astype(int) - expected)[2:-2, 2:-2].max() <= 5


def test_a_thin_strip_stays_small():
    strip = Image.new("RGB", (4, 8000))
    assert square_pixels(strip, 64).shape == (64, 64, 3)
    assert base_pixels(strip, 64).shape == (16, 4, 3)


@pytest.mark.parametrize(
    ("size", "shape"),
    [((400, 200), (74, 148, 3)), ((80, 60), (60, 80, 3)), ((74, 74), (74, 74, 3))],  # 1.15 x 64 = 73.6
)
def test_base_pixels_shrinks_to_what_crops_need_and_never_enlarges(size, shape):
    assert base_pixels(Image.new("RGB", size), 64).shape == shape


def test_normalize_by_hand():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    out = normalize(pixels, (0.5, 0.2, 0.0), (0.25, 0.5, 2.0))
    # (0 - 0.5) / 0.25, (0.2 - 0.2) / 0.5, (1 - 0) / 2
    torch.testing.assert_close(out.flatten(), torch.tensor([-2.0, 0.0, 0.5]))
    assert out.dtype == torch.float32


def batch(size: int = 6, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 3, 8, 8, generator=generator), torch.arange(size) % classes


def test_mixup_by_hand():
    image, label = batch()
    mixed, target = BatchMixer(0.8, 0.0, 4)(image, label, 3, 2, 17)
    # The share is drawn from Beta(0.8, 0.8) with the generator that the key seeds (stream 2 is mixing).
    with seeded_torch(3, 2, 2, 17):
        share = torch.distributions.Beta(torch.tensor([0.8]), torch.tensor([0.8])).sample().item()
    neighbour = image.roll(1, 0)
    torch.testing.assert_close(mixed, share * image + (1 - share) * neighbour)
    one_hot = torch.nn.functional.one_hot(label, 4).float()
    torch.testing.assert_close(target, share * one_hot + (1 - share) * one_hot.roll(1, 0))


@pytest.mark.parametrize(("mixup", "cutmix"), [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_targets_sum_to_one_and_depend_on_the_key(mixup, cutmix):
    image, label = batch()
    mixer = BatchMixer(mixup, cutmix, 4)
    results = [mixer(image, label, 0, epoch, index) for epoch in range(2) for index in range(4)]
    for _, target in results:
        assert target.dtype == torch.float32
        torch.testing.assert_close(target.sum(dim=1), torch.ones(6))
        assert (target >= 0).all()
    assert len({mixed.numpy().tobytes() for mixed, _ in results}) > 6  # an empty CutMix box may come twice
    torch.manual_seed(5)
    assert torch.equal(mixer(image, label, 0, 1, 3)[0], results[-1][0])


def test_cutmix_target_is_the_pasted_area():
    image, label = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 8).clone(), torch.arange(4)
    mixed, target = BatchMixer(0.0, 1.0, 4)(image, label, 0, 0, 1)
    for row in range(4):
        kept = (mixed[row, 0] == row).float().mean()
        torch.testing.assert_close(target[row, row], kept)
    assert 0 < kept < 1


def test_with_both_each_batch_gets_one_of_the_two():
    image, label = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 8).clone(), torch.arange(4)
    mixer = BatchMixer(1.0, 1.0, 4)
    # CutMix copies pixels, so only whole numbers remain; Mixup blends them.
    pasted = [bool((out == out.round()).all()) for out, _ in (mixer(image, label, 0, 0, i) for i in range(60))]
    assert 15 < sum(pasted) < 45

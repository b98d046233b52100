"""Pixels are functions of (seed, epoch, index) and of nothing else, and each step does what torchvision's does."""

import contextlib
import math
import random
from collections import defaultdict
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from timm.data import create_transform
from torchvision.transforms import Normalize, v2
from torchvision.transforms.v2 import functional

from moevision.config import Data, Framing
from moevision.data.transforms import (
    CROP_RATIO,
    TRIES,
    BatchMixer,
    TrainTransform,
    base_pixels,
    erasing_boxes,
    hash_u64,
    hash_u64_array,
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


def test_vertical_flips_and_turns_are_torch_s():
    """Expected streams: 7 vertical flip, 8 turn; first the flip. No other step changes an image here."""
    flips = uniform(1, 7, 7, *KEY)[:, 0] < 0.5
    turns = (4 * uniform(1, 7, 8, *KEY)[:, 0]).astype(int)
    assert 10 < flips.sum() < 30
    assert set(turns) == {0, 1, 2, 3}
    rows = [torch.from_numpy(image) for image in IMAGES]
    flipped_rows = [row.flip(1) if flip else row for row, flip in zip(rows, flips, strict=True)]
    turned_rows = [row.rot90(turn, (1, 2)) for row, turn in zip(flipped_rows, turns, strict=True)]

    plain = {"augment": "none"}
    both = transform(**plain, vflip=True, rotate90=True)
    assert torch.equal(
        transform(**plain, vflip=True)(IMAGES, 7, EPOCHS, INDICES), torch.stack(flipped_rows)
    )
    assert torch.equal(both(IMAGES, 7, EPOCHS, INDICES), torch.stack(turned_rows))
    # An image's turn doesn't depend on its batch.
    assert torch.equal(both(IMAGES[5:6], 7, [2], [105])[0], turned_rows[5])


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


# ---- mixtures are functions of (seed, epoch, index of the first image); their targets say what is in them


def batch(size: int = 6, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 3, 8, 8, generator=generator), torch.arange(size) % classes


def test_mixup_by_hand():
    image, label = batch()
    mixed, target = BatchMixer(0.8, 0.0, 4)(image, label, 3, 2, 17)
    # The share is drawn from Beta(0.8, 0.8) with the generator that the key seeds (stream 2 is mixing).
    with seeded_torch(hash_u64(3, 2, 2, 17)):
        share = torch.distributions.Beta(torch.tensor([0.8]), torch.tensor([0.8])).sample().item()
    neighbour = image.roll(1, 0)
    torch.testing.assert_close(mixed, share * image + (1 - share) * neighbour)
    one_hot = torch.nn.functional.one_hot(label, 4).float()
    torch.testing.assert_close(target, share * one_hot + (1 - share) * one_hot.roll(1, 0))


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
    pasted = [
        bool((out == out.round()).all())
        for out, _ in (mixer(image, label, 0, 0, i) for i in range(60))
    ]
    assert 15 < sum(pasted) < 45


# ---- random numbers are functions of their key: those of many keys at once are those of each alone


def splitmix64(*values: int) -> int:
    """In Python's integers, chained over the values."""
    state = 0
    for value in values:
        state = (state + value + 0x9E3779B97F4A7C15) % 2**64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
        state ^= state >> 31
    return state


def test_hash_is_splitmix64():
    # First output of SplitMix64 seeded with 0 and with 1234567 (published test vectors, e.g. Rosetta Code).
    assert hash_u64(0) == 0xE220A8397B1DCDAF
    assert hash_u64(1234567) == 6457827717110365317
    assert hash_u64(-3, 2**64 - 1, 5) == splitmix64(-3, 2**64 - 1, 5)


@given(
    seed=st.integers(-(2**70), 2**70), many=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=6)
)
def test_the_hash_of_arrays_is_that_of_their_elements(seed, many):
    column, row = np.array(many, np.int64)[:, None], np.arange(3)[None, :]
    expected = [[splitmix64(seed, value, number) for number in range(3)] for value in many]
    assert hash_u64_array(seed, column, row).tolist() == expected


def test_uniform_by_hand():
    found = uniform(3, 7, np.array([4, 5]), np.array([10, 11]))
    expected = [
        [(splitmix64(7, a, b, number) >> 11) / 2**53 for number in range(3)]
        for a, b in ((4, 10), (5, 11))
    ]
    assert found.tolist() == expected


def test_no_number_reaches_one(monkeypatch):
    monkeypatch.setattr(
        "moevision.data.transforms.hash_u64_array", lambda *_: np.array([[0, 2**64 - 1]], np.uint64)
    )
    low, high = uniform(2, 0)[0]
    assert (low, high) == (0.0, 1 - 2.0**-53)
    assert all(np.floor(high * n) == n - 1 for n in range(1, 10_000))


@pytest.mark.parametrize("stream", [1, 3, 4, 5, 6])
def test_numbers_of_neighbouring_keys_are_uniform_and_independent(stream):
    """Keys that count up are the hardest case for a hash. The seeds are fixed, so a passing test passes for ever."""
    epoch, index = (grid.ravel() for grid in np.mgrid[:20, :2000])
    u = uniform(4, 0, stream, epoch, index)
    for column in u.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3
    by_epoch = u[:, 0].reshape(20, 2000)
    pairs = [
        *((u[:, a], u[:, b]) for a in range(4) for b in range(a)),  # numbers of one image
        (by_epoch[:, 1:].ravel(), by_epoch[:, :-1].ravel()),  # neighbours in an epoch
        (by_epoch[1:].ravel(), by_epoch[:-1].ravel()),  # one image in successive epochs
        (u[:, 0], uniform(1, 1, stream, epoch, index)[:, 0]),  # successive seeds
        (u[:, 0], uniform(1, 0, stream + 1, epoch, index)[:, 0]),  # successive streams
    ]
    for first, second in pairs:
        table, _, _ = np.histogram2d(first, second, bins=8, range=[[0, 1], [0, 1]])
        assert stats.chisquare(table.ravel()).pvalue > 1e-4


def test_the_generator_is_put_back_after_an_error():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    with contextlib.suppress(RuntimeError), seeded_torch(7):
        torch.rand(1)
        raise RuntimeError
    assert torch.equal(torch.rand(1), expected)


# ---- crops and erased rectangles: torchvision's distributions, drawn for a whole batch at once

KEYS = np.arange(4000)


def draws(*, stream: int = 0) -> np.ndarray:
    return uniform(4 * TRIES, 0, stream, KEYS).reshape(-1, TRIES, 4)


def boxes_by_torchvision(
    transform: v2.Transform, height: int, width: int, count: int = 4000
) -> np.ndarray:
    """(top, left, height, width) as torchvision draws them; a rectangle that isn't erased has height 0."""
    picture = torch.zeros(3, height, width)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = [transform.make_params([picture]) for _ in range(count)]
    if isinstance(transform, v2.RandomErasing):
        return np.array(
            [[p["i"], p["j"], p["h"], p["w"]] if p["v"] is not None else [0] * 4 for p in drawn]
        )
    return np.array([[p["top"], p["left"], p["height"], p["width"]] for p in drawn])


def assert_same_distribution(ours: np.ndarray, theirs: np.ndarray, sides: tuple[int, int]) -> None:
    """Position, size, area, shape and free space used: two-sample Kolmogorov-Smirnov, 4 000 each, fixed seeds."""

    def views(boxes: np.ndarray) -> list[np.ndarray]:
        top, left, height, width = boxes.T.astype(float)
        free = [top / np.maximum(1, sides[0] - height), left / np.maximum(1, sides[1] - width)]
        return [top, left, height, width, height * width, height / np.maximum(1, width), *free]

    for mine, other in zip(views(ours), views(theirs), strict=True):
        assert stats.ks_2samp(mine, other).pvalue > 1e-3


@pytest.mark.parametrize("size", [(147, 196), (147, 588), (32, 32), (4, 40)], ids=str)
@pytest.mark.parametrize("scale", [0.08, 0.25, 0.9])
def test_resized_crops_are_distributed_as_torchvision_s(size, scale):
    ours = resized_crop_boxes(draws(), np.tile(size, (len(KEYS), 1)), (scale, 1.0))
    theirs = boxes_by_torchvision(v2.RandomResizedCrop(8, (scale, 1.0)), *size)
    assert_same_distribution(ours, theirs, size)


@pytest.mark.parametrize("size", [8, 32, 224])
def test_erased_rectangles_are_distributed_as_torchvision_s(size):
    ours = erasing_boxes(draws(stream=1), size)
    theirs = boxes_by_torchvision(v2.RandomErasing(p=1.0), size, size)
    assert_same_distribution(ours, theirs, (size, size))


def first_fit(u: np.ndarray, height: int, width: int, scale: tuple[float, float]) -> list[int]:
    """torchvision's loop over tries (v2.RandomResizedCrop.make_params), with the numbers handed in."""
    for area, shape, top, left in u:
        target = height * width * (scale[0] + (scale[1] - scale[0]) * area)
        ratio = math.exp(
            math.log(CROP_RATIO[0]) + (math.log(CROP_RATIO[1]) - math.log(CROP_RATIO[0])) * shape
        )
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            return [math.floor(top * (height - h + 1)), math.floor(left * (width - w + 1)), h, w]
    w, h = width, height
    if width / height < min(CROP_RATIO):
        h = round(w / min(CROP_RATIO))
    elif width / height > max(CROP_RATIO):
        w = round(h * max(CROP_RATIO))
    return [(height - h) // 2, (width - w) // 2, h, w]


@given(
    sizes=st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=8),
    scale=st.floats(0.01, 1.0),
    key=st.integers(0, 10_000),
)
def test_a_batch_of_crops_is_the_loop_over_its_pictures(sizes, scale, key):
    u = uniform(4 * TRIES, key, np.arange(len(sizes))).reshape(-1, TRIES, 4)
    found = resized_crop_boxes(u, np.array(sizes), (scale, 1.0))
    assert found.tolist() == [
        first_fit(own, *size, (scale, 1.0)) for own, size in zip(u, sizes, strict=True)
    ]


@pytest.mark.parametrize("padding", [1, 4])
def test_shifts_are_uniform(padding):
    shifts = pad_crop_starts(uniform(2, 0, KEYS), padding)
    values, counts = np.unique(shifts, axis=0, return_counts=True)
    assert (shifts.min(), shifts.max(), len(values)) == (0, 2 * padding, (2 * padding + 1) ** 2)
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("shape", [0.0, 1.0], ids=["wide", "tall"])
def test_an_erased_rectangle_lies_in_the_picture(shape):
    """A third of the area at 3.3 to 1 is 104 long: the next try is taken, 2 % of it and nearly square."""
    tries = np.array([[[1, shape, 0, 0], [0, 0.5, 0, 0]]])
    assert erasing_boxes(tries, 100).tolist() == [[0, 0, 14, 14]]

"""Crops and erased rectangles: torchvision's distributions, drawn for a whole batch at once."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torchvision.transforms import v2

from moevision.data.transforms import (
    CROP_RATIO,
    TRIES,
    erasing_boxes,
    pad_crop_starts,
    resized_crop_boxes,
    uniform,
)

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

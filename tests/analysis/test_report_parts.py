"""Small parts of the report: how numbers are shown, which images are, and that images are read once."""

import numpy as np
import pytest

from moevision.analysis.images import aligned_pictures, cached
from moevision.analysis.information import as_json
from moevision.analysis.report import number, shown_pictures
from tests.analysis.pictures import MadePictures


@pytest.mark.parametrize(
    ("value", "form", "shown"),
    [
        (0.98765, ".1%", "98.8 %"),
        (-0.1234, "+.2f", "−0.12"),
        (-0.0001, "+.2f", "0.00"),
        (1234, ",", "1,234"),
        (0.0123, ".2g", "0.012"),
    ],
)
def test_numbers_are_shown_rounded_and_kept_exactly(value, form, shown):
    assert number(value, form) == f'<data value="{value}">{shown}</data>'


def test_no_number_is_a_dash():
    assert "–" in number(None)


def test_what_json_can_not_say_is_null():
    values = {
        "a": np.float32(1.5),
        "b": np.array([1, 2]),
        "c": float("nan"),
        "d": (np.bool_(True), float("inf")),
    }
    assert as_json(values) == {"a": 1.5, "b": [1, 2], "c": None, "d": [True, None]}


def test_shown_pictures_are_of_different_classes(make_trace):
    trace = make_trace(
        np.zeros((9, 4, 1)), labels=[0, 0, 0, 0, 0, 0, 0, 1, 2], num_experts=2, grid=(2, 2)
    )
    for seed in range(20):
        shown = shown_pictures(trace, seed)
        assert sorted(trace.labels[shown]) == [0, 1, 2]
    assert {shown_pictures(trace, seed)[0] for seed in range(50)} >= {7, 8}, (
        "the first is not always of class 0"
    )


@pytest.fixture
def reads():
    """Images that were read, in order."""
    return []


@pytest.fixture
def ten(reads):
    """Ten images, each a list of reads."""

    def image(index):
        reads.append(index)
        return np.full((8, 8, 3), index, np.uint8)

    return MadePictures(10, image, ("cat", "dog"))


def test_pictures_follow_the_trace(ten, make_trace):
    trace = make_trace(np.zeros((10, 4, 1)), labels=np.arange(10) % 2, num_experts=2, grid=(2, 2))
    assert aligned_pictures(ten, trace) is ten
    some = aligned_pictures(ten, trace.select([7, 2]))
    assert [int(some.image(index)[0, 0, 0]) for index in range(len(some))] == [7, 2]
    assert [some.label(index) for index in range(2)] == [1, 0]


def test_pictures_are_read_once(ten, reads):
    pictures = cached(ten)
    for _ in range(3):
        assert [int(pictures.image(index)[0, 0, 0]) for index in range(10)] == list(range(10))
    assert reads == list(range(10))
    some = cached(ten, max_bytes=8 * 8 * 3 + 5)  # the first fits, the second doesn't
    for _ in range(3):
        assert (int(some.image(0)[0, 0, 0]), int(some.image(1)[0, 0, 0])) == (0, 1)
    assert reads[10:] == [0, 1, 1, 1]
    assert (len(some), some.label(3), some.picture_name(3)) == (10, 1, "picture 3")

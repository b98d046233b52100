"""The study of strangers: areas and shares by hand, and the record beside the models that are carried."""

import json

import numpy as np
import pytest

from benchmarks.strangers import RUNS, area, area_with_interval
from benchmarks.strangers.recompute import CHOSEN_BY, IN_THE_RATE, recognized
from moevision.demo.models import bundled_folders, read_card

RECORDS = [json.loads(line) for line in RUNS.read_text(encoding="utf-8").splitlines()]


def test_the_area_by_hand_and_its_interval():
    """Of 2 x 2 pairs the other is larger in two and equal in one: 2.5 of 4."""
    assert area(np.array([1.0, 3.0]), np.array([2.0, 3.0])) == 2.5 / 4
    rng = np.random.default_rng(0)
    found, low, high = area_with_interval(rng.normal(size=90), rng.normal(1, 1, 60))
    assert low < found < high


def test_the_rate_is_the_mean_over_photos_that_chose_nothing():
    sets = {
        CHOSEN_BY[0]: {"images": 10, "beyond": 10},
        IN_THE_RATE[0]: {"images": 10, "beyond": 4},
        IN_THE_RATE[1]: {"images": 100, "beyond": 60},
        "uniform noise": {"images": 5, "beyond": 5},
    }
    assert recognized({"sets": sets}) == pytest.approx((0.4 + 0.6) / 2)
    assert not set(CHOSEN_BY) & set(IN_THE_RATE)


def test_cards_have_the_share_of_the_record():
    shares = {record["name"]: record["recognized"] for record in RECORDS}
    for record in RECORDS:
        assert record["recognized"] == pytest.approx(recognized(record), abs=1e-4)
    assert {
        folder.name: read_card(folder / "card.json").recognized for folder in bundled_folders()
    } == shares

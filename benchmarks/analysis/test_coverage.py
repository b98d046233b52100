"""A small run of benchmarks/analysis/coverage.py, and what its recorded output must say."""

import json
from pathlib import Path

import pytest

from benchmarks.analysis import coverage

BENCHMARKS = Path(__file__).parents[1]


@pytest.mark.parametrize("bits", [0.0, 0.05, 0.25])
@pytest.mark.parametrize("classes", [2, 8])
def test_coverage_of_a_small_run(classes, bits) -> None:
    found = coverage.study(coverage.Setting("class", 200, classes, 3.0, bits), 200)["methods"]
    # 200 simulations: a true coverage of 95 % gives at least 90.5 % in 99.8 % of such runs (binomial).
    assert found["score"]["coverage"] >= 0.905
    if (
        bits < 0.1 and classes == 8
    ):  # why percentiles aren't used: they take the sample's noise for signal
        assert found["percentile"]["coverage"] < 0.7


def test_recorded_coverage_is_at_least_93_percent() -> None:
    recorded = json.loads((BENCHMARKS / "analysis" / "coverage.json").read_text())
    asked = {(row["about"], row["images"], row["bits"]) for row in recorded["rows"]}
    assert {
        (about, images, bits)
        for about in ("class", "class_given_position", "position", "part")
        for images in (200, 1000)
        for bits in (0.0, 0.05, 0.25)
    } <= asked
    assert min(row["methods"]["score"]["coverage"] for row in recorded["rows"]) >= 0.93
    assert all(row["simulations"] >= 200 for row in recorded["rows"])

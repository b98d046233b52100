"""The site's figures are what docs/figures.py draws from the records now."""

import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from tests.shared import load_script

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    return load_script(ROOT / "docs" / "figures.py")


def test_committed_figures_are_drawn_from_the_records(figures: ModuleType) -> None:
    for name, drawn in figures.figures().items():
        assert (ROOT / "docs" / "img" / name).read_text(encoding="utf-8") == drawn, (
            "python docs/figures.py"
        )


def test_numbers_of_the_results_are_those_of_the_table(figures: ModuleType) -> None:
    """Five of the differences are rows of docs/results.md, the others in guides; each with the same words."""
    pages = ("docs/results.md", "docs/guides/when-experts.md", "benchmarks/upcycling/README.md")
    plain = " ".join(" ".join((ROOT / name).read_text().split()) for name in pages)
    for effect in figures.effects():
        mean, ends = effect.words.split(" ", 1)
        first, last = ends.strip("()").split(" to ")
        assert re.search(
            rf"{re.escape(mean)}(?: points)? \({re.escape(first)} to {re.escape(last)}", plain
        ), effect
        assert effect.low <= effect.mean <= effect.high


def test_loads_are_shares(figures: ModuleType) -> None:
    for arm in json.loads(figures.BALANCE.read_text())["arms"]:
        assert len(arm["steps"]) == len(arm["shares"])
        assert all(abs(sum(row) - 1) < 1e-3 for row in arm["shares"])

"""The site's figures are what docs/figures.py draws from the records now."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_figures", ROOT / "docs" / "figures.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_committed_figures_are_drawn_from_the_records(figures: ModuleType) -> None:
    for name, drawn in figures.figures().items():
        assert (ROOT / "docs" / "img" / name).read_text(encoding="utf-8") == drawn, (
            "python docs/figures.py"
        )


def test_numbers_of_the_results_are_those_of_the_table(figures: ModuleType) -> None:
    """Five of the differences are rows of docs/results.md, the others in guides; each with the same words."""
    pages = " ".join(
        (ROOT / "docs" / name).read_text() for name in ("results.md", "guides/when-experts.md")
    )
    pages += (ROOT / "benchmarks" / "upcycling" / "README.md").read_text()
    plain = re.sub(r"\s+", " ", pages)
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

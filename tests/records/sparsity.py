"""benchmarks/sparsity/README.md: everything between its marks is the report of the committed runs."""

import statistics
from functools import partial
from typing import Any

from benchmarks.sparsity.verdict import Result, finished, judge, runs_of
from benchmarks.study import Contrast
from tests.records import ROOT, Claim, Definition
from tests.records.studies import report, shown

FOLDER = ROOT / "benchmarks" / "sparsity"
FILES = tuple(str(path.relative_to(ROOT)) for path in sorted([*FOLDER.glob("runs/*.json"), *FOLDER.glob("speed.json")]))


def _parts(*found: Any) -> list[dict[str, str]]:
    speed = [each for file in found if isinstance(file, list) for each in file]
    parts = report("sparsity").parts_of(_runs(found), speed)
    return shown(part for part in parts if not part.startswith("#"))


def learned(*found: Any) -> dict[str, float]:
    """H4 on a CPU: the points by which the router that learns nothing is better."""
    result = _judged(found, "H4")
    contrast = result.contrast
    assert contrast is not None
    assert (result.verdict, contrast.second) == ("negative", "position")
    better, half = -100 * contrast.mean, 100 * contrast.half
    return {"mean": better, "low": better - half, "high": better + half, "seeds": len(contrast.gaps)}


def tie(name: str, *found: Any) -> dict[str, float]:
    """H2 or H3 on a CPU: points, not told apart."""
    result = _judged(found, name)
    assert result.contrast is not None
    assert result.verdict == "tie"
    return _points(result.contrast)


def balanced(*found: Any) -> dict[str, float]:
    """H5 on a CPU: points, and the busiest expert's load of the worst layer, mean of the seeds."""
    contrast = _judged(found, "H5").contrast
    assert contrast is not None
    worst = {
        arm: statistics.fmean(
            max(layer["max_over_mean"] for layer in run["layers"])
            for run in finished(runs_of(_runs(found), "cpu", arm)).values()
        )
        for arm in ("moe", "unbalanced")
    }
    return {**_points(contrast), **worst}


def _points(contrast: Contrast) -> dict[str, float]:
    low, high = contrast.mean - contrast.half, contrast.mean + contrast.half
    return {"mean": 100 * contrast.mean, "low": 100 * low, "high": 100 * high, "seeds": len(contrast.gaps)}


def _runs(found: Any) -> list[dict[str, Any]]:
    return [file for file in found if isinstance(file, dict)]  # not speed.json, a list


def _judged(found: Any, name: str) -> Result:
    return next(result for result in judge(_runs(found), "cpu") if result.hypothesis.name == name)


def first(*found: Any) -> dict[str, float]:
    """H1 on a CPU: points, and the CPU seconds of both arms' runs."""
    runs = _runs(found)
    contrast = _judged(found, "H1").contrast
    assert contrast is not None
    seconds = {
        arm: statistics.fmean(run["cpu_s"] for run in finished(runs_of(runs, "cpu", arm)).values())
        for arm in ("moe", "twin")
    }
    return {**_points(contrast), **seconds}


def hashed(*found: Any) -> dict[str, float]:
    """The learned router minus `hash`, on a CPU."""
    moe, other = (finished(runs_of(_runs(found), "cpu", arm)) for arm in ("moe", "hash"))
    gaps = [moe[seed]["test_top1"] - other[seed]["test_top1"] for seed in sorted(moe.keys() & other.keys())]
    return _points(Contrast("moe", "hash", gaps))


at_equal_time, by_share = partial(tie, "H2"), partial(tie, "H3")
CLAIMS = [
    Claim(FILES, "{text}", _parts),
    Claim(FILES, "`moe` is {mean:.1f} points better ({low:.1f} to {high:.1f}; {seeds} seeds)", hashed),
]
DEFINITIONS: list[Definition] = []

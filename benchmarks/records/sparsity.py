"""benchmarks/sparsity/README.md: everything between its marks is the report of the committed runs."""

import statistics
from functools import cache, partial
from typing import Any

from benchmarks.records import ROOT, Claim, Definition
from benchmarks.records.studies import report, shown
from benchmarks.sparsity.arms import ARMS, routed_share
from benchmarks.sparsity.verdict import Result, finished, gap_of, judge, runs_of
from benchmarks.study import Contrast
from benchmarks.subject import find_subject

FOLDER = ROOT / "benchmarks" / "sparsity"
WORDS = {"positive": "better than", "negative": "worse than", "tie": "not told apart from"}
RECIPES = ("cifar10", "imagenette", "cats_vs_dogs", "quickstart")
FILES = ("benchmarks/sparsity/runs.jsonl", "benchmarks/sparsity/speed.json")


def _parts(*found: Any) -> list[dict[str, str]]:
    speed = [each for file in found if isinstance(file, list) for each in file]
    parts = report("sparsity").parts_of(_runs(found), speed)
    return shown(part for part in parts if not part.startswith("#"))


def learned(*found: Any) -> dict[str, Any]:
    """H4 on a CPU: the points by which the learned router is worse than `position`, or better."""
    result = _judged(found, "H4")
    contrast = result.contrast
    assert contrast is not None
    assert contrast.second == "position"
    size, half = 100 * abs(contrast.mean), 100 * contrast.half
    return {**of(result), "mean": size, "low": size - half, "high": size + half}


def with_places(*found: Any) -> dict[str, Any]:
    """H6 and H7 on a CPU: what experts by place lose, and the learned MoE's difference, which isn't told apart."""
    by_place, moe = _judged(found, "H6"), _judged(found, "H7")
    assert (by_place.verdict, moe.verdict) == ("negative", "tie")
    lost = of(by_place)
    return {**of(moe), "lost": -lost["mean"], "least": -lost["high"], "most": -lost["low"]}


def decided(name: str, *found: Any) -> dict[str, Any]:
    """A hypothesis on a CPU: points, and its verdict in words."""
    return of(_judged(found, name))


def of(result: Result) -> dict[str, Any]:
    """Points of a hypothesis, and its verdict in words: flipped on a page, it is no longer what the record says."""
    assert result.contrast is not None
    shown = "is shown" if result.verdict == "positive" else "is not shown"
    return {**_points(result.contrast), "verdict": WORDS[result.verdict], "shown": shown}


def unasked(first: str, second: str, *found: Any) -> dict[str, Any]:
    """A difference on a CPU that no hypothesis is about, its direction in words, and how many more steps that took."""
    runs = _runs(found)
    gap = gap_of(runs, "cpu", first, second)
    assert gap is not None
    points = _points(gap)
    steps = [next(iter(finished(runs_of(runs, "cpu", arm)).values()))["steps"] for arm in (first, second)]
    above = "above" if points["low"] > 0 else "below" if points["high"] < 0 else "not told apart from"
    return {**points, "above": above, "more": steps[0] / steps[1] - 1}


@cache
def _shares() -> dict[str, float]:
    own = {name: routed_share(find_subject(name)) for name in RECIPES}
    extremes = {"least_percent": 100 * min(own.values()), "most": max(own.values())}
    return {**own, **extremes, "moe": routed_share(ARMS["moe"].subject("moe"))}


def shares(*_: Any) -> dict[str, float]:
    """ρ of the study's model and of the shipped recipes, and the extremes of these; counted, nothing is trained."""
    return _shares()


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


first, at_equal_time, by_share, places = (partial(decided, name) for name in ("H1", "H2", "H3", "H7"))
hashed, more_steps, by_place, hash_places = (
    partial(unasked, *arms)
    for arms in (("moe", "hash"), ("twin-time", "twin"), ("position", "twin-time"), ("twin-places", "hash-places"))
)
CLAIMS = [
    Claim(FILES, "{text}", _parts),
    Claim(FILES, "`moe` is {mean:.1f} points {above} ({low:.1f} to {high:.1f}; {seeds} seeds", hashed),
    Claim(FILES, "{more:.0%} more steps give the twin {mean:.1f} points ({low:.1f} to {high:.1f}; {seeds}", more_steps),
    Claim(FILES, "`position` is {mean:.1f} points {above} `twin-time` ({low:.1f} to {high:.1f}; {seeds}", by_place),
    Claim(
        FILES,
        "`twin-places` is {mean:.1f} points {above} `hash-places` ({low:.1f} to {high:.1f}; {seeds} seeds",
        hash_places,
    ),
    Claim(
        FILES,
        "{cifar10:.0%} (CIFAR-10), {imagenette:.0%} (Imagenette), {cats_vs_dogs:.0%} (cats and dogs) and "
        "{quickstart:.0%} (quickstart) of their FLOPs in experts, this one {moe:.0%}",
        shares,
    ),
]
DEFINITIONS: list[Definition] = []

"""benchmarks/small/README.md: everything between its marks is the report of the committed runs."""

from functools import partial
from statistics import fmean
from typing import Any

from benchmarks.records import Claim, Definition
from benchmarks.records.accuracy import CIFAR
from benchmarks.records.studies import shown
from benchmarks.small.report import (
    batches_answer,
    by_seed,
    common_contrasts,
    counted,
    head_contrasts,
    parts_of,
    rates_answer,
)
from benchmarks.study import contrasts

FILES = "benchmarks/small/runs.jsonl"


def _parts(*runs: Any) -> list[dict[str, str]]:
    return shown(part for part in parts_of(runs) if not part.startswith("#"))


def heads(*runs: Any) -> dict[str, Any]:
    """What reading places gives dense, and what experts give beside it; that none is told apart is asserted."""
    own = counted(runs)
    found = {(each.first, each.second): each for each in head_contrasts(own)}
    arms = {
        arm: found[f"{arm}, places", "dense, places"] for arm in ("position", "hash", "learned")
    }
    assert {each.verdict for each in arms.values()} == {"not told apart"}
    gain = found["dense, places", "dense, mean"]
    dense = {
        head: by_seed(own, "shifted_8", question="heads", arm="dense", head=head)
        for head in ("places", "mean")
    }
    (moved,) = contrasts(dense, [("places", "mean")])
    bounds = gain.interval.partition("(")[2].removesuffix(")")
    common = {f"{each.first}_common": each.interval for each in common_contrasts(own)}
    return {
        **common,
        **{arm: each.interval for arm, each in arms.items()},
        **{
            "mean": 100 * gain.mean,
            "bounds": bounds,
            "seeds": len(gain.gaps),
            "below": -100 * moved.mean,
        },
    }


def answers(*runs: Any) -> list[dict[str, str]]:
    """The sentences on instability and large batches."""
    return shown(answer(counted(runs))[1] for answer in (rates_answer, batches_answer))


def recipes(name: str, *runs: Any) -> dict[str, str]:
    """A recipe with the mean, with places read, and the difference by seed."""
    by_head: dict[str, dict[int, float]] = {"mean": {}, "places": {}}
    for run in runs:
        if run["name"].startswith(name):
            top1 = run["test"]["correct"] / run["test"]["total"]
            by_head["places" if "places" in run["name"] else "mean"][run["seed"]] = top1
    (gap,) = contrasts(by_head, [("mean", "places")])
    assert gap.mean > 0
    said = {head: f"{100 * fmean(own.values()):.1f} %" for head, own in by_head.items()}
    bounds = f"{100 * (gap.mean - gap.half):.1f} to {100 * (gap.mean + gap.half):.1f}; {len(gap.gaps)} seeds"
    moved = [run["shifted_4"] for run in runs if run["name"].startswith(f"{name}-places")]
    shifted = f"{100 * fmean(moved):.1f} %" if moved else ""
    return {**said, "gap": f"{100 * gap.mean:.1f} points ({bounds})", "shifted": shifted}


RECIPES = "benchmarks/accuracy/places.jsonl"
CLAIMS = [
    Claim(
        RECIPES,
        "with places read is {gap} below itself ({mean} with the mean, {places} without)",
        partial(recipes, "quickstart"),
    ),
    Claim(
        (RECIPES, *CIFAR),
        "CIFAR-10's recipe is right on {places} with places read, {mean} with the mean: {gap} less",
        partial(recipes, "cifar10"),
    ),
    Claim((RECIPES, *CIFAR), "on images moved by 4 px, {shifted}", partial(recipes, "cifar10")),
    Claim(FILES, "{text}", _parts),
]
DEFINITIONS = [
    Definition("over 3 seeds and loses at most 2 points on images", "the rule"),
    Definition(
        "+9 600 parameters, +.2 % FLOPs", "10 classes x 15 more places x 64; 2 FLOPs each, of 8.1 M"
    ),
    Definition("intervals of 95 % over seeds", "the level of `benchmarks/study.py`"),
]

"""Which verdict sentence of protocol.md the records select, and what could have been detected."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from scipy.stats import t as student

from benchmarks.queue import is_dirty
from benchmarks.sparsity.arms import LEARNED_NOTHING, TUNING_SEEDS, Record, rate_of
from benchmarks.sparsity.training import PROTOCOL
from benchmarks.study import Contrast, holm
from moevision.stats import LEVEL, detectable
from moevision.words import points

_SENTENCE = re.compile(r"^\| (\w+) \| (positive|negative|tie) \| (.+) \|$", re.MULTILINE)
_EITHER_SIGN = "; this cannot exclude ±{x} points"  # false where the interval ends nearer on one side: an amendment


@dataclass(frozen=True)
class Hypothesis:
    """First minus the best of the seconds.

    Attributes:
        least: seeds below which there is no verdict.
        family: hypotheses of one family are adjusted together.
        margin: how much worse the first may be; 0 asks for a difference, in either direction.
    """

    name: str
    first: str
    seconds: Sequence[str]
    least: int
    family: str
    margin: float = 0.0


HYPOTHESES = (
    Hypothesis("H1", "moe", ("twin",), 6, "primary"),
    Hypothesis("H2", "moe", ("twin-time",), 5, "secondary"),
    Hypothesis("H3", "moe", ("rho10",), 5, "secondary"),
    Hypothesis("H4", "moe", LEARNED_NOTHING, 6, "secondary"),
    Hypothesis("H5", "moe", ("unbalanced",), 5, "secondary", margin=0.01),
    Hypothesis("H6", "position-places", ("twin-places",), 5, "places"),
    Hypothesis("H7", "moe-places", ("twin-places",), 5, "places"),
    Hypothesis("H8", "twin-places", ("twin",), 5, "places"),
)


@dataclass(frozen=True)
class Result:
    """A judged hypothesis.

    Attributes:
        contrast: None where no seed is common; its `p` is adjusted.
        verdict: `positive`, `negative`, `tie`, or why there is none.
        sentence: what is to be said.
        detectable: the difference of accuracy that would have been found with 80 % power; NaN below two seeds.
    """

    hypothesis: Hypothesis
    contrast: Contrast | None
    verdict: str
    sentence: str
    detectable: float = math.nan


def sentences(protocol: Path = PROTOCOL) -> dict[tuple[str, str], str]:
    """(hypothesis, verdict) -> the sentence that was written before the runs, as the protocol's amendments leave it."""
    found = _SENTENCE.findall(protocol.read_text(encoding="utf-8"))
    return {(name, verdict): text.replace(_EITHER_SIGN, "") for name, verdict, text in found}


def runs_of(records: Sequence[Record], device: str, arm: str) -> dict[int, Record]:
    """By seed the runs of an arm at its chosen rate, failed ones too; not those of tuning or from a changed tree."""
    lr = rate_of(records, device, arm)
    return {
        run["seed"]: run
        for run in sorted(records, key=lambda run: int(run["seed"]))
        if (run["device"], run["arm"], run["lr"]) == (device, arm, lr) and run["seed"] not in TUNING_SEEDS
        and not is_dirty(run)
    }  # fmt: skip


def finished(runs: dict[int, Record]) -> dict[int, Record]:
    """Those that didn't fail."""
    return {seed: run for seed, run in runs.items() if not run["failed"]}


def gap_of(records: Sequence[Record], device: str, first: str, second: str) -> Contrast | None:
    """The difference of any two arms over their common seeds, its p unadjusted; None without any."""
    arms = [finished(runs_of(records, device, arm)) for arm in (first, second)]
    gaps = [arms[0][seed]["test_top1"] - arms[1][seed]["test_top1"] for seed in sorted(arms[0].keys() & arms[1].keys())]
    return replace(found := Contrast(first, second, gaps), p=found.own_p) if gaps else None


def judge(records: Sequence[Record], device: str) -> list[Result]:
    """All hypotheses; within a family what can't be judged counts as p = 1."""
    results = []
    for family in dict.fromkeys(hypothesis.family for hypothesis in HYPOTHESES):
        members = [hypothesis for hypothesis in HYPOTHESES if hypothesis.family == family]
        contrasts = [_contrast(hypothesis, records, device) for hypothesis in members]
        obstacles = [_obstacle(*pair, records, device) for pair in zip(members, contrasts, strict=True)]
        ps = [
            1.0 if contrast is None or obstacle else p_of(contrast, hypothesis.margin)
            for hypothesis, contrast, obstacle in zip(members, contrasts, obstacles, strict=True)
        ]
        for hypothesis, contrast, obstacle, p in zip(members, contrasts, obstacles, holm(ps), strict=True):
            results.append(_result(hypothesis, contrast, obstacle, p, len(members)))
    return results


def _contrast(hypothesis: Hypothesis, records: Sequence[Record], device: str) -> Contrast | None:
    arms = [finished(runs_of(records, device, arm)) for arm in (hypothesis.first, *hypothesis.seconds)]
    seeds = sorted(set.intersection(*(set(runs) for runs in arms)))
    if not seeds:
        return None
    first, *others = arms
    best = max(
        range(len(others)), key=lambda place: statistics.fmean(others[place][seed]["val_top1"] for seed in seeds)
    )
    gaps = [first[seed]["test_top1"] - others[best][seed]["test_top1"] for seed in seeds]
    return Contrast(hypothesis.first, hypothesis.seconds[best], gaps)


def _obstacle(hypothesis: Hypothesis, contrast: Contrast | None, records: Sequence[Record], device: str) -> str:
    """Why there is no verdict; empty if there is one."""
    for arm in (hypothesis.first, *hypothesis.seconds):
        runs = runs_of(records, device, arm)
        failed = len(runs) - len(finished(runs))
        if failed > 1:
            return f"not judged: {failed} of {len(runs)} runs of {arm} failed"
    if contrast is None:
        begun = any(runs_of(records, device, arm) for arm in hypothesis.seconds)
        return "partial: no seed that all arms have, no verdict" if begun else "not run"
    count = len(contrast.gaps)
    return f"partial: {count} of at least {hypothesis.least} seeds, no verdict" if count < hypothesis.least else ""


def p_of(contrast: Contrast, margin: float = 0.0) -> float:
    """Two-sided p of a difference; with a margin twice the one-sided p of being no worse than that."""
    if not margin:
        return contrast.own_p
    above = contrast.mean + margin
    if contrast.error == 0:
        return float(above <= 0)
    return min(1.0, 2 * float(student.sf(above / contrast.error, len(contrast.gaps) - 1)))


def verdict_of(contrast: Contrast, margin: float = 0.0) -> str:
    """`positive`, `negative` or `tie` of a contrast whose p is adjusted."""
    if contrast.p < LEVEL and contrast.mean > -margin:
        return "positive"
    worse = contrast.mean + contrast.half < -margin if margin else contrast.p < LEVEL
    return "negative" if worse else "tie"


def _result(hypothesis: Hypothesis, contrast: Contrast | None, obstacle: str, p: float, tests: int) -> Result:
    name = hypothesis.name
    if contrast is None:
        return Result(hypothesis, None, obstacle, f"{name}: {obstacle}.")
    contrast = Contrast(contrast.first, contrast.second, contrast.gaps, p)
    count = len(contrast.gaps)
    found = detectable(count, LEVEL / tests) * statistics.stdev(contrast.gaps) if count > 1 else math.nan
    if obstacle:
        return Result(hypothesis, contrast, obstacle, f"{name}: {obstacle}.", found)
    verdict = verdict_of(contrast, hypothesis.margin)
    low, high = contrast.mean - contrast.half, contrast.mean + contrast.half
    numbers = {name: points(value) for name, value in (("mean", contrast.mean), ("low", low), ("high", high))}
    sentence = sentences()[name, verdict].format(**numbers, n=count, x=f"{100 * max(0.0, -low):.1f}")
    return Result(hypothesis, contrast, verdict, sentence, found)

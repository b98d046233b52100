"""README.md's tables and its verdict, from the records alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.markdown import table
from benchmarks.queue import is_dirty
from benchmarks.study import Contrast, contrasts

Runs = Sequence[Mapping[str, Any]]
SHOWN = {"moe": 12, "twin-time": 12, "twin-parameters": 3, "twin-wide": 4}
"""How many seeds, from FIRST_SEED on, each arm has."""
PAIRS = (("moe", "twin-time"), ("moe", "twin-wide"), ("twin-parameters", "twin-time"))
PAYS = 0.005  # of accuracy: half a point
FIRST_SEED = 200
LOOKS, LEVEL = (6, SHOWN["moe"]), 0.0294
"""How many pairs are judged, and the level at which both looks together err with 5 % (Pocock, Biometrika 64, 1977)."""


def by_seed(runs: Runs, arm: str, quantity: str = "test_top1") -> dict[int, float]:
    """Seed -> accuracy of an arm's finished runs from a clean tree, those of tuning left out."""
    return {
        run["seed"]: run[quantity]
        for run in runs
        if run["arm"] == arm and run["seed"] >= FIRST_SEED and not run["failed"] and not is_dirty(run)
    }


def found(runs: Runs) -> list[Contrast]:
    """The protocol's contrasts, judged together."""
    return contrasts({arm: by_seed(runs, arm) for arm in SHOWN}, PAIRS)


def verdict(contrast: Contrast) -> str:
    """`pays`, `doesn't pay here` or `undecided`, by the protocol's rule; of the first contrast."""
    if contrast.p < LEVEL and contrast.mean >= PAYS:
        return "pays"
    return "doesn't pay here" if contrast.mean + contrast.half_at(LEVEL) < PAYS else "undecided"


SENTENCES = {
    "pays": "At equal time and full length experts pay",
    "doesn't pay here": "At equal time and full length experts don't pay here; half a point is excluded",
    "undecided": "Whether experts pay half a point at equal time and full length is undecided",
}


def judged(runs: Runs, pairs: int) -> Contrast | None:
    """The first contrast of a look, of its pairs alone; None as long as not all of them are done.

    Holm's list is the one that had run by then, so that what comes later changes no verdict: without `twin-wide`.
    """
    early = [run for run in runs if run["seed"] < FIRST_SEED + pairs]
    own = contrasts({arm: by_seed(early, arm) for arm in SHOWN if arm != "twin-wide"}, PAIRS)
    return next((each for each in own if (each.first, each.second) == PAIRS[0] and len(each.gaps) == pairs), None)


def decided(runs: Runs) -> Contrast | None:
    """The first contrast of the look that gives the verdict: of the first that decides, or else of the last."""
    looks = [each for pairs in LOOKS if (each := judged(runs, pairs)) is not None]
    return next((each for each in looks if len(each.gaps) == LOOKS[-1] or verdict(each) != "undecided"), None)


def answer(runs: Runs) -> str:
    """The sentence, with its numbers, or else how many of the seeds are done."""
    look = decided(runs)
    if look is not None:
        return f"{SENTENCES[verdict(look)]}: {look.interval_at(LEVEL)} points (97 %); {len(look.gaps)} pairs."
    first = next((each for each in found(runs) if (each.first, each.second) == PAIRS[0]), None)
    if first is None or len(first.gaps) < 2:
        return "Not run to an end yet."
    looked = f"; undecided after {LOOKS[0]}" if judged(runs, LOOKS[0]) else ""
    return (
        f"{len(first.gaps)} of {LOOKS[-1]} pairs so far, no verdict{looked}: {first.interval_at(LEVEL)} points (97 %)."
    )


def limits(runs: Runs) -> list[str]:
    """What the answer doesn't say: whether more dense parameters help, and how equal the time was."""
    own = {(each.first, each.second): each for each in found(runs)}
    told, capacity = [], own.get(PAIRS[2])
    if capacity is not None:
        shown = "is shown to be" if capacity.p < LEVEL else "isn't shown to be"
        side = "worse" if capacity.p < LEVEL and capacity.mean < 0 else "better"
        told.append(
            f"Dense with as many parameters as the MoE {shown} {side} than dense: {capacity.interval_at(LEVEL)} points "
            f"(97 %); {len(capacity.gaps)} seeds."
        )
    seconds = [by_seed(runs, arm, "cpu_s") for arm in PAIRS[0]]
    common = seconds[0].keys() & seconds[1].keys()
    if common:
        moe, dense = (sum(arm[seed] for seed in common) for arm in seconds)
        told.append(f"In these runs dense had {100 * (dense / moe - 1):.1f} % more CPU time than the MoE.")
    return told


def parts_of(runs: Runs, prices: Sequence[Mapping[str, Any]]) -> list[str]:
    """The answer, the table of arms beside their prices, and that of contrasts, as Markdown."""
    rows, look = [], decided(runs)
    for arm, most in SHOWN.items():
        planned = min(most, len(look.gaps)) if look else most
        own = by_seed(runs, arm)
        done = [run for run in runs if run["arm"] == arm and run["seed"] in own]
        accuracy = [100 * value for value in own.values()]
        mean = f"{statistics.fmean(accuracy):.2f}" if accuracy else ""
        if len(accuracy) > 1:
            mean += f" ± {statistics.stdev(accuracy):.2f}"
        cpu = f"{statistics.fmean(run['cpu_s'] for run in done):,.0f}" if done else ""
        rows.append([f"`{arm}`", f"{len(own)} of {planned}", f"{done[0]['lr']:g}" if done else "", mean, cpu,
                     *_prices(prices, "twin" if arm == "twin-time" else arm)])  # fmt: skip
    names = ["arm", "seeds", "lr", "test top-1, % ± SD", "CPU s of training, busy", "ms a step",
             "ms an image, 1 at a time", "64 at a time", "training, MiB", "parameters"]  # fmt: skip
    lines = [
        [
            f"`{each.first}` − `{each.second}`",
            str(len(each.gaps)),
            each.interval_at(LEVEL),
            each.shown_p,
            each.verdict if each.p < LEVEL else "no difference shown",
        ]
        for each in found(runs)
    ]
    contrast = table(["contrast", "seeds", "points (97 %)", "p, adjusted", "verdict"], lines, "lrrrl") if lines else ""
    tried = sorted({(run["arm"], run["lr"]) for run in runs if run["seed"] < FIRST_SEED})
    tuning = "; ".join(f"`{arm}` at {lr:g}: {_validation(runs, arm, lr)}" for arm, lr in tried)
    parts = [f"**{answer(runs)}**", table(names, rows, "lrrrrrrrrr"), contrast, " ".join(limits(runs))]
    return [*filter(None, parts), *([f"Validation of the tuning runs, %: {tuning}."] if tuning else [])]


def _validation(runs: Runs, arm: str, lr: float) -> str:
    own = [run["val_top1"] for run in runs if (run["arm"], run["lr"]) == (arm, lr) and run["seed"] < FIRST_SEED]
    return ", ".join("failed" if value is None else f"{100 * value:.2f}" for value in own)


def _prices(prices: Sequence[Mapping[str, Any]], arm: str) -> list[str]:
    """Idle prices of an arm, each the median of the measurements."""
    if not prices:
        return [""] * 5

    def median(*keys: str) -> float:
        values = []
        for each in prices:
            value = each["arms"][arm]
            for key in keys:
                value = value[key]
            values.append(value)
        return statistics.median(values)

    times = [median(name, "median") for name in ("step_ms", "image_ms_1", "image_ms_64")]
    return [f"{times[0]:.0f}", f"{times[1]:.1f}", f"{times[2]:.2f}", f"{median('memory', 'peak_mib'):.0f}",
            f"{median('cost', 'total_parameters') / 1e6:.2f} M"]  # fmt: skip

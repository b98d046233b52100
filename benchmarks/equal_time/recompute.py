"""Recompute every measured number of README.md from runs.jsonl and prices.jsonl, with SciPy alone.

Question: trained to the end for the same CPU time, is CIFAR-10's MoE better than the dense model beside it, by half a
point of test accuracy? Arms, contrasts and the verdict's rule are in protocol.md.

Code: commit dcecec0d ran the trainings that are compared, commits 04514324 and 55aef447 those that tuned the learning
rates, commit d58aa810 the prices.

    python benchmarks/equal_time/recompute.py
"""

import json
import math
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

from scipy.stats import t as student

HERE = Path(__file__).parent
ARMS = {
    "moe": 12,
    "twin-time": 12,
    "twin-parameters": 3,
    "twin-wide": 4,
}  # and how many seeds each may have
CONTRASTS = (("moe", "twin-time"), ("moe", "twin-wide"), ("twin-parameters", "twin-time"))
FIRST_SEED = 200  # those below tuned the learning rates
LOOKS = (6, 12)  # the pairs after which the first contrast is judged
LEVEL = 0.0294  # of each look, so that both together err with 5 % (Pocock 1977)
HALF_A_POINT = 0.005
VERDICTS = {
    "pays": ("yes", "At equal time and full length experts pay", "shown"),
    "doesn't pay here": (
        "no",
        "At equal time and full length experts don't pay here; half a point is excluded",
        "excluded",
    ),
    "undecided": (
        "undecided",
        "Whether experts pay half a point at equal time and full length is undecided",
        "neither shown nor excluded",
    ),
}
"""Verdict -> its word in docs/results.md, its sentence, and what it says about half a point more."""
Run = dict[str, Any]


def read(file: str) -> list[Run]:
    """The lines of a record."""
    return [json.loads(line) for line in (HERE / file).read_text(encoding="utf-8").splitlines()]


def read_runs() -> list[Run]:
    """All trainings."""
    return read("runs.jsonl")


def by_seed(runs: list[Run], arm: str) -> dict[int, Run]:
    """Seed -> finished run of an arm; the tuning left out."""
    return {
        run["seed"]: run
        for run in runs
        if run["arm"] == arm and run["seed"] >= FIRST_SEED and not run["failed"]
    }


def differences(runs: list[Run], first: str, second: str) -> list[float]:
    """One arm's test accuracy minus another's in every seed that both have."""
    own, other = by_seed(runs, first), by_seed(runs, second)
    return [
        own[seed]["test_top1"] - other[seed]["test_top1"]
        for seed in sorted(own.keys() & other.keys())
    ]


def half_interval(values: list[float]) -> float:
    """Half of Student's interval at the level of a look, 97 %."""
    return student.ppf(1 - LEVEL / 2, len(values) - 1) * stdev(values) / math.sqrt(len(values))


def p_value(values: list[float]) -> float:
    """Two-sided p of the paired t-test."""
    return 2 * student.sf(
        abs(fmean(values)) / (stdev(values) / math.sqrt(len(values))), len(values) - 1
    )


def judged_contrasts(runs: list[Run]) -> dict[tuple[str, str], tuple[list[float], float]]:
    """The contrasts that ran, each with its differences and its p, adjusted by Holm over all of them."""
    samples = {pair: values for pair in CONTRASTS if len(values := differences(runs, *pair)) > 1}
    adjusted, largest = {}, 0.0
    for rank, pair in enumerate(sorted(samples, key=lambda pair: p_value(samples[pair]))):
        largest = max(largest, min(1.0, (len(samples) - rank) * p_value(samples[pair])))
        adjusted[pair] = largest
    return {pair: (values, adjusted[pair]) for pair, values in samples.items()}


def verdict_of(values: list[float], p: float) -> str:
    """The protocol's rule for the first contrast."""
    if p < LEVEL and fmean(values) >= HALF_A_POINT:
        return "pays"
    return (
        "doesn't pay here" if fmean(values) + half_interval(values) < HALF_A_POINT else "undecided"
    )


def decide(runs: list[Run]) -> tuple[str, list[float]]:
    """The verdict and the differences of the first look that decides, or else of the last; without `twin-wide`."""
    for pairs in LOOKS:
        early = [
            run for run in runs if run["seed"] < FIRST_SEED + pairs and run["arm"] != "twin-wide"
        ]
        values, p = judged_contrasts(early)[CONTRASTS[0]]
        if verdict_of(values, p) != "undecided" or pairs == LOOKS[-1]:
            break
    return verdict_of(values, p), values


def points(share: float) -> str:
    """A difference in percentage points, with its sign."""
    return f"{100 * share:+.1f}".replace("-", "−")


def interval(values: list[float]) -> tuple[float, float, float]:
    """The mean and both ends of its interval."""
    mean, half = fmean(values), half_interval(values)
    return mean, mean - half, mean + half


def mean_and_ends(values: list[float]) -> list[str]:
    """The same in points."""
    return [points(value) for value in interval(values)]


def price_cells(prices: list[Run], arm: str) -> str:
    """Time and memory on an idle machine: the median of the measurements."""

    def middle(*keys: str) -> float:
        values = []
        for price in prices:
            value: Any = price["arms"]["twin" if arm == "twin-time" else arm]
            for key in keys:
                value = value[key]
            values.append(value)
        return median(values)

    return (
        f"{middle('step_ms', 'median'):.0f} | {middle('image_ms_1', 'median'):.1f} | "
        f"{middle('image_ms_64', 'median'):.2f} | {middle('memory', 'peak_mib'):.0f} | "
        f"{middle('cost', 'total_parameters') / 1e6:.2f} M"
    )


def arm_row(runs: list[Run], prices: list[Run], arm: str, pairs: int) -> str:
    """Seeds, learning rate, accuracy and CPU seconds of an arm, and its prices."""
    own = list(by_seed(runs, arm).values())
    cells = ["", "", ""]
    if own:
        percents = [100 * run["test_top1"] for run in own]
        cells = [
            f"{own[0]['lr']:g}",
            f"{fmean(percents):.2f} ± {stdev(percents):.2f}",
            f"{fmean(run['cpu_s'] for run in own):,.0f}",
        ]
    return f"| `{arm}` | {len(own)} of {min(ARMS[arm], pairs)} | {' | '.join(cells)} | {price_cells(prices, arm)} |"


def contrast_row(pair: tuple[str, str], values: list[float], p: float) -> str:
    """A contrast with its interval, its p and whether it is told apart from 0."""
    mean, low, high = mean_and_ends(values)
    verdict = "no difference shown" if p >= LEVEL else "above" if fmean(values) > 0 else "below"
    return f"| `{pair[0]}` − `{pair[1]}` | {len(values)} | {mean} ({low} to {high}) | {p:.3f} | {verdict} |"


class Parameters(NamedTuple):
    """Dense with as many parameters as the MoE, beside dense of equal time."""

    shown: str
    interval: str
    seeds: int


def of_parameters(runs: list[Run]) -> Parameters:
    """Whether more dense parameters are shown to help; the interval without its last bracket."""
    values, p = judged_contrasts(runs)[CONTRASTS[2]]
    mean, low, high = mean_and_ends(values)
    is_shown = p < LEVEL and fmean(values) > 0
    return Parameters(
        "is shown" if is_shown else "isn't shown", f"{mean} ({low} to {high}", len(values)
    )


def of_cpu_time(runs: list[Run]) -> str:
    """By how much the dense runs took more CPU time than the MoE's of the same seeds."""
    moe, dense = (by_seed(runs, arm) for arm in CONTRASTS[0])
    common = moe.keys() & dense.keys()
    seconds = [sum(arm[seed]["cpu_s"] for seed in common) for arm in (dense, moe)]
    return f"{100 * (seconds[0] / seconds[1] - 1):.1f} %"


def went_on_with_another_order(runs: list[Run]) -> list[Run]:
    """Those that were stopped at an epoch's end: their curve has a point one step behind it."""
    return [
        run
        for run in runs
        if any(
            later[0] - earlier[0] == 1
            for earlier, later in zip(run["curve"], run["curve"][1:], strict=False)
        )
    ]


def of_stopped_runs(runs: list[Run]) -> str:
    """Which runs these are, and whether a verdict hangs on them."""
    stopped = went_on_with_another_order(runs)
    others = [run for run in runs if run not in stopped]
    names = " and ".join(
        f"`{run['arm']}` {run['seed']}" for run in sorted(stopped, key=lambda run: run["arm"])
    )

    def verdicts(some: list[Run]) -> list[bool]:
        return [p < LEVEL for _, p in judged_contrasts(some).values()]

    values, p = judged_contrasts(others)[CONTRASTS[0]]
    same = verdicts(runs) == verdicts(others) and verdict_of(values, p) == decide(runs)[0]
    return (
        f"Two runs, {names}, were stopped at an epoch's end and went on, by a fault that is mended since, with all but "
        "one batch of the next epoch's order left out: as many steps, on other orders of the same images (their curve "
        f"in `runs.jsonl` has a point more). Without them {'no' if same else 'a'} verdict is another."
    )


def lead(runs: list[Run]) -> str:
    """Whether the MoE is better or worse than dense at equal time; empty where neither is shown."""
    values, p = judged_contrasts([run for run in runs if run["arm"] != "twin-wide"])[CONTRASTS[0]]
    return "" if p >= LEVEL else "better" if fmean(values) > 0 else "worse"


def half_a_point_more(runs: list[Run]) -> str:
    """What the verdict says about half a point more than dense."""
    return VERDICTS[decide(runs)[0]][2]


def statements() -> dict[str, list[str]]:
    """Page -> its texts with measured numbers."""
    runs, prices = read_runs(), read("prices.jsonl")
    verdict, values = decide(runs)
    word, sentence, half_a_point = VERDICTS[verdict]
    mean, low, high = mean_and_ends(values)
    answer = f"{sentence}: {mean} ({low} to {high}) points (97 %); {len(values)} pairs"
    tuning = sorted(
        (run["arm"], run["lr"], run["val_top1"]) for run in runs if run["seed"] < FIRST_SEED
    )
    tuned = "; ".join(f"`{arm}` at {lr:g}: {100 * accuracy:.2f}" for arm, lr, accuracy in tuning)
    parameters, cpu_time = of_parameters(runs), of_cpu_time(runs)
    headlines = [
        f"In ten epochs at equal time: {mean} points ({low} to {high}, 97 %; {len(values)} pairs); half a point more "
        f"is {half_a_point}",
        f"Dense with the MoE's parameters {parameters.shown} to gain either: {parameters.interval}, 97 %; "
        f"{parameters.seeds} seeds)",
    ]
    limits = (
        f"Dense with as many parameters as the MoE {parameters.shown} to be better than dense: "
        f"{parameters.interval}) points (97 %); {parameters.seeds} seeds. In these runs dense had {cpu_time} more CPU "
        "time than the MoE"
    )
    readme = [
        f"**{answer}.**",
        *(arm_row(runs, prices, arm, len(values)) for arm in ARMS),
        *(contrast_row(pair, gaps, p) for pair, (gaps, p) in judged_contrasts(runs).items()),
        f"{limits}.",
        of_stopped_runs(runs),
        f"Validation of the tuning runs, %: {tuned}.",
    ]
    link = "([equal_time](../benchmarks/equal_time/README.md))."
    results = f"| They help at equal time too | {word} | {answer}. {limits} {link}"
    return {
        "benchmarks/equal_time/README.md": readme,
        "README.md": headlines,
        "docs/guides/when-experts.md": headlines,
        "docs/results.md": [results],
    }


if __name__ == "__main__":
    for page, texts in statements().items():
        print(f"{page}\n", *texts, sep="\n")

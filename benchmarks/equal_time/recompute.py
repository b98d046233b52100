"""Recompute every measured number of README.md from runs.jsonl and prices.jsonl, with SciPy alone.

Question: trained to the end for the same CPU time, is CIFAR-10's MoE better than the dense model beside it, by half a
point of test accuracy? Arms, contrasts and the verdict's rule are in protocol.md.

Code: commit dcecec0d ran the trainings that are compared, commits 04514324 and 55aef447 those that tuned the learning
rates, commit d58aa810 the prices.

    python benchmarks/equal_time/recompute.py
"""

import json
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from scipy.stats import ttest_1samp

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
    own = [run for run in runs if run["arm"] == arm and not run["failed"]]
    return {run["seed"]: run for run in own if run["seed"] >= FIRST_SEED}


def differences(runs: list[Run], first: str, second: str) -> list[float]:
    """One arm's test accuracy minus another's in every seed that both have."""
    own, other = by_seed(runs, first), by_seed(runs, second)
    common = sorted(own.keys() & other.keys())
    return [own[seed]["test_top1"] - other[seed]["test_top1"] for seed in common]


def interval(values: list[float]) -> tuple[float, float, float]:
    """The mean and both ends of Student's interval at the level of a look, 97 %."""
    low, high = ttest_1samp(values, 0).confidence_interval(1 - LEVEL)
    return fmean(values), float(low), float(high)


def judged_contrasts(runs: list[Run]) -> dict[tuple[str, str], tuple[list[float], float]]:
    """The contrasts that ran, each with its differences and its p, adjusted by Holm over all of them."""
    samples = {pair: values for pair in CONTRASTS if len(values := differences(runs, *pair)) > 1}
    own_p = {pair: ttest_1samp(values, 0).pvalue for pair, values in samples.items()}
    adjusted, largest = {}, 0.0
    for rank, pair in enumerate(sorted(own_p, key=own_p.__getitem__)):
        largest = max(largest, min(1.0, (len(own_p) - rank) * own_p[pair]))
        adjusted[pair] = largest
    return {pair: (values, adjusted[pair]) for pair, values in samples.items()}


def side(values: list[float], p: float, words: tuple[str, str, str]) -> str:
    """Which of the words holds: no difference shown, above, below."""
    return words[0] if p >= LEVEL else words[1] if fmean(values) > 0 else words[2]


def verdict_of(values: list[float], p: float) -> str:
    """The protocol's rule for the first contrast."""
    mean, _, high = interval(values)
    if p < LEVEL and mean >= HALF_A_POINT:
        return "pays"
    return "doesn't pay here" if high < HALF_A_POINT else "undecided"


def decide(runs: list[Run]) -> tuple[str, list[float]]:
    """The verdict and the differences of the first look that decides, or else of the last; without `twin-wide`."""
    compared = [run for run in runs if run["arm"] != "twin-wide"]
    for pairs in LOOKS:
        early = [run for run in compared if run["seed"] < FIRST_SEED + pairs]
        values, p = judged_contrasts(early)[CONTRASTS[0]]
        if (verdict := verdict_of(values, p)) != "undecided":
            break
    return verdict, values


def lead(runs: list[Run]) -> str:
    """Whether the MoE is better or worse than dense at equal time; empty where neither is shown."""
    compared = [run for run in runs if run["arm"] != "twin-wide"]
    return side(*judged_contrasts(compared)[CONTRASTS[0]], ("", "better", "worse"))


def half_a_point_more(runs: list[Run]) -> str:
    """What the verdict says about half a point more than dense."""
    return VERDICTS[decide(runs)[0]][2]


def in_points(values: list[float]) -> tuple[str, str, str]:
    """The same in percentage points."""
    mean, low, high = (f"{100 * end:+.1f}" for end in interval(values))
    return mean, low, high


def price_cells(prices: list[Run], arm: str) -> str:
    """Time and memory on an idle machine: the median of the measurements."""
    own = [price["arms"]["twin" if arm == "twin-time" else arm] for price in prices]

    def middle(name: str, key: str = "median") -> float:
        return median(price[name][key] for price in own)

    return (
        f"{middle('step_ms'):.0f} | {middle('image_ms_1'):.1f} | {middle('image_ms_64'):.2f} | "
        f"{middle('memory', 'peak_mib'):.0f} | {middle('cost', 'total_parameters') / 1e6:.2f} M"
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
    mean, low, high = in_points(values)
    verdict = side(values, p, ("no difference shown", "above", "below"))
    return f"| `{pair[0]}` − `{pair[1]}` | {len(values)} | {mean} ({low} to {high}) | {p:.3f} | {verdict} |"


def of_cpu_time(runs: list[Run]) -> str:
    """By how much the dense runs took more CPU time than the MoE's of the same seeds."""
    moe, dense = (by_seed(runs, arm) for arm in CONTRASTS[0])
    common = moe.keys() & dense.keys()
    seconds = [sum(arm[seed]["cpu_s"] for seed in common) for arm in (dense, moe)]
    return f"{100 * (seconds[0] / seconds[1] - 1):.1f} %"


def was_stopped(run: Run) -> bool:
    """Whether a run was stopped at an epoch's end: its curve has a point one step behind it."""
    steps = [point[0] for point in run["curve"]]
    return any(step + 1 in steps for step in steps)


def of_stopped_runs(runs: list[Run]) -> str:
    """Which runs these are, and whether a verdict hangs on them."""
    stopped = sorted(filter(was_stopped, runs), key=lambda run: run["arm"])
    others = [run for run in runs if run not in stopped]
    names = " and ".join(f"`{run['arm']}` {run['seed']}" for run in stopped)

    def verdicts(some: list[Run]) -> list[bool]:
        return [p < LEVEL for _, p in judged_contrasts(some).values()]

    values, p = judged_contrasts(others)[CONTRASTS[0]]
    same = verdicts(runs) == verdicts(others) and verdict_of(values, p) == decide(runs)[0]
    return (
        f"Two runs, {names}, were stopped at an epoch's end and went on, by a fault that is mended since, with all but "
        "one batch of the next epoch's order left out: as many steps, on other orders of the same images (their curve "
        f"in `runs.jsonl` has a point more). Without them {'no' if same else 'a'} verdict is another."
    )


def statements() -> dict[str, list[str]]:
    """Page -> its texts with measured numbers."""
    runs, prices = read_runs(), read("prices.jsonl")
    verdict, values = decide(runs)
    word, sentence, half_a_point = VERDICTS[verdict]
    mean, low, high = in_points(values)
    answer = f"{sentence}: {mean} ({low} to {high}) points (97 %); {len(values)} pairs"
    tuning = sorted(
        (run["arm"], run["lr"], run["val_top1"]) for run in runs if run["seed"] < FIRST_SEED
    )
    tuned = "; ".join(f"`{arm}` at {lr:g}: {100 * accuracy:.2f}" for arm, lr, accuracy in tuning)
    more, p = judged_contrasts(runs)[CONTRASTS[2]]
    is_shown = side(more, p, ("isn't shown", "is shown", "isn't shown"))
    gain = "{} ({} to {}".format(*in_points(more))
    headlines = [
        f"In ten epochs at equal time: {mean} points ({low} to {high}, 97 %; {len(values)} pairs); half a point more "
        f"is {half_a_point}",
        f"Dense with the MoE's parameters {is_shown} to gain either: {gain}, 97 %; {len(more)} seeds)",
    ]
    limits = (
        f"Dense with as many parameters as the MoE {is_shown} to be better than dense: {gain}) points (97 %); "
        f"{len(more)} seeds. In these runs dense had {of_cpu_time(runs)} more CPU time than the MoE"
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
    print(json.dumps(statements(), indent=1, ensure_ascii=False))

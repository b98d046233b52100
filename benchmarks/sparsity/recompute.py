"""Is a Mixture of Experts better than its dense twin on CIFAR-10, and does a learned router beat fixed rules?

    python benchmarks/sparsity/recompute.py

prints every measured number of README.md, from runs.jsonl and speed.json, and what other pages quote of them. The code
that ran the study is benchmarks/sparsity of the commits that the records name, the last one 276ea9d1; it has left the
tree. Hypotheses, rules and the sentence of every outcome are in protocol.md.

A record is one training of one arm with one seed. Runs with the seeds 100 and 101 tune an arm's learning rate by
validation accuracy and count nowhere else. Arms are compared by test accuracy, seed by seed, with Student's t.
"""

import json
import math
import re
import statistics
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.stats import nct, ttest_1samp
from scipy.stats import t as student

FOLDER = Path(__file__).parent
README, RESULTS = "benchmarks/sparsity/README.md", "docs/results.md"
HEADLINES = ("README.md", "docs/guides/when-experts.md")
LINK = "([sparsity](../benchmarks/sparsity/README.md))."
TUNING_SEEDS = (100, 101)
PLANNED = {
    **dict.fromkeys(("moe", "twin", "hash", "position"), 8),
    **dict.fromkeys(("unbalanced", "importance", "load", "z", "bias"), 6),
    **dict.fromkeys(
        ("rho10", "twin-time", "twin-places", "position-places", "moe-places", "hash-places"), 5
    ),
    **dict.fromkeys(("twin-again", "position-again", "moe-again", "hash-again"), 1),
    **dict.fromkeys(("colour", "random", "twin-parameters"), 5),
}
"""Arm -> its number of seeds in the protocol."""
FAMILIES = (("H1",), ("H2", "H3", "H4", "H5"), ("H6", "H7", "H8"))
"""Hypotheses whose p are adjusted together."""
HYPOTHESES = {
    "H1": ("moe", ("twin",)),
    "H2": ("moe", ("twin-time",)),
    "H3": ("moe", ("rho10",)),
    "H4": ("moe", ("hash", "position")),
    "H5": ("moe", ("unbalanced",)),
    "H6": ("position-places", ("twin-places",)),
    "H7": ("moe-places", ("twin-places",)),
    "H8": ("twin-places", ("twin",)),
}
"""The first arm minus the second, or the better of two by validation accuracy."""
MARGIN = {"H5": 0.01}
"""H5 asks whether the first arm loses at most one point."""


def read_runs() -> list[dict]:
    """All records; no run failed, and none is of a changed tree."""
    text = (FOLDER / "runs.jsonl").read_text(encoding="utf-8")
    runs = [json.loads(line) for line in text.splitlines()]
    assert not any(run["failed"] or run["code"]["dirty"] for run in runs)
    return runs


# ---- the runs of an arm


def is_tuning(run: dict) -> bool:
    """Whether a run served to choose a learning rate."""
    return run["seed"] in TUNING_SEEDS


def learning_rate(runs: list[dict], arm: str) -> float:
    """The rate with the best mean validation accuracy of the tuning runs, the lowest of those that tie.

    An arm that wasn't tuned took another one's rate, and has no other.
    """
    own = [run for run in runs if run["arm"] == arm]
    by_rate: dict[float, list[float]] = {}
    for run in [run for run in own if is_tuning(run)] or own:
        by_rate.setdefault(run["lr"], []).append(run["val_top1"])
    return max(sorted(by_rate), key=lambda rate: statistics.fmean(by_rate[rate]))


def runs_of(runs: list[dict], arm: str) -> dict[int, dict]:
    """The runs of an arm at its rate, by seed."""
    rate = learning_rate(runs, arm)
    chosen = [run for run in runs if run["arm"] == arm and run["lr"] == rate and not is_tuning(run)]
    return {run["seed"]: run for run in sorted(chosen, key=lambda run: run["seed"])}


def mean_of(runs: dict[int, dict], name: str) -> float:
    """Mean over seeds of a number that a record has."""
    return statistics.fmean(run[name] for run in runs.values())


# ---- differences


class Difference(NamedTuple):
    """The first arm's test accuracy minus the second's, seed by seed."""

    first: str
    second: str
    by_seed: list[float]

    @property
    def mean(self) -> float:
        """Over seeds."""
        return statistics.fmean(self.by_seed)

    @property
    def interval(self) -> tuple[float, float]:
        """Student's 95 % interval of the mean."""
        low, high = ttest_1samp(self.by_seed, 0).confidence_interval(0.95)
        return float(low), float(high)

    def p_value(self, margin: float) -> float:
        """Two-sided p of no difference; with a margin twice the one-sided p of losing that much."""
        if not margin:
            return float(ttest_1samp(self.by_seed, 0).pvalue)
        return min(1.0, 2 * float(ttest_1samp(self.by_seed, -margin, alternative="greater").pvalue))

    @property
    def numbers(self) -> dict[str, Any]:
        """In points, as the sentences of the protocol name them."""
        low, high = self.interval
        ends = {"mean": self.mean, "low": low, "high": high}
        points = {name: f"{100 * end:+.1f}" for name, end in ends.items()}
        return {**points, "n": len(self.by_seed)}


def difference(
    runs: list[dict], first: str, second: str, among: tuple[str, ...] = ()
) -> Difference:
    """Of two arms, over the seeds that both, and those `among`, have."""
    arms = {arm: runs_of(runs, arm) for arm in (first, second, *among)}
    seeds = sorted(set.intersection(*map(set, arms.values())))
    gaps = [arms[first][seed]["test_top1"] - arms[second][seed]["test_top1"] for seed in seeds]
    return Difference(first, second, gaps)


def better_rule(runs: list[dict], first: str, rivals: tuple[str, ...]) -> str:
    """The rival with the better validation accuracy, over the seeds that all have."""
    arms = {arm: runs_of(runs, arm) for arm in (first, *rivals)}
    seeds = set.intersection(*map(set, arms.values()))
    return max(rivals, key=lambda arm: statistics.fmean(arms[arm][s]["val_top1"] for s in seeds))


# ---- hypotheses


class Result(NamedTuple):
    """A hypothesis with its p, adjusted by Holm in its family, its verdict, and what 80 % power would have found."""

    name: str
    difference: Difference
    p: float
    verdict: str
    detectable: float


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """The p adjusted by Holm (1979): the smallest times their number, the next times one less, never falling."""
    names = sorted(p_values, key=p_values.__getitem__)
    scaled = [min(1.0, (len(names) - rank) * p_values[name]) for rank, name in enumerate(names)]
    return dict(zip(names, accumulate(scaled, max), strict=True))


def detectable(by_seed: list[float], level: float) -> float:
    """The mean difference that a paired t-test finds with 80 % power, by the noncentral t, in points."""
    seeds = len(by_seed)
    critical = student.ppf(1 - level / 2, seeds - 1)
    in_deviations = brentq(
        lambda d: nct.sf(critical, seeds - 1, d * math.sqrt(seeds)) - 0.8, 1e-6, 100.0
    )
    return 100 * in_deviations * statistics.stdev(by_seed)


def judged(runs: list[dict]) -> dict[str, Result]:
    """All hypotheses, by the rule of the protocol."""
    results = {}
    for names in FAMILIES:
        differences = {}
        for name in names:
            first, rivals = HYPOTHESES[name]
            differences[name] = difference(runs, first, better_rule(runs, first, rivals), rivals)
        adjusted = holm({name: differences[name].p_value(MARGIN.get(name, 0.0)) for name in names})
        for name, contrast in differences.items():
            p, margin = adjusted[name], MARGIN.get(name, 0.0)
            is_worse = contrast.interval[1] < -margin if margin else p < 0.05
            verdict = "negative" if is_worse else "tie"
            if p < 0.05 and contrast.mean > -margin:
                verdict = "positive"
            power = detectable(contrast.by_seed, 0.05 / len(names))
            results[name] = Result(name, contrast, p, verdict, power)
    return results


def sentence(result: Result) -> str:
    """The protocol's sentence of a verdict; its amendments take the clause about what can't be excluded away."""
    protocol = (FOLDER / "protocol.md").read_text(encoding="utf-8")
    row = re.search(rf"^\| {result.name} \| {result.verdict} \| (.+) \|$", protocol, re.MULTILINE)
    assert row is not None
    words = row[1].replace("; this cannot exclude ±{x} points", "")
    largest_loss = 100 * max(0.0, -result.difference.interval[0])
    return words.format(**result.difference.numbers, x=f"{largest_loss:.1f}")


def hypothesis_row(result: Result) -> str:
    """A line of the table of hypotheses."""
    contrast = result.difference
    interval = "{n} | {mean} ({low} to {high})".format(**contrast.numbers)
    p = "below 0.001" if result.p < 0.0005 else f"{result.p:.3f}"
    return (
        f"| {result.name} | `{contrast.first}` − `{contrast.second}` | {interval} | {p} "
        f"| {result.detectable:.1f} | {result.verdict} |"
    )


# ---- tables


def arm_row(runs: list[dict], speeds: list[dict], arm: str) -> str:
    """Accuracy and cost of an arm; share of FLOPs in experts, ms and MiB of a step are empty where not measured."""
    of_arm = runs_of(runs, arm)
    accuracies = [100 * run["test_top1"] for run in of_arm.values()]
    spread = f" ± {statistics.stdev(accuracies):.1f}" if len(accuracies) > 1 else ""
    cost = next(iter(of_arm.values()))["cost"]
    flops = (cost["flops_per_image"] + cost["router_flops_per_image"]) / 1e6
    share = ms = mib = ""
    if measured := [speed["arms"][arm] for speed in speeds if arm in speed["arms"]]:
        share = f"{measured[0]['routed_share']:.2f}"
        ms = f"{statistics.median(each['ms']['median'] for each in measured):.0f}"
        mib = f"{statistics.median(each['memory']['peak_mib'] for each in measured):.0f}"
    return (
        f"| `{arm}` | {len(of_arm)} of {PLANNED[arm]} | {learning_rate(runs, arm):g} "
        f"| {statistics.fmean(accuracies):.1f}{spread} | {flops:.2f} M | {share} "
        f"| {cost['total_parameters'] / 1e6:.2f} M | {ms} | {mib} "
        f"| {mean_of(of_arm, 'cpu_s'):.0f} | {mean_of(of_arm, 'peak_mib'):.0f} |"
    )


def shift_row(runs: list[dict], arm: str) -> str:
    """Accuracy on test images as they are, and moved by 4 and by 8 pixels."""
    of_arm = {seed: run for seed, run in runs_of(runs, arm).items() if "shifted_4" in run}
    shifts = ("test_top1", "shifted_4", "shifted_8")
    cells = (f"{100 * mean_of(of_arm, name):.1f}" for name in shifts)
    return f"| `{arm}` | {len(of_arm)} | {' | '.join(cells)} |"


def balance_row(runs: list[dict], arm: str) -> str:
    """How even the load of the worst MoE layer is, mean over seeds, beside accuracy."""
    of_arm = runs_of(runs, arm)
    loads = [np.array([layer["counts"] for layer in run["layers"]]) for run in of_arm.values()]
    importance = statistics.fmean(max(run["cv_importance"]) for run in of_arm.values())
    variation = np.mean([max(counts.std(1) / counts.mean(1)) for counts in loads])
    busiest = np.mean([max(counts.max(1) / counts.mean(1)) for counts in loads])
    cells = f"{importance:.2f} | {variation:.2f} | {busiest:.2f} | {100 * mean_of(of_arm, 'test_top1'):.1f}"
    return f"| `{arm}` | {len(of_arm)} | {cells} |"


def tables(runs: list[dict], speeds: list[dict]) -> list[str]:
    """The tables of arms, of moved images and of balance losses, and what was done of the protocol, a line each."""
    ran = [arm for arm in PLANNED if any(run["arm"] == arm for run in runs)]
    moved = [arm for arm in ran if any("shifted_4" in run for run in runs_of(runs, arm).values())]
    balanced = ("unbalanced", "importance", "load", "moe", "z", "bias")
    missing = [f"`{arm}`" for arm in PLANNED if arm not in ran]
    tuning, done = sum(map(is_tuning, runs)), sum(len(runs_of(runs, arm)) for arm in ran)
    commits = len({run["code"]["git_commit"] for run in runs})
    processors = "; ".join(sorted({run["machine"]["cpu"] for run in runs}))
    return [
        *(arm_row(runs, speeds, arm) for arm in ran),
        f"No seed finished: {', '.join(missing)}.",
        *(shift_row(runs, arm) for arm in moved),
        *(balance_row(runs, arm) for arm in balanced),
        f"{tuning + done} runs of the queue are done, {sum(PLANNED.values()) - done} are missing.",
        f"- {len(runs)} records, {tuning} of them of tuning, of {commits} commits, from {processors}.",
    ]


# ---- what pages say beside the tables


def more_steps(runs: list[dict]) -> str:
    """By which part the twin of equal time trains longer."""
    steps = [next(iter(runs_of(runs, arm).values()))["steps"] for arm in ("twin-time", "twin")]
    return f"{steps[0] / steps[1] - 1:.0%}"


def beside(runs: list[dict], first: str, second: str) -> tuple[str, str]:
    """A difference that no hypothesis asks for: its size and where its own interval lies, and the interval."""
    contrast = difference(runs, first, second)
    low, high = contrast.interval
    direction = "above" if low > 0 else "below" if high < 0 else "not told apart from"
    interval = f"{100 * low:.1f} to {100 * high:.1f}; {len(contrast.by_seed)} seeds"
    return f"{100 * contrast.mean:.1f} points {direction}", interval


def limits(runs: list[dict], speeds: list[dict]) -> list[str]:
    """README.md's section on what the study can't say."""
    longer, longer_interval = beside(runs, "twin-time", "twin")
    hashed, hashed_interval = beside(runs, "moe", "hash")
    by_place, place_interval = beside(runs, "position", "twin-time")
    places, places_interval = beside(runs, "twin-places", "hash-places")
    agrees = all(
        runs_of(runs, f"{arm}-again")[0]["test_top1"] == runs_of(runs, arm)[0]["test_top1"]
        for arm in ("twin", "position", "moe", "hash")
    )
    return [
        f"{more_steps(runs)} more steps give the twin {longer.removesuffix(' above')} ({longer_interval})",
        f"of their FLOPs in experts, this one {speeds[0]['arms']['moe']['routed_share']:.0%}",
        f"Beside `hash` alone `moe` is {hashed} ({hashed_interval}; unadjusted)",
        f"`position` is {by_place} `twin-time` ({place_interval})",
        f"`twin-places` is {places} `hash-places` ({places_interval}; unadjusted,",
        f"it is right on {'exactly' if agrees else 'not'} as many test images as its record",
    ]


def headlines(results: dict[str, Result]) -> list[str]:
    """What README.md and the guide say of H1, H7 and H2."""
    first, places, equal_time = (results[name].difference.numbers for name in ("H1", "H7", "H2"))
    return [
        "After one epoch of CIFAR-10, MoE minus twin: {mean} points ({low} to {high}; {n} seeds) at equal steps where "
        "the classifier averages patches".format(**first),
        "{mean} ({low} to {high}; {n} seeds) where it reads their places".format(**places),
        "{mean} ({low} to {high}) at equal time".format(**equal_time),
    ]


def rows_of_results(runs: list[dict], results: dict[str, Result]) -> list[str]:
    """The rows of docs/results.md, and what this study says of equal time in another study's row."""
    words = {"positive": "after 1 epoch", "negative": "no", "tie": "not shown"}
    holds = {name: words[result.verdict] for name, result in results.items()}
    if holds["H4"] == "no":
        holds["H4"] = f"not `{results['H4'].difference.second}`"
    if holds["H1"] == "after 1 epoch" and holds["H7"] != holds["H1"]:
        holds["H1"] = "only with the mean"  # a lead that is gone once places are read
    said = {name: sentence(result).removesuffix(".") for name, result in results.items()}
    longer = difference(runs, "twin-time", "twin").numbers
    hashed = difference(runs, "moe", "hash").numbers
    interval = "{mean} ({low} to {high}; {n} seeds)"
    rows = [
        f"| More parameters help at equal compute | {holds['H1']} | {said['H1']}. {more_steps(runs)} more steps give "
        f"the twin {interval.format(**longer)}. {said['H7']} {LINK} |",
        f"After one epoch: a{said['H2'][1:]} {LINK} |",
        f"| The more of the compute is sparse, the more it helps | {holds['H3']} | {said['H3']} {LINK} |",
        f"| A learned router beats fixed rules | {holds['H4']} | {said['H4']}. Against `hash` alone, unadjusted: "
        f"{interval.format(**hashed)}. {said['H6']} {LINK} |",
        f"| Balance costs at most a point of accuracy | {holds['H5']} | {said['H5']} {LINK} |",
    ]
    return [row.replace("not told apart from", "not shown to differ from") for row in rows]


def statements() -> dict[str, list[str]]:
    """Page -> what it says, with the numbers of the records."""
    runs = read_runs()
    # Three measurements of every arm's training step on an idle machine.
    speeds = json.loads((FOLDER / "speed.json").read_text(encoding="utf-8"))
    results = judged(runs)
    return {
        README: [
            *(f"- **{name}.** {sentence(result)}" for name, result in results.items()),
            *map(hypothesis_row, results.values()),
            *tables(runs, speeds),
            *limits(runs, speeds),
        ],
        **{page: headlines(results) for page in HEADLINES},
        RESULTS: [
            f"with {speeds[0]['arms']['moe']['routed_share']:.0%} of a model's FLOPs in experts",
            *rows_of_results(runs, results),
        ],
    }


if __name__ == "__main__":
    print(json.dumps(statements(), indent=1, ensure_ascii=False))

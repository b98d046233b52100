"""After the same steps, is a dense model that was upcycled to experts better than the dense model trained on?

    python benchmarks/upcycling/recompute.py

prints every measured number of README.md that is in record.json, and what other pages quote of it. The code that ran
the study is benchmarks/upcycling.py of commit 442d2c64; it has left the tree. (README.md's second table, of step 0, is
measured again by tests/models/test_upcycle.py.)

The record has four trainings of each of three seeds. `continued` and `upcycled` go on from the `dense` one, so their
costs include it. Differences are paired by seed, with Student's t; the two p are adjusted by Holm.
"""

import json
import statistics
from pathlib import Path

from scipy.stats import ttest_1samp

RECORD = Path(__file__).with_name("record.json")
LABELS = {
    "dense": "dense, n",
    "in one": "dense, n + m in one schedule",
    "continued": "dense, n, restarted, m",
    "upcycled": "dense, n, upcycled, m",
}
RIVALS = ("continued", "in one")


def read_record() -> dict:
    """Settings and runs."""
    return json.loads(RECORD.read_text(encoding="utf-8"))


def runs_of(record: dict, arm: str) -> dict[int, dict]:
    """The trainings of one arm, by seed."""
    return {run["seed"]: run for run in record["runs"] if run["arm"] == arm}


def cost(record: dict, run: dict) -> tuple[float, float]:
    """FLOPs and CPU seconds of a training, those of the dense model that it started from included."""
    flops, seconds = run["steps"] * run["train_flops_per_step"], run["curve"][-1]["cpu_s"]
    if run["arm"] not in ("continued", "upcycled"):
        return flops, seconds
    start_flops, start_seconds = cost(record, runs_of(record, "dense")[run["seed"]])
    return start_flops + flops, start_seconds + seconds


def mean_cost(record: dict, arm: str) -> tuple[float, float]:
    """The same, mean over seeds."""
    flops, seconds = zip(*(cost(record, run) for run in runs_of(record, arm).values()), strict=True)
    return statistics.fmean(flops), statistics.fmean(seconds)


def accuracy_table(record: dict) -> list[str]:
    """A line for each arm: accuracy over seeds, costs, parameters, and the busiest expert's load."""
    lines = []
    for arm, label in LABELS.items():
        runs = list(runs_of(record, arm).values())
        accuracies = [100 * run["test_top1"] for run in runs]
        flops, seconds = mean_cost(record, arm)
        by_seed = ", ".join(f"{accuracy:.1f}" for accuracy in accuracies)
        parameters = f"{runs[0]['active_parameters'] / 1e6:.2f} M of {runs[0]['total_parameters'] / 1e6:.2f} M"
        load = ""
        if arm == "upcycled":
            load = f"{statistics.fmean(max(layer['max_over_mean'] for layer in run['layers']) for run in runs):.2f}"
        lines.append(
            f"| {label} | {statistics.fmean(accuracies):.1f} ± {statistics.stdev(accuracies):.1f} | {by_seed} "
            f"| {flops / 1e12:.2f} T | {seconds:.0f} s | {parameters} | {load} |"
        )
    return lines


def differences(record: dict, rival: str) -> list[float]:
    """Test accuracy of the upcycled model minus its rival's, seed by seed."""
    own, other = runs_of(record, "upcycled"), runs_of(record, rival)
    return [own[seed]["test_top1"] - other[seed]["test_top1"] for seed in sorted(own)]


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean, and the ends of its 95 % interval."""
    low, high = ttest_1samp(values, 0).confidence_interval(0.95)
    return statistics.fmean(values), float(low), float(high)


def with_interval(values: list[float]) -> str:
    """The same in points."""
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * end for end in interval(values)))


def adjusted_p_values(record: dict) -> dict[str, float]:
    """Both p, adjusted by Holm (1979): the smaller one doubled, the larger one not below that."""
    own = {rival: ttest_1samp(differences(record, rival), 0).pvalue for rival in RIVALS}
    doubled = min(1.0, 2 * min(own.values()))
    return {rival: max(doubled, p) for rival, p in own.items()}


def verdict(record: dict, rival: str) -> str:
    """Whether the upcycled model is above or below a rival."""
    if adjusted_p_values(record)[rival] >= 0.05:
        return "not told apart"
    return "above" if statistics.fmean(differences(record, rival)) > 0 else "below"


def difference_sentences(record: dict) -> list[str]:
    """A sentence for each rival."""
    sentences = []
    for rival in RIVALS:
        values = differences(record, rival)
        by_seed, p = (
            ", ".join(f"{100 * gap:+.1f}" for gap in values),
            adjusted_p_values(record)[rival],
        )
        sentences.append(
            f"“{LABELS['upcycled']}” minus “{LABELS[rival]}”: {by_seed} points by seed, mean {with_interval(values)}, "
            f"p = {p:.3f}: {verdict(record, rival)}."
        )
    return sentences


def row_of_results(record: dict) -> str:
    """The row of docs/results.md: the idea holds if the upcycled model is above the dense model trained on."""
    words = {"above": "yes", "below": "no", "not told apart": "not shown"}
    holds = words[verdict(record, "continued")]
    continued, in_one = (
        f"{with_interval(differences(record, rival))}, {verdict(record, rival)}" for rival in RIVALS
    )
    row = (
        f"| [Experts improve a trained dense model](guides/dense-sparse.md) | {holds} | upcycled minus dense, trained "
        f"on: {continued}; minus dense in one schedule of as many steps: {in_one} "
        "([upcycling](../benchmarks/upcycling/README.md)). |"
    )
    return row.replace("not told apart", "no difference shown")


def statements() -> dict[str, list[str]]:
    """Page -> what it says, with the numbers of the record."""
    record = read_record()
    settings = record["settings"]
    more_time = mean_cost(record, "upcycled")[1] / mean_cost(record, "continued")[1] - 1
    in_one = with_interval(differences(record, "in one"))
    return {
        "benchmarks/upcycling/README.md": [
            f"n = m = {settings['first']:,} steps of {settings['batch']} images",
            *accuracy_table(record),
            *difference_sentences(record),
            f"The upcycled model took {more_time:.0%} more CPU time than the restarted dense one",
        ],
        "docs/results.md": [row_of_results(record)],
        "docs/guides/dense-sparse.md": [
            f"one dense schedule of as many steps it is {in_one} points"
        ],
    }


if __name__ == "__main__":
    print(json.dumps(statements(), indent=1, ensure_ascii=False))

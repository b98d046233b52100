"""Are 70 % of the training images, chosen by a score, as good as all, or as 70 % drawn at random?

    python benchmarks/curve/recompute.py

prints every measured number of README.md, from record.json, and what other pages quote of it. The code that ran the
study is benchmarks/curve of commit cd6641d1; it has left the tree.

The record has 39 trainings on CIFAR-10 with three seeds: on all images, and on four shares of them, chosen by each of
three methods. Differences are in points of test accuracy, paired by seed, with Student's t intervals of 95 %.
"""

import json
import statistics
from pathlib import Path
from typing import NamedTuple

from scipy.stats import ttest_1samp

ASKED = 0.7  # the share of the question


class Difference(NamedTuple):
    """Mean over seeds, in points, and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


Accuracies = dict[tuple[str, float], dict[int, float]]
"""(method, share) -> seed -> test accuracy in per cent."""


def accuracies_of(record: dict) -> Accuracies:
    """All of them; that on all images is ("all", 1.0)."""
    accuracies: Accuracies = {}
    for training in record["trainings"]:
        by_seed = accuracies.setdefault((training["by"], training["share"]), {})
        by_seed[training["seed"]] = 100 * training["correct"] / training["total"]
    return accuracies


def paired_difference(
    first: dict[int, float], second: dict[int, float], divisor: float = 1.0
) -> Difference:
    """First minus second, seed by seed, over the divisor."""
    gaps = [(first[seed] - second[seed]) / divisor for seed in sorted(first)]
    return Difference(statistics.fmean(gaps), *ttest_1samp(gaps, 0).confidence_interval(0.95))


def beside(accuracies: Accuracies, by: str, share: float, other: str = "all") -> Difference:
    """A share of the images minus all of them, or minus as many of another method."""
    reference = accuracies[other, 1.0 if other == "all" else share]
    return paired_difference(accuracies[by, share], reference)


def shares_of(record: dict) -> list[float]:
    """From the largest to the smallest, without all."""
    return sorted({training["share"] for training in record["trainings"]} - {1.0}, reverse=True)


def table(record: dict, accuracies: Accuracies) -> list[str]:
    """A line for all images, then one for each method and share."""
    images = {
        (training["by"], training["share"]): training["images"] for training in record["trainings"]
    }
    lines = []
    for by, share in [
        ("all", 1.0),
        *((by, share) for by in record["methods"] for share in shares_of(record)),
    ]:
        of_seeds = accuracies[by, share].values()
        differences = ["-", "-"]
        if by != "all":
            differences[0] = str(beside(accuracies, by, share))
        if by not in ("all", "random"):
            differences[1] = str(beside(accuracies, by, share, "random"))
        lines.append(
            f"{by} {100 * share:.0f} % {images[by, share]:,} {statistics.fmean(of_seeds):.1f} % "
            f"{statistics.stdev(of_seeds):.2f} {' '.join(differences)}"
        )
    return lines


def verdict(difference: Difference, margin: float) -> str:
    """What the interval shows."""
    if difference.low > -margin:
        return f"is shown to be as good as training on all, to within {margin:g} points"
    if difference.high < 0:
        return "is shown to be worse than training on all"
    return "isn't shown to be as good as training on all"


def sentences(record: dict, accuracies: Accuracies) -> list[str]:
    """What each method's 70 % are worth, and the last tenth that was drawn at random."""
    lines = []
    for by in record["methods"]:
        difference = beside(accuracies, by, ASKED)
        how = "drawn at random" if by == "random" else f"chosen by {by}"
        shown = verdict(difference, record["margin"])
        lines.append(f"Training on {ASKED:.0%} of the images, {how}, {shown}: {difference} points.")
    last = shares_of(record)[0]
    thousands = (1 - last) * record["images"] / 1000
    slope = paired_difference(accuracies["all", 1.0], accuracies["random", last], thousands)
    seeds, total = len(accuracies["all", 1.0]), record["trainings"][0]["total"]
    return [
        *lines,
        f"The last {1 - last:.0%} of the images, drawn at random, are worth {slope} points per 1,000 images.",
        f"In brackets: 95 % t intervals over {seeds} seeds, on the same {total:,} test images.",
    ]


def row_of_results(record: dict, accuracies: Accuracies) -> str:
    """The row of docs/results.md."""
    differences = {by: beside(accuracies, by, ASKED) for by in record["methods"]}
    good = [by for by, difference in differences.items() if difference.low > -record["margin"]]
    worse = [by for by, difference in differences.items() if by not in good and difference.high < 0]
    costs = ", ".join(f"{by} {difference}" for by, difference in differences.items())
    return (
        f"| [Fewer images, well chosen, are enough](guides/good-data.md) | {'yes' if good else 'not shown'} "
        f"| {ASKED:.0%} of the images less all: {costs} points; to be worse is shown for "
        f"{' and '.join(worse) or 'none'}, to be as good to within {record['margin']:g} point for "
        f"{' and '.join(good) or 'none'} ([curve](../benchmarks/curve/README.md)). |"
    )


def statements() -> dict[str, list[str]]:
    """Page -> what it says, with the numbers of the record."""
    record = json.loads(Path(__file__).with_name("record.json").read_text(encoding="utf-8"))
    accuracies = accuracies_of(record)
    worse = {  # than as many images at random: at these shares
        by: [
            share for share in shares_of(record) if beside(accuracies, by, share, "random").high < 0
        ]
        for by in ("ccs", "aum")
    }
    ccs = "is worse than" if worse["ccs"] else "is not told apart from"
    largest = max(worse["aum"], default=0)
    return {
        "benchmarks/curve/README.md": [
            *table(record, accuracies),
            *sentences(record, accuracies),
            f"`ccs` {ccs} `random` at any share, and `aum` is worse from {largest:.0%} down",
        ],
        "docs/results.md": [row_of_results(record, accuracies)],
        "docs/guides/good-data.md": [f"`aum` already at {largest:.0%}"],
    }


if __name__ == "__main__":
    print(json.dumps(statements(), indent=1, ensure_ascii=False))

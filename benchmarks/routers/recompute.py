"""At equal active FLOPs, tuning and seeds, how do the routers differ in accuracy, balance and speed?

    python benchmarks/routers/recompute.py

prints every measured number of README.md, from record.json and loss_001.json, and what other pages quote of it. The
code of the study, and of the figure, is benchmarks/routers of commit 81c13b38; each run names its own commit.

A row is a router, or the dense twin. Rows take the learning rate that is best on average on validation images with seed
0; one whose best rate is the largest or the smallest that it tried has none, and stands in no table. Differences are
paired by seed, with Student's t; the p of a column are adjusted by Holm.
"""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scipy.stats import ttest_1samp

TWIN, HASH = "dense twin", "hash"
LEARN_NOTHING = ("hash", "position")
BALANCED_BY_DESIGN = ("expert_choice", "soft", *LEARN_NOTHING)
TOLERANCE = 0.01  # validation accuracy by which a row's own rate must beat the common one
Run = dict[str, Any]
Rows = dict[str, list[Run]]


class Difference(NamedTuple):
    """One row minus another over common seeds: mean in points, ends of its 95 % interval, adjusted p."""

    mean: float
    low: float
    high: float
    seeds: int
    p: float

    @property
    def verdict(self) -> str:
        """In words."""
        return "not told apart" if self.p >= 0.05 else "above" if self.mean > 0 else "below"

    def __str__(self) -> str:
        return f"{self.mean:+.1f} ({self.low:+.1f} to {self.high:+.1f})"


def rates_of(runs: list[Run]) -> tuple[float, dict[str, float]]:
    """The common learning rate, and that of each row."""
    tried: dict[str, dict[float, float]] = defaultdict(dict)
    for run in runs:
        if run["seed"] == 0:
            tried[run["row"]][run["lr"]] = run["val_top1"]
    best = {row: max(rates, key=rates.__getitem__) for row, rates in tried.items()}
    settled = {row: own for row, own in tried.items() if min(own) < best[row] < max(own)}
    shared = sorted(set(next(iter(settled.values()))).intersection(*settled.values()))
    common = max(shared, key=lambda lr: statistics.fmean(own[lr] for own in settled.values()))
    kept = {row: own[best[row]] - own[common] > TOLERANCE for row, own in settled.items()}
    return common, {row: best[row] if keeps else common for row, keeps in kept.items()}


def difference(runs: list[Run], others: list[Run]) -> Difference:
    """Of the test accuracies of the seeds that both have; p isn't adjusted."""
    own, its = ({run["seed"]: 100 * run["test_top1"] for run in each} for each in (runs, others))
    gaps = [own[seed] - its[seed] for seed in sorted(own.keys() & its.keys())]
    test = ttest_1samp(gaps, 0)
    interval = test.confidence_interval(0.95)
    return Difference(statistics.fmean(gaps), *interval, len(gaps), float(test.pvalue))


def against(rows: Rows, reference: str) -> dict[str, Difference]:
    """Every other row minus the reference, p adjusted over all of them (Holm 1979)."""
    found = {
        row: difference(runs, rows[reference]) for row, runs in rows.items() if row != reference
    }
    smallest, adjusted = 0.0, {}
    for rank, row in enumerate(sorted(found, key=lambda row: found[row].p)):
        smallest = max(smallest, min(1.0, (len(found) - rank) * found[row].p))
        adjusted[row] = found[row]._replace(p=smallest)
    return adjusted


def layer_means(runs: list[Run], quantity: str) -> list[float]:
    """Of each MoE layer, mean over seeds."""
    by_run = ([layer[quantity] for layer in run["layers"]] for run in runs)
    return [statistics.fmean(values) for values in zip(*by_run, strict=True)]


def joined(values: Sequence[float], form: str) -> str:
    """One value for each layer."""
    return ", ".join(format(value, form) for value in values)


def titled(row: str) -> str:
    """A row's first cell."""
    return row if row == TWIN else f"`{row}`"


def accuracy_rows(rows: Rows, rates: dict[str, float]) -> list[str]:
    """Differences to the dense twin and to `hash` with verdicts, the largest first."""
    to_twin, to_hash = against(rows, TWIN), against(rows, HASH)
    lines = []
    for row in [*sorted(to_twin, key=lambda row: -to_twin[row].mean), TWIN]:
        said = [
            f"{each[row]}: {each[row].verdict}" if row in each else ""
            for each in (to_twin, to_hash)
        ]
        mean = 100 * statistics.fmean(run["test_top1"] for run in rows[row])
        lines.append(
            f"| {titled(row)} | {' | '.join(said)} | {mean:.1f} | {len(rows[row])} | {rates[row]:g} |"
        )
    return lines


def load_rows(rows: Rows) -> list[str]:
    """Hard counts over the whole test split, by MoE layer, mean over seeds."""
    lines = []
    for row, runs in rows.items():
        if row != TWIN:
            most = joined(layer_means(runs, "max_over_mean"), ".2f")
            unrouted = joined([100 * share for share in layer_means(runs, "unrouted")], ".1f")
            layers = [layer for run in runs for layer in run["layers"]]
            dead, experts = max(layer["dead"] for layer in layers), len(layers[0]["counts"])
            lines.append(f"| `{row}` | {most} | {unrouted} | {dead} of {experts} |")
    return lines


def cost_rows(record: dict[str, Any]) -> list[str]:
    """Parameters, FLOPs per image and training speed, in millions."""
    lines = []
    for row, cost in record["cost"].items():
        counts = (
            "active_parameters",
            "total_parameters",
            "flops_per_image",
            "router_flops_per_image",
        )
        cells = [f"{cost[name] / 1e6:.2f} M" for name in counts]
        speed = record["speed"]["rows"][row]
        low, high = speed["to_twin_quartiles"]
        cells.append(f"{speed['to_twin']:.2f} ({low:.2f} to {high:.2f})")
        lines.append(f"| {titled(row)} | {' | '.join(cells)} |")
    return lines


def group_of(to_twin: dict[str, Difference], verdict: str) -> tuple[str, str]:
    """The routers that learn with this verdict, best first, and the range of their points above the twin."""
    found = {
        row: each.mean
        for row, each in to_twin.items()
        if row not in LEARN_NOTHING and each.verdict == verdict
    }
    *first, last = [f"`{row}`" for row in sorted(found, key=lambda row: -found[row])]
    spread = f"{min(found.values()):.1f} to {max(found.values()):.1f}"
    return f"{', '.join(first)} and {last}", spread


def accuracy_sentences(rows: Rows) -> list[str]:
    """What README.md says of differences in words."""
    to_twin, to_hash = against(rows, TWIN), against(rows, HASH)
    (above, above_by), (alike, alike_by) = (
        group_of(to_twin, verdict) for verdict in ("above", "not told apart")
    )
    below_hash = all(
        each.verdict == "below" for row, each in to_hash.items() if row not in LEARN_NOTHING
    )
    fixed = " and ".join(f"{to_twin[row].mean:.1f}" for row in ("position", "hash"))
    return [
        f"`position` and `hash` are {fixed} points {to_twin[HASH].verdict} the dense twin",
        f"{'every' if below_hash else 'not every'} learned router in the table is below `hash`",
        f"{above} are {above_by} points above the twin",
        f"{alike} ({alike_by} points above) are not told apart from it",
    ]


def cost_sentences(record: dict[str, Any], rows: Rows) -> list[str]:
    """What it says of speed, FLOPs and load."""
    ratios = [row["to_twin"] for name, row in record["speed"]["rows"].items() if name != TWIN]
    flops = {name: cost["flops_per_image"] for name, cost in record["cost"].items()}
    learned = [runs for row, runs in rows.items() if row not in (TWIN, *BALANCED_BY_DESIGN)]
    worst = max(max(layer_means(runs, "max_over_mean")) for runs in learned)
    return [
        f"at {min(ratios):.2f} to {max(ratios):.2f} times its images/s",
        f"slots cost {flops['soft'] / flops[TWIN] - 1:.0%} more",
        f"{worst:.2f} times the mean load at worst",
    ]


def random_sentence(runs: list[Run], common: float) -> str:
    """Of `random`, which is in no list, at the common rate."""
    own, twin = (
        [run for run in runs if (run["row"], run["lr"]) == (row, common)]
        for row in ("random", TWIN)
    )
    found = difference(own, twin)
    numbers = (
        f"{found.mean:+.1f} points ({found.low:+.1f} to {found.high:+.1f}; {found.seeds} seeds"
    )
    return f"`random` is {found.verdict} from the twin: {numbers}"


def weaker_load(record: dict[str, Any], common: float) -> str:
    """The load with a weaker balance loss."""
    runs = [run for run in record["runs"] if math.isclose(run["lr"], common)]
    loads = [layer["max_over_mean"] for run in runs for layer in run["layers"]]
    return f"had {min(loads):.1f} to {max(loads):.1f}"


def statements() -> dict[str, list[str]]:
    """Page -> what it says, with the numbers of the records."""
    record, weaker = (
        json.loads(Path(__file__).with_name(name).read_text(encoding="utf-8"))
        for name in ("record.json", "loss_001.json")
    )
    runs = [run for run in record["runs"] if run["dataset"] == "cifar10"]
    common, rates = rates_of(runs)
    rows = {
        row: [run for run in runs if (run["row"], run["lr"]) == (row, lr)]
        for row, lr in rates.items()
    }
    best = against(rows, TWIN)["vmoe_top_k"]
    rate = f"All rows take the one that is best on average, {common:g}"
    return {
        "benchmarks/routers/README.md": [
            *accuracy_rows(rows, rates),
            *load_rows(rows),
            *cost_rows(record),
            *accuracy_sentences(rows),
            *cost_sentences(record, rows),
            *([rate] if set(rates.values()) == {common} else []),
            random_sentence(runs, common),
            weaker_load(weaker, common),
        ],
        "docs/reference/routers.md": [
            f"it was {best.mean:.1f} points above the dense twin ({best.low:+.1f} to {best.high:+.1f})"
        ],
    }


if __name__ == "__main__":
    print(json.dumps(statements(), indent=1, ensure_ascii=False))

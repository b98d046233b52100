"""Is there a recipe for a photo model whose experts are needed? A search, and three seeds beside dense ones.

    python benchmarks/photo_model/recompute.py

prints every measured number of README.md, from runs.jsonl and needed.jsonl. Arms and the rule are in protocol.md; of
two runs what changes without experts was measured again (its first amendment), and stands in needed.jsonl. The
code that ran the study is benchmarks/photo_model of commit 1a1f32d2.
"""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

from scipy.stats import ttest_1samp

FOLDER = Path(__file__).parent
STUDY = "benchmarks/photo_model/README.md"
DENSE, EPOCHS = "dense", (3, 2)  # of both comparisons
LEAST, MOST, POINT = 0.15, 1 / 3, 0.01  # changed, its control's share of that, accuracy below dense
Run = dict[str, Any]


def read_lines(file: str) -> list[Run]:
    """The records of a file, a line each."""
    return [json.loads(line) for line in (FOLDER / file).read_text(encoding="utf-8").splitlines()]


def read_runs(photos: str) -> list[Run]:
    """The records of the search, or of the comparison (`all` photos), with what was measured again."""
    again = {record["of"]: record for record in read_lines("needed.jsonl")}
    runs = [run for run in read_lines("runs.jsonl") if run["photos"] == photos]
    return [{**run, "needed": again[run["name"]]} if run["name"] in again else run for run in runs]


def share(run: Run, key: str) -> float:
    """Of the right answers: those that change by `changed` or by the control, `at_random`."""
    return float(run["needed"][key] / run["needed"]["right"])


def percent(value: float) -> str:
    """`12.3`."""
    return f"{100 * value:.1f}"


def signed(points: float) -> str:
    """`+1.0`, with a minus sign below zero."""
    return f"{100 * points:+.1f}".replace("-", "−")


def needed_cells(run: Run) -> list[str]:
    """Changed, at random, and the control's share; empty for a dense model."""
    if "needed" not in run:
        return ["", "", ""]
    changed, at_random = share(run, "changed"), share(run, "at_random")
    return [percent(changed), percent(at_random), f"{at_random / changed:.2f}"]


def row(cells: list[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def search_rows(runs: list[Run]) -> list[str]:
    """The search, in the order of its runs."""
    return [
        row([f"`{run['arm']}`", f"{run['lr']:g}", percent(run["val_top1"]), *needed_cells(run)])
        for run in runs
    ]


def comparison_rows(runs: list[Run]) -> list[str]:
    """The comparison by arm and seed."""
    return [
        row(
            [
                f"`{run['arm']}`",
                str(run["seed"]),
                percent(run["correct"] / run["total"]),
                *needed_cells(run),
                f"{run['cpu_s']:,}",
            ]
        )
        for run in sorted(runs, key=lambda run: (run["arm"] == DENSE, run["seed"]))
    ]


def answer_of(runs: list[Run]) -> list[str]:
    """The verdict, and the three numbers that it rests on."""
    dense = {run["seed"]: run["correct"] / run["total"] for run in runs if run["arm"] == DENSE}
    experts = [run for run in runs if run["arm"] != DENSE]
    changed, at_random = (
        fmean(share(run, key) for run in experts) for key in ("changed", "at_random")
    )
    gains = [run["correct"] / run["total"] - dense[run["seed"]] for run in experts]
    low, high = ttest_1samp(gains, 0).confidence_interval(0.95)
    is_met = changed >= LEAST and at_random <= MOST * changed and fmean(gains) >= -POINT
    return [
        "The rule is met" if is_met else "The rule isn't met",
        f"{percent(changed)} % of the right answers change",
        f"{percent(at_random)} % by the best of as many random sets",
        f"{signed(fmean(gains))} points of test accuracy ({signed(low)} to {signed(high)})",
    ]


def statements() -> dict[str, list[str]]:
    """Page -> its texts with measured numbers."""
    said = search_rows(read_runs("search"))
    for epochs in EPOCHS:
        compared = [run for run in read_runs("all") if run["epochs"] == epochs]
        said += [*answer_of(compared), *comparison_rows(compared)]
    return {STUDY: said}


if __name__ == "__main__":
    print(json.dumps(statements(), indent=1, ensure_ascii=False))

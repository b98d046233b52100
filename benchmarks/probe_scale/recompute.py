"""Does a smaller head, or a lower rate, keep a pretrained start from unlearning? Nine pairs of trainings each.

    python benchmarks/probe_scale/recompute.py

prints every measured number of README.md, from runs.jsonl and peak.jsonl. Arms, folders and the rule are in
protocol.md; a pair is a folder with a seed. What trained them is in the commits that the records name.
"""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from scipy.stats import ttest_1samp

FOLDER = Path(__file__).parent
STUDY = "benchmarks/probe_scale/README.md"
Run = dict[str, Any]


def read_pairs(text: str, usual: str, other: str) -> list[tuple[Run, Run]]:
    """The records of two arms by folder and seed."""
    runs = [json.loads(line) for line in text.splitlines()]
    of_other = {(run["folder"], run["seed"]): run for run in runs if run["arm"] == other}
    return [(run, of_other[run["folder"], run["seed"]]) for run in runs if run["arm"] == usual]


def row_of(usual: Run, other: Run) -> str:
    """A pair's line of the table."""
    cells = []
    for run in (usual, other):
        cells += [f"{100 * run['correct'] / run['total']:.1f}", f"{run['val_loss'][0]:.2f}"]
    return f"| {usual['folder']} | {usual['seed']} | {' | '.join(cells)} | {signed(gain(usual, other))} |"


def gain(usual: Run, other: Run) -> float:
    """Test accuracy of the other arm's training minus that of the usual one, in points."""
    return 100 * float(other["correct"] - usual["correct"]) / float(usual["total"])


def signed(points: float) -> str:
    """`+1.0`, with a minus sign below zero."""
    return f"{points:+.1f}".replace("-", "−")


def mean_losses(runs: list[Run]) -> list[float]:
    """The mean validation loss after each epoch."""
    losses: list[float] = np.mean([run["val_loss"] for run in runs], axis=0).tolist()
    return losses


def said_of(pairs: list[tuple[Run, Run]]) -> list[str]:
    """The rule's verdict, the losses of both arms after each epoch, and the rows of the table."""
    gains = [gain(*pair) for pair in pairs]
    low, high = ttest_1samp(gains, 0).confidence_interval(0.95)
    usual, other = (mean_losses(list(arm)) for arm in zip(*pairs, strict=True))
    better = sum(points > 0 for points in gains)
    by_accuracy = fmean(gains) >= 1 and better >= 6
    is_met = by_accuracy or (fmean(gains) >= 0 and other[1] <= usual[2])
    verdict = "is met" if is_met else "isn't met"
    losses = " and ".join(", ".join(f"{loss:.2f}" for loss in arm) for arm in (usual, other))
    answer = (
        f"The rule {verdict}: {signed(fmean(gains))} points of test accuracy "
        f"({signed(low)} to {signed(high)}; {better} of {len(gains)} pairs are above 0)"
    )
    return [answer, losses, *(row_of(*pair) for pair in pairs)]


def statements() -> dict[str, list[str]]:
    """Page -> its texts with measured numbers."""
    divided = (FOLDER / "runs.jsonl").read_text(encoding="utf-8")
    lower = (FOLDER / "peak.jsonl").read_text(encoding="utf-8")
    of_divided = said_of(read_pairs(divided, "probe", "divided"))
    of_lower = said_of(read_pairs(lower, "peak", "third"))
    return {STUDY: of_divided + of_lower}


if __name__ == "__main__":
    print(json.dumps(statements(), indent=1, ensure_ascii=False))

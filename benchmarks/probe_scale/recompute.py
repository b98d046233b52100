"""Does a smaller head keep a pretrained start from unlearning? Nine pairs of trainings.

    python benchmarks/probe_scale/recompute.py

prints every measured number of README.md, from runs.jsonl. Arms, folders and the rule are in protocol.md; a pair is a
folder with a seed. The code of the divided probe is in the commit that its records name.
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


def read_runs() -> dict[tuple[str, str, int], Run]:
    """The records by arm, folder and seed."""
    lines = (FOLDER / "runs.jsonl").read_text(encoding="utf-8").splitlines()
    runs = map(json.loads, lines)
    return {(run["arm"], run["folder"], run["seed"]): run for run in runs}


def row_of(probe: Run, divided: Run) -> str:
    """A pair's line of the table."""
    cells = []
    for run in (probe, divided):
        cells += [f"{100 * run['correct'] / run['total']:.1f}", f"{run['val_loss'][0]:.2f}"]
    return f"| {probe['folder']} | {probe['seed']} | {' | '.join(cells)} | {signed(gain(probe, divided))} |"


def gain(probe: Run, divided: Run) -> float:
    """Test accuracy of the divided probe's training minus that of the other, in points."""
    return 100 * float(divided["correct"] - probe["correct"]) / float(probe["total"])


def signed(points: float) -> str:
    """`+1.0`, with a minus sign below zero."""
    return f"{points:+.1f}".replace("-", "−")


def mean_losses(runs: list[Run]) -> list[float]:
    """The mean validation loss after each epoch."""
    losses: list[float] = np.mean([run["val_loss"] for run in runs], axis=0).tolist()
    return losses


def statements() -> dict[str, list[str]]:
    """Page -> its texts with measured numbers."""
    runs = read_runs()
    pairs = [
        (run, runs["divided", folder, seed])
        for (arm, folder, seed), run in runs.items()
        if arm == "probe"
    ]
    gains = [gain(*pair) for pair in pairs]
    low, high = ttest_1samp(gains, 0).confidence_interval(0.95)
    probe, divided = (mean_losses(list(arm)) for arm in zip(*pairs, strict=True))
    better = sum(points > 0 for points in gains)
    by_accuracy = fmean(gains) >= 1 and better >= 6
    is_met = by_accuracy or (fmean(gains) >= 0 and divided[1] <= probe[2])
    verdict = "is met" if is_met else "isn't met"
    losses = " and ".join(", ".join(f"{loss:.2f}" for loss in arm) for arm in (probe, divided))
    answer = (
        f"The rule {verdict}: {signed(fmean(gains))} points of test accuracy "
        f"({signed(low)} to {signed(high)}; {better} of {len(gains)} pairs are above 0)"
    )
    return {STUDY: [answer, losses, *(row_of(*pair) for pair in pairs)]}


if __name__ == "__main__":
    print(json.dumps(statements(), indent=1, ensure_ascii=False))

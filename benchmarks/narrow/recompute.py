"""What the photos' half of the study says: README.md's numbers, from runs.jsonl; NumPy and SciPy only.

`python benchmarks/narrow/recompute.py`
"""

import json
from pathlib import Path

import numpy as np
from scipy import stats

SEARCHED = ("8-k1", "16-k1", "32-k1")


def read_runs(stage: str) -> list[dict]:
    """The photos' runs of a stage."""
    text = Path(__file__).with_name("runs.jsonl").read_text(encoding="utf-8")
    runs = [json.loads(line) for line in text.splitlines()]
    return [run for run in runs if (run["task"], run["stage"]) == ("photos", stage)]


def accuracy(runs: list[dict], arm: str) -> np.ndarray:
    """[6] test accuracy of an arm, percent, in the order of its seeds."""
    of_arm = sorted((run for run in runs if run["arm"] == arm), key=lambda run: run["seed"])
    return np.array([100 * run["correct"] / run["total"] for run in of_arm])


def difference(runs: list[dict], first: str, second: str) -> str:
    """Mean difference of two arms over the same seeds, points, with Student's 95 % interval."""
    points = accuracy(runs, first) - accuracy(runs, second)
    half = stats.t.ppf(0.975, len(points) - 1) * stats.sem(points)
    mean = points.mean()
    return f"{mean:+.2f} points ({mean - half:+.2f} to {mean + half:+.2f})"


def statements() -> dict[str, list[str]]:
    """Page -> its texts with measured numbers."""
    search, runs = read_runs("search"), read_runs("comparison")
    validation = [
        np.mean([100 * run["val_top1"] for run in search if run["arm"] == arm]) for arm in SEARCHED
    ]
    means = [accuracy(runs, arm).mean() for arm in ("8-k1", "8-k2", "dense")]
    return {
        "benchmarks/narrow/README.md": [
            "Validation accuracy of 8, 16 and 32 experts, one a token: "
            + ", ".join(f"{value:.1f}" for value in validation)
            + " %",
            f"eight experts, one a token: {means[0]:.2f} %; two a token: {means[1]:.2f} %; dense: {means[2]:.2f} %",
            f"one less two experts a token: {difference(runs, '8-k1', '8-k2')}",
            f"one expert a token less dense: {difference(runs, '8-k1', 'dense')}",
            f"two experts a token less dense: {difference(runs, '8-k2', 'dense')}",
        ]
    }


if __name__ == "__main__":
    print(json.dumps(statements(), indent=1, ensure_ascii=False))

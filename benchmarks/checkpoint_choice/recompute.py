"""Which checkpoint of a finished training should be tested? README.md's numbers, from runs.jsonl; NumPy and SciPy only.

    python benchmarks/checkpoint_choice/recompute.py

A run has, for each validation, which validation and test images were right (bits, base64) and the validation loss.
A rule names one of a run's validations by what validation says; its price is the test accuracy of that one less the
last one's. Commit ab0ba8ec ran it.

Axes: V validations of a run, n images, C classes.
"""

import base64
import json
import math
from pathlib import Path

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm

Z = float(norm.ppf(0.975))


# ---- the runs


def right(row: dict, split: str, n: int) -> np.ndarray:
    """[n] whether each image of a split was right."""
    return np.unpackbits(np.frombuffer(base64.b64decode(row[f"{split}_right"]), np.uint8))[:n] > 0


class Run:
    """A training: right [V, n] of both splits, labels [n], loss [V], and what best.ckpt went by."""

    def __init__(self, record: dict) -> None:
        self.key = record["data"], record["arm"], record["seed"]
        self.monitor = record["monitor"]
        self.labels = {
            split: np.array([int(digit) for digit in text])
            for split, text in record["labels"].items()
        }
        rows = record["validations"]
        self.right = {
            split: np.array([right(row, split, len(labels)) for row in rows])
            for split, labels in self.labels.items()
        }
        self.loss = np.array([row["val_loss"] for row in rows])

    def accuracy(self, split: str) -> np.ndarray:
        """[V] share right."""
        return self.right[split].mean(1)

    def balanced(self, split: str) -> np.ndarray:
        """[V] mean over classes of the share right."""
        labels = self.labels[split]
        return np.mean(
            [self.right[split][:, labels == label].mean(1) for label in np.unique(labels)], axis=0
        )

    def monitored(self, split: str) -> np.ndarray:
        """[V] what best.ckpt went by."""
        return self.balanced(split) if self.monitor == "val/balanced_acc" else self.accuracy(split)


# ---- the rules: the place of the validation that is tested; of several that tie the first, as Lightning keeps it


def last_unless(run: Run, errors: float) -> int:
    """The last, unless the best is ahead by more than so many standard errors of the paired difference."""
    best, last = np.argmax(run.monitored("val")), len(run.loss) - 1
    one, other, labels = run.right["val"][best], run.right["val"][last], run.labels["val"]
    gain, error = (
        macro(one, other, labels) if run.monitor == "val/balanced_acc" else paired(one, other)
    )
    return best if gain > errors * error else last


RULES = {
    "last": lambda run: len(run.loss) - 1,
    "best by accuracy": lambda run: np.argmax(run.accuracy("val")),
    "best by balanced accuracy": lambda run: np.argmax(run.balanced("val")),
    "best by the monitor": lambda run: np.argmax(run.monitored("val")),
    "best by loss": lambda run: np.argmax(-run.loss),
    "last, unless best by 1 SE": lambda run: last_unless(run, 1),
    "last, unless best by 2 SE": lambda run: last_unless(run, 2),
}


def paired(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Difference of two accuracies on the same images, and half of Tango's 95 % interval (1998) ÷ 1.96."""
    n, b, c = len(one), int((one & ~other).sum()), int((~one & other).sum())

    def score(difference: float) -> float:
        part = difference * (2 * n - b + c) - b - c
        q = (
            math.sqrt(max(0.0, part * part + 8 * n * c * difference * (1 - difference))) - part
        ) / (4 * n)
        surplus, variance = b - c - n * difference, n * (2 * q + difference * (1 - difference))
        if variance > 0:
            return surplus / math.sqrt(variance)
        return math.copysign(math.inf, surplus) if surplus else 0.0

    low, high = (brentq(lambda d, z=z: score(d) - z, -1 + 1e-12, 1 - 1e-12) for z in (Z, -Z))
    return (b - c) / n, (high - low) / 2 / Z


def macro(one: np.ndarray, other: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """The same of two balanced accuracies: Price and Bonett (2004), with two images that the classes share."""
    means, variances = [], []
    classes = np.unique(labels)
    for label in classes:
        gaps = one[labels == label].astype(float) - other[labels == label]
        images = len(gaps) + 2 / len(classes)
        means.append(gaps.mean())
        variances.append(
            (np.square(gaps).sum() + 1 / len(classes) - gaps.sum() ** 2 / images) / images**2
        )
    return float(np.mean(means)), math.sqrt(sum(variances)) / len(classes)


# ---- what the page says


def gains(runs: list[Run], rule: str) -> np.ndarray:
    """[runs] points of the monitor's metric on the test images that the rule's weights have over the last."""
    metrics = [100 * run.monitored("test") for run in runs]
    return np.array(
        [metric[RULES[rule](run)] - metric[-1] for run, metric in zip(runs, metrics, strict=True)]
    )


def others(runs: list[Run], rule: str) -> int:
    """In how many runs the rule takes other weights than the last."""
    return sum(RULES[rule](run) != len(run.loss) - 1 for run in runs)


def winners(runs: list[Run], rule: str) -> dict[tuple[str, int], float]:
    """For each data set and seed the sign of MoE less dense in the metric, on the test images."""
    tested = {run.key: run.monitored("test")[RULES[rule](run)] for run in runs}
    return {
        (data, seed): np.sign(metric - tested[data, "dense", seed])
        for (data, arm, seed), metric in tested.items()
        if arm == "moe" and (data, "dense", seed) in tested
    }


def turned(runs: list[Run], rule: str) -> int:
    """In how many pairs MoE against dense has another outcome than with the last weights: a win, a defeat, a tie."""
    of_last = winners(runs, "last")
    return sum(sign != of_last[pair] for pair, sign in winners(runs, rule).items())


def overall(runs: list[Run]) -> list[str]:
    """A row for each rule: runs with other weights than the last, mean gain, worst, best, and what changes."""
    rows = []
    for rule in RULES:
        gain, pairs = gains(runs, rule), len(winners(runs, rule))
        points = f"{gain.mean():+.2f} | {gain.min():+.1f} | {gain.max():+.1f}"
        changed = f"{turned(runs, rule)} of {pairs}"
        rows.append(f"| {rule} | {others(runs, rule)} of {len(runs)} | {points} | {changed} |")
    return rows


def by_data(runs: list[Run]) -> list[str]:
    """A row for each rule: mean gain and the worst, of each data set."""
    names = dict.fromkeys(run.key[0] for run in runs)
    rows = []
    for rule in RULES:
        each = [gains([run for run in runs if run.key[0] == name], rule) for name in names]
        cells = [f"{gain.mean():+.2f} ({gain.min():+.1f})" for gain in each]
        rows.append(f"| {rule} | {' | '.join(cells)} |")
    return rows


def statements() -> dict[str, list[str]]:
    """Page -> its texts with measured numbers."""
    text = Path(__file__).with_name("runs.jsonl").read_text(encoding="utf-8")
    runs = [Run(json.loads(line)) for line in text.splitlines()]
    today, one = "best by the monitor", "last, unless best by 1 SE"
    gain = gains(runs, today)
    answer = (
        f"In {others(runs, today)} of {len(runs)} trainings the best validation wasn't the last. Testing it cost "
        f"{-gain.mean():.2f} points on average and {-gain.min():.1f} at worst, and gained at most {gain.max():.1f}; in "
        f"{turned(runs, today)} of {len(winners(runs, today))} pairs it changed whether MoE or dense is ahead."
    )
    rule = (
        f"With the rule of one standard error {others(runs, one)} of {len(runs)} trainings took other weights than the "
        f"last, at {gains(runs, one).mean():+.2f} points on average."
    )
    return {
        "benchmarks/checkpoint_choice/README.md": [
            answer,
            rule,
            *overall(runs),
            *by_data(runs),
        ]
    }


if __name__ == "__main__":
    print(json.dumps(statements(), indent=1, ensure_ascii=False))

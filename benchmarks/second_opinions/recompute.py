"""What a mirror image adds, and what prediction sets cover: README.md's numbers, from runs.jsonl; NumPy and SciPy only.

    python benchmarks/second_opinions/recompute.py

A run has, for each way to answer, which images are right (a digit an image), the negative log-likelihood and the ECE;
the probabilities of the true class of the validation images that have scores, and of the test images; and of each test
image the size of its set (a hexadecimal digit) at each level.
"""

import json
import math
from pathlib import Path

import numpy as np
from scipy import stats
from scipy.optimize import brentq

DATA = ("cats", "cifar10", "imagenette")
LEVELS = ("0.8", "0.9", "0.95")
MEANS = ("plain", "logits", "probabilities")
Z = float(stats.norm.ppf(0.975))


def read() -> list[dict]:
    """All runs, the bundled model last."""
    text = Path(__file__).with_name("runs.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def digits(text: str) -> np.ndarray:
    """[n] of a text of hexadecimal digits."""
    return np.array([int(digit, 16) for digit in text])


def tango(gained: int, lost: int, n: int) -> tuple[float, float]:
    """Tango's 95 % interval of (gained - lost) / n (Statistics in Medicine 17, 1998)."""

    def score(difference: float) -> float:
        a, b = 2 * n, -gained - lost + (2 * n - gained + lost) * difference
        c = -lost * difference * (1 - difference)
        only_lost = (math.sqrt(max(b * b - 4 * a * c, 0)) - b) / (2 * a)
        variance = n * (2 * only_lost + difference * (1 - difference))
        return (gained - lost - n * difference) / math.sqrt(max(variance, 1e-300))

    edge = 1 - 1e-12
    low = brentq(lambda x: score(x) - Z, -edge, (gained - lost) / n)
    high = brentq(lambda x: score(x) + Z, (gained - lost) / n, edge)
    return low, high


# ---- the mirror


def choice(runs: list[dict]) -> str:
    """The rule's number: validation likelihood at each way's own temperature, mean over the models."""
    plain, logits, probabilities = (
        np.mean([run["val"][way]["nll_own_temperature"] for run in runs]) for way in MEANS
    )
    return f"{probabilities:.4f} with the mean of probabilities, {logits:.4f} with that of logits, {plain:.4f} without"


def gain(run: dict) -> np.ndarray:
    """[n] 1 where only the mirrored answer is right, -1 where only the plain one is."""
    test = run["test"]
    return digits(test["probabilities"]["right"]) - digits(test["plain"]["right"])


def mirror_row(runs: list[dict], name: str) -> str:
    """Accuracy of a data set's runs before and after, and what changes: mean over seeds."""
    before, after = (
        np.array([100 * digits(run["test"][way]["right"]).mean() for run in runs])
        for way in ("plain", "probabilities")
    )
    points = after - before
    if len(runs) > 1:
        half = stats.t.ppf(0.975, len(runs) - 1) * stats.sem(points)
        low, high = points.mean() - half, points.mean() + half
    else:
        gains = gain(runs[0])
        low, high = (
            100 * bound for bound in tango((gains > 0).sum(), (gains < 0).sum(), len(gains))
        )
    changes = []
    for measure, scale in (("nll", 1), ("ece", 100)):
        plain, mirrored = (
            scale * np.mean([run["test"][way][measure] for run in runs])
            for way in ("plain", "probabilities")
        )
        changes.append(
            f"{plain:.{3 if scale == 1 else 1}f} → {mirrored:.{3 if scale == 1 else 1}f}"
        )
    return (
        f"| {name} | {before.mean():.1f} → {after.mean():.1f} % | {points.mean():+.2f} ({low:+.2f} to {high:+.2f}) | "
        f"{' | '.join(changes)} |"
    )


def image_row(run: dict) -> str:
    """A model's gain with its interval over images."""
    gains = gain(run)
    gained, lost = int((gains > 0).sum()), int((gains < 0).sum())
    low, high = (100 * bound for bound in tango(gained, lost, len(gains)))
    return f"| `{run['name']}` | {gained} | {lost} | {100 * gains.mean():+.2f} ({low:+.2f} to {high:+.2f}) |"


# ---- the sets


def threshold(probabilities: np.ndarray, level: float) -> float:
    """The probability of rank ceil((n + 1) level) from above."""
    rank = math.ceil(round((len(probabilities) + 1) * level, 9))
    return 0.0 if rank > len(probabilities) else float(np.sort(probabilities)[::-1][rank - 1])


def covered(run: dict, level: str) -> np.ndarray:
    """[n] whether each test image's set has its class."""
    return np.array(run["tested"]) >= threshold(np.array(run["scored"]), float(level))


def coverage_row(runs: list[dict], name: str, level: str) -> str:
    """A data set's sets: coverage (mean, lowest, highest of the seeds), size, the class with the least, empty ones."""
    shares = [100 * covered(run, level).mean() for run in runs]
    sizes = [digits(run["set_sizes"][level]) for run in runs]
    worst = []
    for run in runs:
        labels, is_covered = digits(run["labels"]), covered(run, level)
        worst.append(min(100 * is_covered[labels == label].mean() for label in set(labels)))
    empty = 100 * np.mean([(size == 0).mean() for size in sizes])
    return (
        f"| {name} | {level} | {np.mean(shares):.1f} ({min(shares):.1f} to {max(shares):.1f}) % | "
        f"{np.mean([size.mean() for size in sizes]):.2f} | {np.mean(worst):.1f} % | {empty:.1f} % |"
    )


def over_splits(run: dict, level: float, splits: int = 2000) -> float:
    """Mean coverage less k / (n + 1), points, over random splits of scored and tested images."""
    scored, tested = np.array(run["scored"]), np.array(run["tested"])
    pool, n = np.concatenate([scored, tested]), len(scored)
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(splits):
        pool = rng.permutation(pool)
        shares.append((pool[n:] >= threshold(pool[:n], level)).mean())
    expected = math.ceil(round((n + 1) * level, 9)) / (n + 1)
    return 100 * (np.mean(shares) - expected)


def inside(runs: list[dict]) -> str:
    """In how many runs and levels the test's coverage lies within the 95 % range of Beta(k, n + 1 - k) and the test."""
    hits = []
    for run in runs:
        for level in LEVELS:
            n, total = len(run["scored"]), len(run["tested"])
            k = math.ceil(round((n + 1) * float(level), 9))
            low, high = stats.betabinom(total, k, n + 1 - k).ppf([0.025, 0.975]) / total
            hits.append(low <= covered(run, level).mean() <= high)
    return f"{sum(hits)} of {len(hits)}"


def statements() -> dict[str, list[str]]:
    """Page -> its texts with measured numbers."""
    *runs, bundled = read()
    of_data = {name: [run for run in runs if run["data"] == name] for name in DATA}
    deviations = [over_splits(run, float(level)) for run in runs for level in LEVELS]
    return {
        "benchmarks/second_opinions/README.md": [
            choice(runs),
            *(mirror_row(of_data[name], f"`{name}`") for name in DATA),
            mirror_row([bundled], "bundled `cifar10`"),
            *map(image_row, [*runs, bundled]),
            *(coverage_row(of_data[name], f"`{name}`", level) for name in DATA for level in LEVELS),
            f"differs from k / (n + 1) by {max(map(abs, deviations)):.2f} points at most",
            f"{inside(runs)} coverages lie within the 95 % range",
        ]
    }


if __name__ == "__main__":
    print(json.dumps(statements(), indent=1, ensure_ascii=False))

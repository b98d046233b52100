"""Statements of README, Results and guides beside the same numbers, recomputed without the studies' own code.

    python benchmarks/recompute_statements.py   # NumPy and SciPy alone; status 1 if a page says something else

Each is a difference of accuracy over common seeds with Student's interval, unless it says otherwise.
"""

import json
import math
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

ROOT = Path(__file__).resolve().parents[1]
Run = dict[str, Any]
Accuracies = Mapping[int, float]  # by seed


def runs_of(study: str, **keys: Any) -> list[Run]:
    """The lines of a study's records with these values."""
    lines = (ROOT / "benchmarks" / study).read_text(encoding="utf-8").splitlines()
    return [run for run in map(json.loads, lines) if keys.items() <= run.items()]


def difference(
    first: Accuracies, second: Accuracies, level: float = 0.05
) -> tuple[float, float, float]:
    """Mean of the paired differences, and the ends of its interval."""
    gaps = np.array([first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())])
    half = student.ppf(1 - level / 2, len(gaps) - 1) * gaps.std(ddof=1) / math.sqrt(len(gaps))
    return gaps.mean(), gaps.mean() - half, gaps.mean() + half


def points(found: tuple[float, float, float], digits: int = 1, end: str = ")") -> str:
    """`+1.5 (+0.4 to +2.5)` of shares."""
    mean, low, high = (f"{100 * value:+.{digits}f}" for value in found)
    return f"{mean} ({low} to {high}{end}"


def one_epoch(arm: str) -> dict[int, float]:
    """The sparsity study's test accuracy at the rate that the tuning seeds, 100 and 101, find best on validation."""
    runs = [
        run for run in runs_of("sparsity/runs.jsonl", arm=arm, device="cpu") if not run["failed"]
    ]
    tried: dict[float, list[float]] = {}
    for run in runs:
        if run["seed"] >= 100:
            tried.setdefault(run["lr"], []).append(run["val_top1"])
    best = max(tried, key=lambda lr: np.mean(tried[lr])) if tried else None
    return {
        run["seed"]: run["test_top1"]
        for run in runs
        if run["seed"] < 100 and best in (None, run["lr"])
    }


def full_length(arm: str, quantity: str = "test_top1") -> dict[int, float]:
    """Equal time's compared runs; tuning had seeds below 200."""
    return {
        run["seed"]: run[quantity]
        for run in runs_of("equal_time/runs.jsonl", arm=arm)
        if run["seed"] >= 200
    }


def cats(gate: str) -> dict[int, float]:
    """Right of the test photos where only experts learned, counted from the answers."""
    runs = runs_of("cats_and_dogs/runs.jsonl", gate=gate, learn="experts", trunk="pretrained")
    return {
        run["seed"]: np.mean([a == b for a, b in zip(run["labels"], run["predicted"], strict=True)])
        for run in runs
    }


def large_batch(arm: str, batch: int) -> dict[int, float]:
    """The small study's test accuracy with places read, counted from the answers: 1,000 images a class, in order."""
    found = {}
    for run in runs_of("small/runs.jsonl", question="batches", head="places", arm=arm, batch=batch):
        if run["seed"] < 100:
            found[run["seed"]] = np.mean(
                [int(digit) == place // 1000 for place, digit in enumerate(run["predicted"])]
            )
    return found


def beside_the_rule(name: str, arm: str) -> str:
    """An arm of the modular study less the linear rule: the mean over domains, with the interval over test images."""
    runs = [
        run for run in runs_of("modular/runs.jsonl", set=name) if "trains" in run
    ]  # from the first amendment on
    right = {
        of: np.mean(
            [
                np.array(list(run["predicted"][of])) == np.array(list(run["labels"]))
                for run in runs
                if of in run["predicted"]
            ],
            axis=0,
        )
        for of in (arm, "no training")
    }
    parts = np.split(right[arm] - right["no training"], np.cumsum(runs[0]["test_images"])[:-1])
    mean = np.mean([part.mean() for part in parts])
    half = 1.96 * math.sqrt(sum(part.var(ddof=1) / len(part) for part in parts)) / len(parts)
    return points((float(mean), mean - half, mean + half), 2)


def flips() -> str:
    """Right answers that change without some expert, and with as much away at random."""
    record = json.loads((ROOT / "benchmarks/demo/flips.json").read_text(encoding="utf-8"))
    labels, own = np.array(list(record["labels"])), np.array(list(record["all"]))
    changed = {
        kind: np.any([np.array(list(answers)) != own for answers in record[kind].values()], axis=0)[
            labels == own
        ]
        for kind in ("without", "at_random")
    }
    shares = [f"{100 * each.mean():.0f} %" for each in changed.values()]
    right = (labels == own).sum()
    return f"of {right:,} right test photos {shares[0]} change without some network, {shares[1]} at random"


def statements() -> Iterator[tuple[str, str]]:
    """Each page, and what it must say."""
    guide, results, table = (
        "docs/guides/when-experts.md",
        "docs/results.md",
        ("README.md", "docs/guides/when-experts.md"),
    )
    moe, twin = one_epoch("moe"), one_epoch("twin")
    lead = points(difference(moe, twin), end="; 6 seeds)").replace(" (", " points (", 1)
    places = points(difference(one_epoch("moe-places"), one_epoch("twin-places")), end="; 5 seeds)")
    time = points(difference(moe, one_epoch("twin-time")))
    long = points(
        difference(full_length("moe"), full_length("twin-time"), 0.0294), end=", 97 %; 6 pairs)"
    )
    dense = points(
        difference(full_length("twin-parameters"), full_length("twin-time"), 0.0294),
        end=", 97 %; 3 seeds)",
    )
    told = points(difference(cats("class"), cats("balanced")))
    below = [
        -100 * difference(cats(gate), cats("dense"))[0] for gate in ("alone", "balanced", "class")
    ]
    for page in table:
        yield page, f"{lead} at equal steps where the classifier averages patches"
        yield page, f"{places} where it reads their places"
        yield page, f"{time} at equal time"
        yield page, f"In ten epochs at equal time: {long.replace(' (', ' points (', 1)}"
        yield page, f"isn't shown to gain either: {dense}"
        yield page, f"{min(below):.1f} to {max(below):.1f} points below dense"
        yield page, f"(told − balanced {told})"
    yield "README.md", flips()
    for arm, words in (
        ("joined", "joined bring {}, {} and {} points"),
        ("heads only, tuned", "each folder {}, {} and {}"),
    ):
        yield (
            guide,
            words.format(
                *(beside_the_rule(name, arm) for name in ("sources", "far", "imagenette"))
            ),
        )
    more = points(difference(one_epoch("twin-time"), twin), end="; 5 seeds)")
    yield results, f"14 % more steps give the twin {more}"
    seconds = [np.mean(list(full_length(arm, "cpu_s").values())) for arm in ("twin-time", "moe")]
    yield results, f"dense had {100 * (seconds[0] / seconds[1] - 1):.1f} % more CPU time"
    for row in _large_batches():
        yield results, row


def _large_batches() -> Iterator[str]:
    leads = {
        batch: {seed: moe[seed] - dense[seed] for seed in moe.keys() & dense.keys()}
        for batch in (16, 64, 256, 1024)
        for moe, dense in [(large_batch("learned", batch), large_batch("dense", batch))]
    }
    if min(map(len, leads.values())) > 1:
        changes = [
            f"{points(difference(leads[batch], leads[64]))} at {batch}" for batch in (16, 256, 1024)
        ]
        yield f"With places read {', '.join(changes)}"


def plain(text: str) -> str:
    """Words with single blanks and hyphens for minus signs."""
    return re.sub(r"\s+", " ", text).replace("−", "-")


def checked() -> int:
    """Print every statement with its verdict; how many pages say something else."""
    texts: dict[str, str] = {}
    wrong = 0
    for page, said in statements():
        text = texts.setdefault(page, plain((ROOT / page).read_text(encoding="utf-8")))
        same = plain(said) in text
        wrong += not same
        print(f"{'=' if same else 'NOT THERE'}\t{page}\t{said.replace('-', '−')}")
    return wrong


def main() -> None:
    """Exit with 1 if a page says something else."""
    sys.exit(min(checked(), 1))


if __name__ == "__main__":
    main()

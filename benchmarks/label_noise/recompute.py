"""Recompute every measured number of README.md from runs.jsonl and difficulty.json, with NumPy and SciPy alone.

Question: a tenth of the labels is wrong. Which of the scores of the training images ranks these first, and does a
training without the suspects get better?

Code: commit 47eb0f95 ran it (two trainings are of commit 9f438722, one of 59bab884), commit 389b4527 the part about
difficulty.

    python benchmarks/label_noise/recompute.py
"""

import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from scipy.stats import ttest_1samp

HERE = Path(__file__).parent
TITLES = {
    "random": "CIFAR-10, random flips",
    "similar": "CIFAR-10, flips between similar classes",
    "cats": "cats_vs_dogs, from a pretrained ViT",
    "folder": "A folder of drawn animals",
}
TRAININGS = {
    "moe": "all images",
    "dropped": "without the tenth of lowest AUM",
    "drawn": "without a tenth drawn at random",
}
Run = dict[str, Any]


def mean_and_sd(values: list[float], digits: int = 3) -> str:
    """Over seeds; empty where nothing was measured."""
    return f"{fmean(values):.{digits}f} ± {stdev(values):.{digits}f}" if values else ""


def accuracies(runs: list[Run], arm: str) -> list[float]:
    """Test accuracy in per cent, seed by seed."""
    own = sorted((run for run in runs if run["arm"] == arm), key=lambda run: run["seed"])
    return [100 * run["test_top1"] for run in own]


def beside(runs: list[Run], arm: str, other: str) -> tuple[float, float, float]:
    """One arm's test accuracy minus another's, in points, seed by seed: mean and Student's 95 % interval."""
    gaps = np.subtract(accuracies(runs, arm), accuracies(runs, other))
    return fmean(gaps), *ttest_1samp(gaps, 0).confidence_interval(0.95)


def score_rows(runs: list[Run]) -> list[str]:
    """A row for each score: area under the ROC curve and precision, with and without experts."""
    arms = [arm for arm in ("moe", "dense") if any(run["arm"] == arm for run in runs)]
    by_arm = {arm: [run["scores"] for run in runs if run["arm"] == arm] for arm in arms}
    rows = []
    for name in by_arm["moe"][0]:
        cells = [
            mean_and_sd([scores[name][measure] for scores in by_arm[arm] if name in scores])
            for arm in arms
            for measure in ("auroc", "precision")
        ]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return rows


def training_rows(runs: list[Run]) -> list[str]:
    """A row for each choice of images: wrong labels that are left, and accuracy beside the two other choices."""
    rows = []
    for arm, title in TRAININGS.items():
        wrong = [run["flips"] for run in runs if run["arm"] == arm]
        cells = [
            "{:+.2f} ({:+.2f} to {:+.2f})".format(*beside(runs, arm, other)) if arm != other else ""
            for other in ("moe", "drawn")
        ]
        top1 = mean_and_sd(accuracies(runs, arm), 2)
        rows.append(
            f"| {title} | {fmean(wrong):.0f} | {len(wrong)} | {top1} | {cells[0]} | {cells[1]} |"
        )
    return rows


def verdicts(runs: list[Run]) -> list[str]:
    """What leaving a tenth out is worth: told apart where the interval excludes 0."""

    def verdict(arm: str, other: str) -> str:
        _, low, high = beside(runs, arm, other)
        return "better than" if low > 0 else "worse than" if high < 0 else "not told apart from"

    return [
        f"Leaving out the page's first tenth was {verdict('dropped', 'moe')} training on all",
        f"A tenth drawn at random was {verdict('drawn', 'moe')} all, and the two tenths are "
        f"{verdict('dropped', 'drawn')} one another",
    ]


def difficulty_rows(measured: list[Run]) -> list[str]:
    """Explained share of the variance of an image's difficulty, by model."""
    rows = []
    for arm, title in (("moe", "MoE"), ("dense", "dense twin")):
        own = [row for row in measured if row["arm"] == arm]
        by_experts = mean_and_sd([row["experts"] for row in own if row["experts"] is not None])
        rows.append(
            f"| {title} | {len(own)} | {by_experts} | {mean_and_sd([row['features'] for row in own])} |"
        )
    return rows


def statements() -> dict[str, list[str]]:
    """Page -> its texts with measured numbers."""
    text = Path(__file__).with_name("runs.jsonl").read_text(encoding="utf-8")
    records = [json.loads(line) for line in text.splitlines()]
    difficulty = json.loads((HERE / "difficulty.json").read_text(encoding="utf-8"))
    readme, areas = [], []
    for noise, title in TITLES.items():
        runs = [run for run in records if run["noise"] == noise]
        readme.append(
            f"**{title}** (test top-1 of the MoE: {mean_and_sd(accuracies(runs, 'moe'), 1)} %)"
        )
        readme += score_rows(runs)
        if noise == "random":
            readme += training_rows(runs) + verdicts(runs)
        areas.append(
            f"{fmean(run['scores']['aum']['auroc'] for run in runs if run['arm'] == 'moe'):.2f}"
        )
    readme += difficulty_rows(difficulty["rows"])
    results = (
        f"finds them with an AUROC of {areas[0]} where CIFAR-10's labels were flipped at random, {areas[1]} where "
        f"similar classes were mixed up, {areas[2]} on photos of cats and dogs and {areas[3]} on a folder of drawn "
        "animals"
    )
    return {"benchmarks/label_noise/README.md": readme, "docs/results.md": [results]}


if __name__ == "__main__":
    print(json.dumps(statements(), indent=1, ensure_ascii=False))

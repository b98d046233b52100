"""Recompute every measured number of README.md from runs.jsonl, with SciPy alone.

Question: which `--data.fit` suits photos that aren't square: crop, pad or squash? By a linear head on frozen features,
three divisions of the photos.

Code: commit b08e206b ran it.

    python benchmarks/fits/recompute.py
"""

import json
import math
from pathlib import Path
from statistics import fmean, stdev

from scipy.stats import t as student

HERE = Path(__file__).parent


def paired_interval(differences: list[float]) -> tuple[float, float]:
    """Mean of one difference for each division, and half of Student's 95 % interval."""
    half = (
        student.ppf(0.975, len(differences) - 1) * stdev(differences) / math.sqrt(len(differences))
    )
    return fmean(differences), half


def statements() -> dict[str, list[str]]:
    """Page -> its texts with measured numbers."""
    shares: dict[str, list[float]] = {}
    for line in (HERE / "runs.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)  # in the order of seeds
        shares.setdefault(record["fit"], []).append(record["correct"] / record["total"])
    rows, is_better = [], False
    for fit, own in shares.items():
        less_crop = ""
        if fit != "crop":
            mean, half = paired_interval(
                [100 * (a - b) for a, b in zip(own, shares["crop"], strict=True)]
            )
            less_crop = f"{mean:+.2f} ± {half:.2f}"
            is_better = is_better or mean > half
        by_seed = " | ".join(f"{share:.1%}" for share in own)
        rows.append(f"| `{fit}` | {by_seed} | {fmean(own):.1%} | {less_crop} |")
    highest = max(shares, key=lambda fit: fmean(shares[fit]))
    answer = (
        f"{'Another' if is_better else 'No other'} fit is shown to be better than `crop`, which "
        f"{'has' if highest == 'crop' else 'lacks'} the highest mean"
    )
    return {"benchmarks/fits/README.md": [answer, *rows]}


if __name__ == "__main__":
    for page, texts in statements().items():
        print(f"{page}\n", *texts, sep="\n")

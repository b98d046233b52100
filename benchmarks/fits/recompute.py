"""Recompute every measured number of README.md from runs.jsonl, with SciPy alone.

Question: which `--data.fit` suits photos that aren't square: crop, pad or squash? By a linear head on frozen features,
three divisions of the photos.

Code: commit b08e206b ran it.

    python benchmarks/fits/recompute.py
"""

import json
from pathlib import Path
from statistics import fmean

import numpy as np
from scipy.stats import ttest_1samp

HERE = Path(__file__).parent


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
            gaps = 100 * np.subtract(own, shares["crop"])
            low, high = ttest_1samp(gaps, 0).confidence_interval(0.95)
            less_crop = f"{gaps.mean():+.2f} ± {(high - low) / 2:.2f}"
            is_better = is_better or low > 0
        by_seed = " | ".join(f"{share:.1%}" for share in own)
        rows.append(f"| `{fit}` | {by_seed} | {fmean(own):.1%} | {less_crop} |")
    highest = max(shares, key=lambda fit: fmean(shares[fit]))
    answer = (
        f"{'Another' if is_better else 'No other'} fit is shown to be better than `crop`, which "
        f"{'has' if highest == 'crop' else 'lacks'} the highest mean"
    )
    return {"benchmarks/fits/README.md": [answer, *rows]}


if __name__ == "__main__":
    print(json.dumps(statements(), indent=1, ensure_ascii=False))

"""benchmarks/label_noise/README.md: everything between its marks is the report of the committed runs."""

import statistics
from typing import Any

from benchmarks.label_noise import DROPS, NOISES, _beside, _cell, parts_of
from benchmarks.records import Claim, Definition
from benchmarks.records.studies import shown

FILES = "benchmarks/label_noise/runs.jsonl"


def _parts(*runs: Any) -> list[dict[str, str]]:
    return shown(parts_of(runs))


def of_moe(*runs: Any) -> dict[str, float]:
    """Mean area of a score over the seeds, by noise and score: `random_aum`."""
    found = {}
    for noise in NOISES:
        own = [run["scores"] for run in runs if (run["noise"], run["arm"]) == (noise, "moe")]
        for name, key in KEYS.items():
            found[f"{noise}_{key}"] = statistics.fmean(scores[name]["auroc"] for scores in own)
    return found


def dropped(*runs: Any) -> dict[str, str]:
    """Test accuracy without a tenth of the images less that with all, random flips."""
    by_arm = {arm: {run["seed"]: run for run in runs if (run["noise"], run["arm"]) == ("random", arm)}
              for arm in ("moe", *DROPS)}  # fmt: skip
    return {arm: _beside(by_arm[arm], by_arm["moe"]) for arm in DROPS}


def difficulty(record: Any) -> list[dict[str, str]]:
    """Means of what is explained, with SDs over seeds, by arm."""
    found = []
    for arm, name in (("moe", "MoE"), ("dense", "dense twin")):
        own = [row for row in record["rows"] if row["arm"] == arm]
        cells = {
            key: _cell([row[key] for row in own if row[key] is not None], ".3f") for key in ("experts", "features")
        }
        found.append({"model": name, "seeds": str(len(own)), **cells})
    return found


KEYS = {
    "aum": "aum",
    "p_final": "final",
    "cleanlab normalized_margin": "margin",
    "experts": "experts",
    "features": "features",
}
CLAIMS = [
    Claim(FILES, "{text}", _parts),
    Claim("benchmarks/label_noise/difficulty.json", "| {model} | {seeds} | {experts} | {features} |", difficulty),
]
DEFINITIONS = [
    Definition("20,000 of CIFAR-10's training set, 2,000 of each class", "what is drawn"),
    Definition("1,000 training photos", "what is drawn"),
    Definition("2,400 drawn animals", "what is drawn"),
    Definition("10 % of the images", "what is planted"),
    Definition("(0.5: chance, 1: all first)", "the scale of the area"),
    Definition("2.9 (Apache-2.0)", "a version and its licence"),
    Definition("their share among the first 10 % (0.1: chance)", "how precision is defined"),
    Definition("95 % t intervals", "their level"),
]

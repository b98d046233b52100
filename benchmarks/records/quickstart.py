"""benchmarks/quickstart/README.md."""

from typing import Any

from benchmarks.records import Claim, Definition
from benchmarks.records.analysis import ATLAS, CARD
from moevision.stats import accuracy_interval

Json = dict[str, Any]
RUNS = "benchmarks/quickstart/runs.jsonl"
NOW, BEFORE = (tuple(f"{RUNS}#{name}-s{seed}" for seed in range(3)) for name in ("now", "before"))
QUICKSTART = NOW[0]
CIFAR_CARD = CARD.replace("pets", "cifar10")
CATS_CARD, CATS_ATLAS = CARD.replace("pets", "cats_vs_dogs"), ATLAS.replace("pets", "cats_vs_dogs")
TWO_CARD = CARD.replace("pets", "cats_vs_dogs_two")


def share(correct: int, total: int) -> str:
    """An accuracy with Wilson's 95 % interval."""
    low, high = accuracy_interval(correct, total)
    return f"{correct / total:.1%} ({100 * low:.1f} to {100 * high:.1f})"


def of_card(card: Json) -> Json:
    """The accuracies of a bundled model and of its twin."""
    total = card["test_images"]
    return {
        name: share(round(value * total), total) for name, value in card["accuracy"].items()
    } | {"total": total}


def of_run(summary: Json) -> Json:
    """The accuracy of a run."""
    test = summary["test"]
    return {"moe": share(test["correct"], test["total"]), "total": test["total"]}


def of_command(*runs: Json) -> Json:
    """CPU seconds of the whole command and test accuracy, of each seed."""
    tests = [run["test"]["correct"] / run["test"]["total"] for run in runs]
    return {
        "tests": ", ".join(f"{100 * each:.1f}" for each in tests),
        "mean": sum(tests) / len(tests),
        "seconds": ", ".join(f"{run['command_cpu_s']:.0f}" for run in runs),
        "images": runs[0]["cost"]["images"],
        "total": runs[0]["test"]["total"],
    }


def loads(record: Json) -> Json:
    """Busiest expert over the mean, and CV², in each layer: of a run's summary, or of a bundled model's atlas."""
    slowest, spread = [], []
    for layer in record["layers"]:
        counts = layer.get("counts", layer.get("loads"))
        mean = sum(counts) / len(counts)
        slowest.append(f"{max(counts) / mean:.2f}")
        spread.append(f"{sum((count / mean - 1) ** 2 for count in counts) / len(counts):.4f}")
    images = record["n_images"] if "n_images" in record else record["test"]["total"]
    return {"slowest": ", ".join(slowest), "spread": ", ".join(spread), "images": images}


CLAIMS = [
    Claim(QUICKSTART, "| quickstart, drawn pets | {total:,} | {moe} | |", of_run),
    Claim(CATS_CARD, "| bundled, cats and dogs | {total:,} | {moe} | {dense} |", of_card),
    Claim(CARD, "| bundled, drawn pets | {total:,} | {moe} | {dense} |", of_card),
    Claim(QUICKSTART, "| quickstart, drawn pets | {images:,} | {slowest} | {spread} |", loads),
    Claim(CATS_ATLAS, "| bundled, cats and dogs | {images:,} | {slowest} | {spread} |", loads),
    Claim(ATLAS, "| bundled, drawn pets | {images:,} | {slowest} | {spread} |", loads),
    Claim(NOW, "| now | {images:,} | {seconds} | {tests} |", of_command),
    Claim(BEFORE, "| before | {images:,} | {seconds} | {tests} |", of_command),
]

DEFINITIONS = [
    Definition("trained on 16,000 drawn images in batches of 64", "the recipe before"),
    Definition("on 12,000 in batches of 48", "the recipe"),
    Definition("Wilson's 95 % interval", "the level of the intervals"),
]

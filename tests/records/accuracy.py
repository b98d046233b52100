"""benchmarks/accuracy/README.md."""

from typing import Any

from tests.records import Claim, Definition
from tests.records.quickstart import share

Json = dict[str, Any]
CIFAR = "benchmarks/accuracy/cifar10-short-s0.json"


def of_run(record: Json) -> Json:
    """One row of the table."""
    cost, test = record["cost"], record["test"]
    return {
        "total": test["total"],
        "top1": share(test["correct"], test["total"]),
        "images": cost["images"],
        "pflop": cost["training_flops"] / 1e15,
        "cpu_s": cost["cpu_s"] or record["observed"]["cpu_s"],
        "loads": ", ".join(f"{layer['max_over_mean']:.2f}" for layer in record["layers"]),
    }


CLAIMS = [
    Claim(
        CIFAR,
        "Muon, 9 epochs, seed 0 | {total:,} | {top1} | {images:,} | {pflop:.3f} | {cpu_s:,.0f} | {loads} |",
        of_run,
    ),
    Claim(
        CIFAR,
        "is missed by {missed:.1f} points",
        lambda record: {"missed": 87 - 100 * record["test"]["correct"] / record["test"]["total"]},
    ),
]

DEFINITIONS = [
    Definition("hybrid, 64 tokens", "a size"),
    Definition("Wilson's 95 % over test images", "the level of the intervals"),
    Definition("The aim, 87 %", "an aim"),
    Definition("16 tokens, and more weight decay", "a size"),
]

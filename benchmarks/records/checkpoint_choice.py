"""benchmarks/checkpoint_choice/README.md: of the earlier study that it quotes; the rest is in its recompute.py."""

from typing import Any

from benchmarks.records import Claim, Definition

ACCURACY = "benchmarks/accuracy/runs.jsonl"


def _earlier(*records: Any) -> list[dict[str, Any]]:
    """Trainings whose best validation wasn't their last, and by how many points it was ahead."""
    rows = []
    for record in records:
        curve = [top1 for _, top1, _ in record["curve"]]
        best = curve.index(max(curve))
        if best + 1 < len(curve):
            ahead = 100 * (curve[best] - curve[-1])
            rows.append({"name": record["name"], "best": best + 1, "epochs": len(curve), "ahead": ahead})
    return rows


CLAIMS = [Claim(ACCURACY, "| `{name}` | {best} of {epochs} | {ahead:.1f} |", _earlier)]
DEFINITIONS: list[Definition] = []

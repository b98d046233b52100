"""benchmarks/checkpoint_choice/README.md: what its own script doesn't compute, of the record of another study."""

from typing import Any

from benchmarks.records import Claim, Definition
from benchmarks.records.accuracy import RUNS


def of_earlier_epochs(*records: Any) -> list[dict[str, Any]]:
    """Trainings whose best validation wasn't their last, and by how many points it was ahead."""
    rows = []
    for record in records:
        curve = [top1 for _, top1, _ in record["curve"]]
        best = curve.index(max(curve))
        if best + 1 < len(curve):
            ahead = 100 * (curve[best] - curve[-1])
            rows.append(
                {"name": record["name"], "best": best + 1, "epochs": len(curve), "ahead": ahead}
            )
    return rows


CLAIMS = [Claim(RUNS, "| `{name}` | {best} of {epochs} | {ahead:.1f} |", of_earlier_epochs)]
DEFINITIONS: list[Definition] = []

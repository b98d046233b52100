"""benchmarks/balance/README.md."""

from typing import Any

from benchmarks.records import Claim

RECORD = "benchmarks/balance/record.json"


def ends(record: dict[str, Any]) -> dict[str, float]:
    """The busiest expert's load at the end over an equal share, and the accuracy, of both trainings."""
    found = {}
    for name, arm in zip(("without", "with_loss"), record["arms"], strict=True):
        last = arm["shares"][-1]
        found |= {name: max(last) * len(last), f"{name}_right": arm["correct"] / arm["total"]}
    return found


CLAIMS = [
    Claim(
        RECORD,
        "ends at {without:.1f} times an equal share ({without_right:.1%} of the test images right), with one at "
        "{with_loss:.1f} times ({with_loss_right:.1%})",
        ends,
    )
]

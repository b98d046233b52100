"""benchmarks/waiting/README.md."""

from typing import Any

from benchmarks.ideas import waits as waits_longer
from benchmarks.records import Claim, Definition
from moevision.analysis.questions import YES

Json = dict[str, Any]
RUNS = "benchmarks/waiting/runs.jsonl"


def rows(*runs: Json) -> list[Json]:
    """A row for each arm: rows and bytes of the first run, which are counts, and the range of the waiting."""
    found = []
    for same in zip(*(run["rows"] for run in runs), strict=True):
        waits = [row["wait_over_even"] for row in same]
        found.append(
            {
                "arm": same[0]["arm"],
                "busiest": same[0]["busiest_over_mean"],
                "kb": same[0]["bytes_sent"] / 1000,
                "low": min(waits),
                "high": max(waits),
            }
        )
    return found


def extremes(*runs: Json) -> Json:
    """The range of the waiting without and with the balance loss."""
    by_arm = {row["arm"]: row for row in rows(*runs)}
    ranges = [f"{by_arm[arm]['low']:.1f} to {by_arm[arm]['high']:.1f}" for arm in ("no loss", "loss")]
    waits = [
        [row["wait_ms"] for run in runs for row in run["rows"] if row["arm"] == arm] for arm in ("no loss", "loss")
    ]
    return {
        **dict(zip(("without", "with_loss"), ranges, strict=True)),
        "rows": by_arm["no loss"]["busiest"],
        "rows_with_loss": by_arm["loss"]["busiest"],
        "ms": ", ".join(f"{without:.1f} and {beside:.1f}" for without, beside in zip(*waits, strict=True)),
        "longer": sum(without > beside for without, beside in zip(*waits, strict=True)),
        "runs": len(runs),
        "shown": "Yes, in every run and by both measures" if waits_longer(list(runs))[0] == YES else "Not shown",
    }


CLAIMS = [
    Claim(RUNS, "| `{arm}` | {busiest:.2f} | {kb:.0f} | {low:.2f} to {high:.2f} |", rows),
    Claim(RUNS, "**Answer.** {shown}", extremes),
    Claim(
        RUNS,
        "computes {rows:.2f} times the mean rows, and the other waits {without} times as long as under an even load; "
        "with the loss {rows_with_loss:.2f} times the rows and {with_loss} times the wait",
        extremes,
    ),
    Claim(RUNS, "{ms} ms without and with the loss: longer without it in {longer} of {runs} runs", extremes),
]
DEFINITIONS = [
    Definition("64 images each, 1,000 steps of each arm", "settings of the records"),
    Definition("sends 100 tokens to the first expert", "FORCED"),
    Definition("forced to 100 : 1", "FORCED"),
]

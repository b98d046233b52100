"""benchmarks/waiting/README.md."""

from typing import Any

from tests.records import Claim, Definition

Json = dict[str, Any]
RUNS = tuple(f"benchmarks/waiting/record-{number}.json" for number in (1, 2, 3))


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
    by_arm = {row["arm"]: f"{row['low']:.1f} to {row['high']:.1f}" for row in rows(*runs)}
    return {"without": by_arm["no loss"], "with_loss": by_arm["loss"]}


CLAIMS = [Claim(RUNS, "| `{arm}` | {busiest:.2f} | {kb:.0f} | {low:.2f} to {high:.2f} |", rows)]
DEFINITIONS = [
    Definition("64 images each, 100 steps of each arm", "settings of the records"),
    Definition("sends 100 tokens to the first expert", "FORCED"),
    Definition("forced to 100 : 1", "FORCED"),
]

"""How often `moevision audit` finds a planted fault, and accuses a healthy router: the draws of its tests.

python -m benchmarks audit
"""

from __future__ import annotations

from benchmarks.harness import HERE, about, argument_parser
from benchmarks.lines import write_lines
from tests.analysis.test_audit import FAULTS, HEALTHY, drawn

DRAWS = 100  # of each case


def main() -> None:
    """Draw, and write the record."""
    argument_parser("audit", __doc__).parse_args()
    origin = about()
    cases = {}
    for case in (*FAULTS, *HEALTHY):
        accused = [drawn(case, seed) for seed in range(DRAWS)]
        counts = {what: sum(what in found for found in accused) for what in FAULTS.values()}
        cases[case] = {**counts, "any": sum(map(bool, accused))}
        print(f"{case}: {cases[case]}", flush=True)

    healthy = {what: sum(cases[case][what] for case in HEALTHY) for what in FAULTS.values()}
    total = DRAWS * len(HEALTHY)
    record = {**origin, "draws": DRAWS, "healthy_draws": total, "cases": cases, "healthy": healthy}
    write_lines(HERE / "audit" / "record.json", record)

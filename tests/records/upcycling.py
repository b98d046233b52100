"""docs/upcycling.md."""

import re
import statistics
from typing import Any

from tests.records import ROOT, Claim, Definition
from tests.records.studies import report, shown

STUDY = "benchmarks/upcycling/record.json"


def _facts(record: dict[str, Any]) -> dict[str, Any]:
    own = report("upcycling")
    spent = {
        arm: statistics.fmean(own.spent(record, run)[1] for run in own.runs_of(record, arm).values())
        for arm in own.RESTARTED
    }
    return {**record["settings"], "longer": spent["upcycled"] / spent["continued"] - 1}


CLAIMS = [
    Claim(STUDY, "n = m = {first:,} steps of {batch} images", _facts),
    Claim(STUDY, "{text}", lambda record: {"text": report("upcycling").accuracy_table(record)}),
    Claim(STUDY, "{text}", lambda record: shown(report("upcycling").differences(record))),
    Claim(STUDY, "The upcycled model took {longer:.0%} more CPU time than", _facts),
]

_TABLES = re.findall(
    r"^\| .+ \| (?:[\d.]+ M \| [\d.]+ M \| [\d.]+ \| [\d.]+|(?:< 1e-5|[\d.]+) \| [\d.]+ %) \|$",
    (ROOT / "docs" / "upcycling.md").read_text(encoding="utf-8"),
    re.M,
)
DEFINITIONS = [
    *(Definition(row, "measured again by `tests/models/test_upcycle.py`") for row in _TABLES),
    Definition("0.75^(L − i), the embedding at `lr` · 0.75^(L + 1)", "the rule of layer decay"),
    Definition("hundreds of billions of tokens", "the cited paper"),
    Definition("logits of standard deviation 1.5", "measured again by `tests/models/test_upcycle.py`"),
]

"""benchmarks/upcycling/README.md."""

import re
import statistics
from typing import Any

from benchmarks.records import ROOT, Claim, Definition
from benchmarks.records.studies import report, shown

STUDY = "benchmarks/upcycling/record.json"


def _facts(record: dict[str, Any]) -> dict[str, Any]:
    own = report("upcycling")
    spent = {
        arm: statistics.fmean(own.spent(record, run)[1] for run in own.runs_of(record, arm).values())
        for arm in own.RESTARTED
    }
    return {**record["settings"], "longer": spent["upcycled"] / spent["continued"] - 1}


def rivals(record: dict[str, Any]) -> dict[str, Any]:
    """The upcycled model beside the restarted dense one and the one in one schedule: points, and verdicts in words."""
    restarted, in_one = report("upcycling").differences(record)
    verdicts = [text.rsplit(": ", 1)[1] for text in (restarted, in_one)]
    points = [text.split("mean ")[1].split(", p")[0] for text in (restarted, in_one)]
    nor = "nor" if verdicts == ["not told apart."] * 2 else "but"
    return {"mean": points[0], "in_one": points[1], "verdict": verdicts[0].removesuffix("."), "nor": nor}


CLAIMS = [
    Claim(STUDY, "n = m = {first:,} steps of {batch} images", _facts),
    Claim(STUDY, "{text}", lambda record: {"text": report("upcycling").accuracy_table(record)}),
    Claim(STUDY, "{text}", lambda record: shown(report("upcycling").differences(record))),
    Claim(STUDY, "The upcycled model took {longer:.0%} more CPU time than", _facts),
]
_GAPS = re.findall(
    r"^\| .+ \| (?:< 1e-5|[\d.]+) \| [\d.]+ % \|$",
    (ROOT / "benchmarks" / "upcycling" / "README.md").read_text(encoding="utf-8"),
    re.M,
)
DEFINITIONS = [
    *(Definition(row, "measured again by `tests/models/test_upcycle.py`") for row in _GAPS),
    Definition("logits of standard deviation 1.6", "measured again by `tests/models/test_upcycle.py`"),
]

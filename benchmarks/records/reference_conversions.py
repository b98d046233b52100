"""docs/reference/conversions.md."""

import re

from benchmarks.records import ROOT, Claim, Definition

_TABLES = re.findall(
    r"^\| .+ \| [\d.]+ M \| [\d.]+ M \| [\d.]+ \| [\d.]+ \|$",
    (ROOT / "docs" / "reference" / "conversions.md").read_text(encoding="utf-8"),
    re.M,
)
CLAIMS: list[Claim] = []
DEFINITIONS = [
    Definition("blocks 7 and 9 of 12 instead of 9 and 11", "block numbers"),
    *(Definition(row, "counted again by `tests/models/test_upcycle.py`") for row in _TABLES),
    Definition("0.75^(L − i), the embedding at `lr` · 0.75^(L + 1)", "the rule of layer decay"),
    Definition("holds at most 2 GB", "a limit of the format"),
    Definition(
        "1e-4 in three draws of noise (with `--dtype fp16` 0.05)",
        "`moevision.models.export.TOLERANCE`",
    ),
    Definition("checked with 5.24", "a version"),
]

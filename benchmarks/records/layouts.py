"""benchmarks/layouts/README.md: everything between its marks is the report of the committed runs."""

from typing import Any

from benchmarks.layouts import table
from benchmarks.records import Claim, Definition

FILES = "benchmarks/layouts/runs.jsonl"


def _table(*runs: Any) -> list[dict[str, str]]:
    return [{"text": "\n".join(table(runs))}] if runs else []


CLAIMS = [Claim(FILES, "{text}", _table)]
DEFINITIONS = [
    Definition("2,048 for training and validation, 832 for the test", "the data"),
    Definition("64 images a step", "the batch"),
    Definition("one in seven lies more than two of them away", "simulated: a normal value, in SDs of five others"),
]

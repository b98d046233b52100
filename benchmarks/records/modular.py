"""benchmarks/modular/README.md: everything between its marks is the report of the committed runs."""

from typing import Any

from benchmarks.modular.report import parts_of
from benchmarks.records import Claim
from benchmarks.records.studies import shown

FILES = "benchmarks/modular/runs.jsonl"


def _parts(*runs: Any) -> list[dict[str, str]]:
    return shown(part for part in parts_of(runs) if not part.startswith("#"))


CLAIMS = [Claim(FILES, "{text}", _parts)]

"""benchmarks/fits/README.md: everything between its marks is the report of the committed runs."""

from typing import Any

from benchmarks.fits import parts_of
from benchmarks.records import Claim, Definition
from benchmarks.records.studies import shown

FILE = "benchmarks/fits/runs.jsonl"


def _parts(*records: Any) -> list[dict[str, str]]:
    return shown(parts_of(list(records)))


CLAIMS = [Claim(FILE, "{text}", _parts)]
DEFINITIONS = [
    Definition("all 2,880 of cats and dogs", "the folder"),
    Definition("2,048 to train and 832 to test", "`TESTED` of them"),
    Definition("at 112 px", "`SIDE`"),
]

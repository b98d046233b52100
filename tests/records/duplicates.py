"""benchmarks/duplicates/README.md: everything between its marks is the report of the committed record."""

from typing import Any

from benchmarks.duplicates import EACH, FOLDER, KINDS, OUTSIDE, TRAIN, parts_of
from tests.records import ROOT, Claim, Definition
from tests.records.studies import shown

FILES = tuple(str(path.relative_to(ROOT)) for path in FOLDER.glob("record.json"))


def _parts(*records: Any) -> list[dict[str, str]]:
    return shown(part for record in records for part in parts_of(record))


assert (TRAIN, OUTSIDE, EACH * len(KINDS)) == (1_500, 500, 280)
CLAIMS = [Claim(FILES, "{text}", _parts)]
DEFINITIONS = [
    Definition("3.3 % are published", "the cited paper"),
    Definition("1,500 training and 500 validation photos", "what is planted"),
    Definition("280 altered copies", "what is planted"),
    Definition("280, or the 140 across splits", "what is planted"),
    Definition("50,000 training and 10,000 test images", "the data"),
]

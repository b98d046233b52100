"""benchmarks/duplicates/README.md: everything between its marks is the report of the committed record."""

from typing import Any

from benchmarks.duplicates import EACH, FOLDER, KINDS, OUTSIDE, TRAIN, parts_of
from benchmarks.records import ROOT, Claim, Definition
from benchmarks.records.studies import shown

FILES = tuple(str(path.relative_to(ROOT)) for path in FOLDER.glob("record.json"))


def _parts(*records: Any) -> list[dict[str, str]]:
    return shown(part for record in records for part in parts_of(record))


def of_planted(record: Any) -> dict[str, float]:
    """The list of near-duplicates: what was planted, and what was found of it."""
    found = record["planted"]["lists"]["all"]
    named = sum(kind["copies"] * kind["named"] for kind in found["kinds"].values()) / found["planted"]
    return {"planted": found["planted"], "named": named, "precision": found["precision"]}


assert (TRAIN, OUTSIDE, EACH * len(KINDS)) == (1_500, 500, 280)
CLAIMS = [Claim(FILES, "{text}", _parts)]
DEFINITIONS = [
    Definition("3.3 % are published", "the cited paper"),
    Definition("1,500 training and 500 validation photos", "what is planted"),
    Definition("280 altered copies", "what is planted"),
    Definition("280, or the 140 across splits", "what is planted"),
    Definition("of the 29 first pairs of photos", "judged by eye"),
    Definition(
        "20 of the 20 pairs from rank 50 on, 17 from rank 150, 14 from 250, 13 from 350, 2 from 500 and 3 from 700",
        "judged by eye",
    ),
    Definition("about 370 down to there", "the trapezoids over the judged ranks"),
    Definition("3.3 % would be 330", "of 10,000"),
    Definition("50,000 training and 10,000 test images", "the data"),
]

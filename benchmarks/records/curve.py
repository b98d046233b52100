"""benchmarks/curve/README.md: everything between its marks is the report of the committed record."""

from typing import Any

from benchmarks.curve import EPOCHS, FOLDER, IMAGES, MARGIN, SEEDS, parts_of
from benchmarks.curve.shares import table, with_interval
from benchmarks.records import ROOT, Claim, Definition
from benchmarks.records.studies import shown

FILES = tuple(str(path.relative_to(ROOT)) for path in FOLDER.glob("record.json"))


def _parts(*records: Any) -> list[dict[str, str]]:
    return shown(part for record in records for part in parts_of(record))


def beside_all(record: Any) -> dict[str, str]:
    """Points beside all images, by method and percent: `ccs_70`."""
    rows = table(record["trainings"], record["methods"])
    return {f"{row.by}_{round(100 * row.share)}": with_interval(row.beside_all) for row in rows}


def worse_than_random(record: Any) -> dict[str, float]:
    """The largest share at which AUM is shown to be worse than as many images at random."""
    rows = table(record["trainings"], record["methods"])
    return {"share": max(row.share for row in rows if row.by == "aum" and row.beside_random.high < 0)}


assert (IMAGES, EPOCHS, SEEDS, MARGIN) == (8_000, 4, 3, 1)
CLAIMS = [Claim(FILES, "{text}", _parts)]
DEFINITIONS = [
    Definition("70 % of the training images", "the question"),
    Definition("70 % drawn at random", "the question"),
    Definition("800 of each class", "what is drawn"),
    Definition("all 8,000 images", "what is drawn"),
    Definition("the lowest 10 % of AUM go", "how ccs is run"),
    Definition("less than 1 point worse counts as as good", "the margin"),
    Definition("10,000 test images", "the data"),
    Definition("70 % weren't shown to be as good as all", "the verdict of the sentences"),
    Definition("worse from 70 % down", "the verdict of the table"),
    Definition("at 90 % `ccs` gives up", "of the method: its hardest tenth is all that goes"),
    Definition("95 % t intervals", "their level"),
]

"""benchmarks/strangers/README.md: everything between its marks is the report of the committed record."""

from typing import Any

from benchmarks.records import Claim, Definition
from benchmarks.records.studies import shown
from benchmarks.strangers import parts_of

FILE = "benchmarks/strangers/runs.jsonl"


def _parts(*records: Any) -> list[dict[str, str]]:
    return shown(parts_of(list(records)))


def recognized(*records: Any) -> dict[str, str]:
    """Of the bundled models, the best one first."""
    rates = sorted(records, key=lambda record: -record["recognized"])
    return {"rates": ", ".join(f"`{record['name']}` {100 * record['recognized']:.0f}" for record in rates)}


CLAIMS = [Claim(FILE, "{text}", _parts)]
DEFINITIONS = [
    Definition("2,000 at most", "`benchmarks.strangers.IMAGES`"),
    Definition("5 % of at most 2,000 validation images", "`REFUSED` and `IMAGES`"),
    Definition("eight classes of CIFAR-10", "without cat and dog"),
    Definition("29 photos of other animals (20 for CIFAR-10", "the folder's"),
    Definition("below 80 %", "`moevision.demo.service.SURE`"),
]

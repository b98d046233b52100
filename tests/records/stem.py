"""benchmarks/stem/README.md: everything between its marks is the report of the committed record."""

from typing import Any

from benchmarks.stem import FACTORS, FOLDER, STEPS, effects, parts_of
from tests.records import ROOT, Claim, Definition
from tests.records.studies import shown

FILES = tuple(str(path.relative_to(ROOT)) for path in FOLDER.glob("record.json"))


def _parts(*records: Any) -> list[dict[str, str]]:
    return shown(part for record in records for part in parts_of(record["runs"]))


def gains(record: Any) -> dict[str, str]:
    """Points with their interval, by factor."""
    return {factor: each.interval for factor, each in zip(FACTORS, effects(record["runs"]), strict=True)}


assert STEPS == 351
CLAIMS = [Claim(FILES, "{text}", _parts)] if FILES else []
DEFINITIONS: list[Definition] = []

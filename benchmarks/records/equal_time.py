"""benchmarks/equal_time/README.md: everything between its marks is the report of the committed runs and prices."""

from typing import Any

from benchmarks.equal_time.report import parts_of
from benchmarks.records import Claim
from benchmarks.records.studies import shown

FILES = ("benchmarks/equal_time/runs.jsonl", "benchmarks/equal_time/prices.jsonl")


def _parts(*records: Any) -> list[dict[str, str]]:
    runs, prices = ([each for each in records if (each["name"] == "price") is priced] for priced in (False, True))
    return shown(parts_of(runs, prices))


CLAIMS = [Claim(FILES, "{text}", _parts)]

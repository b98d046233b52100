"""benchmarks/sparsity/README.md: everything between its marks is the report of the committed runs."""

from typing import Any

from tests.records import ROOT, Claim, Definition
from tests.records.studies import report, shown

FOLDER = ROOT / "benchmarks" / "sparsity"
FILES = tuple(str(path.relative_to(ROOT)) for path in sorted([*FOLDER.glob("runs/*.json"), *FOLDER.glob("speed.json")]))


def _parts(*found: Any) -> list[dict[str, str]]:
    speed = [each for file in found if isinstance(file, list) for each in file]
    parts = report("sparsity").parts_of([file for file in found if isinstance(file, dict)], speed)
    return shown(part for part in parts if not part.startswith("#"))


CLAIMS = [Claim(FILES, "{text}", _parts)]
DEFINITIONS: list[Definition] = []

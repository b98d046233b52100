"""benchmarks/specialization/README.md: everything between its marks is the report of the committed runs."""

from typing import Any

from tests.records import ROOT, Claim, Definition
from tests.records.studies import report, shown

FOLDER = ROOT / "benchmarks" / "specialization"
FILES = tuple(str(path.relative_to(ROOT)) for path in sorted(FOLDER.glob("runs/*.json")))


def _parts(*runs: Any) -> list[dict[str, str]]:
    return shown(part for part in report("specialization").parts_of(runs) if not part.startswith("#"))


CLAIMS = [Claim(FILES, "{text}", _parts)]
DEFINITIONS: list[Definition] = []

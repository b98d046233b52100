"""How large the house is, how far its trips go, and whether its results stay: counts, trips, unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.lines import write_lines
from moevision.train.provenance import git_state

RECORD = Path(__file__).with_name("record.json")


def put(name: str, part: str, values: dict[str, Any], package: Path) -> None:
    """Write what was counted of a package into the record, under a name such as `after`, with the commit."""
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {}
    record[name] = {**record.get(name, {}), **(git_state(package) or {}), part: values}
    write_lines(RECORD, record)

"""Records as people compare them: a line for each row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moevision.files import write_text_atomic


def as_lines(record: Any) -> str:
    """JSON with a line for each entry of a list or an object, and one for each entry of a list inside it."""

    def written(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)

    def entries(values: list[Any]) -> str:
        return "[\n" + ",\n".join(map(written, values)) + "\n]" if values else "[]"

    if isinstance(record, list):
        return entries(record) + "\n"
    parts = [
        f"{written(name)}: {entries(x) if isinstance(x, list) else written(x)}"
        for name, x in record.items()
    ]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def write_lines(path: Path, record: Any) -> None:
    """Replace a record, whole or not at all."""
    write_text_atomic(path, as_lines(record))


def put_run(path: Path, run: dict[str, Any]) -> None:
    """Put the record of a run into a file of a line for each, in the place of an earlier one of the same name."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    others = [line for line in lines if json.loads(line)["name"] != run["name"]]
    found = json.dumps(run, ensure_ascii=False, allow_nan=False)
    write_text_atomic(path, "".join(f"{line}\n" for line in [*others, found]))

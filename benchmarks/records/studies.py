"""Tables and sentences of the studies in benchmarks/, as their own reports write them: pages show those unchanged."""

import importlib
from collections.abc import Iterable
from typing import Any

from benchmarks.records import parts_of


def report(study: str) -> Any:
    """The module that tells the record of a study."""
    return importlib.import_module(f"benchmarks.{study}.report")


def shown(texts: Iterable[str]) -> list[dict[str, str]]:
    """What fills `Claim(record, "{text}", ...)`."""
    return [{"text": text} for text in texts]


def on_gpus(*records: Any) -> bool:
    """Whether one of these was measured on a machine with a GPU."""
    return any(part.get("gpus") for record in records for part in parts_of(record))

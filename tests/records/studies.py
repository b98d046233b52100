"""Tables and sentences of the studies in benchmarks/, as their own reports write them: pages show those unchanged."""

import importlib
import sys
from collections.abc import Iterable
from typing import Any

from tests.records import ROOT


def report(name: str) -> Any:
    """The module of this name in benchmarks/."""
    folder = str(ROOT / "benchmarks")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


def shown(texts: Iterable[str]) -> list[dict[str, str]]:
    """What fills `Claim(record, "{text}", ...)`."""
    return [{"text": text} for text in texts]

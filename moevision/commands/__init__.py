"""The verbs that are more than one call, a module each; `moevision.cli` has the table of all verbs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loading(what: str = "loading PyTorch") -> Iterator[None]:
    """Say on a terminal what is going on, such as the import of torch, which takes seconds."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield

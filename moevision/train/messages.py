"""Sentences for the person at the terminal, who may have gone; of several processes only the first one speaks."""

from __future__ import annotations

import contextlib
import sys

from moevision.data.contents import is_main_process
from moevision.names import shown_lines


def tell(sentence: str) -> None:
    """Print a sentence to stderr at once; a terminal that was closed meanwhile is no reason to stop training."""
    if not is_main_process():
        return
    with contextlib.suppress(OSError, ValueError):  # EIO from a hung-up terminal; ValueError from a closed file
        print(shown_lines(sentence), file=sys.stderr, flush=True)

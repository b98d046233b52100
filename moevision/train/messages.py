"""Sentences for the person at the terminal, who may have gone."""

from __future__ import annotations

import contextlib
import sys


def tell(sentence: str) -> None:
    """Print a sentence to stderr at once; a terminal that was closed meanwhile is no reason to stop training."""
    with contextlib.suppress(OSError, ValueError):  # EIO from a hung-up terminal; ValueError from a closed file
        print(sentence, file=sys.stderr, flush=True)

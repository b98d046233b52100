"""Training: the task, the command-line verbs, and what a run leaves behind.

The names below load on first use, so that a look at the machine or at a config doesn't import Lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moevision.train.guard import StabilityGuard
    from moevision.train.task import ClassificationTask

__all__ = ["ClassificationTask", "StabilityGuard"]

_HOME = {"ClassificationTask": "task", "StabilityGuard": "guard"}


def __getattr__(name: str) -> object:
    """Import the module that defines ``name``."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)

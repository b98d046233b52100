"""Training: the task, the command-line verbs, and what a run leaves behind.

The names below load on first use, so that a look at the machine or at a config doesn't import Lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moevision import lazy_names

if TYPE_CHECKING:
    from moevision.train.guard import StabilityGuard
    from moevision.train.task import ClassificationTask

__all__ = ["ClassificationTask", "StabilityGuard"]

_NAMES = {"task": ("ClassificationTask",), "guard": ("StabilityGuard",)}

__getattr__ = lazy_names(__name__, _NAMES)

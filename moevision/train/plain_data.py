"""Turns what only unpickling could read again into numbers, strings and lists, before it gets into a checkpoint.

A checkpoint is read with `weights_only=True`, which refuses NumPy's numbers, paths and the like. They come from
notebooks: `OptimizerConfig(lr=np.float64(1e-3))` trains well, and its checkpoints could never be opened.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """`value` with NumPy numbers and arrays, paths and enumerations as plain data, at any depth; the rest as it is."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, PurePath):
        return str(value)
    if type(value) is dict:
        return {plain(key): plain(each) for key, each in value.items()}
    if isinstance(value, OrderedDict):  # a module's state, with metadata as an attribute
        for key, each in value.items():
            value[key] = plain(each)
        return value
    if isinstance(value, Mapping):
        return {plain(key): plain(each) for key, each in value.items()}
    if type(value) in (list, tuple, set):
        return type(value)(plain(each) for each in value)
    return value


def make_plain(checkpoint: dict[str, Any]) -> None:
    """Make all of a checkpoint plain, in place."""
    for key in list(checkpoint):
        checkpoint[key] = plain(checkpoint[key])

"""Names of types that many modules use: arrays by what they hold, and JSON."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]
Flags = NDArray[np.bool_]
Pixels = NDArray[np.uint8]  # of an image [H, W, 3], or several; or a mask of its parts
Json = dict[str, Any]  # an object of JSON
Keywords = dict[str, Any]  # arguments of a call, or options, by their names
State = dict[str, Any]  # of a checkpoint or a part of it: plain data and tensors
TimmModel = Any  # a model of timm's: an nn.Module with attributes that nn.Module doesn't declare

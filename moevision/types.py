"""Names of types that many modules use: arrays by what they hold, and JSON."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]
Flags = NDArray[np.bool_]
Pixels = NDArray[
    np.uint8
]  # an RGB image [H, W, 3] ([3, H, W] for a network), a batch, or a part mask [H, W]
Json = dict[str, Any]  # an object of JSON
Keywords = dict[str, Any]  # keyword arguments of a call
State = dict[str, Any]  # the state dict of a checkpoint or of a part of one: plain data and tensors
TimmModel = Any  # a model of timm's: an nn.Module with attributes that nn.Module doesn't declare

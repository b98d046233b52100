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
]  # an RGB image [H, W, 3], several of them [N, H, W, 3], or a mask of parts [H, W]
Json = dict[str, Any]  # a JSON object
Keywords = dict[str, Any]  # keyword arguments
State = dict[
    str, Any
]  # the state dict of a checkpoint or of a part of one: tensors and plain values
TimmModel = Any  # a model of timm's: an nn.Module with attributes that nn.Module doesn't declare

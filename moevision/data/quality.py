"""What the pixels of one image say about it: size, sharpness, brightness, colour, and a hash by which copies are found.

All but the size is measured on the image shrunk to a short side of at most `SIDE`, so that photos of different cameras
compare; nothing is enlarged.

- `sharpness`: variance of the Laplacian of the luma, in grey levels² (Pech-Pacheco et al., ICPR 2000, LAPV); low:
  blurred or without detail;
- `brightness`: mean luma, 0 to 1;
- `colour`: mean of the largest less the smallest channel, 0 to 1; 0: grey;
- `hash`: 64 bits, signs of the lowest 8 x 8 frequencies (DCT-II of 32 x 32 luma) against their median, as pHash does
  (Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010): alike for a copy in another size
  or compression, and not for a mirrored or strongly cropped one. An image without contrast has none.

Axes: H height, W width.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from moevision.data.images import full_size

SIDE: Final = 224
LOOK: Final = np.dtype([
    ("width", np.int32), ("height", np.int32), ("sharpness", np.float32), ("brightness", np.float32),
    ("colour", np.float32), ("hash", np.uint64), ("has_hash", np.bool_), ("read", np.bool_),
])  # fmt: skip
"""What is kept of one image, 33 bytes; `read` is false where it can't be decoded."""
_GRID, _KEPT = 32, 8
_FLAT: Final = 2.0  # grey levels: standard deviation of the 32 x 32 luma below which signs are noise
# DCT-II, rows k = 0 ... 7: cos(pi k (2 x + 1) / 64).
_COSINES: Final = np.cos(np.pi * np.outer(np.arange(_KEPT), 2 * np.arange(_GRID) + 1) / (2 * _GRID))


def look_at(image: Image.Image) -> npt.NDArray[Any]:
    """Measure an RGB image, perhaps decoded at a reduced size by `safe_open`; a 0-d array of `LOOK`."""
    (width, height), _ = full_size(image)
    scale = SIDE / min(image.size)
    if scale < 1:
        size = tuple(max(1, round(side * scale)) for side in image.size)
        image = image.resize(size, Image.Resampling.BILINEAR)  # type: ignore[arg-type]
    luma = image.convert("L")
    rgb = np.asarray(image)  # [H, W, 3]
    found = np.zeros((), LOOK)
    found["width"], found["height"], found["read"] = width, height, True
    found["sharpness"] = laplacian_variance(np.asarray(luma, np.float32))
    found["brightness"] = np.asarray(luma).mean() / 255
    found["colour"] = (rgb.max(-1) - rgb.min(-1)).mean() / 255
    found["hash"], found["has_hash"] = perceptual_hash(luma)
    return found


def laplacian_variance(luma: npt.NDArray[np.float32]) -> float:
    """Variance of the four-neighbour Laplacian of [H, W] inside the edge; 0 of less than 3 x 3 pixels."""
    if min(luma.shape) < 3:
        return 0.0
    inner = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:] - 4 * luma[1:-1, 1:-1]
    return float(inner.var())


def perceptual_hash(luma: Image.Image) -> tuple[np.uint64, bool]:
    """The hash of a grey image, and whether there was contrast enough for one."""
    grid = np.asarray(luma.resize((_GRID, _GRID), Image.Resampling.BILINEAR), np.float64)
    frequencies = (_COSINES @ grid @ _COSINES.T).ravel()[1:]  # without the mean
    bits = np.packbits(np.append(False, frequencies > np.median(frequencies)))
    return bits.view(">u8")[0].astype(np.uint64), bool(grid.std() >= _FLAT)

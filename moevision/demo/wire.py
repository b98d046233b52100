"""Images and arrays as text: data URIs to a browser, the only door for an image from one, and packed numbers.

A visitor's image is base64 inside the request, never a path or an address, so nothing on the server's disk and
nothing on its network can be asked for. The bytes go through `open_upload`, and so do those of a file that Gradio's
server has stored.
"""

from __future__ import annotations

import base64
import io
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from moevision.data.images import JPEG, BadImageError, safe_open
from moevision.errors import UserError
from moevision.types import Array, Floats, Json, Pixels

MAX_BYTES = 8 * 1024 * 1024
MAX_PIXELS = 50_000_000  # of a JPEG, which is decoded in fewer
MAX_PIXELS_WHOLE = 16_000_000  # of any other format: 0.25 GB and a second
# base64 writes 3 bytes as 4 characters; the prefix "data:image/...;base64," is short.
MAX_CHARACTERS = MAX_BYTES * 4 // 3 + 256


Code = Literal["bad_request", "busy", "bad_image", "too_large", "internal"]


class RequestError(UserError):
    """A request that can't be answered; `code` is what kind of mistake it is, for the page."""

    def __init__(self, message: str, code: Code = "bad_request") -> None:
        super().__init__(message)
        self.code: Code = code


# Of a photo of 168 px, lossless WebP has 36 KB in 3 ms; PNG has 53 KB in 6 ms.
LOSSLESS = {"format": "webp", "lossless": True, "method": 1, "quality": 20}


def data_uri(pixels: Pixels, **options: Any) -> str:
    """An image, uint8 [H, W, 3], as `data:image/...;base64,...`; `options` are those of Pillow, `LOSSLESS` if none."""
    options = options or LOSSLESS
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, **options)
    return f"data:image/{options['format']};base64,{_base64(buffer.getvalue())}"


def to_numpy(values: Tensor) -> Floats:
    """A tensor as a float32 array in main memory."""
    return values.detach().float().cpu().numpy()


def encode_float32(values: Array) -> Json:
    """Real numbers as a few characters each: `data`, base64 of little-endian int16 in row-major order, and `shape`.

    `unit` is what 1 stands for: the largest number is 32767, and none is off by more than half a unit.
    """
    largest = float(np.abs(values).max(initial=0.0))
    unit = largest / 32767 if largest > 0 else 1.0
    whole = np.round(np.asarray(values, np.float64) / unit).astype("<i2")
    return {"unit": unit, "shape": list(values.shape), "data": _base64(whole.tobytes())}


def encode_float16(values: npt.NDArray[np.float16]) -> Json:
    """Half-precision numbers as they are: `shape`, and `data`, base64 of little-endian float16 in row-major order."""
    return {"shape": list(values.shape), "data": _base64(values.astype("<f2").tobytes())}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def open_data_uri(text: str, short_side: int | None = None) -> Image.Image:
    """The upright RGB image that came inside a request as `data:image/...;base64,...`, or as the base64 alone.

    A JPEG may come with fewer pixels if it will be shrunk to `short_side` (`safe_open`). More than `MAX_BYTES` are a
    RequestError with code "too_large"; anything else that isn't accepted is a BadImageError.
    """
    if len(text) > MAX_CHARACTERS:
        raise _too_large()
    body = text.rpartition(";base64,")[2]
    try:
        data = base64.b64decode(body, validate=True)
    except ValueError as error:
        raise BadImageError(
            "<upload>",
            "it is no data:image/...;base64,... and no plain base64; a path or an address is never opened, send the "
            "image itself",
        ) from error
    return open_upload(data, short_side)


def open_upload(data: bytes, short_side: int | None = None) -> Image.Image:
    """The upright RGB image that a visitor's bytes are, within the explorer's limits; errors as of `open_data_uri`."""
    if len(data) > MAX_BYTES:
        raise _too_large()
    max_pixels = MAX_PIXELS if data.startswith(JPEG) else MAX_PIXELS_WHOLE
    return safe_open(io.BytesIO(data), short_side, max_bytes=MAX_BYTES, max_pixels=max_pixels)


def _too_large() -> RequestError:
    sentence = f"The image is larger than {MAX_BYTES // 2**20} MB: save it smaller and try again."
    return RequestError(sentence, "too_large")

"""Safe opening of image files: the one function that training, prediction and the web page read images with.

`safe_open` turns a file of unknown origin into an upright 8-bit RGB image, or raises `BadImageError` with
the reason. What a bare `PIL.Image.open(path).convert("RGB")` gets wrong, and is put right here:

- the EXIF orientation is ignored;
- 16-bit grey is clipped at 255, so that nearly every pixel turns white;
- the hidden colour under transparent pixels shows up;
- a 15 KB file may announce 121 megapixels and only a warning is given;
- a progressive JPEG of 8 MB may hold 250,000 scans, each of which goes over the whole image: hours of work;
- every installed decoder may be reached, rare and little-tested ones among them.

The file's first bytes (never its name) choose one of six Pillow decoders; the size is read from the header and checked
before a pixel is decoded. A JPEG that is far larger than its reader needs may be decoded at a half, a quarter or an
eighth of its size (``short_side``): libjpeg then leaves out the fine part of each block of 8 x 8 pixels (its
``scale_denom``, Pillow's ``Image.draft``), several times as fast. No global state of Pillow or `warnings` is touched,
so threads may share it. One consequence: what Pillow warns of (damaged metadata) stays a warning, unless the process
turns warnings into errors; then it is a `BadImageError`.
"""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from moevision.errors import UserError

# File name endings, in lower case, that a folder scan takes for images.
IMAGE_SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
)
MAX_BYTES = 256 * 1024 * 1024  # largest file that is read
MAX_SIDE = 16_384  # longest side, in pixels, that is decoded
JPEG = b"\xff\xd8\xff"
_DECODERS: dict[bytes, type[ImageFile.ImageFile]] = {
    JPEG: JpegImageFile,
    b"\x89PNG\r\n\x1a\n": PngImageFile,
    b"GIF87a": GifImageFile,
    b"GIF89a": GifImageFile,
    b"BM": BmpImageFile,
    b"II*\x00": TiffImageFile,
    b"MM\x00*": TiffImageFile,
}

# EXIF tag 0x0112 (Exif 2.32, table 4): stored orientation -> the turn that sets the image upright.
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow takes such prefixes away one by one, each time copying what is left: minutes for 8 MB (CVE-2026-96643).
_REPEATED_EXIF = b"Exif\0\0" * 4

# Encoders write about ten scans for a progressive JPEG. A scan costs 0.01 s at 16 megapixels, however short it is.
MAX_SCANS = 100
_MAX_SEGMENTS = 20_000  # 256 MB in pieces of 64 KB, as large metadata are written, are 4,000
# 0 is a stuffed byte, D0-D7 restart within a scan
_JPEG_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")

# A reduced image keeps at least this many pixels for each one of the result (Pillow's thumbnail has the same margin).
_REDUCING_GAP = 2
_FULL_SIZE = "full_size\0"  # no text in an image is called so


class BadImageError(UserError):
    """An image that can't be used: `path` as the caller named it or `"<stream>"`, and the `reason` without the path."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"cannot use the image {path}: {reason}")
        self.path = path
        self.reason = reason


def is_image_path(path: str | Path) -> bool:
    """Says whether a file's name looks like an image's; hidden files (such as macOS `._cat.jpg`) don't."""
    path = Path(path)
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def safe_open(
    source: str | Path | BinaryIO,
    short_side: int | None = None,
    *,
    max_pixels: int = 50_000_000,
    max_bytes: int = MAX_BYTES,
) -> Image.Image:
    """Opens an image file as an upright, fully loaded 8-bit RGB image.

    Args:
        source: A path, or a binary stream that is read from its current position.
        short_side: The side in pixels to which the caller will shrink the image's short side. A JPEG may then come
            reduced, with a short side of at least twice that (see `full_size`); shrunk with an antialiased
            bicubic filter it differs from the exact result by less than a grey level on average. None never reduces.
        max_pixels: Largest width x height that will be decoded.
        max_bytes: Largest file, in bytes, that will be read.

    Returns:
        An image in mode `"RGB"`: the first frame, orientation applied, free of the source file and of its
        metadata (an orientation left in it would be applied twice by a later reader) but for its full size.

    Raises:
        BadImageError: If the file is missing, unreadable, empty, too large, damaged, or not a JPEG, PNG,
            WebP, BMP, GIF or TIFF image.
    """
    name = str(source) if isinstance(source, str | Path) else "<stream>"
    data = read_image(source, name, max_bytes)
    if not data:
        raise BadImageError(name, "the file is empty; replace or remove it")
    if _REPEATED_EXIF in data:
        raise BadImageError(
            name, "its metadata are malformed (repeated Exif headers); save it anew"
        )
    if data.startswith(JPEG) and _has_too_many_scans(data):
        raise BadImageError(
            name,
            f"it is a JPEG of more than {MAX_SCANS} scans, or of countless segments; save it anew",
        )
    reduction = 1
    try:
        image = _open_header(data)
        if image is None:
            raise BadImageError(
                name, "it is not a JPEG, PNG, WebP, BMP, GIF or TIFF image; convert or remove it"
            )
        _check_size(image.size, name, max_pixels)
        full = image.size
        if short_side is not None and isinstance(image, JpegImageFile):
            reduction = _reduce_jpeg(image, short_side, turned=_turn(image) is not None)
        image.load()
        # The decoder may revise the size that the header announced (TIFF, GIF).
        _check_size(image.size, name, max_pixels)
        rgb = upright_rgb(image, name)
        if rgb.size != image.size:  # turned sideways
            full = full[::-1]
    except BadImageError:
        raise
    # Broad on purpose: on damaged bytes Pillow's decoders raise OSError, SyntaxError, ValueError, EOFError,
    # struct.error, zlib.error, MemoryError, SystemError ... and all of them mean "this file is damaged".
    except Exception as error:
        raise BadImageError(
            name, f"it is truncated or damaged ({error}); replace or remove it"
        ) from error
    rgb.info.clear()
    if reduction > 1:
        rgb.info[_FULL_SIZE] = full, reduction
    return rgb


def upright_rgb(image: Image.Image, name: str = "given") -> Image.Image:
    """An image that is open already, as `safe_open` gives it: upright 8-bit RGB, on white where it is transparent.

    A `BadImageError`, with the name, if its pixel format has no agreed range.
    """
    # Pillow's TIFF decoder has applied the orientation already, and then reports none.
    turn = _turn(image)
    image = image if turn is None else image.transpose(turn)
    if image.mode.startswith("I;16"):
        # 65535 = 257 x 255, so a rounded division by 257 maps full scale to full scale.
        values = (np.asarray(image).astype(np.uint32) + 128) // 257
        return Image.fromarray(values.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise BadImageError(
            name, f"its pixel format {image.mode} has no agreed range; save it with 8 bits"
        )
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, (255, 255, 255, 255))
        canvas.alpha_composite(image.convert("RGBA"))
        return canvas.convert("RGB")
    return image.convert("RGB")


def read_image(source: str | Path | BinaryIO, name: str = "", max_bytes: int = MAX_BYTES) -> bytes:
    """The bytes of an image file or stream; a pipe or device isn't opened at all, since reading it might never end.

    `name` is what to call it in a `BadImageError` (a path's own if empty), `max_bytes` the largest file that is read.
    """
    name = name or str(source)
    try:
        if isinstance(source, str | Path):
            path = Path(source)
            if path.exists() and not path.is_file():
                raise BadImageError(
                    name, "it is not a regular file; give the path of an image file"
                )
            with path.open("rb") as handle:
                # Not more than there is: Python sets the memory that is asked for aside before it reads.
                data = handle.read(min(max_bytes, os.fstat(handle.fileno()).st_size) + 1)
        else:
            data = source.read(max_bytes + 1)
    except FileNotFoundError as error:
        raise BadImageError(name, "there is no such file; check the path") from error
    except BadImageError:
        raise
    # ValueError: a NUL in the path, a closed stream
    except (OSError, ValueError, MemoryError) as error:
        raise BadImageError(name, f"it can't be read ({error}); check its permissions") from error
    if len(data) > max_bytes:
        raise BadImageError(name, f"the file is larger than {max_bytes:,} bytes; save it smaller")
    return data


def _open_header(data: bytes) -> ImageFile.ImageFile | None:
    """Reads the header with the decoder that the first bytes name; None if they name none.

    The decoder classes are called directly because `PIL.Image.open` tries all plugins and emits its own
    decompression-bomb warning, which couldn't be silenced in a thread-safe way.
    """
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return WebPImageFile(io.BytesIO(data))
    for magic, decoder in _DECODERS.items():
        if data.startswith(magic):
            return decoder(io.BytesIO(data))
    return None


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    announced = f"its size of {width} x {height} pixels"
    if min(size) < 1:
        raise BadImageError(name, f"{announced} is empty; replace or remove it")
    if max(size) > MAX_SIDE:
        raise BadImageError(
            name, f"{announced} exceeds the longest side of {MAX_SIDE:,}; shrink it"
        )
    if width * height > max_pixels:
        raise BadImageError(name, f"{announced} exceeds the limit of {max_pixels:,}; shrink it")


def _turn(image: Image.Image) -> Image.Transpose | None:
    """The turn that sets the image upright, by its EXIF orientation."""
    return _UPRIGHT.get(image.getexif().get(_ORIENTATION_TAG, 1))


def _has_too_many_scans(data: bytes) -> bool:
    """Counts a JPEG's scans (ITU-T T.81, B.1.1) up to its end; what lies behind, such as a video, isn't looked at."""
    position = 2
    scans = 0
    for _ in range(_MAX_SEGMENTS):
        marker = _JPEG_MARKER.search(data, position)
        if marker is None or marker[1] == b"\xd9":
            return False
        position = marker.end()
        if marker[1] not in (b"\x01", b"\xd8"):  # the two others without a length
            position += int.from_bytes(data[position : position + 2], "big")
        scans += marker[1] == b"\xda"
        if scans > MAX_SCANS:
            return True
    return True


def _reduce_jpeg(image: JpegImageFile, short_side: int, *, turned: bool) -> int:
    """Has a JPEG decoded smaller, if that leaves enough pixels for a short side of `short_side`.

    An image that will be ``turned`` to be upright is divided only without remainder: a part of a pixel may stand at its
    right and lower edge, where boxes end, but not at the left or upper one. Returns the divisor: 1, 2, 4 or 8.
    """
    width, height = image.size
    for divisor in (8, 4, 2):
        enough = min(width, height) >= divisor * _REDUCING_GAP * max(1, short_side)
        if enough and not (turned and (width % divisor or height % divisor)):
            image.draft(None, (width // divisor, height // divisor))
            return divisor
    return 1


def full_size(image: Image.Image) -> tuple[tuple[int, int], int]:
    """((width, height) of the full image, upright, reduction): what `safe_open` has divided its size by: 1, 2, 4 or 8.

    The last column and row of a reduced image may cover less than a whole pixel: boxes in it are those of the full
    image divided by the reduction.
    """
    result: tuple[tuple[int, int], int] = image.info.get(_FULL_SIZE, (image.size, 1))
    return result

"""What is particular to JPEG files: scans that cost hours, and decoding at a reduced size.

libjpeg can decode a picture at a half, a quarter or an eighth of its size by leaving out the fine part of each block
of 8 x 8 pixels (its ``scale_denom``, Pillow's ``Image.draft``), several times as fast as in full.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

MAX_SCANS: Final = 100
"""Encoders write about ten scans for a progressive JPEG. A scan costs 0.01 s at 16 megapixels, however short it is."""
_MAX_SEGMENTS: Final = 20_000  # 256 MB in pieces of 64 KB, as large metadata are written, are 4,000
_JPEG_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")  # 0 is a stuffed byte, D0-D7 restart within a scan
# A reduced picture keeps at least this many pixels for each one of the result (Pillow's thumbnail has the same margin).
_REDUCING_GAP: Final = 2
_FULL_SIZE: Final = "full_size"


def has_too_many_scans(data: bytes) -> bool:
    """Counts a JPEG's scans (ITU-T T.81, B.1.1) up to its end; what lies behind, such as a video, isn't looked at."""
    position, scans = 2, 0
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


def reduce_jpeg(image: JpegImageFile, short_side: int, *, turned: bool) -> int:
    """Has a JPEG decoded smaller, if that leaves enough pixels for a short side of `short_side`.

    A picture that will be turned is divided only without remainder: a part of a pixel may stand at its right and lower
    edge, where boxes end, but not at the left or upper one.

    Args:
        image: A picture whose header was read and whose pixels weren't.
        short_side: What the short side will be shrunk to, in pixels.
        turned: Whether the picture will be turned or mirrored to be upright.

    Returns:
        What its size is divided by: 1, 2, 4 or 8.
    """
    width, height = image.size
    for divisor in (8, 4, 2):
        enough = min(width, height) >= divisor * _REDUCING_GAP * max(1, short_side)
        if enough and not (turned and (width % divisor or height % divisor)):
            image.draft(None, (width // divisor, height // divisor))
            return divisor
    return 1


class FullSize(NamedTuple):
    """What `safe_open` notes in a reduced picture: width and height of the full one, upright, and the divisor."""

    size: tuple[int, int]
    reduction: int


def full_size(image: Image.Image) -> tuple[tuple[int, int], int]:
    """How large a picture is in its file, and by what `safe_open` has divided its size.

    The last column and row of a reduced picture may cover less than a whole pixel: boxes in it are those of the full
    picture divided by the reduction.

    Returns:
        ((width, height) of the full picture, upright, reduction): 1, 2, 4 or 8.
    """
    found = image.info.get(_FULL_SIZE)
    # a picture that was opened elsewhere may have a text of that name in it
    return (found.size, found.reduction) if isinstance(found, FullSize) else (image.size, 1)


def note_full_size(image: Image.Image, size: tuple[int, int], reduction: int) -> None:
    """Let `full_size` find the size of the full picture, upright, and the divisor."""
    image.info[_FULL_SIZE] = FullSize(size, reduction)

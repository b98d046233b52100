"""Decoded pictures kept in memory.

Axis legend: H height, W width; pictures differ in size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class PixelCache:
    """Decoded pictures of one split in a few large uint8 buffers.

    Thousands of small tensors would be copied into every worker process as soon as their reference counts
    are touched; views into a few large buffers are shared. The buffers are torch's, which workers that are not
    forked share too.
    """

    def __init__(self, *, planar: bool) -> None:
        """Start empty.

        Args:
            planar: whether the channels of a picture lie one after the other, [3, H, W], the fast order for shifted
                copies; otherwise together, [H, W, 3], the fast order for resizing. Only time depends on it.
        """
        self._planar = planar
        self._chunks: list[Tensor] = []
        self._where: list[tuple[int, int, int, int]] = []
        self.bad: dict[int, str] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return sum(chunk.numel() for chunk in self._chunks)

    def extend(self, pictures: Sequence[npt.NDArray[np.uint8] | str]) -> None:
        """Add the next pictures, uint8 [H, W, 3] each, or the reason why one is missing."""
        chunk = torch.empty(sum(p.size for p in pictures if not isinstance(p, str)), dtype=torch.uint8)
        offset = 0
        for picture in pictures:
            if isinstance(picture, str):
                self.bad[len(self._where)] = picture
                self._where.append((0, 0, 0, 0))
                continue
            height, width, _ = picture.shape
            stored = picture.transpose(2, 0, 1) if self._planar else picture
            chunk.numpy()[offset : offset + picture.size].reshape(stored.shape)[:] = stored
            self._where.append((len(self._chunks), offset, height, width))
            offset += picture.size
        self._chunks.append(chunk)

    def __len__(self) -> int:
        """Number of pictures, bad ones included."""
        return len(self._where)

    def __getitem__(self, index: int) -> npt.NDArray[np.uint8]:
        """Pixels uint8 [3, H, W], a view that must not be written to."""
        chunk, offset, height, width = self._where[index]
        stored = self._chunks[chunk].numpy()[offset : offset + 3 * height * width]
        if self._planar:
            return stored.reshape(3, height, width)
        return stored.reshape(height, width, 3).transpose(2, 0, 1)

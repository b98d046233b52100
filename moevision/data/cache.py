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
    are touched; views into a few large buffers are shared.
    """

    def __init__(self) -> None:
        """Start empty."""
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
            planes = torch.from_numpy(picture).permute(2, 0, 1)
            chunk[offset : offset + picture.size].view(3, height, width).copy_(planes)
            self._where.append((len(self._chunks), offset, height, width))
            offset += picture.size
        self._chunks.append(chunk)

    def __len__(self) -> int:
        """Number of pictures, bad ones included."""
        return len(self._where)

    def __getitem__(self, index: int) -> Tensor:
        """Pixels uint8 [3, H, W], a view that must not be written to."""
        chunk, offset, height, width = self._where[index]
        return self._chunks[chunk][offset : offset + 3 * height * width].view(3, height, width)

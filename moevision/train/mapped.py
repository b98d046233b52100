"""Copies of tensors whose memory is a file: the system writes them out and takes their memory when others need it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from moevision.train.parallel import mesh_of, own_part, with_part

_SMALL = 1 << 16  # bytes; a tensor of fewer stays in memory, as none saves much


def mapped_copy(tensor: Tensor, folder: Path) -> Tensor:
    """A copy in main memory, backed by a file of `folder` that has no name any more: with the copy it is gone.

    Args:
        tensor: of any device, whole or this process's part of a divided one; detached.
        folder: on a local disk.

    Raises:
        OSError: if the file can't be written.
    """
    part = own_part(tensor).cpu().contiguous()
    if part.nbytes < _SMALL or os.name == "nt":  # where a mapped file can't be deleted
        part = part.clone()
    else:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".snapshot-") as file:
            # Written, not mapped and filled: a full disk is an error then, and no crash.
            file.write(part.flatten().view(torch.uint8).numpy().data)
            file.flush()
            part = torch.from_file(file.name, size=part.numel(), dtype=part.dtype).view(part.shape)
    return part if mesh_of(tensor) is None else with_part(part, tensor)

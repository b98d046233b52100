"""Checkpoints that a crash or a flipped bit can't turn into a wrong training.

Contents: plain data only (`plain`), since a checkpoint is read with `weights_only=True`, which refuses NumPy's
numbers, paths and the like. Divided tensors are whole in it (`parallel.parts.gathered`).

Writing: Lightning's own goes through a temporary file in $TMPDIR, without fsync; on another file system a kill leaves
half a file. Here the temporary file lies in the target's own folder, is flushed, and renamed.

Reading: nothing in a file is run, and nothing unfolds to more than the file. A flipped bit inside a tensor loads
without an error, so the CRC-32 that the zip archive keeps of each part is compared first.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path, PurePath
from typing import Any, cast

import numpy as np
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch.utils._pytree import tree_map

from moevision.errors import UserError
from moevision.files import write_bytes_atomic
from moevision.train.processes import broadcast_from_rank0, is_rank0

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
PRETRAINED_CONFIG = (
    "start"  # a folder beside them, with the config.json of the model that training started from
)
_PREFERRED = {LAST: 2, PREVIOUS: 1}


def plain(value: Any) -> Any:
    """`value` with NumPy numbers and arrays, paths and enumerations as plain data, at any depth; the rest as it is."""

    def each(leaf: Any) -> Any:
        if isinstance(leaf, np.generic | np.ndarray):
            return leaf.tolist()
        if isinstance(leaf, Enum):
            return each(leaf.value)
        return str(leaf) if isinstance(leaf, PurePath) else leaf

    return tree_map(each, value)


@contextmanager
def explain_damaged_files(path: Path | str) -> Iterator[None]:
    """Say in one sentence that a checkpoint can't be read: damaged or foreign files fail in every type of error."""
    try:
        yield
    except UserError:
        raise
    except (
        Exception
    ) as error:  # zip, pickle, key and OS errors alike; torch's own words advise to trust the file
        reason = (
            str(error)
            if type(error) is ValueError
            else getattr(error, "strerror", None) or type(error).__name__
        )
        raise UserError(
            f"The checkpoint {path} can't be read ({reason}): it is damaged, or no checkpoint of moevision. Use "
            "another one of the run, such as last.ckpt or best.ckpt."
        ) from error


def load_archive(path: Path, map_location: Any = "cpu", *, mmap: bool = False) -> Any:
    """What torch.save wrote, as data; with `mmap` tensors stay on the disk until they are used."""
    if not path.is_file():  # a pipe would be waited for
        raise ValueError("it is no regular file")
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(
        each.compress_type != zipfile.ZIP_STORED or each.file_size != each.compress_size
        for each in entries
    ):
        raise ValueError("its parts are compressed")
    if sum(each.file_size for each in entries) > path.stat().st_size:
        raise ValueError("its parts overlap")
    return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)


@dataclass(frozen=True)
class Verified:
    """A checkpoint that was looked at: its optimizer steps (-1: unknown), and why it can't be used (None: it can)."""

    path: Path
    step: int
    fault: str | None


def verify(path: Path) -> Verified:
    """Compare a checkpoint with its own checksums."""
    try:
        step = int(load_archive(path, mmap=True)["global_step"])
        with zipfile.ZipFile(path) as parts:
            broken = parts.testzip()
        return Verified(path, step, None if broken is None else f"is damaged in {broken}")
    except (
        Exception
    ) as error:  # zip, pickle, key and OS errors alike: whatever it is, nothing can go on from it
        return Verified(path, -1, f"is no whole checkpoint ({type(error).__name__})")


def newest_valid(folder: Path) -> tuple[Verified | None, list[Verified]]:
    """The valid checkpoint of the latest step in `folder`, and those that can't be used.

    Between files of the same step `last.ckpt` wins, and then `previous.ckpt`.
    """
    seen = [verify(path) for path in sorted(folder.glob("*.ckpt"))]
    sound = [each for each in seen if each.fault is None]
    newest = max(
        sound, key=lambda each: (each.step, _PREFERRED.get(each.path.name, 0)), default=None
    )
    return newest, [each for each in seen if each.fault is not None]


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints whole or not at all, and reads only those that are as they were written.

    A new `last.ckpt` turns the one before into `previous.ckpt`, so that there are two to go on from.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint; an OSError if the disk refuses it, and what was there before is then still there."""
        path, memory = Path(path), io.BytesIO()
        torch.save(checkpoint, memory)
        write_bytes_atomic(
            path, memory.getvalue(), before=path.with_name(PREVIOUS) if path.name == LAST else None
        )

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any | None = None,
        weights_only: bool | None = None,
        *,
        mmap: bool = False,
    ) -> dict[str, Any]:
        """Read a checkpoint, never by unpickling; `weights_only` is there for Lightning's sake, `mmap` as above.

        Every process of a training must call it; the first one compares the checksums.
        """
        path = Path(path)
        fault = "is missing" if not path.exists() else verify(path).fault if is_rank0() else None
        fault = broadcast_from_rank0(lambda: fault)
        if fault is not None:
            raise UserError(f"The checkpoint {path} {fault}: use another one of the run.")
        with explain_damaged_files(path):
            return cast(dict[str, Any], load_archive(path, map_location or "cpu", mmap=mmap))


def check_checkpoint(name: str) -> dict[str, Any]:
    """The content of a checkpoint, on the disk until it is used; a UserError if it is missing, damaged or foreign."""
    if not Path(name).exists():
        raise UserError(f"There is no checkpoint {name}: look in runs/NAME/checkpoints/.")
    with explain_damaged_files(name):
        checkpoint = load_archive(Path(name), mmap=True)
    options = checkpoint.get("hyper_parameters") if isinstance(checkpoint, dict) else None
    if not isinstance(options, dict) or "arch" not in options:
        raise UserError(
            f"The checkpoint {name} was not written by moevision: use one from runs/NAME/checkpoints/."
        )
    return cast(dict[str, Any], checkpoint)

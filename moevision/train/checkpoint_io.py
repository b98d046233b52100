"""Checkpoints that a crash, a full disk or a flipped bit can't turn into a wrong training.

Lightning 2.6.6 writes through a temporary file in $TMPDIR, without fsync; on another file system that is a plain copy
onto the final name, so a kill leaves half a file there. Here: a temporary file in the target's own folder, fsync, its
SHA-256 into the manifest, rename, fsync of the folder. What a disk refuses is kept in memory and tried again, while
training goes on.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO

from moevision.errors import UserError
from moevision.files import make_folder, rename, sync_folder, written_beside
from moevision.train.manifest import Entry, read_manifest, sha256_of, verify, write_manifest
from moevision.train.processes import from_first, tell

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
RETRY_S = 30.0
_MARGIN_BYTES = 1 << 20  # left free for the manifest, the metrics and the file system's own tables


@dataclass(frozen=True)
class _Unwritten:
    data: bytes
    entry: Entry


class SafeCheckpointIO(CheckpointIO):
    """Writes checkpoints whole or not at all, and reads only those that are as they were written.

    A new `last.ckpt` turns the one before into `previous.ckpt`, so that there are two to go on from.
    """

    def __init__(self) -> None:
        self._unwritten: dict[Path, _Unwritten] = {}
        self._tried_s = 0.0

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint; if the disk refuses, warn, keep it in memory and let `retry` write it later."""
        path = Path(path).resolve()
        memory = io.BytesIO()  # Lightning does so too; the exact size has to be known before the disk is touched
        torch.save(checkpoint, memory)
        data = memory.getvalue()
        again = path in self._unwritten
        self._unwritten[path] = _Unwritten(data, Entry.of(path.name, checkpoint, data))
        self._write(path, again=again)

    @property
    def waiting(self) -> list[Path]:
        """Checkpoints that the disk has refused so far."""
        return list(self._unwritten)

    def retry(self, *, now: bool = False) -> bool:
        """Try again what the disk has refused, at most every RETRY_S seconds.

        Args:
            now: try even if the last attempt was a moment ago.

        Returns:
            Whether everything is written.
        """
        if self._unwritten and (now or time.monotonic() - self._tried_s >= RETRY_S):
            for path in self.waiting:
                if self._write(path, again=True):
                    tell(f"note: {path} could be written now.")
        return not self._unwritten

    def _write(self, path: Path, *, again: bool = False) -> bool:
        waiting = self._unwritten[path]
        self._tried_s = time.monotonic()
        try:
            _write_safely(path, waiting)
        except OSError as error:
            if not again:
                tell(
                    f"warning: {path} ({waiting.entry.size / 1e6:.1f} MB) can't be written ({error.strerror}): "
                    f"training goes on, and it is tried again every {RETRY_S:.0f} s; make room, or give write access."
                )
            return False
        del self._unwritten[path]
        return True

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, never by unpickling; `weights_only` is there for Lightning's sake.

        Every process of a training must call it: one that the disk has refused is in the first one's memory only.

        Raises:
            UserError: if the file is missing, damaged or no checkpoint.
        """
        path = Path(path).resolve()
        held = from_first(self._unwritten[path].data if path in self._unwritten else None)
        if held is not None:  # the disk is full, and the best weights are only here
            source: Any = io.BytesIO(held)
        else:
            fault = verify(path).fault if path.is_file() else "is missing"
            if fault is not None:
                raise UserError(f"The checkpoint {path} {fault}: use another one of the run.")
            source = path
        location = map_location if map_location is not None else "cpu"
        loaded: dict[str, Any] = torch.load(source, map_location=location, weights_only=True)
        return loaded

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint and its entry."""
        path = Path(path).resolve()
        self._unwritten.pop(path, None)
        path.unlink(missing_ok=True)
        write_manifest(path.parent, [entry for entry in read_manifest(path.parent) if entry.name != path.name])


def _write_safely(path: Path, unwritten: _Unwritten) -> None:
    folder = path.parent
    known = read_manifest(folder)
    if unwritten.entry in known and path.is_file() and sha256_of(path) == unwritten.entry.sha256:
        sync_folder(folder)  # an earlier attempt failed behind the renames: done again they would lose previous.ckpt
        return
    make_folder(folder)
    if shutil.disk_usage(folder).free < len(unwritten.data) + _MARGIN_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # before the last free bytes are used up
    with written_beside(path, unwritten.data) as temporary:
        write_manifest(folder, [*known, unwritten.entry])
        # Weights that are not finite don't push out finite ones.
        before = [entry for entry in known if entry.name == path.name]
        moves = path.name == LAST and all(entry.finite for entry in before)
        rotates = moves and path.is_file()  # else a process died right here, or somebody deleted it
        if rotates:
            rename(path, folder / PREVIOUS)
        rename(temporary, path)
        sync_folder(folder)
    replaced = {path.name, PREVIOUS} if rotates else {path.name}
    moved = [replace(entry, name=PREVIOUS) for entry in before] if moves else []
    write_manifest(folder, [*(entry for entry in known if entry.name not in replaced), *moved, unwritten.entry])


def final_checkpoint(folder: Path, files: SafeCheckpointIO) -> tuple[Path, str]:
    """The checkpoint that a finished training is tested with, and which weights these are.

    Those of the best validation epoch; those of the last step if there is none, or `best.ckpt` got damaged.
    """
    best = folder / BEST
    if best.resolve() not in files.waiting and not best.is_file():  # a training that ends within its first epoch
        return folder / LAST, "the weights of the last step, because there is no best.ckpt"
    if best.resolve() in files.waiting or verify(best).fault is None:
        return best, "the weights of the best validation epoch"
    tell(f"warning: {best} {verify(best).fault}: {LAST} is tested instead.")
    return folder / LAST, "the weights of the last epoch, because best.ckpt was damaged"

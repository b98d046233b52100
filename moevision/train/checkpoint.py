"""Checkpoints that a crash, a full disk or a flipped bit can't turn into a wrong training.

Contents: plain data only (`make_plain`), since a checkpoint is read with `weights_only=True`, which refuses NumPy's
numbers, paths and the like; and the state of every global random generator (`processes.random_state`), which Lightning
(2.6.6) leaves out.

Writing: Lightning writes through a temporary file in $TMPDIR, without fsync; on another file system that is a plain
copy onto the final name, so a kill leaves half a file there. Here: a temporary file in the target's own folder, fsync,
its SHA-256 into manifest.json, rename, fsync of the folder. What a disk refuses is said, and training goes on to the
next point. Weights that are divided over processes make the checkpoint a folder (`parallel/folder.py`), renamed as a
whole.

Reading: a flipped bit inside a tensor loads without an error, so a file is compared with its hash in the manifest. The
manifest is written before a new file is renamed over an old one and names both until then: at no moment is a whole file
taken for a damaged one. Files without an entry (made by hand, or by an earlier version) are checked by the CRC-32 that
their zip archive keeps of each part.
"""

from __future__ import annotations

import hashlib
import io
import math
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path, PurePath
from typing import Any, cast, get_type_hints

import numpy as np
import torch
from lightning.fabric.plugins import CheckpointIO

from moevision.errors import UserError
from moevision.files import (
    check_room,
    file_sha256,
    make_folder,
    rename_over,
    sync_folder,
    temporary_for,
    write_json_atomic,
    written_beside,
)
from moevision.models.safe_files import read_json
from moevision.train import archive
from moevision.train.processes import from_first, is_first, tell

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
START = "start"  # a folder beside them, with the config.json of the model that training started from
MANIFEST = "manifest.json"
_PREFERRED = {LAST: 2, PREVIOUS: 1}


def plain(value: Any) -> Any:
    """`value` with NumPy numbers and arrays, paths and enumerations as plain data, at any depth; the rest as it is."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, PurePath):
        return str(value)
    if type(value) is dict:
        return {plain(key): plain(each) for key, each in value.items()}
    if isinstance(value, OrderedDict):  # a module's state, with metadata as an attribute
        for key, each in value.items():
            value[key] = plain(each)
        return value
    if isinstance(value, Mapping):
        return {plain(key): plain(each) for key, each in value.items()}
    if type(value) in (list, tuple, set):
        return type(value)(plain(each) for each in value)
    return value


def make_plain(checkpoint: dict[str, Any]) -> None:
    """Make a checkpoint plain, in place."""
    for key in list(checkpoint):
        checkpoint[key] = plain(checkpoint[key])


@dataclass(frozen=True)
class Entry:
    """What is known about one checkpoint file.

    Attributes:
        name: the name of the file or folder.
        sha256: hash of its bytes, in hexadecimal; for a folder over its files (`archive.digest`).
        step: optimizer steps done.
        epoch: the epoch that it lies in.
        size: bytes.
        finite: whether all weights and buffers are finite.
        written_utc: when.
    """

    name: str
    sha256: str
    step: int
    epoch: int
    size: int
    finite: bool
    written_utc: str

    @classmethod
    def of(cls, name: str, checkpoint: dict[str, Any], sha256: str, size: int, finite: bool) -> Entry:
        """Describe a checkpoint that was written."""
        step, epoch = int(checkpoint.get("global_step", 0)), int(checkpoint.get("epoch", 0))
        return cls(name, sha256, step, epoch, size, finite, datetime.now(UTC).isoformat(timespec="seconds"))


def read_manifest(folder: Path) -> list[Entry]:
    """The entries; none if there is no manifest, or it can't be read (the archives' own checksums remain then)."""
    types = get_type_hints(Entry)
    try:
        entries = [Entry(**entry) for entry in read_json(folder / MANIFEST)["files"]]
    except (OSError, ValueError, TypeError, KeyError):
        return []
    sound = all(type(getattr(entry, name)) is kind for entry in entries for name, kind in types.items())
    return entries if sound else []


def write_manifest(folder: Path, entries: Sequence[Entry]) -> None:
    """Replace the manifest."""
    write_json_atomic(folder / MANIFEST, {"files": [asdict(entry) for entry in entries]})


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hexadecimal; of a folder `archive.digest`.

    Raises:
        OSError: if it can't be read, or is a pipe or device.
    """
    if path.is_dir():
        return archive.digest(path)
    if path.exists() and not path.is_file():
        raise OSError(0, "it is no regular file")
    return file_sha256(path)


@dataclass(frozen=True)
class Verified:
    """A checkpoint that was looked at.

    Attributes:
        path: the file or folder.
        step: optimizer steps done; -1 if that is unknown.
        fault: why it can't be used; None if it can.
        sha256: hash of the file; "" if it could not be read.
    """

    path: Path
    step: int
    fault: str | None
    sha256: str = ""


def verify(path: Path) -> Verified:
    """Compare a checkpoint with the manifest beside it, or else with its own checksums."""
    known = read_manifest(path.parent)
    named = [entry for entry in known if entry.name == path.name]
    expected = named[-1].step if named else -1
    try:
        digest = sha256_of(path)
    except OSError as error:
        return Verified(path, expected, f"can't be read ({error.strerror})")
    same = [entry for entry in known if entry.sha256 == digest]
    if same:
        fault = None if same[0].finite else "holds weights that are not finite"
        return Verified(path, same[0].step, fault, digest)
    if named:
        return Verified(path, expected, "differs from its SHA-256 in manifest.json: it is damaged or cut off", digest)
    return _verify_archive(path, digest)


def _verify_archive(path: Path, digest: str) -> Verified:
    if path.is_dir():
        return Verified(path, -1, "has no entry in manifest.json", digest)
    try:
        with zipfile.ZipFile(path) as parts:
            broken = parts.testzip()
        if broken is not None:
            return Verified(path, -1, f"is damaged in {broken}", digest)
        return Verified(path, int(archive.load_rest(path)["global_step"]), None, digest)
    except Exception as error:  # zip, pickle, key and OS errors alike: whatever it is, nothing can go on from it
        return Verified(path, -1, f"is no whole checkpoint ({type(error).__name__})", digest)


def newest_valid(folder: Path) -> tuple[Verified | None, list[Verified]]:
    """The valid checkpoint of the latest step in `folder`, and those that were read and can't be used.

    Between files of the same step `last.ckpt` wins, and then `previous.ckpt`. Those that are older by the manifest are
    not read.
    """
    known = read_manifest(folder)
    steps = {entry.name: entry.step for entry in known}
    if len(steps) < len(known):  # a process died within `_put`: names and steps may not match, and all are read
        steps = {}
    paths = [path for path in sorted(folder.glob("*.ckpt")) if not path.name.startswith(".")]
    paths.sort(key=lambda path: (steps.get(path.name, math.inf), _PREFERRED.get(path.name, 0)), reverse=True)
    newest, refused = None, list[Verified]()
    for path in paths:
        if newest is not None and newest.step >= steps.get(path.name, math.inf):
            break
        seen = verify(path)
        if seen.fault is not None:
            refused.append(seen)
        elif newest is None or seen.step > newest.step:
            newest = seen
    return newest, refused


class SafeCheckpointIO(CheckpointIO):
    """Writes checkpoints whole or not at all, and reads only those that are as they were written.

    A new `last.ckpt` turns the one before into `previous.ckpt`, so that there are two to go on from.

    Attributes:
        refused: checkpoints that could not be written when they were last to be, and why; of sharded ones on every
            process, of others on the first.
    """

    def __init__(self) -> None:
        self.refused: dict[Path, str] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint; every process calls it for a sharded one, else the first. Warns if the disk refuses."""
        path = Path(path).resolve()
        divided, fault = archive.is_divided(checkpoint), None
        try:
            _write_folder(checkpoint, path) if divided else _write_file(checkpoint, path)
        except OSError as error:
            fault = error.strerror
        if divided:
            fault = from_first(fault)
        known = self.refused.pop(path, None)
        if fault is None:
            if known is not None:
                tell(f"note: {path} could be written now.")
            return
        self.refused[path] = fault
        if known is None:
            tell(
                f"warning: {path} can't be written ({fault}): training goes on, and the next one is tried; make room, "
                "or give write access."
            )

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any | None = None,
        weights_only: bool | None = None,
        like: Any = None,
    ) -> dict[str, Any]:
        """Read a checkpoint, never by unpickling; `weights_only` is there for Lightning's sake.

        Every process of a training must call it. `like` says how the tensors of a folder shall be divided; by default
        they are whole.

        Raises:
            UserError: if the file is missing, damaged or no checkpoint.
        """
        path = Path(path).resolve()
        location = map_location if map_location is not None else "cpu"
        fault = None
        if is_first():  # reading it whole once is enough
            fault = verify(path).fault if path.exists() else "is missing"
        fault = from_first(fault)
        if fault is not None:
            raise UserError(f"The checkpoint {path} {fault}: use another one of the run.")
        if path.is_dir():
            from moevision.train.parallel.folder import read_folder

            return read_folder(path, like, location)
        with archive.saying_what_is_damaged(path):
            return cast(dict[str, Any], archive.load_archive(path, location))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint and its entry."""
        path = Path(path).resolve()
        archive.remove(path)
        write_manifest(path.parent, [entry for entry in read_manifest(path.parent) if entry.name != path.name])


def _write_file(checkpoint: dict[str, Any], path: Path) -> None:
    memory = io.BytesIO()  # Lightning does so too; the exact size has to be known before the disk is touched
    torch.save(checkpoint, memory)
    data = memory.getvalue()
    states = [checkpoint.get(key, {}) for key in ("state_dict", "current_model_state")]  # the second: beside an EMA
    finite = all(
        bool(torch.isfinite(value).all())
        for state in states
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    )
    make_folder(path.parent)
    check_room(path.parent, len(data))
    with written_beside(path, data) as temporary:
        _put(temporary, path, Entry.of(path.name, checkpoint, hashlib.sha256(data).hexdigest(), len(data), finite))


def _write_folder(checkpoint: dict[str, Any], path: Path) -> None:
    """Write sharded tensors, each process its own."""
    from moevision.train.parallel.folder import write_folder

    temporary = Path(from_first(str(temporary_for(path))))
    try:
        written = write_folder(checkpoint, temporary)
        if is_first():
            _put(temporary, path, Entry.of(path.name, checkpoint, *written))
    finally:
        if is_first():
            shutil.rmtree(temporary, ignore_errors=True)


def _put(temporary: Path, path: Path, entry: Entry) -> None:
    """Give a written checkpoint its name; a `last.ckpt` before it becomes `previous.ckpt`."""
    folder, known = path.parent, read_manifest(path.parent)
    write_manifest(folder, [*known, entry])
    # Weights that are not finite don't push out finite ones.
    before = [other for other in known if other.name == path.name]
    moves = path.name == LAST and all(other.finite for other in before)
    rotates = moves and path.exists()  # else a process died right here, or somebody deleted it
    if rotates:
        rename_over(path, folder / PREVIOUS)
    rename_over(temporary, path)
    sync_folder(folder)
    replaced = {path.name, PREVIOUS} if rotates else {path.name}
    moved = [replace(other, name=PREVIOUS) for other in before] if moves else []
    write_manifest(folder, [*(other for other in known if other.name not in replaced), *moved, entry])


def final_checkpoint(folder: Path, files: SafeCheckpointIO) -> tuple[Path, str]:
    """The checkpoint that a finished training is tested with, and which weights these are.

    Those of the best validation epoch; those of the last step if there is none, or `best.ckpt` got damaged.
    """
    best = folder / BEST
    if not best.exists():  # a training that ends within its first epoch, or whose disk refused it
        return folder / LAST, "the weights of the last step, because there is no best.ckpt"
    fault = verify(best).fault
    if fault is None:
        saved = " that could be saved" if best.resolve() in files.refused else ""
        return best, f"the weights of the best validation epoch{saved}"
    tell(f"warning: {best} {fault}: {LAST} is tested instead.")
    return folder / LAST, "the weights of the last epoch, because best.ckpt was damaged"


def check_checkpoint(name: str) -> None:
    """Raise a UserError if this is a file that is missing, damaged, or of another program."""
    if not Path(name).exists():
        raise UserError(f"There is no checkpoint {name}: look in runs/NAME/checkpoints/.")
    with archive.saying_what_is_damaged(name):
        checkpoint = archive.load_rest(Path(name))
    options = checkpoint.get("hyper_parameters") if isinstance(checkpoint, dict) else None
    if not isinstance(options, dict) or "arch" not in options:
        raise UserError(f"The checkpoint {name} was not written by moevision: use one from runs/NAME/checkpoints/.")

"""Which checkpoints of a folder are whole: their SHA-256 in `manifest.json`, and the search for the newest valid one.

A flipped bit inside a tensor loads without an error in torch.load, so a checkpoint is compared with the hash that was
written down when it was made. The manifest is written before a new file is renamed over an old one and names both
until then, so no moment exists in which a whole file is taken for a damaged one. Checkpoints without an entry (made by
hand, or by an earlier version) are checked by the CRC-32 that their zip archive keeps of each of its parts.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from moevision.files import write_json_atomic

MANIFEST = "manifest.json"
_BLOCK = 1 << 20
_PREFERRED = {"last.ckpt": 2, "previous.ckpt": 1}


@dataclass(frozen=True)
class Entry:
    """What is known about one checkpoint file.

    Attributes:
        name: the file's name.
        sha256: hash of its bytes, in hexadecimal.
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
    def of(cls, name: str, checkpoint: dict[str, Any], data: bytes) -> Entry:
        """Describe a checkpoint that is about to be written as `data`."""
        states = [checkpoint.get(key, {}) for key in ("state_dict", "current_model_state")]  # the second: beside an EMA
        finite = all(
            bool(torch.isfinite(value).all())
            for state in states
            for value in state.values()
            if isinstance(value, torch.Tensor) and value.is_floating_point()
        )
        step, epoch = int(checkpoint.get("global_step", 0)), int(checkpoint.get("epoch", 0))
        digest = hashlib.sha256(data).hexdigest()
        return cls(name, digest, step, epoch, len(data), finite, datetime.now(UTC).isoformat(timespec="seconds"))


def read_manifest(folder: Path) -> list[Entry]:
    """The entries; none if there is no manifest, or it can't be read (the archives' own checksums remain then)."""
    try:
        return [Entry(**entry) for entry in json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def write_manifest(folder: Path, entries: Sequence[Entry]) -> None:
    """Replace the manifest."""
    write_json_atomic(folder / MANIFEST, {"files": [asdict(entry) for entry in entries]})


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class Verified:
    """A checkpoint that was looked at.

    Attributes:
        path: the file.
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
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            return Verified(path, -1, f"is damaged in {broken}", digest)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return Verified(path, int(content["global_step"]), None, digest)
    except Exception as error:  # zip, pickle, key and OS errors alike: whatever it is, nothing can go on from it
        return Verified(path, -1, f"is no whole checkpoint ({type(error).__name__})", digest)


def newest_valid(folder: Path) -> tuple[Verified | None, list[Verified]]:
    """The valid checkpoint of the latest step in `folder`, and all those that can't be used.

    Between files of the same step `last.ckpt` wins, and then `previous.ckpt`.
    """
    seen = [verify(path) for path in sorted(folder.glob("*.ckpt")) if not path.name.startswith(".")]
    valid = [each for each in seen if each.fault is None]
    newest = max(valid, key=lambda each: (each.step, _PREFERRED.get(each.path.name, 0)), default=None)
    return newest, [each for each in seen if each.fault is not None]

"""Files and folders of checkpoints as data: nothing in them is run, and nothing unfolds to more than the file."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from moevision.errors import UserError
from moevision.files import file_sha256

REST = "rest.pt"  # of a folder: all but its divided tensors


@contextmanager
def saying_what_is_damaged(path: Path | str) -> Iterator[None]:
    """Say in one sentence that a checkpoint can't be read: damaged or foreign files fail in every type of error."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # zip, pickle, key and OS errors alike; the cause stays attached
        reason = type(error).__name__  # torch's own words advise to trust the file
        if type(error) is ValueError or isinstance(error, OSError):
            reason = str(getattr(error, "strerror", None) or error)
        raise UserError(
            f"The checkpoint {path} can't be read ({reason}): it is damaged, or no checkpoint of moevision. Use "
            "another one of the run, such as last.ckpt or best.ckpt."
        ) from error


def load_archive(source: Path | io.BytesIO, map_location: Any = "cpu", *, mmap: bool = False) -> Any:
    """What torch.save wrote, as data: nothing is run, and nothing unfolds to more than the file.

    Raises:
        ValueError: if it is no such file. Other errors if it is damaged.
    """
    if isinstance(source, Path) and not source.is_file():  # a pipe would be waited for
        raise ValueError(f"{source.name} is no regular file")
    with zipfile.ZipFile(source) as archive:
        entries = archive.infolist()
    if any(each.compress_type != zipfile.ZIP_STORED or each.file_size != each.compress_size for each in entries):
        raise ValueError("its parts are compressed")
    size = source.stat().st_size if isinstance(source, Path) else source.getbuffer().nbytes
    if sum(each.file_size for each in entries) > size:
        raise ValueError("its parts overlap")
    if isinstance(source, io.BytesIO):
        source.seek(0)
    return torch.load(source, map_location=map_location, weights_only=True, mmap=mmap)


def load_rest(path: Path) -> Any:
    """A checkpoint, file or folder, without its sharded tensors; others stay on the disk until they are used."""
    return load_archive(path / REST if path.is_dir() else path, mmap=True)


def sizes_of(folder: Path) -> dict[str, int]:
    """The files of a checkpoint's folder, and their bytes.

    Raises:
        OSError: if something else than regular files is there, a link or a pipe, say.
    """
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    if odd := next((entry for entry in found if not entry.is_file(follow_symlinks=False)), None):
        raise OSError(0, f"{odd.name} in it is no regular file")
    return {entry.name: entry.stat().st_size for entry in found}


def digest(folder: Path) -> str:
    """SHA-256 over the names and SHA-256 of a folder's files, in hexadecimal.

    Raises:
        OSError: if it can't be read, or holds something else than regular files.
    """
    files = [folder / name for name in sizes_of(folder)]
    with ThreadPoolExecutor() as threads:  # hashing holds no lock of Python's
        return digest_of(dict(zip([path.name for path in files], threads.map(file_sha256, files), strict=True)))


def remove(path: Path) -> None:
    """Delete a checkpoint, file or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def digest_of(files: Mapping[str, str]) -> str:
    """The same from the SHA-256 of each file."""
    return hashlib.sha256("".join(f"{name} {files[name]}\n" for name in sorted(files)).encode()).hexdigest()


def is_divided(checkpoint: Mapping[str, Any]) -> bool:
    """Whether some of its weights are divided over processes (DTensors), so that it becomes a folder."""
    return any(hasattr(value, "device_mesh") for value in checkpoint.get("state_dict", {}).values())

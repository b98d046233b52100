"""Images in tar shards (the WebDataset format), read at random through an index.

A shard is an uncompressed tar that holds each image as ``KEY.jpg`` (or another ending) and its class beside it, as
``KEY.cls`` or ``KEY.json``. Other programs read shards from front to back and shuffle in a buffer; here an index of
(shard, offset, size) per image lets `os.pread` fetch any of them, so that the order, the augmentation and an exact
resume are those of a folder. What `moevision data shard` writes (``shard_writer.py``) keeps the sample ids, the classes
and the order of its source in the index. Shards that others made are indexed once by their headers
(``shard_scan.py``). Local and mounted storage only.

Source of the format: webdataset (github.com/webdataset/webdataset), ``tariterators.py``.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from moevision.data.images import MAX_BYTES, BadImageError, safe_open
from moevision.data.sources import SPLIT_NAMES, Collection, Sample, access_advice, subfolders
from moevision.errors import UserError
from moevision.files import file_sha256, write_text_atomic
from moevision.names import json_text, name_bytes

INDEX: Final = "moevision-index.json"
JOURNAL: Final = "moevision-unfinished.json"
"""What `moevision data shard` has written so far; the index takes its place at the end."""
_FORMAT: Final = 1
_OPEN_FILES: Final = 128  # ImageNet has 1,088 shards, and a process may often open no more than 1,024 files


@dataclass
class Shard:
    """One tar.

    Attributes:
        file: path relative to the folder of the shards, with forward slashes.
        bytes: its size.
        sha256: of the whole tar, in hexadecimal; empty for tars that were only scanned.
        plan: what it was made from, see `shard_writer`; empty for scanned ones.
        modified_ns: time of change when it was scanned; 0 for those that we wrote.
    """

    file: str
    bytes: int
    sha256: str = ""
    plan: str = ""
    modified_ns: int = 0


@dataclass
class Rows:
    """The images of one split, a row each, in the order in which a run counts them.

    Attributes:
        ids: sample ids.
        labels: classes.
        shards: which shard, an index into the list of them.
        offsets: where the image's bytes begin in it.
        sizes: how many bytes they are.
        columns: other columns of the table that the images came from, such as patients.
    """

    ids: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    shards: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    columns: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class Index:
    """What is in a folder of shards.

    Attributes:
        class_names: class names in words; labels are indices into them.
        shards: the tars.
        splits: rows by "train", "val" and "test", or all under "all".
        group_column: the column whose equal values are kept in one split, if the source had one.
        notes: sentences about what was left out while scanning.
    """

    class_names: list[str]
    shards: list[Shard]
    splits: dict[str, Rows]
    group_column: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def scanned(self) -> bool:
        """Whether it was made from tars that others wrote."""
        return any(not shard.sha256 for shard in self.shards)

    def write(self, path: Path) -> None:
        """Write it whole or not at all."""
        held = vars(self) | {
            "shards": list(map(vars, self.shards)),
            "splits": {split: vars(rows) for split, rows in self.splits.items()},
        }
        write_text_atomic(path, json_text({"moevision_shards": _FORMAT, **held}) + "\n")


def read_index(path: Path) -> Index:
    """Read an index.

    Raises:
        UserError: if it is damaged, or made by a later version.
    """
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        if held.pop("moevision_shards") != _FORMAT:
            raise UserError(f"{path} was written by another version of moevision: update moevision.")
        held["shards"] = [Shard(**shard) for shard in held["shards"]]
        held["splits"] = {split: Rows(**rows) for split, rows in held["splits"].items()}
        index = Index(**held)
        _check_index(index)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{path} can't be read as an index of shards ({type(error).__name__}): delete it, and run `moevision data "
            "shard` again for shards that it wrote."
        ) from error
    return index


def _check_index(index: Index) -> None:
    """Every row lies in a shard of the folder, and has a class; raises ValueError."""
    for shard in index.shards:
        path = Path(shard.file)
        if path.is_absolute() or ".." in path.parts or "\\" in shard.file:
            raise ValueError(f"{shard.file} leads out of the folder")
    ends = np.array([shard.bytes for shard in index.shards], np.int64)
    for rows in index.splits.values():
        where, start, size, label = (
            np.array(each, np.int64) for each in (rows.shards, rows.offsets, rows.sizes, rows.labels)
        )
        if len({len(rows.ids), *map(len, (where, start, size, label)), *map(len, rows.columns.values())}) > 1:
            raise ValueError("columns of different length")
        if len(where) and (
            min(where.min(), start.min(), size.min(), label.min()) < 0
            or label.max() >= len(index.class_names)
            or (start + size > ends[where]).any()
        ):
            raise ValueError("a row outside of its shard")
    ids = [name for rows in index.splits.values() for name in rows.ids]
    if len(set(ids)) < len(ids):
        raise ValueError("an id that stands twice")


# ---- finding and opening


def tars_in(folder: Path) -> list[Path]:
    """The tars of a folder and of its train, val and test folders, in order."""
    places = [folder, *(below for below in subfolders(folder) if below.name.lower() in SPLIT_NAMES)]
    return sorted(
        entry for place in places for entry in place.iterdir() if entry.suffix == ".tar" and entry.name[0] not in "._"
    )


def is_shards(folder: Path) -> bool:
    """Whether a folder holds shards: an index, or tars and no folders of classes (an archive may lie beside those)."""
    with access_advice(folder):
        return _is_shards(folder)


def _is_shards(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    if (folder / INDEX).is_file() or (folder / JOURNAL).is_file():
        return True
    split_folders = [below for below in subfolders(folder) if below.name.lower() in SPLIT_NAMES]
    if len(split_folders) < len(subfolders(folder)) or any(map(subfolders, split_folders)):
        return False
    return bool(tars_in(folder))


def open_shards(folder: Path) -> ShardCollection:
    """Open a folder of shards, ours or others'.

    Args:
        folder: the tars, and the index if there is one.

    Raises:
        UserError: if shards are missing, damaged, changed or without labels; the sentence says what to do.
    """
    index = find_index(folder)
    samples = {
        split: [Sample(*row) for row in zip(rows.ids, rows.labels, strict=True)] for split, rows in index.splits.items()
    }
    return ShardCollection(
        index.class_names, samples, index.notes, index.group_column, ShardFiles(folder, index.shards), _places(index),
        {name: _column(index, name) for rows in index.splits.values() for name in rows.columns},
    )  # fmt: skip


def find_index(folder: Path) -> Index:
    """The index of a folder, made now if others' tars have none or have changed since; see `open_shards`."""
    from moevision.data import shard_scan  # which imports this module

    if (folder / JOURNAL).is_file():
        raise UserError(f"{folder} isn't finished: run `moevision data shard` again as before, and it goes on.")
    cached = shard_scan.cache_file(folder)
    path = folder / INDEX if (folder / INDEX).is_file() else cached
    if not path.is_file():
        return shard_scan.index_others(folder)
    index = read_index(path)
    if index.scanned and shard_scan.has_changed(folder, index, path):
        return shard_scan.index_others(folder)
    _check_sizes(folder, index, path)
    return index


def _check_sizes(folder: Path, index: Index, path: Path) -> None:
    """Every shard is there, as large as it was."""
    for shard in index.shards:
        file = folder / shard.file
        try:
            size = os.stat(file).st_size
        except OSError as error:
            hint = f", or delete {path} to go without it" if index.scanned else ""
            raise UserError(
                f"The shard {file} is missing ({error.strerror}), and {path} names it: bring it back{hint}."
            ) from error
        if size < shard.bytes:
            raise UserError(f"The shard {file} is cut short: it has {size:,} of {shard.bytes:,} bytes; copy it again.")
        if size > shard.bytes:
            raise UserError(
                f"The shard {file} was changed: it has {size:,} bytes, and {shard.bytes:,} when {path} was written; "
                "copy it again, or write it anew with `moevision data shard`."
            )


def verify(folder: Path, on_progress: Callable[[int], None] = lambda done: None) -> Index:
    """Compare every shard with the SHA-256 in its index.

    Args:
        folder: shards that `moevision data shard` wrote.
        on_progress: called with the number of bytes read since the last call.

    Raises:
        UserError: if one differs, is missing, or the index has no hashes.
    """
    index = find_index(folder)
    if index.scanned:
        raise UserError(f"{folder} has no hashes to check: its tars weren't written by `moevision data shard`.")
    for shard in index.shards:
        if file_sha256(folder / shard.file, on_progress) != shard.sha256:
            raise UserError(
                f"The shard {folder / shard.file} was changed: its SHA-256 isn't that of its index; copy it again, or "
                "run `moevision data shard` again as before, which writes it anew."
            )
    return index


# ---- reading


class _Descriptor:
    """An open file that is closed when nobody uses it any longer: another thread may still read from it."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # os is gone when Python ends
        if hasattr(self, "number"):
            close(self.number)


class ShardFiles:
    """The bytes of a folder of shards; may be used by several threads, and in worker processes."""

    def __init__(self, folder: Path, shards: Sequence[Shard]) -> None:
        """Nothing is opened yet."""
        self.folder = folder
        self.names = [shard.file for shard in shards]
        self._opened = lru_cache(_OPEN_FILES)(_Descriptor)

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Bytes of a shard, fewer where it ends early; raises OSError."""
        if sys.platform == "win32":  # which has no pread
            with (self.folder / self.names[shard]).open("rb") as file:
                file.seek(offset)
                return file.read(size)
        return os.pread(self._opened(self.folder / self.names[shard]).number, size, offset)

    def __getstate__(self) -> dict[str, Any]:
        """Without open files, for workers that aren't forked."""
        return {"folder": self.folder, "names": self.names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open anew."""
        self.__dict__.update(state)
        self._opened = lru_cache(_OPEN_FILES)(_Descriptor)


Places = tuple[dict[str, int], npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.int64]]
"""Row by sample id; shard, offset and size by row."""


def _places(index: Index) -> Places:
    everything = list(index.splits.values())
    shards, offsets, sizes = (
        np.concatenate([np.array(part, np.int64) for part in parts] or [np.zeros(0, np.int64)])
        for parts in zip(*((rows.shards, rows.offsets, rows.sizes) for rows in everything), strict=True)
    )
    ids = (name for rows in everything for name in rows.ids)
    return {name: row for row, name in enumerate(ids)}, shards.astype(np.int32), offsets, sizes


def _column(index: Index, name: str) -> dict[str, str]:
    """Values of a column by sample id."""
    return {
        sample_id: value
        for rows in index.splits.values()
        for sample_id, value in zip(rows.ids, rows.columns.get(name, [""] * len(rows.ids)), strict=True)
    }


@dataclass
class ShardCollection(Collection):
    """Images in tar shards, each read by one `pread`."""

    files: ShardFiles = field(default_factory=lambda: ShardFiles(Path(), ()))
    places: Places = field(default_factory=lambda: _places(Index([], [], {"all": Rows()})))
    columns: dict[str, dict[str, str]] = field(default_factory=dict)

    def _read(self, sample: Sample, start: int = 0, size: int | None = None) -> bytes:
        """Stored bytes, all of them or so many from ``start``; raises OSError where the shard can't be read."""
        row_of, shards, offsets, sizes = self.places
        row = row_of[sample.sample_id]
        size = int(sizes[row]) if size is None else size
        found = self.files.read(int(shards[row]), int(offsets[row]) + start, min(size, MAX_BYTES + 1))
        if len(found) < min(size, MAX_BYTES + 1):
            raise OSError(f"{self.files.names[shards[row]]} was cut short; copy it again")
        return found

    def open(self, sample: Sample, short_side: int | None = None) -> Image.Image:
        """Decode the stored bytes through `safe_open`."""
        try:
            stored = io.BytesIO(self._read(sample))
        except OSError as error:
            raise BadImageError(sample.sample_id, f"its shard can't be read ({error})") from error
        stored.name = sample.sample_id
        return safe_open(stored, short_side)

    def size_bytes(self, sample: Sample) -> int:
        """Number of stored bytes."""
        return int(self.places[3][self.places[0][sample.sample_id]])

    def probe(self, sample: Sample) -> bytes:
        """1 KiB from the middle of an image of 64 KiB or more, as of a file."""
        half = self.size_bytes(sample) // 2
        try:
            return b"" if half < 32 * 1024 else self._read(sample, half, 1024)
        except OSError:
            return b""

    def digest(self, sample: Sample) -> bytes:
        """SHA-256 of the stored bytes; an unreadable image is unlike any other (opening it will say why)."""
        try:
            return hashlib.sha256(self._read(sample)).digest()
        except OSError:
            return hashlib.sha256(name_bytes(sample.sample_id)).digest()

    def stored(self, sample: Sample) -> bytes:
        """The stored bytes."""
        return self._read(sample)

    def column(self, name: str) -> Mapping[str, str] | None:
        """Values by sample id of a column that the shards' source had."""
        return self.columns.get(name)

    def column_names(self) -> Iterator[str]:
        """Columns that the shards' source had."""
        yield from self.columns

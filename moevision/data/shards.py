"""Images in tar shards (the WebDataset format), read at random through an index.

A shard is an uncompressed tar that holds each image as ``KEY.jpg`` (or another ending) and its class as ``KEY.cls``.
Other programs read shards from front to back and shuffle in a buffer; here an index of (shard, offset, size) per image
lets `os.pread` fetch any of them, so that order, augmentation and an exact resume are those of a folder. The index
keeps the sample ids, the classes and the order of the source. Local and mounted storage only.

`write_shards` makes the same bytes each time: images go into the shards of their split in the order of a hash of their
names, and an image's key is its place in the dataset's order. The folder gets its name when all of it is written.

Source: POSIX.1-2001 pax, "ustar Interchange Format" (two blocks of zeros end a tar).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sys
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from moevision.data.collection import Collection, DrawnCollection, Sample
from moevision.data.images import MAX_BYTES, BadImageError, safe_open
from moevision.errors import UserError, json_text, name_bytes
from moevision.files import (
    file_sha256,
    remove_leftovers,
    sync_folder,
    temporary_for,
    write_bytes_atomic,
    write_text_atomic,
)

INDEX: Final = "moevision-index.json"
_FORMAT: Final = 1
_OPEN_FILES: Final = 128  # ImageNet has 1,088 shards, and a process may often open no more than 1,024 files
_ENDINGS: Final = (
    (b"\xff\xd8\xff", "jpg"), (b"\x89PNG", "png"), (b"RIFF", "webp"), (b"GIF8", "gif"), (b"BM", "bmp"),
    (b"II*\x00", "tif"), (b"MM\x00*", "tif"),
)  # fmt: skip


@dataclass
class Shard:
    """One tar."""

    file: str  # path relative to the folder of the shards, with forward slashes
    bytes: int
    sha256: str  # of the whole tar, in hexadecimal
    plan: str = ""  # empty; version 0.1 kept a hash of what a tar was made from
    modified_ns: int = 0  # 0; version 0.1 kept the time of change of tars that others made


@dataclass
class Rows:
    """The images of one split, a row each, in the order in which a run counts them."""

    ids: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    shards: list[int] = field(default_factory=list)  # which shard, an index into the list of them
    offsets: list[int] = field(default_factory=list)  # where the image's bytes begin in it
    sizes: list[int] = field(default_factory=list)  # how many bytes they are
    # other columns of the table that the images came from, such as patients
    columns: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class Index:
    """What is in a folder of shards."""

    class_names: list[str]  # class names in words; labels are indices into them
    shards: list[Shard]
    splits: dict[str, Rows]  # rows by "train", "val" and "test", or all under "all"
    group_column: str | None = None  # the column whose equal values are kept in one split, if the source had one
    notes: list[str] = field(default_factory=list)  # sentences about what was left out of the source


def find_index(folder: Path) -> Index:
    """The index of a folder of shards, of which every one is there and as large as it was."""
    path = folder / INDEX
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        if held.pop("moevision_shards") != _FORMAT:
            raise UserError(f"{path} was written by another version of moevision: update moevision.")
        held["shards"] = [Shard(**shard) for shard in held["shards"]]
        held["splits"] = {split: Rows(**rows) for split, rows in held["splits"].items()}
        index = Index(**held)
        if not all(shard.sha256 and Path(shard.file).name == shard.file for shard in index.shards):
            raise ValueError("a shard leads out of the folder, or wasn't written by moevision")
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{path} can't be read as an index of shards ({type(error).__name__}): delete it, and run `moevision data "
            "shard` again."
        ) from error
    for shard in index.shards:
        file = folder / shard.file
        size = file.stat().st_size if file.is_file() else 0
        if size != shard.bytes:
            raise UserError(
                f"The shard {file} is missing or was changed: it has {size:,} of {shard.bytes:,} bytes; copy it again."
            )
    return index


def verify_shards(folder: Path, on_progress: Callable[[int], None] = lambda done: None) -> Index:
    """Compare every shard with the SHA-256 in its index; raises UserError if one differs or is missing.

    ``on_progress`` is called with the number of bytes read since the last call.
    """
    index = find_index(folder)
    for shard in index.shards:
        if file_sha256(folder / shard.file, on_progress) != shard.sha256:
            raise UserError(
                f"The shard {folder / shard.file} was changed: its SHA-256 isn't that of its index; copy it again."
            )
    return index


# ---- reading


class _Descriptor:
    """An open file that is closed when nobody uses it any longer: another thread may still read from it."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # os is gone when Python ends
        if hasattr(self, "number"):
            close(self.number)


class ShardFiles:
    """The bytes of a folder of tars; may be used by several threads, and in worker processes."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        """Nothing is opened yet."""
        self.folder, self.names = folder, list(names)
        self._opened = lru_cache(_OPEN_FILES)(_Descriptor)

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Bytes of a tar, fewer where it ends early; raises OSError."""
        path = self.folder / self.names[shard]
        if sys.platform == "win32":  # which has no pread
            with path.open("rb") as file:
                file.seek(offset)
                return file.read(size)
        return os.pread(self._opened(path).number, size, offset)

    def __reduce__(self) -> tuple[Any, ...]:
        """Without open files, for workers that aren't forked."""
        return type(self), (self.folder, self.names)


@dataclass
class ShardCollection(Collection):
    """Images in tars, each read by one `pread`; ``row`` by sample id, and [n, 3] tar, offset and size by row."""

    files: ShardFiles = field(default_factory=lambda: ShardFiles(Path(), ()))
    row: dict[str, int] = field(default_factory=dict)
    places: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 3), np.int64))

    def open(self, sample: Sample, short_side: int | None = None) -> Image.Image:
        """Decode the stored bytes through `safe_open`."""
        try:
            stored = io.BytesIO(self.stored(sample))
        except OSError as error:
            raise BadImageError(sample.sample_id, f"its shard can't be read ({error})") from error
        stored.name = sample.sample_id
        return safe_open(stored, short_side)

    def size_bytes(self, sample: Sample) -> int:
        """Number of stored bytes."""
        return int(self.places[self.row[sample.sample_id], 2])

    def stored(self, sample: Sample) -> bytes:
        """The stored bytes."""
        return self.read_part(sample, 0, self.size_bytes(sample))

    def read_part(self, sample: Sample, start: int, size: int) -> bytes:
        """Without reading the rest."""
        tar, offset, _ = self.places[self.row[sample.sample_id]].tolist()
        found = self.files.read(tar, offset + start, min(size, MAX_BYTES + 1))
        if len(found) < min(size, MAX_BYTES + 1):
            raise OSError(f"{self.files.names[tar]} was cut short; copy it again")
        return found


def open_shards(folder: Path) -> ShardCollection:
    """Open a folder of shards that `write_shards` wrote; raises UserError as `find_index`."""
    index = find_index(folder)
    splits, columns = index.splits.values(), defaultdict[str, dict[str, str]](dict)
    for rows in splits:
        for name, values in rows.columns.items():
            columns[name] |= zip(rows.ids, values, strict=True)
    parts = [np.array([rows.shards, rows.offsets, rows.sizes], np.int64).reshape(3, -1).T for rows in splits]
    return ShardCollection(
        index.class_names,
        {
            split: [Sample(*row) for row in zip(rows.ids, rows.labels, strict=True)]
            for split, rows in index.splits.items()
        },
        index.notes,
        index.group_column,
        dict(columns),
        files=ShardFiles(folder, [shard.file for shard in index.shards]),
        row={name: row for row, name in enumerate(name for rows in splits for name in rows.ids)},
        places=np.concatenate([np.zeros((0, 3), np.int64), *parts]),
    )


# ---- writing


def write_shards(
    collection: Collection,
    out: Path,
    *,
    shard_bytes: int = 256 * 2**20,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Index:
    """Write a dataset as shards into a folder that isn't there yet, or is empty.

    A shard is closed when its images have `shard_bytes`; `on_progress` is called with the number of images that are
    done since the last call.
    """
    if isinstance(collection, DrawnCollection):
        raise UserError("synthetic_pets is drawn when it is opened: there are no files to put into shards.")
    part = temporary_for(out)
    try:
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise UserError(f"{out} is there already: give --out a new folder, or remove it.")
        remove_leftovers(out.parent, out.name)
        part.mkdir(parents=True)
        index = Index(collection.class_names, [], {}, collection.group_column)
        columns = {name: collection.column(name) or {} for name in collection.column_names()}
        for split, samples in collection.given.items():
            ids, n = [sample.sample_id for sample in samples], len(samples)
            rows = Rows(ids, [sample.label for sample in samples], [0] * n, [0] * n, [0] * n)
            rows.columns = {name: [values.get(each, "") for each in ids] for name, values in columns.items()}
            index.splits[split] = rows
            left = sorted(
                enumerate(samples),
                key=lambda each: hashlib.sha256(name_bytes(each[1].sample_id)).digest(),
                reverse=True,
            )
            number = 0
            while left:
                images: list[tuple[int, Sample]] = []
                size = 0
                while left and (size < shard_bytes or not images):
                    images.append(left.pop())
                    size += collection.size_bytes(images[-1][1])
                file = part / f"{split}-{number:05d}.tar"
                write_bytes_atomic(file, _tar(collection, images, rows, len(index.shards), on_progress))
                index.shards.append(Shard(file.name, file.stat().st_size, file_sha256(file)))
                number += 1
        held = {
            "shards": list(map(vars, index.shards)),
            "splits": {split: vars(rows) for split, rows in index.splits.items()},
        }
        write_text_atomic(part / INDEX, json_text({"moevision_shards": _FORMAT, **vars(index), **held}) + "\n")
        os.replace(part, out)
        sync_folder(out.parent)
    except OSError as error:
        raise UserError(
            f"{error.filename or out} can't be read or written ({error.strerror or error}): mend that and start again."
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return index


def _tar(
    collection: Collection,
    images: Sequence[tuple[int, Sample]],
    rows: Rows,
    shard: int,
    on_progress: Callable[[int], None],
) -> Iterator[bytes]:
    """The bytes of a tar, the same for the same images; where each image begins goes into `rows`."""
    size = 0
    for place, sample in images:
        try:
            data = collection.stored(sample)
        except (OSError, BadImageError) as error:
            reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
            raise UserError(
                f"The image {sample.sample_id} can't be read ({reason}): mend or remove it and start again."
            ) from error
        # The first bytes name the kind, as `safe_open` goes by them; of damaged ones the file's own ending does.
        own = PurePosixPath(sample.sample_id).suffix.lower().removeprefix(".")
        ending = next((ending for magic, ending in _ENDINGS if data.startswith(magic)), own or "jpg")
        for name, content in (("cls", str(sample.label).encode()), (ending, data)):
            member = tarfile.TarInfo(f"{place:08d}.{name}")
            member.size = len(content)
            rows.offsets[place], rows.sizes[place] = size + tarfile.BLOCKSIZE, len(content)  # the image comes last
            written = member.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE)
            size += len(written)
            yield written
        rows.shards[place] = shard
        on_progress(1)
    # Two blocks of zeros are the end, and tar fills its last record.
    yield bytes(-(-(size + 2 * tarfile.BLOCKSIZE) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE - size)

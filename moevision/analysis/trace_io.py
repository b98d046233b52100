"""The file of a trace: one safetensors file, written row by row in bounded memory and read through a memory map.

The `safetensors` library writes a file only from arrays that lie in memory whole. The format is plain
(https://github.com/huggingface/safetensors#format): 8 bytes with the length of the header (little-endian), a header in
JSON, and the arrays one after the other. So every array has its place before the first number is known.

Rows are written at their place instead of through a writable map: a full disk is then an error with a sentence, while a
map of a file with holes ends the process with SIGBUS. The header is written last and the file renamed at the end, so
a file that was cut off is never taken for a whole one. Reading leaves all checks to the library.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from moevision.errors import UserError
from moevision.files import rename, sync_folder, temporary_for

Array = npt.NDArray[Any]

_LENGTH_BYTES = 8
_MOVED_BYTES = 2**20  # at once, where arrays are moved together
_NAMES = {"float32": "F32", "float16": "F16", "int64": "I64", "int16": "I16", "bool": "BOOL"}
_DTYPES = {name: np.dtype(dtype) for dtype, name in _NAMES.items()}


class TensorSpec(NamedTuple):
    """Type and shape of an array; the first axis counts rows."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.dtype.itemsize * prod(self.shape[1:])

    @property
    def total_bytes(self) -> int:
        """Bytes of all rows."""
        return self.dtype.itemsize * prod(self.shape)


class TensorBuffer:
    """Arrays in memory that fill row by row; the same three calls as `TensorFile`, without a `with` block."""

    def __init__(self, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> None:
        self._arrays = {name: np.empty(spec.shape, spec.dtype) for name, spec in specs.items()}
        self._metadata = dict(metadata)

    def write(self, rows: Mapping[str, Array], start: int) -> None:
        """Copy rows into their place."""
        for name, values in rows.items():
            self._arrays[name][start : start + len(values)] = values

    def shrink(self, rows: int, metadata: Mapping[str, str]) -> None:
        """Keep only the first rows, with other metadata."""
        self._arrays = {name: array[:rows] for name, array in self._arrays.items()}
        self._metadata = dict(metadata)

    def result(self) -> tuple[dict[str, Array], dict[str, str]]:
        """The arrays and the metadata."""
        return self._arrays, self._metadata


class TensorFile:
    """A file of arrays that fills row by row; it appears under its name when the `with` block ends well.

    Args:
        path: the file; an older one stays until the new one is complete.
        specs: array name -> type and shape.
        metadata: what the header says beside the arrays.

    Raises:
        UserError: on entry, while writing or on exit, if the disk doesn't take it.
    """

    def __init__(self, path: str | Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> None:
        self.specs, self.path = dict(specs), Path(path)
        self.partial = temporary_for(self.path)
        self._header, self._starts = _header(self.specs, metadata)

    def __enter__(self) -> Self:
        """Make the unfinished file, with its full length and zeros for a header."""
        with self._disk():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.partial.open("w+b")
            self._file.truncate(len(self._header) + sum(spec.total_bytes for spec in self.specs.values()))
        return self

    def write(self, rows: Mapping[str, Array], start: int) -> None:
        """Write rows to their place in the file."""
        for name, values in rows.items():
            spec = self.specs[name]
            if values.dtype != spec.dtype or values.shape[1:] != spec.shape[1:] or start + len(values) > spec.shape[0]:
                raise ValueError(f"{name} takes rows of {spec}, not {values.dtype} {values.shape} from row {start}")
            with self._disk():
                self._file.seek(self._starts[name] + start * spec.row_bytes)
                self._file.write(values.tobytes())

    def shrink(self, rows: int, metadata: Mapping[str, str]) -> None:
        """Move the arrays' first rows together; the new metadata must not be longer than the old."""
        specs = {name: TensorSpec(spec.dtype, (rows, *spec.shape[1:])) for name, spec in self.specs.items()}
        header, starts = _header(specs, metadata, len(self._header))
        with self._disk():
            # Every array moves towards the front, and the front ones first: none is overwritten before it has moved.
            for name in sorted(starts, key=starts.__getitem__):
                self._move(self._starts[name], starts[name], specs[name].total_bytes)
            self._file.truncate(len(header) + sum(spec.total_bytes for spec in specs.values()))
        self.specs, self._header, self._starts = specs, header, starts

    def _move(self, source: int, target: int, size: int) -> None:
        for offset in range(0, size, _MOVED_BYTES):
            self._file.seek(source + offset)
            part = self._file.read(min(_MOVED_BYTES, size - offset))
            self._file.seek(target + offset)
            self._file.write(part)

    def result(self) -> tuple[dict[str, Array], dict[str, str]]:
        """The finished file, mapped."""
        return read_tensors(self.path)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Complete and rename the file, or remove it after an error."""
        try:
            if kind is None:
                with self._disk():
                    self._complete()
        finally:
            self._file.close()
            self.partial.unlink(missing_ok=True)

    def _complete(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())  # the arrays are on the disk before the header says that they are
        self._file.seek(0)
        self._file.write(self._header)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        rename(self.partial, self.path)
        sync_folder(self.path.parent)

    @contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.path} can't be written ({error.strerror}): give another place, or free some space."
            ) from error


def _header(
    specs: Mapping[str, TensorSpec], metadata: Mapping[str, str], length: int = 0
) -> tuple[bytes, dict[str, int]]:
    """The bytes in front of the arrays, and where each array starts in the file.

    Wide types come first, and blanks (which the format allows) fill the header up to a multiple of 8 bytes: then every
    array is aligned, which NumPy needs to be fast.

    Args:
        specs: array name -> type and shape.
        metadata: what the header says beside them.
        length: bytes that the header must have, 0 for as many as needed.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    starts: dict[str, int] = {}
    offset = 0
    for name, spec in sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize):
        end = offset + spec.total_bytes
        entries[name] = {"dtype": _NAMES[spec.dtype.name], "shape": list(spec.shape), "data_offsets": [offset, end]}
        starts[name], offset = offset, end
    text = json.dumps(entries).encode()
    blanks = length - _LENGTH_BYTES - len(text) if length else -len(text) % 8
    if blanks < 0:
        raise ValueError(f"a header of {len(text)} bytes doesn't fit into {length}")
    text += b" " * blanks
    header = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    return header, {name: start + len(header) for name, start in starts.items()}


def read_tensors(path: str | Path) -> tuple[dict[str, Array], dict[str, str]]:
    """Map the arrays of a safetensors file into memory, read-only.

    Args:
        path: the file.

    Returns:
        The arrays and the header's metadata.

    Raises:
        UserError: if there is no such file or it is damaged.
    """
    try:
        with safe_open(str(path), framework="np") as checked:  # also that the file ends where it should
            metadata = checked.metadata() or {}
        with Path(path).open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            entries = json.loads(file.read(length))
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        entries.pop("__metadata__", None)
        start = _LENGTH_BYTES + length
        arrays = {name: _view(mapped, start, entry) for name, entry in entries.items()}
    except FileNotFoundError as error:
        raise UserError(f"There is no file {path}: collect the routing again, or check the path.") from error
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} is damaged, or is no file of this kind ({error}): collect the routing again, or give another file."
        ) from error
    return arrays, metadata


def _view(mapped: mmap.mmap, start: int, entry: Mapping[str, Any]) -> Array:
    dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
    first = start + entry["data_offsets"][0]
    array: Array = np.frombuffer(mapped, dtype, count=prod(shape), offset=first if prod(shape) else 0)
    return array.reshape(shape)

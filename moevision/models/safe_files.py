"""Read JSON, YAML and safetensors of unknown origin, with limits that hold before memory is taken.

These formats are data only: unlike a pickle, reading them runs no code. The remaining risks are refused here:

- a name that is no file: a named pipe (opening it would wait for ever), a device (it never ends), a folder;
- more bytes than such a file can need, and JSON whose millions of empty lists take far more memory than its text;
- JSON nested so deeply that the parser gives up, keys that stand twice (two readers would see two files), NaN;
- a safetensors header that announces more than the file holds, overlapping or odd tensors, absurd shapes.

Format of safetensors: 8 bytes with the header's length (little-endian), that much JSON, then the tensors without gaps;
https://github.com/huggingface/safetensors#format. Its own reader checks offsets too, but takes 100 MB of header, and
it is asked here only after everything has been found in order. Links are followed, as the hub's cache is made of them.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

import yaml  # type: ignore[import-untyped]

from moevision.errors import UserError

MAX_JSON_BYTES: Final = 16 * 2**20  # the names and descriptions of ImageNet-21k's 21 841 classes take 3 MB
MAX_JSON_VALUES: Final = 1_000_000
MAX_YAML_BYTES: Final = 2**20
MAX_HEADER_BYTES: Final = 16 * 2**20
MAX_TENSORS: Final = 100_000
MAX_DIMENSIONS: Final = 8
_LENGTH_BYTES: Final = 8
_DTYPE_BYTES: Final = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
INTEGERS: Final = frozenset(("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"))


@dataclass(frozen=True)
class TensorEntry:
    """What a safetensors header says about one tensor.

    Attributes:
        dtype: as the format spells it, such as `BF16`.
        shape: of the tensor.
        begin: first byte, counted from the end of the header.
        end: first byte after it.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_json(path: str | Path, *, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: if it is no regular file, larger than `max_bytes`, or no sound JSON.
        FileNotFoundError: if there is none; callers know best what that means.
    """
    return parse_json(_read(Path(path), max_bytes), str(path))


def read_yaml(path: str | Path) -> Any:
    """The content of a YAML file of plain values, such as a run's config.yaml.

    Raises:
        UserError: if it is no regular file, too large, or no such YAML.
        FileNotFoundError: if there is none.
    """
    try:
        return parse_yaml(_read(Path(path), MAX_YAML_BYTES).decode("utf-8"))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{path} can't be read ({' '.join(str(error).split())[:160]}): mend or remove it.") from error


def parse_yaml(text: str, load: Callable[[str], Any] = yaml.safe_load) -> Any:
    """Parse YAML without anchors: behind them a few lines can stand for billions of values.

    Args:
        text: of the file.
        load: what parses it when it is found in order.

    Raises:
        UserError: if it is longer than `MAX_YAML_BYTES` or uses anchors.
        yaml.YAMLError: if it is no YAML.
    """
    if len(text) > MAX_YAML_BYTES:
        raise UserError(f"A configuration has at most {MAX_YAML_BYTES:,} characters, and this one has {len(text):,}.")
    if "*" in text and any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
        raise UserError("A configuration may not use YAML's anchors (&name, *name): write the values out.")
    return load(text)


def parse_json(data: bytes, name: str) -> Any:
    """Parse JSON in UTF-8: a bounded number of values, no key twice, no NaN or infinity.

    Args:
        data: the text.
        name: what to call it in an error.

    Raises:
        UserError: if it isn't such JSON.
    """
    # Each value but the first follows one of these, so their number bounds that of the values.
    if sum(map(data.count, (b",", b"[", b"{", b":"))) > MAX_JSON_VALUES:
        raise UserError(f"{name} holds more than the {MAX_JSON_VALUES:,} values that such a file may have.")
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_no_key_twice, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is damaged, or no JSON file ({str(error)[:120]}): give another one.") from error


def read_header(path: str | Path) -> dict[str, TensorEntry]:
    """Tensor name -> entry of a safetensors file, after every entry was checked against the file's size.

    Raises:
        UserError: if it is no sound safetensors file.
        FileNotFoundError: if there is none.
    """
    with _open_regular(Path(path)) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - _LENGTH_BYTES):
            raise _damaged(path, f"its header would be {length:,} bytes long")
        text = file.read(length)
    given = parse_json(text, str(path))
    if not isinstance(given, dict):
        raise _damaged(path, "its header is no JSON object")
    metadata = given.pop("__metadata__", None)
    if metadata is not None and not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise _damaged(path, "its metadata are no texts")
    if len(given) > MAX_TENSORS:
        raise _damaged(path, f"it has {len(given):,} tensors")
    entries = {name: _entry(path, name, entry) for name, entry in given.items()}
    _check_layout(path, entries, size - _LENGTH_BYTES - length)
    return entries


def elements(entries: dict[str, TensorEntry]) -> int:
    """Numbers that all tensors hold together."""
    return sum(prod(entry.shape) for entry in entries.values())


def _entry(path: str | Path, name: str, given: Any) -> TensorEntry:
    shown = repr(name[:80])
    if not isinstance(given, dict) or set(given) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"the entry of {shown} is malformed")
    width = _DTYPE_BYTES.get(given["dtype"]) if isinstance(given["dtype"], str) else None
    if width is None:
        raise _damaged(path, f"{shown} has an unknown type")
    shape, offsets = given["shape"], given["data_offsets"]
    if not _natural(shape) or not _natural(offsets) or len(shape) > MAX_DIMENSIONS or len(offsets) != 2:
        raise _damaged(path, f"the shape or the place of {shown} is malformed")
    entry = TensorEntry(cast(str, given["dtype"]), tuple(shape), *offsets)
    if entry.end - entry.begin != prod(entry.shape) * width:
        raise _damaged(path, f"{shown} has another size than its shape says")
    return entry


def _natural(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**48 for value in values)


def _check_layout(path: str | Path, entries: dict[str, TensorEntry], data_bytes: int) -> None:
    places = sorted((entry.begin, entry.end) for entry in entries.values())
    whole = [(0, 0), *places, (data_bytes, data_bytes)]
    if any(end != begin for (_, end), (begin, _) in pairwise(whole)):
        raise _damaged(path, "its tensors overlap, leave gaps, or end elsewhere than the file")


def _damaged(path: str | Path, reason: str) -> UserError:
    return UserError(f"{path} can't be loaded ({reason}): it is damaged, or no safetensors file.")


def _read(path: Path, max_bytes: int) -> bytes:
    with _open_regular(path) as file:
        data = file.read(min(max_bytes, os.fstat(file.fileno()).st_size) + 1)
    if len(data) > max_bytes:
        raise UserError(f"{path} is larger than the {max_bytes:,} bytes that such a file may have: give another one.")
    return data


def _open_regular(path: Path) -> BinaryIO:
    """Open a regular file without ever waiting: the kind is asked of what was opened, so it can't be exchanged."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"{path} can't be read ({error}): check the path and its permissions.") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path} is no regular file: give a file.")
    return os.fdopen(descriptor, "rb")


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")

"""Write a file whole or not at all, so that a crash never leaves half a report where a whole one stood.

The bytes go to a temporary file in the same folder, are flushed to the disk, and the file is renamed over the target.
Then the folder is flushed: until then the disk may forget the new name.
"""

import csv
import hashlib
import io
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from moevision.errors import UserError, json_text


def write_bytes_atomic(
    path: str | Path, data: bytes | Iterable[bytes], before: Path | None = None
) -> None:
    """Replace `path` by a file with these bytes, at once or part by part; missing parent folders are made.

    When it returns, the file is on the disk under its name. An older one is then called `before`, if that is given; an
    OSError (a full disk, a folder that can't be written) leaves it untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_for(path)
    parts = [data] if isinstance(data, bytes) else data
    try:
        with temporary.open("wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        if before is not None and path.exists():
            os.replace(path, before)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def newest_config(run_dir: Path) -> Path:
    """The settings that a run was last gone on with: config.yaml, or the newest config-N.yaml, which changes leave."""
    changed = sorted(run_dir.glob("config-*.yaml"), key=lambda file: (len(file.name), file.name))
    return changed[-1] if changed else run_dir / "config.yaml"


def sync_file(path: Path) -> None:
    """Flush a file's bytes to the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, where the system can (neither on Windows nor on FUSE)."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def temporary_for(path: Path) -> Path:
    """The name under which `path` is written, in its folder; it says which process writes."""
    # Not tempfile: its files are readable by their owner only, and the mode would survive the rename.
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_leftovers(folder: Path) -> None:
    """Delete files that killed processes left unfinished in a folder; nobody else may be writing there now."""
    for path in folder.glob(".*.tmp"):
        path.unlink()


def write_text_atomic(path: str | Path, text: str | Iterable[str]) -> None:
    r"""Replace `path` by this text in UTF-8; a file name that isn't valid Unicode is shown with `\udcXX`.

    Text that is large comes in parts, and is written part by part.
    """
    parts = [text] if isinstance(text, str) else text
    write_bytes_atomic(path, (part.encode("utf-8", errors="backslashreplace") for part in parts))


def refuse_foreign(path: Path, mark: bytes, option: str = "--out") -> None:
    """Keep a file that somebody else made from being replaced.

    `mark` stands in the first 4 KiB of every file that the caller writes, `option` names another place.
    """
    if not os.path.exists(path):
        return
    ours = False
    if path.is_file():  # reading from a pipe would wait
        with suppress(OSError), path.open("rb") as file:
            beginning = file.read(4096)
            ours = mark in beginning or not beginning
    if not ours:
        raise UserError(
            f"{path} is there already and holds something else: give {option} another place."
        )


def write_json_atomic(path: str | Path, obj: Any) -> None:
    """Replace `path` by `obj` as indented JSON, in which names from outside are escaped and read back exactly."""
    write_text_atomic(path, json_text(obj, indent=2) + "\n")


def read_csv(path: Path, columns: Iterable[str] = ()) -> list[dict[str, str]]:
    """The rows of a CSV file in UTF-8, each by the names in its first line; what a row lacks is empty.

    A ValueError if one of `columns` isn't there.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:  # Excel writes a byte order mark
        rows = csv.DictReader(file, restval="", strict=True)
        if missing := {*columns} - {*(rows.fieldnames or ())}:
            raise ValueError(f"it has no column {', '.join(sorted(missing))}")
        return list(rows)


def csv_text(columns: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    """A CSV file: its first line, and rows of as many cells; the caller shows names from outside (`csv_name`)."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

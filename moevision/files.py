"""Writes files atomically, reads CSV files, and finds what verbs share: shipped configs, runs, files that are theirs.

A crash never replaces a complete file by an incomplete one. The bytes go to a temporary file in the same folder, which
is flushed to the disk and renamed to the target. Then the folder is flushed too: a power failure before that can undo
the renaming.
"""

import csv
import hashlib
import io
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from moevision.errors import UserError, escape_controls, json_text


def write_bytes_atomic(
    path: str | Path, data: bytes | Iterable[bytes], backup: Path | None = None
) -> None:
    """Replace `path` by a file with these bytes, given as a whole or in parts; missing parent folders are made.

    When it returns, the file is on the disk under its name. With `backup`, an existing file is kept under that name
    instead of being overwritten. An OSError (a full disk, a folder that can't be written) leaves it untouched.
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
        if backup is not None and path.exists():
            os.replace(path, backup)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


PACKAGE = Path(__file__).resolve().parent


def shipped_configs() -> dict[str, Path]:
    """Name -> file of the configs in the installed package, or beside it in a checkout."""
    inside = PACKAGE / "configs"
    folder = inside if inside.is_dir() else PACKAGE.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def newest_config(run_dir: Path) -> Path:
    """The config of a run's latest start: the last config-N.yaml, which a resume with changed options writes.

    Without such a file it is config.yaml.
    """
    # By length first, so that config-10 comes after config-9.
    changed = sorted(run_dir.glob("config-*.yaml"), key=lambda file: (len(file.name), file.name))
    return changed[-1] if changed else run_dir / "config.yaml"


def model_not_found_message(name: str) -> str:
    """A sentence that says that there is no such run or model, and which runs there are."""
    runs = sorted(file.parent.name for file in Path("runs").glob("*/config.yaml"))
    hint = (
        f"runs/ has {', '.join(map(escape_controls, runs[:8]))}"
        if runs
        else "give a folder that fit wrote, such as runs/NAME/model"
    )
    return f"There is no run or model {name!r}: {hint}."


def require_new_or_empty(out: Path) -> None:
    """Raise a UserError if `--out` names a file, or a folder that isn't empty."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out} is there already: give --out another name.")


def sync_file(path: Path) -> None:
    """Flush a file's bytes to the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, where the system supports it (neither Windows nor FUSE does)."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def temporary_for(path: Path) -> Path:
    """The temporary name under which `path` is written first: in its folder, with this process's id."""
    # The module tempfile makes files that only their owner can read, and renaming would keep that mode.
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_leftovers(folder: Path) -> None:
    """Delete all temporary files in a folder, which killed processes left; no other may be writing there."""
    for path in folder.glob(".*.tmp"):
        path.unlink()


def write_text_atomic(path: str | Path, text: str | Iterable[str]) -> None:
    r"""Replace `path` by this text in UTF-8, given as a whole or in parts (for large texts).

    Lone surrogates, as in file names that aren't valid Unicode, are written as `\udcXX`.
    """
    parts = [text] if isinstance(text, str) else text
    write_bytes_atomic(path, (part.encode("utf-8", errors="backslashreplace") for part in parts))


def require_own_file(path: Path, mark: bytes, option: str = "--out") -> None:
    """Raise a UserError if `path` exists and wasn't written by the caller.

    Every file that the caller writes contains `mark` in its first 4 KiB; an empty file may be replaced too. `option`
    is the option by which the user can name another path.
    """
    if not os.path.exists(path):
        return
    is_replaceable = False
    if path.is_file():  # reading from a pipe would wait
        with path.open("rb") as file:
            beginning = file.read(4096)
        is_replaceable = mark in beginning or not beginning
    if not is_replaceable:
        raise UserError(
            f"{path} is there already and holds something else: give {option} another place."
        )


def write_json_atomic(path: str | Path, obj: Any) -> None:
    """Replace `path` by `obj` as indented JSON; control characters are escaped, so that names are read back exactly."""
    write_text_atomic(path, json_text(obj, indent=2) + "\n")


def read_csv(path: Path, columns: Iterable[str] = ()) -> list[dict[str, str]]:
    """The rows of a CSV file in UTF-8 as dicts by the column names of the first line; missing cells are empty.

    Raises a ValueError if the file lacks one of `columns`.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:  # Excel writes a byte order mark
        rows = csv.DictReader(file, restval="", strict=True)
        if missing := set(columns) - set(rows.fieldnames or ()):
            raise ValueError(f"it has no column {', '.join(sorted(missing))}")
        return list(rows)


def csv_text(columns: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    """The text of a CSV file: column names and rows; the caller escapes what comes from outside (`escape_csv_cell`)."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

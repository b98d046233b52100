"""Write a file whole or not at all, so that a crash never leaves half a report where a whole one stood.

The text goes to a neighbour in the same folder, is flushed to the disk and then renamed over the target;
`os.replace` is atomic on POSIX and on Windows as long as both names lie on one file system.
"""

import os
from pathlib import Path
from typing import Any

from moevision.names import json_text


def write_bytes_atomic(path: str | Path, data: bytes) -> None:
    """Replace `path` by a file with these bytes; missing parent folders are made.

    Raises:
        OSError: the folder can't be written or the disk is full; an older `path` is then untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile: its files are readable by their owner only, and the mode would survive the rename.
    neighbour = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with neighbour.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(neighbour, path)
    finally:
        neighbour.unlink(missing_ok=True)


def write_text_atomic(path: str | Path, text: str) -> None:
    r"""Replace `path` by this text in UTF-8; a file name that isn't valid Unicode is shown with `\udcXX`."""
    write_bytes_atomic(path, text.encode("utf-8", errors="backslashreplace"))


def write_json_atomic(path: str | Path, obj: Any) -> None:
    """Replace `path` by `obj` as indented JSON, in which names from outside are escaped and read back exactly.

    Raises:
        TypeError: `obj` holds something other than JSON primitives.
        ValueError: `obj` holds NaN or infinity, which JSON can't say.
    """
    write_text_atomic(path, json_text(obj, indent=2) + "\n")

"""The report's folder: which places may be written to, and in which order, so that no half report is left behind.

report.html         the report; written last, so where it stands everything else does
report.json         every number of it
trace.safetensors   the routing (`RoutingTrace.load`)
figures/*.png       its pictures
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moevision.errors import UserError
from moevision.files import write_bytes_atomic, write_json_atomic, write_text_atomic
from moevision.models.safe_files import read_json

SCHEMA = "moevision.report/1"
"""Version of report.json; a change that an older reader would misread raises the number."""

HTML, NUMBERS, TRACE, FIGURES = "report.html", "report.json", "trace.safetensors", "figures"


def claim_folder(out: str | Path) -> Path:
    """The folder of a new report: a new or empty one, or that of a former report, whose files are replaced.

    Raises:
        UserError: if something else lies there, or it can't be made or written to.
    """
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        foreign = sorted(entry.name for entry in folder.iterdir() if not _is_ours(entry))
        probe = folder / ".moevision-probe"
        probe.touch()
        probe.unlink()
    except FileExistsError as error:
        raise UserError(f"{folder} is a file: give --out a folder for the report.") from error
    except OSError as error:
        raise UserError(f"{folder} can't be written to ({error.strerror}): give --out another place.") from error
    if foreign and former_report(folder) is None:
        raise UserError(
            f"{folder} holds other files ({', '.join(foreign[:3])}{', ...' if len(foreign) > 3 else ''}) and no former "
            "report: give --out a new folder."
        )
    return folder


def former_report(folder: Path) -> dict[str, Any] | None:
    """The numbers of the report that lies in a folder; None where none does."""
    try:
        found = read_json(folder / NUMBERS)
    except (OSError, ValueError):
        return None  # absent, or not ours: both mean that there is no report to replace
    ours = isinstance(found, dict) and str(found.get("schema", "")).startswith("moevision.report/")
    return found if ours else None


def write_report(folder: Path, numbers: Mapping[str, Any], page: str, pictures: Mapping[str, bytes]) -> None:
    """Write everything but the trace; figures of a former report that this one doesn't have go.

    Args:
        folder: from `claim_folder`.
        numbers: JSON primitives.
        page: the HTML.
        pictures: file name -> PNG.

    Raises:
        UserError: if the disk is full or the folder has become read-only.
    """
    former = former_report(folder) or {}
    try:
        for name, png in pictures.items():
            write_bytes_atomic(folder / FIGURES / name, png)
        write_json_atomic(folder / NUMBERS, numbers)
        write_text_atomic(folder / HTML, page)
        for entry in former.get("figures", []):
            name = Path(str(entry.get("file", ""))).name
            if name.endswith(".png") and name not in pictures:
                (folder / FIGURES / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"The report can't be written to {folder} ({error.strerror}): make room or give --out another place."
        ) from error


def _is_ours(entry: Path) -> bool:
    """Whether an earlier, perhaps interrupted, run can have left it."""
    if entry.name == FIGURES:
        return entry.is_dir() and all(inner.suffix in (".png", ".tmp") for inner in entry.iterdir())
    unfinished = entry.name.startswith(".") and entry.suffix == ".tmp"
    return unfinished or entry.name in (HTML, NUMBERS, TRACE)

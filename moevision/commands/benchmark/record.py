"""The record of a benchmark: machine, libraries, command and results as JSON, beside its table and figure."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from moevision import __version__, allocator
from moevision.errors import UserError
from moevision.files import write_json_atomic
from moevision.layers.cpu import has_matrix_unit
from moevision.names import shown_lines
from moevision.train.provenance import cpu_model, git_state, gpu_names, total_memory_bytes
from moevision.versions import package_version

FORMAT = 1
LIBRARIES = ("torch", "torchvision", "timm", "lightning", "numpy", "transformers", "torchtitan", "triton")
NO_CUDA = "not measured: no CUDA device"


def new_record(kind: str, command: str, device: torch.device, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What every record begins with.

    Args:
        kind: `layer`, `train`, `infer` or `data`.
        command: the command line.
        device: where it was measured.
        settings: what was asked for, as JSON primitives.
    """
    memory = total_memory_bytes()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "benchmark": kind,
        "format": FORMAT,
        "command": command,
        "code": git_state(Path(__file__).parents[2]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "cpu": cpu_model(),
            "usable_cores": usable,
            "torch_threads": torch.get_num_threads(),
            "memory_gib": None if memory is None else round(memory / 2**30, 1),
            "gpus": gpu_names(),
            "device": str(device),
            "freed_memory_is_kept": allocator.is_kept(),
            "matrix_unit": has_matrix_unit(),
            # Load of others spoils times: a reader should see it.
            "load_average_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        },
        "versions": {
            "moevision": __version__,
            "python": platform.python_version(),
            **{name: version for name in LIBRARIES if (version := package_version(name)) is not None},
        },
        "cuda": "measured" if device.type == "cuda" else NO_CUDA if not torch.cuda.is_available() else "not asked for",
        "settings": dict(settings),
    }


def write_record(out: Path, record: Mapping[str, Any], draw: Callable[[Path], None]) -> list[Path]:
    """Write `benchmark-KIND.json` and `.png` into a folder.

    Raises:
        UserError: if the folder can't be written.
    """
    paths = [out / f"benchmark-{record['benchmark']}.{suffix}" for suffix in ("json", "png")]
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json_atomic(paths[0], record)
        draw(paths[1])
    except OSError as error:
        raise UserError(f"{out} can't be written ({error.strerror}): give --out another folder.") from error
    return paths


@contextmanager
def progress_bar(text: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on standard error while something takes its time; yields what to call after each of `total` steps."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(text, total=total)
        yield lambda: progress.advance(task)


def print_machine(record: Mapping[str, Any]) -> None:
    """One line on where it was measured."""
    machine, versions = record["machine"], record["versions"]
    place = machine["cpu"] if machine["device"] == "cpu" else f"{', '.join(machine['gpus'])} ({machine['device']})"
    print_line(
        f"{place}, {machine['torch_threads']} threads, torch {versions['torch']}, "
        f"load before {machine['load_average_before']}"
    )


def print_line(text: str) -> None:
    """A line of prose that isn't wrapped or coloured."""
    Console(highlight=False).print(shown_lines(text), soft_wrap=True, markup=False)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table whose first column is text and whose others are numbers."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    # A table in a pipe or a log has no terminal width to heed.
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table)


def ratio_text(ratio: Mapping[str, float] | None) -> str:
    """`0.95 (0.93–0.97)`: the median with its quartiles; nothing where there is no ratio."""
    if ratio is None:
        return ""
    return f"{ratio['median']:.3f} ({ratio['quartile_1']:.3f}–{ratio['quartile_3']:.3f})"

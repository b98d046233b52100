"""What every benchmark and study shares: its command line, where a record comes from, tables, progress and figures."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table

import moevision
from benchmarks.lines import write_lines
from benchmarks.peak import matmul_peak
from benchmarks.timing import rounded
from moevision import limits, package_version
from moevision.errors import UserError, escape_controls_of_lines
from moevision.layers.cpu import has_matrix_unit
from moevision.limits import physical_memory_bytes, usable_cores
from moevision.train.provenance import cpu_model, git_state, gpu_names

HERE = Path(__file__).parent
LIBRARIES = (
    *("torch", "torchvision", "timm", "lightning", "numpy"),
    *("transformers", "torchtitan", "triton"),
)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Json = Mapping[str, Any]
T = TypeVar("T")


# ---- the command line


def argument_parser(verb: str, text: str | None, examples: str = "") -> ArgumentParser:
    """The parser of one verb; `text` is the head of its module."""
    return ArgumentParser(
        prog=f"python -m benchmarks {verb}",
        description=text,
        epilog=examples and f"examples\n{examples}",
        formatter_class=RawDescriptionHelpFormatter,
    )


def add_measuring(parser: ArgumentParser, *, repetitions: int) -> None:
    """Options of the benchmarks that measure this machine."""
    add = parser.add_argument
    add("--repetitions", type=positive, default=repetitions, help="measured rounds (%(default)s)")
    add("--warm-up", type=count, default=20, help="rounds before, to compile kernels (%(default)s)")
    add("--no-peak", action="store_true", help="don't measure the matmul peak; no MFU then")
    # cuda is the first card: clocks, memory and other processes look there.
    devices = ("auto", "cpu", "cuda")
    add("--device", choices=devices, default="auto", help="(%(default)s: CUDA if it is there)")
    add("--threads", type=positive, metavar="N", help="threads of torch on the CPU")
    add("--out", type=Path, metavar="DIR", help="write benchmark-*.json to this folder")
    add("--quick", action="store_true", help="shows that it runs, measures nothing")


def parse(parser: ArgumentParser, quick: Mapping[str, Any]) -> Namespace:
    """What the command line asks for; `quick` are the defaults that --quick sets."""
    options = parser.parse_args()
    if options.quick:
        parser.set_defaults(**quick)
        options = parser.parse_args()
    return options


def _at_least(lowest: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        if int(text) < lowest:
            raise ArgumentTypeError(f"it is {text} and must be at least {lowest}")
        return int(text)

    return whole_number


positive, count = _at_least(1), _at_least(0)


# ---- the machine


def set_up(options: Namespace) -> torch.device:
    """Device and threads that were asked for, memory and fp32 products as `moevision fit` has them.

    Raises:
        UserError: if the device isn't there.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("high")
    limits.keep_freed_memory()
    has_cuda = torch.cuda.is_available()
    if options.device == "cuda" and not has_cuda:
        raise UserError("There is no CUDA device here: leave --device out.")
    return torch.device("cuda", 0) if has_cuda and options.device != "cpu" else torch.device("cpu")


def measure_peaks(
    options: Namespace, device: torch.device, precisions: Sequence[str]
) -> dict[str, float]:
    """The best rate of matrix products by precision, in FLOP/s; none with --no-peak."""
    names = () if options.no_peak else dict.fromkeys(precisions)
    return {name: rounded(matmul_peak(device, DTYPES[name])) for name in names}


def in_a_process(work: Callable[..., T], *arguments: Any) -> T:
    """What `work` returns in a fresh process, with this one's modules: no allocator gives all its memory back."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(work, *arguments).result()


# ---- records


def about() -> dict[str, Any]:
    """Where a record comes from: command, code, date, machine and libraries. The load of others spoils times."""
    memory = physical_memory_bytes()
    command = shlex.join(["python", "-m", *sys.argv[0].split(), *sys.argv[1:]])
    versions = {name: package_version(name) for name in LIBRARIES}
    return {
        "command": without_places(command),
        # The commit, and whether one of these has uncommitted changes.
        "code": git_state(Path(moevision.__file__).parent, HERE / "*.py", HERE.parent / "configs"),
        "started_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "cpu": cpu_model(),
            "usable_cores": usable_cores(),
            "torch_threads": torch.get_num_threads(),
            "memory_gib": None if memory is None else round(memory / 2**30, 1),
            "gpus": gpu_names(),
            "freed_memory_is_kept": limits.keeps_freed_memory(),
            "matrix_unit": has_matrix_unit(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "load_average_before": round(os.getloadavg()[0], 2),
        },
        "versions": {
            "moevision": moevision.__version__,
            "python": platform.python_version(),
            **{name: version for name, version in versions.items() if version is not None},
        },
    }


def new_record(kind: str, options: Namespace, device: torch.device) -> dict[str, Any]:
    """What the record of `layer`, `train` or `infer` begins with."""
    record = about()
    record["machine"]["device"] = str(device)
    missing = "not asked for" if torch.cuda.is_available() else "not measured: no CUDA device"
    left_out = ("out", "quick", "threads")
    asked = {name: value for name, value in vars(options).items() if name not in left_out}
    return {
        "benchmark": kind,
        "format": 1,
        **({"dry_run": True} if options.quick else {}),  # never committed
        **record,
        "cuda": "measured" if device.type == "cuda" else missing,
        "settings": asked,
    }


def write_record(
    out: Path | None, record: Json, draw: Callable[[Json, Path], None] | None = None
) -> None:
    """Write `benchmark-KIND.json`, and `.png` where there is something to draw, into a folder."""
    if out is None:
        return
    path = out / f"benchmark-{record['benchmark']}.json"
    out.mkdir(parents=True, exist_ok=True)
    write_lines(path, record)
    if draw is not None:
        draw(record, path.with_suffix(".png"))
    print(f"written: {path}", file=sys.stderr)


def write_result(out: Path | None, result: Json) -> None:
    """Print a study's result as JSON and write it, if a file is given."""
    print(json.dumps(result, indent=1))
    if out is not None:
        write_lines(out, result)


def without_places(command: str) -> str:
    """A command with files and folders by their names only: where they lay is nobody's concern."""
    return re.sub(r"(?<![^ =])[./][^ =]*/", "", command)


# ---- the terminal


def print_machine(record: Json) -> None:
    """One line on where it was measured."""
    machine, versions = record["machine"], record["versions"]
    place = machine["cpu"] if machine["device"] == "cpu" else ", ".join(machine["gpus"])
    print_line(
        f"{place}, {machine['torch_threads']} threads, torch {versions['torch']}, "
        f"load before {machine['load_average_before']}"
    )


def print_line(text: str) -> None:
    """A line of prose that isn't wrapped or coloured."""
    Console(highlight=False).print(escape_controls_of_lines(text), soft_wrap=True, markup=False)


def print_rows(title: str, rows: Sequence[Json], reference: str) -> None:
    """Time, ratio to a reference, images/s, MFU and parameters of each candidate, as far as a row has them."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in ("", "ms", f"time ÷ {reference}", "images/s", "MFU", "parameters"):
        table.add_column(column, justify="right" if column else "left", overflow="fold")
    for row in rows:
        if "error" in row:
            print_line(f"  {row['name']}: {row['error']}")
            continue
        ms, ratio = f"{row['time_ms']['median']:.2f}", ratio_text(row["ratio_to"][reference])
        rate, mfu, size = (row.get(name) for name in ("images_per_s", "mfu", "parameters"))
        known = ((rate, ",.1f"), (mfu, ".1%"), (size, ","))
        cells = ["" if value is None else format(value, form) for value, form in known]
        table.add_row(row["name"], ms, ratio, *cells)
    # A table in a pipe or a log has no terminal width to heed.
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table)


def ratio_text(ratio: Mapping[str, float]) -> str:
    """`0.95 (0.93–0.97)`: the median with its quartiles."""
    return "{median:.3f} ({quartile_1:.3f}–{quartile_3:.3f})".format_map(ratio)

"""`moevision doctor`: what this machine has, what limits it now, and what to change."""

from __future__ import annotations

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from moevision.errors import UserError
from moevision.files import write_json_atomic

if TYPE_CHECKING:
    from moevision.commands.doctor_findings import Finding
    from moevision.commands.doctor_machine import Choices, Machine, Measured

DESCRIPTION = """\
Look at this machine before you train on it: processor, memory, GPUs and libraries, what this process may use of them,
how fast they really multiply matrices, and which backend and precision moevision would take.

Then say what limits it right now - too few or too many threads, other programs, a torch without CUDA beside an NVIDIA
card, little memory, a tiny /dev/shm, no compiler, no energy counter - and what to change. Findings are no errors: the
exit code is 0.

The peaks are those that `python -m benchmarks` measures utilisation (MFU) against; they take about three seconds.
"""

EXAMPLES = """\
examples
  moevision doctor
  moevision doctor --no-measure                  facts and findings alone
  moevision doctor --json doctor.json            the same as a file, to attach to a bug report
"""


def main(arguments: list[str]) -> None:
    """Run with command-line arguments."""
    parser = ArgumentParser(
        prog="moevision doctor", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("--format", choices=("table", "json"), default="table", help="what is printed (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to a file, too")
    parser.add_argument("--no-measure", action="store_true", help="don't measure how fast it multiplies and copies")
    chosen = parser.parse_args(arguments)
    from moevision.commands.doctor_findings import findings  # torch: not for --help
    from moevision.commands.doctor_machine import as_record, choose, look, measure

    # Status lines go to standard error, so that standard output stays JSON.
    with Console(stderr=True).status("looking around") as status:
        machine, choices = look(), choose()
        measured = None if chosen.no_measure else measure(choices.device, status.update)
    found = findings(machine, choices, measured)
    record = {**as_record(machine, choices, measured), "findings": [asdict(finding) for finding in found]}
    if chosen.json is not None:
        _write(chosen.json, record)
    if chosen.format == "json":
        print(json.dumps(record, indent=2))
    else:
        print_report(Console(highlight=False), machine, choices, measured, found)


def print_report(
    console: Console, machine: Machine, choices: Choices, measured: Measured | None, found: list[Finding]
) -> None:
    """Facts, measured rates, choices, then the findings."""
    table = Table.grid(padding=(0, 2))
    for name, value in (*facts(machine), *rates(measured), *_choices(choices)):
        table.add_row(name, value)
    console.print(table)
    if not found:
        console.print("\nNothing limits this machine that this command knows of.")
        return
    console.print("\nwhat limits it now, and what to change")
    for number, finding in enumerate(found, 1):
        console.print(f"{number:2}. {finding.what}\n    -> {finding.advice}", markup=False, soft_wrap=True)


def facts(machine: Machine) -> list[tuple[str, str]]:
    """What the machine has, as rows of a table."""
    from moevision.commands.doctor_findings import gib, usable

    cores = [f"{machine.logical_cores} logical", f"{usable(machine)} usable", f"{machine.threads} threads of torch"]
    if machine.physical_cores is not None:
        cores.insert(0, f"{machine.physical_cores} physical")
    if machine.quota_cores is not None:
        cores.append(f"control group's limit {machine.quota_cores:g}")
    sizes = (
        ("", machine.memory_bytes),
        ("control group's limit ", machine.memory_limit_bytes),
        ("free ", machine.memory_available_bytes),
        ("/dev/shm ", machine.shm_bytes),
        ("disk free ", machine.disk_free_bytes),
    )
    torch = machine.torch
    built_for = f"CUDA {torch['cuda']}" if torch["cuda"] else f"ROCm {torch['hip']}" if torch["hip"] else "no GPU"
    versions = [f"{name} {version}" for name, version in machine.libraries.items() if name != "torch" and version]
    return [
        ("CPU", f"{machine.cpu} ({', '.join(machine.cpu_flags) or 'instructions unknown'})"),
        ("cores", ", ".join(cores)),
        ("memory", ", ".join(f"{name}{gib(size)}" for name, size in sizes if size is not None)),
        *(("GPU", _gpu(gpu)) for gpu in machine.gpus),
        *([] if machine.gpus else [("GPU", "none that torch can use")]),
        ("torch", f"{torch['version']}, built for {built_for}"),
        ("libraries", ", ".join(versions)),
        ("compiler", machine.compiler or "none"),
        *(
            ("energy", f"{device}: {counter.get('domain', 'not measured')}")
            for device, counter in machine.energy.items()
        ),
    ]


def rates(measured: Measured | None) -> list[tuple[str, str]]:
    """What was measured, as rows of a table."""
    if measured is None:
        return [("matmul peak", "not measured")]
    rows = [
        (f"matmul peak {precision}", f"{_rate(peak.flops_per_s)} ({measured.device}, {peak.size} x {peak.size})")
        for precision, peak in measured.peaks.items()
    ]
    return [*rows, ("memory copy", f"{measured.copy_bytes_per_s / 1e9:.1f} GB/s read and written")]


def _choices(choices: Choices) -> list[tuple[str, str]]:
    text = f"{choices.device}, precision {choices.precision}, experts by backend {choices.backend}"
    return [("moevision takes", text)]


def _gpu(gpu: Any) -> str:
    from moevision.commands.doctor_findings import gib

    parts = [gpu.name]
    if gpu.capability is not None:
        parts.append(f"compute capability {gpu.capability}")
    if gpu.memory_bytes is not None:
        parts.append(f"{gib(gpu.memory_bytes)}, {gib(gpu.free_bytes)} free")
    return ", ".join(parts)


def _rate(flops_per_s: float) -> str:
    return f"{flops_per_s / 1e12:.1f} TFLOP/s" if flops_per_s >= 1e12 else f"{flops_per_s / 1e9:.0f} GFLOP/s"


def _write(file: Path, record: dict[str, Any]) -> None:
    try:
        write_json_atomic(file, record)
    except OSError as error:
        raise UserError(f"{file} can't be written ({error.strerror}): give --json another name.") from error

"""Where a run came from: code, command, data, machine and libraries, as plain JSON.

Written into every run folder as `provenance.json`, so that a figure found a year later can be traced to
the code and the images that gave it. It says nothing about who ran it: no user name, no host name and no
path beyond those the command line itself contains.
"""

import os
import platform
import shlex
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from moevision import __version__
from moevision.files import write_json_atomic
from moevision.versions import package_version

__all__ = ["LIBRARIES", "collect_provenance", "write_json_atomic"]

LIBRARIES = ("torch", "torchvision", "timm", "lightning", "torchmetrics", "numpy", "pillow")
_PACKAGE_FOLDER = Path(__file__).resolve().parent.parent
_TIMEOUT_S = 10.0


def collect_provenance(
    *,
    command: list[str],
    seed: int | None,
    data_sha256: str | None,
    started: datetime | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Collect what a reader needs to repeat this run.

    Args:
        command: the program and its arguments as given, e.g. `sys.argv`.
        seed: the seed of the run; None if it wasn't seeded.
        data_sha256: hash over the list of files with their splits; None where the data has no files.
        started: when the run began, with a time zone; None = now.
        extra: further JSON primitives, kept under `run` (e.g. the backend that a timing chose).

    Returns:
        JSON primitives only, ready for `write_json_atomic`.

    Raises:
        ValueError: `started` has no time zone, so its UTC time can't be known.
    """
    moment = datetime.now(UTC) if started is None else started
    if moment.tzinfo is None:
        raise ValueError("started needs a time zone, e.g. datetime.now(UTC)")
    return {
        "moevision": __version__,
        "code": git_state(_PACKAGE_FOLDER),
        "command": list(command),
        "command_line": shlex.join(command),
        "started_utc": moment.astimezone(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "data": {"file_list_sha256": data_sha256},
        "hardware": _hardware(),
        "os": {"system": platform.system(), "release": platform.release(), "machine": platform.machine()},
        "python": {"implementation": platform.python_implementation(), "version": platform.python_version()},
        "libraries": {name: package_version(name) for name in LIBRARIES},
        "determinism": _determinism(),
        "run": dict(extra or {}),
    }


def git_state(folder: Path, *others: Path) -> dict[str, Any] | None:
    """Commit and dirty flag of the checkout that `folder` is a tracked part of; None if there is none.

    Tracked is the point: a wheel installed into a virtual environment inside somebody else's repository
    must not be labelled with that repository's commit. `dirty` means that a file below `folder`, or one of
    `others` in the same checkout, differs from the commit or is new; edits elsewhere (a README, a record that
    a study has just written) don't change what ran.
    """
    if not _git(folder, "ls-files", "--", "."):
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    status = _git(folder, "status", "--porcelain", "--", ".", *map(str, others))
    if not commit or status is None:
        return None
    return {"git_commit": commit, "dirty": bool(status)}


def _git(folder: Path, *arguments: str) -> str | None:
    # A hook or a parent git process may point these variables at another repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment["GIT_OPTIONAL_LOCKS"] = "0"  # looking must not write the index of a repository in use
    return _output_of(["git", *arguments], folder, environment)


def _output_of(command: list[str], folder: Path, environment: dict[str, str]) -> str | None:
    """What a command prints, stripped; None where it is missing, fails or takes too long."""
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _hardware() -> dict[str, Any]:
    memory = total_memory_bytes()
    return {
        "cpu": cpu_model(),
        "logical_cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": None if memory is None else round(memory / 2**30, 1),
        "gpus": gpu_names(),
    }


def cpu_model() -> str:
    """The processor's name as the system states it, e.g. `AMD EPYC 7B13`; the architecture if it doesn't."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():  # Arm kernels have no such line
                return value.strip()
    if platform.system() == "Darwin":
        brand = _output_of(["sysctl", "-n", "machdep.cpu.brand_string"], _PACKAGE_FOLDER, dict(os.environ))
        if brand:
            return brand
    return platform.processor() or platform.machine() or "unknown"


def total_memory_bytes() -> int | None:
    """Physical memory of the machine; None where the system has no plain way to ask (Windows)."""
    names = getattr(os, "sysconf_names", {})
    if "SC_PAGE_SIZE" not in names or "SC_PHYS_PAGES" not in names:
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def gpu_names() -> list[str]:
    """Names of the accelerators that torch sees, one per device; empty on a plain CPU machine."""
    if torch.cuda.is_available():
        return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ["Apple MPS"] if torch.backends.mps.is_available() else []


def _determinism() -> dict[str, Any]:
    return {
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "environment": {name: os.environ.get(name) for name in ("PYTHONHASHSEED", "CUBLAS_WORKSPACE_CONFIG")},
    }

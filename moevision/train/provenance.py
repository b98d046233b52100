"""Provenance: code, command, data, machine and libraries that the numbers of a run depend on, as plain JSON.

Written into every run folder as `provenance.json`, and as a fingerprint into every checkpoint: a resumed run is
bit-identical to an uninterrupted one if the fingerprint is the same, and `differences` lists what has changed, before
anything starts. No user name, no host name, and no path beyond those in the command line itself.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moevision import __version__, package_version
from moevision.limits import physical_memory_bytes, usable_cores
from moevision.types import Json

if TYPE_CHECKING:
    from lightning import Trainer

    from moevision.data import ImageDataModule

LIBRARIES = ("torch", "torchvision", "timm", "lightning", "torchmetrics", "numpy", "pillow")
_PACKAGE_FOLDER = Path(__file__).resolve().parent.parent
# What a user calls the parts of a fingerprint; libraries go by their own names.
_LABELS = {
    "processor": "the processor",
    "device": "the device",
    "threads": "the number of threads (OMP_NUM_THREADS)",
    "world_size": "the number of processes (--trainer.devices)",
    "images_per_step": "the number of images of a step",
    "precision": "the precision",
    "matmul_precision": "the precision of float32 products",
    "backend": "the experts' backend",
    "compile": "compilation",
    "python": "Python",
}


def collect_provenance(
    *,
    command: list[str],
    seed: int | None,
    data_sha256: str | None,
    started: datetime | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Json:
    """What a reader needs to repeat this run, as JSON primitives; `extra` are further entries, under the key `run`."""
    memory = physical_memory_bytes()
    return {
        "moevision": __version__,
        # A checkout has the shipped configurations beside the package; in a wheel they are inside.
        "code": git_state(_PACKAGE_FOLDER, _PACKAGE_FOLDER.parent / "configs"),
        "command": list(command),
        "command_line": shlex.join(command),
        "started_utc": (started or datetime.now(UTC)).astimezone(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "data": {"file_list_sha256": data_sha256},
        "hardware": {
            "cpu": cpu_model(),
            "logical_cores": os.cpu_count(),
            "usable_cores": usable_cores(),
            "torch_threads": torch.get_num_threads(),
            "memory_gib": None if memory is None else round(memory / 2**30, 1),
            "gpus": gpu_names(),
        },
        "os": {
            "system": platform.system(),
            "release": platform.release(),
            "machine": platform.machine(),
        },
        "python": {
            "implementation": platform.python_implementation(),
            "version": platform.python_version(),
        },
        "libraries": {name: package_version(name) for name in LIBRARIES},
        "determinism": {
            "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
            "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
            "cudnn_deterministic": torch.backends.cudnn.deterministic,
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "environment": {
                name: os.environ.get(name) for name in ("PYTHONHASHSEED", "CUBLAS_WORKSPACE_CONFIG")
            },
        },
        "run": dict(extra or {}),
    }


def git_state(folder: Path, *others: Path) -> Json | None:
    """Commit and dirty flag of the checkout that `folder` is a tracked part of; None if there is none.

    It must be tracked: a wheel installed within somebody else's repository must not get its commit. `dirty` means
    that a file below `folder` or one of `others` differs from the commit or is new; other edits don't change what ran.
    """

    def git(*arguments: str) -> str | None:
        return _output_of(["git", "-C", str(folder), *arguments])

    if not git("ls-files", "--", "."):
        return None
    commit = git("rev-parse", "HEAD")
    status = git("status", "--porcelain", "--", ".", *map(str, others))
    if not commit or status is None:
        return None
    return {"git_commit": commit, "dirty": bool(status)}


def _output_of(command: list[str]) -> str | None:
    """The output of a command; None where it is missing or fails."""
    # Variables of a hook or a parent git process may name another repository; and `status` must not rewrite the index.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment["GIT_OPTIONAL_LOCKS"] = "0"
    try:
        process = subprocess.run(command, env=environment, capture_output=True)
    except OSError:
        return None
    if process.returncode:
        return None
    return process.stdout.decode(errors="replace").strip()


def cpu_model() -> str:
    """The processor's name as the system states it, e.g. `AMD EPYC 7B13`; the architecture if it doesn't."""
    if platform.system() == "Darwin":
        return _output_of(["sysctl", "-n", "machdep.cpu.brand_string"]) or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, name = line.partition(":")
            if key.strip() == "model name" and name.strip():
                return name.strip()
    # On Arm /proc/cpuinfo has no model name.
    return platform.processor() or platform.machine() or "unknown"


def gpu_names() -> list[str]:
    """Names of the GPUs that torch sees, one per device; empty on a plain CPU machine."""
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def device_name(trainer: Trainer) -> str:
    """The device's name for people."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads)"
    return device.type


def fingerprint(trainer: Trainer, task: Any, data: ImageDataModule) -> dict[str, str | int | bool]:
    """The hardware, software, options and data that numbers depend on, as primitives.

    Images are told by two hashes, of the list with splits and labels, and of the files' sizes: a file that was replaced
    by one of the same size isn't noticed.
    """
    device = trainer.strategy.root_device
    return {
        "processor": cpu_model(),
        # the name of a CPU has the threads, which have a row of their own
        "device": device.type if device.type == "cpu" else device_name(trainer),
        "threads": torch.get_num_threads(),
        "world_size": trainer.world_size,
        "images_per_step": data.batch_size * trainer.world_size * trainer.accumulate_grad_batches,
        "precision": str(trainer.precision),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "backend": task.arch.backend or "auto",
        "compile": task.compile_blocks,
        "python": platform.python_version(),
        "moevision": __version__,
        "data": data.file_list_sha256(),
        "sizes": data.file_sizes_sha256(),
        **{name: package_version(name) or "none" for name in LIBRARIES},
    }


def differences(saved: Json, current: Json) -> list[str]:
    """A phrase for everything that is not as it was, such as `the number of threads was 4, now 1`.

    What `saved` doesn't know, as the sizes in old checkpoints, isn't compared.
    """
    changed = [name for name in current if name in saved and saved[name] != current[name]]
    hashed = ("data", "sizes")
    phrases = [
        f"{_LABELS.get(name, name)} was {saved[name]}, now {current[name]}"
        for name in changed
        if name not in hashed
    ]
    if "data" in changed:
        phrases.append("the list of images is another one")
    elif "sizes" in changed:  # with another list they differ anyway
        phrases.append("image files have other sizes than then, so other contents")
    return phrases

"""`moevision doctor`: what limits this machine, and what to change.

`look` collects facts, `findings` judges them, so that every rule can be shown a machine that breaks it.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from moevision.limits import (
    ROOT,
    cpu_quota,
    memory_available_bytes,
    memory_limit_bytes,
    total_memory_bytes,
    usable_cores,
)
from moevision.train.provenance import cpu_model
from moevision.train.recipe import default_precision

MEMORY_BYTES = 2 * 2**30  # a step of the micro model at batch 128 took 1.3 GiB with Lightning loaded
DISK_BYTES = 2 * 2**30
SHM_BYTES = 512 * 2**20  # Docker gives 64 MiB; four workers with two prepared batches of 64 x 224 px want about 300


@dataclass(frozen=True)
class Gpu:
    """One GPU."""

    name: str
    capability: str  # such as "9.0"
    memory_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Machine:
    """What this process can use; None where the system doesn't say or sets no limit."""

    cpu: str
    cores: int  # logical
    usable_cores: int  # that this process may run on
    quota_cores: float | None  # cores' worth of time that the control group grants
    threads: int  # of torch
    omp_num_threads: str | None  # the environment variable
    memory_bytes: int | None
    memory_limit_bytes: int | None  # the control group's
    memory_available_bytes: int | None
    shm_bytes: int | None  # size of /dev/shm, through which data workers hand over batches
    disk_free_bytes: int  # in the current folder
    gpus: list[Gpu]  # that torch can use
    nvidia_card: bool  # whether the system has one, for torch or not
    torch: dict[str, str | None]  # version, and the CUDA or ROCm that it was built for
    device: str  # where moevision trains here
    precision: str  # and in which, if nobody says otherwise


@dataclass(frozen=True)
class Finding:
    """One thing that limits, and what to do about it."""

    what: str
    advice: str


def run(chosen: Namespace) -> None:
    """Print facts and findings."""
    machine = look()
    found = findings(machine)
    if chosen.format == "json":
        print(json.dumps({"machine": asdict(machine), "findings": [asdict(finding) for finding in found]}, indent=2))
    else:
        print_report(Console(highlight=False), machine, found)


def print_report(console: Console, machine: Machine, found: list[Finding]) -> None:
    """The facts, then the findings."""
    cores = f"{machine.cores} logical, {machine.usable_cores} usable, {machine.threads} threads of torch"
    if machine.quota_cores is not None:
        cores += f", control group's limit {machine.quota_cores:g}"
    sizes = {
        "": machine.memory_bytes,
        "control group's limit ": machine.memory_limit_bytes,
        "free ": machine.memory_available_bytes,
        "/dev/shm ": machine.shm_bytes,
        "disk free ": machine.disk_free_bytes,
    }
    built = machine.torch
    built_for = f"CUDA {built['cuda']}" if built["cuda"] else f"ROCm {built['hip']}" if built["hip"] else "no GPU"
    gpus = []
    for gpu in machine.gpus:
        gpus.append(f"{gpu.name}, {gib(gpu.memory_bytes)}, {gib(gpu.free_bytes)} free")
    table = Table.grid(padding=(0, 2))
    table.add_row("CPU", machine.cpu)
    table.add_row("cores", cores)
    table.add_row("memory", ", ".join(f"{name}{gib(size)}" for name, size in sizes.items() if size is not None))
    table.add_row("GPU", "\n".join(gpus) or "none that torch can use")
    table.add_row("torch", f"{built['version']}, built for {built_for}")
    table.add_row("trains on", f"{machine.device}, precision {machine.precision}, unless you say otherwise")
    console.print(table)
    if not found:
        console.print("\nNothing limits this machine that this command knows of.")
        return
    console.print("\nwhat limits it now, and what to change")
    for number, finding in enumerate(found, 1):
        console.print(f"{number:2}. {finding.what}\n    -> {finding.advice}", markup=False, soft_wrap=True)


# ---- rules


def findings(machine: Machine) -> list[Finding]:
    """All rules that apply, the costliest first: the wrong device, then cores, then memory."""
    rules = (_gpu, _threads, _memory)
    return [Finding(what, advice) for rule in rules for what, advice in rule(machine)]


def _gpu(machine: Machine) -> Iterator[tuple[str, str]]:
    version, cuda = machine.torch["version"], machine.torch["cuda"]
    if machine.nvidia_card and not machine.gpus and cuda is None:
        yield (
            f"There is an NVIDIA card, but torch {version} was built without CUDA.",
            "Install a torch for CUDA: https://pytorch.org/get-started/locally/",
        )
    elif machine.nvidia_card and not machine.gpus:
        yield (
            f"There is an NVIDIA card, but torch {version} (CUDA {cuda}) can't use it.",
            "Check that CUDA_VISIBLE_DEVICES doesn't hide it and that `nvidia-smi` shows a driver for at least that "
            "CUDA version.",
        )
    for gpu in machine.gpus:
        if gpu.free_bytes < 0.8 * gpu.memory_bytes:
            yield (
                f"Of the {gib(gpu.memory_bytes)} of {gpu.name} only {gib(gpu.free_bytes)} are free.",
                "See with `nvidia-smi` what else runs there, and end it or take another card with "
                "CUDA_VISIBLE_DEVICES.",
            )


def _threads(machine: Machine) -> Iterator[tuple[str, str]]:
    """Threads against the whole cores that they can have at once: allowed ones, within the control group's time."""
    quota = machine.usable_cores if machine.quota_cores is None else math.ceil(machine.quota_cores)
    cores = max(1, min(machine.usable_cores, quota))
    if machine.threads < cores and machine.device == "cpu":
        given = machine.omp_num_threads
        yield (
            f"torch uses {machine.threads} of {cores} usable cores"
            + ("." if given is None else f" because OMP_NUM_THREADS is {given}."),
            ("Unset OMP_NUM_THREADS" if given is not None else f"Set OMP_NUM_THREADS={cores}")
            + ", unless several trainings share this machine.",
        )
    if machine.threads > cores:
        why = f"this process may use {machine.usable_cores} of {machine.cores} cores"
        if machine.quota_cores is not None and machine.quota_cores < machine.usable_cores:
            why = f"its control group grants {machine.quota_cores:g} cores' worth of time"
        yield (
            f"torch uses {machine.threads} threads, but {why}; threads that wait for each other are slower than few.",
            f"Set OMP_NUM_THREADS={cores}.",
        )


def _memory(machine: Machine) -> Iterator[tuple[str, str]]:
    free, limit = machine.memory_available_bytes, machine.memory_limit_bytes
    if free is not None and free < MEMORY_BYTES:
        granted = "" if limit is None else f" (the control group grants {gib(limit)})"
        yield (
            f"{gib(free)} of memory are free{granted}.",
            "End other programs, or train with a smaller --data.batch_size and --trainer.accumulate_grad_batches.",
        )
    if machine.shm_bytes is not None and machine.shm_bytes < SHM_BYTES:
        yield (
            f"/dev/shm holds {gib(machine.shm_bytes)}; data workers hand batches over through it and die when it is "
            "full.",
            "Start the container with --shm-size=2g, or keep --data.num_workers 0.",
        )
    if machine.disk_free_bytes < DISK_BYTES:
        yield (
            f"The disk of this folder has {gib(machine.disk_free_bytes)} left; a run keeps several checkpoints.",
            "Make room, or write elsewhere with --runs_root.",
        )


def gib(size_bytes: int) -> str:
    """A size in GiB, or MiB below one."""
    return f"{size_bytes / 2**30:.1f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.0f} MiB"


# ---- facts


def look(root: Path = ROOT) -> Machine:
    """Collect the facts."""
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Machine(
        cpu=cpu_model(),
        cores=os.cpu_count() or 1,
        usable_cores=usable_cores(),
        quota_cores=cpu_quota(root),
        threads=torch.get_num_threads(),
        omp_num_threads=os.environ.get("OMP_NUM_THREADS"),
        memory_bytes=total_memory_bytes(),
        memory_limit_bytes=memory_limit_bytes(root),
        memory_available_bytes=memory_available_bytes(root),
        shm_bytes=shutil.disk_usage(root / "dev/shm").total if (root / "dev/shm").is_dir() else None,
        disk_free_bytes=shutil.disk_usage(Path.cwd()).free,
        gpus=_gpus(cards),
        nvidia_card=shutil.which("nvidia-smi") is not None or (root / "proc/driver/nvidia/version").exists(),
        torch={"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip},
        device="cuda" if cards else "cpu",
        precision=default_precision(),
    )


def _gpus(cards: int) -> list[Gpu]:
    found = []
    for index in range(cards):
        card = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found.append(Gpu(card.name, f"{card.major}.{card.minor}", total, free))
    return found

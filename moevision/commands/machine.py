"""`moevision info --machine`: what limits a training on this machine, and what to change."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from moevision.limits import cpu_quota, memory_available_bytes, usable_cores
from moevision.train.provenance import cpu_model, gpu_names
from moevision.train.recipe import default_precision

GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """What this process can use; None where the system doesn't say."""

    cpu: str
    cores: int  # that it may run on, within the time that its control group grants
    threads: int  # of torch
    gpus: list[str]  # that torch can use
    nvidia_card: bool  # for torch or not
    torch: str
    cuda: str | None  # that torch was built for
    precision: str  # of fit, if nobody says otherwise
    memory_gib: float | None  # free
    shm_gib: float | None  # of /dev/shm, through which data workers hand over batches
    disk_gib: float  # free in the current folder


def show(*, as_json: bool) -> None:
    """Print facts and findings."""
    machine = look()
    found = [{"what": what, "advice": advice} for what, advice in findings(machine)]
    if as_json:
        print(json.dumps({"machine": asdict(machine), "findings": found}, indent=2))
        return
    print("\n".join(f"{name:12} {value}" for name, value in asdict(machine).items()))
    for finding in found:
        print(f"\n{finding['what']}\n-> {finding['advice']}")


def findings(machine: Machine) -> Iterator[tuple[str, str]]:
    """What limits, and what to do about it: the wrong device first, then cores, then memory."""
    if machine.nvidia_card and not machine.gpus:
        yield (
            f"There is an NVIDIA card, but torch {machine.torch} (CUDA: {machine.cuda}) can't use it.",
            "Install a torch for CUDA (https://pytorch.org/get-started/locally/); if it is one, check that "
            "CUDA_VISIBLE_DEVICES doesn't hide the card and that `nvidia-smi` shows a driver for that CUDA.",
        )
    if machine.threads > machine.cores or (machine.threads < machine.cores and not machine.gpus):
        yield (
            f"torch uses {machine.threads} threads, and this process may use {machine.cores} cores.",
            f"Set OMP_NUM_THREADS={machine.cores}, or less if several trainings share this machine.",
        )
    for size, least, what, advice in (
        (machine.memory_gib, 2, "GiB of memory are free", "End other programs, or use a smaller --data.batch_size and "
            "more --trainer.accumulate_grad_batches."),
        (machine.shm_gib, 0.5, "GiB has /dev/shm, and data workers die when it is full", "Start the container with "
            "--shm-size=2g, or keep --data.num_workers 0."),
        (machine.disk_gib, 2, "GiB are left on the disk of this folder, and a run keeps several checkpoints",
            "Make room, or write elsewhere with --runs_root."),
    ):  # fmt: skip
        if size is not None and size < least:
            yield f"Only {size} {what}.", advice


def look() -> Machine:
    """Collect the facts."""
    memory, shm = memory_available_bytes(), Path("/dev/shm")
    return Machine(
        cpu=cpu_model(),
        cores=max(1, min(usable_cores(), math.ceil(cpu_quota() or usable_cores()))),
        threads=torch.get_num_threads(),
        gpus=gpu_names() if torch.cuda.is_available() else [],
        nvidia_card=shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        precision=default_precision(),
        memory_gib=None if memory is None else round(memory / GIB, 2),
        shm_gib=round(shutil.disk_usage(shm).total / GIB, 2) if shm.is_dir() else None,
        disk_gib=round(shutil.disk_usage(".").free / GIB, 2),
    )

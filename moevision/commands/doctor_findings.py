"""What limits this machine now, and one sentence each on what to change.

Rules on facts alone: nothing is looked up here, so every rule can be shown a machine that breaks it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from moevision.commands.doctor_machine import Choices, Machine, Measured

BUSY_SHARE = 0.1  # of the usable cores in the hands of others: beyond it timings can't be compared
STOLEN_SHARE = 0.02  # of them taken by the host
MEMORY_BYTES = 2 * 2**30  # a step of the micro model at batch 128 took 1.3 GiB with Lightning loaded
DISK_BYTES = 2 * 2**30
SHM_BYTES = 512 * 2**20  # Docker gives 64 MiB; four workers with two prepared batches of 64 x 224 px want about 300
BF16_GAIN = 1.1  # below it bfloat16 costs accuracy for nothing
_INSTALL = "https://pytorch.org/get-started/locally/"


@dataclass(frozen=True)
class Finding:
    """One thing that limits.

    Attributes:
        what: what is so.
        advice: what to do about it.
    """

    what: str
    advice: str


def findings(machine: Machine, choices: Choices, measured: Measured | None) -> list[Finding]:
    """All rules that apply, the costliest first: the wrong device, then cores, precision, memory, tools, meters."""
    return [
        *_gpu(machine),
        *_threads(machine, choices),
        *_company(machine),
        *_precision(machine, choices, measured),
        *_memory(machine),
        *_tools(machine, choices),
        *_energy(machine),
    ]


def _gpu(machine: Machine) -> Iterator[Finding]:
    cuda_cards = [gpu for gpu in machine.gpus if gpu.capability is not None]
    if machine.nvidia_card and not cuda_cards:
        if machine.torch["cuda"] is None:
            yield Finding(
                f"There is an NVIDIA card, but torch {machine.torch['version']} was built without CUDA.",
                f"Install a torch for CUDA: {_INSTALL}",
            )
        else:
            yield Finding(
                f"There is an NVIDIA card, but torch {machine.torch['version']} (CUDA {machine.torch['cuda']}) can't "
                "use it.",
                "Check that CUDA_VISIBLE_DEVICES doesn't hide it and that `nvidia-smi` shows a driver for at least "
                "that CUDA version.",
            )
    for gpu in cuda_cards:
        if gpu.memory_bytes and gpu.free_bytes is not None and gpu.free_bytes < 0.8 * gpu.memory_bytes:
            yield Finding(
                f"Of the {gib(gpu.memory_bytes)} of {gpu.name} only {gib(gpu.free_bytes)} are free.",
                "See with `nvidia-smi` what else runs there, and end it or take another card with "
                "CUDA_VISIBLE_DEVICES.",
            )


def _threads(machine: Machine, choices: Choices) -> Iterator[Finding]:
    cores = usable(machine)
    set_by_hand = machine.omp_num_threads is not None
    if machine.threads < cores and choices.device == "cpu":
        advice = (
            "Unset OMP_NUM_THREADS" if set_by_hand else f"Set OMP_NUM_THREADS={cores}"
        ) + ", unless several trainings share this machine."
        given = f" because OMP_NUM_THREADS is {machine.omp_num_threads}" if set_by_hand else ""
        yield Finding(f"torch uses {machine.threads} of {cores} usable cores{given}.", advice)
    if machine.threads > cores:
        why = f"this process may use {machine.usable_cores} of {machine.logical_cores} cores"
        if machine.quota_cores is not None and machine.quota_cores < machine.usable_cores:
            why = f"its control group grants {machine.quota_cores:g} cores' worth of time"
        yield Finding(
            f"torch uses {machine.threads} threads, but {why}; threads that wait for each other are slower than few.",
            f"Set OMP_NUM_THREADS={cores}.",
        )


def _company(machine: Machine) -> Iterator[Finding]:
    cores = machine.usable_cores
    if machine.others_busy_cores is not None and machine.others_busy_cores > BUSY_SHARE * cores:
        yield Finding(
            f"Other programs keep {machine.others_busy_cores:.1f} of {cores} cores busy right now.",
            "End them or wait: what is measured meanwhile, here too, is too slow and can't be compared.",
        )
    if machine.stolen_cores is not None and machine.stolen_cores > STOLEN_SHARE * cores:
        yield Finding(
            f"The host of this virtual machine took {machine.stolen_cores:.2f} of {cores} cores for others.",
            "Measure ratios in one run, interleaved, rather than seconds; or rent dedicated cores.",
        )


def _precision(machine: Machine, choices: Choices, measured: Measured | None) -> Iterator[Finding]:
    for gpu in machine.gpus:
        if not gpu.bf16:
            yield Finding(
                f"{gpu.name} (compute capability {gpu.capability}) doesn't multiply bfloat16 itself.",
                "Train with --trainer.precision 16-mixed, which is the default there.",
            )
    if choices.device == "cpu" and not machine.mkldnn:
        yield Finding(
            "This torch has no oneDNN, so bfloat16 and convolutions are slow.", f"Install torch from {_INSTALL}."
        )
    if measured is None or choices.precision == "32-true" or choices.precision not in measured.peaks:
        return
    gain = measured.peaks[choices.precision].flops_per_s / measured.peaks["32-true"].flops_per_s
    if gain < BF16_GAIN:
        yield Finding(
            f"{choices.precision} multiplies matrices only {gain:.2f} times as fast as 32-true here.",
            "Train with --trainer.precision 32-true.",
        )


def _memory(machine: Machine) -> Iterator[Finding]:
    if machine.memory_available_bytes is not None and machine.memory_available_bytes < MEMORY_BYTES:
        limit = (
            ""
            if machine.memory_limit_bytes is None
            else f" (the control group grants {gib(machine.memory_limit_bytes)})"
        )
        yield Finding(
            f"{gib(machine.memory_available_bytes)} of memory are free{limit}.",
            "End other programs, or train with a smaller --data.batch_size and --trainer.accumulate_grad_batches.",
        )
    if machine.shm_bytes is not None and machine.shm_bytes < SHM_BYTES:
        yield Finding(
            f"/dev/shm holds {gib(machine.shm_bytes)}; data workers hand batches over through it and die when it is "
            "full.",
            "Start the container with --shm-size=2g, or keep --data.num_workers 0.",
        )
    if machine.disk_free_bytes < DISK_BYTES:
        yield Finding(
            f"The disk of this folder has {gib(machine.disk_free_bytes)} left; a run keeps several checkpoints.",
            "Make room, or write elsewhere with --runs_root.",
        )


def _tools(machine: Machine, choices: Choices) -> Iterator[Finding]:
    if machine.compiler is None and choices.device == "cpu":
        yield Finding(
            "There is no C++ compiler, so torch.compile doesn't work on this CPU.",
            "Install one, such as the package g++; nothing else needs it.",
        )


def _energy(machine: Machine) -> Iterator[Finding]:
    for device, counter in machine.energy.items():
        if "reason" in counter:
            advice = counter["advice"]
            yield Finding(
                f"Energy of {device.upper()} is not measured: {counter['reason']}.", f"{advice[0].upper()}{advice[1:]}."
            )


def usable(machine: Machine) -> int:
    """Whole cores that threads can have at once: allowed ones, within the control group's time."""
    quota = machine.usable_cores if machine.quota_cores is None else math.ceil(machine.quota_cores)
    return max(1, min(machine.usable_cores, quota))


def gib(size_bytes: int) -> str:
    """A size in GiB, or MiB below one."""
    return f"{size_bytes / 2**30:.1f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.0f} MiB"

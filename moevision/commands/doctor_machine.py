"""The facts that `moevision doctor` looks at: hardware, limits, libraries, and what was measured on them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moevision.commands import doctor_limits as limits
from moevision.efficiency import MatmulPeak, copy_bandwidth, flop_counter, matmul_peak
from moevision.efficiency.energy import NotMeasured, open_counter
from moevision.layers import Experts
from moevision.train.provenance import LIBRARIES, cpu_model, total_memory_bytes
from moevision.train.recipe import default_precision
from moevision.versions import package_version

_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_PRECISION = {torch.float32: "32-true", torch.bfloat16: "bf16-mixed", torch.float16: "16-mixed"}


@dataclass(frozen=True)
class Gpu:
    """One accelerator.

    Attributes:
        name: the vendor's name.
        capability: e.g. "9.0"; None if it isn't CUDA.
        memory_bytes: what it has; None if the system shares its own.
        free_bytes: what is free now.
        bf16: whether it multiplies bfloat16 itself.
    """

    name: str
    capability: str | None
    memory_bytes: int | None
    free_bytes: int | None
    bf16: bool


@dataclass(frozen=True)
class Machine:
    """What this process can use.

    Attributes:
        cpu: the processor's name.
        cpu_flags: its vector and matrix instructions.
        physical_cores: without second threads; None if unknown.
        logical_cores: all of them.
        usable_cores: those that this process may run on.
        quota_cores: what its control group grants; None without a limit.
        threads: of torch.
        omp_num_threads: the environment variable.
        others_busy_cores: cores' worth of other programs, right now; None if unknown.
        stolen_cores: cores' worth that a virtual machine's host took, right now.
        memory_bytes: the machine's.
        memory_limit_bytes: the control group's; None without a limit.
        memory_available_bytes: what can be had now.
        shm_bytes: size of /dev/shm, through which data workers hand over batches; None if there is none.
        disk_free_bytes: where runs are written, i.e. in the current folder.
        gpus: what torch can use.
        nvidia_card: whether the system has an NVIDIA card, for torch or not.
        torch: version, and what it was built for.
        mkldnn: whether torch has oneDNN, which multiplies bfloat16 on CPUs.
        libraries: versions.
        compiler: the C++ compiler for torch.compile on a CPU; None if there is none.
        energy: domain of the energy counter, by device; or why there is none.
    """

    cpu: str
    cpu_flags: list[str]
    physical_cores: int | None
    logical_cores: int
    usable_cores: int
    quota_cores: float | None
    threads: int
    omp_num_threads: str | None
    others_busy_cores: float | None
    stolen_cores: float | None
    memory_bytes: int | None
    memory_limit_bytes: int | None
    memory_available_bytes: int | None
    shm_bytes: int | None
    disk_free_bytes: int
    gpus: list[Gpu]
    nvidia_card: bool
    torch: dict[str, str | None]
    mkldnn: bool
    libraries: dict[str, str | None]
    compiler: str | None
    energy: dict[str, dict[str, str]]


@dataclass(frozen=True)
class Measured:
    """Rates of the device that training would use.

    Attributes:
        device: `cpu`, `cuda` or `mps`.
        peaks: the matmul peak by precision.
        copy_bytes_per_s: a large copy, reading and writing counted.
    """

    device: str
    peaks: dict[str, MatmulPeak]
    copy_bytes_per_s: float


@dataclass(frozen=True)
class Choices:
    """What moevision does on this machine if nobody says otherwise.

    Attributes:
        device: where it trains.
        precision: Lightning's name.
        backend: what `backend="auto"` runs in that precision: `grouped` (one `grouped_mm`) or `loop`.
    """

    device: str
    precision: str
    backend: str


def look(root: Path = limits.ROOT) -> Machine:
    """Collect the facts; half a second, in which the load of other programs is observed."""
    load = limits.current_load(root)
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return Machine(
        cpu=cpu_model(),
        cpu_flags=limits.cpu_flags(root),
        physical_cores=limits.physical_cores(root),
        logical_cores=os.cpu_count() or 1,
        usable_cores=limits.usable_cores(),
        quota_cores=limits.cpu_quota(root),
        threads=torch.get_num_threads(),
        omp_num_threads=os.environ.get("OMP_NUM_THREADS"),
        others_busy_cores=None if load is None else load.busy,
        stolen_cores=None if load is None else load.stolen,
        memory_bytes=total_memory_bytes(),
        memory_limit_bytes=limits.memory_limit_bytes(root),
        memory_available_bytes=limits.memory_available_bytes(root),
        shm_bytes=shutil.disk_usage(root / "dev/shm").total if (root / "dev/shm").is_dir() else None,
        disk_free_bytes=shutil.disk_usage(Path.cwd()).free,
        gpus=_gpus(),
        nvidia_card=shutil.which("nvidia-smi") is not None or (root / "proc/driver/nvidia/version").exists(),
        torch={"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip},
        mkldnn=torch.backends.mkldnn.is_available(),
        libraries={"moevision": package_version("moevision")} | {name: package_version(name) for name in LIBRARIES},
        compiler=next((path for name in _compilers() if (path := shutil.which(name))), None),
        energy={device: _energy(torch.device(device), root) for device in devices},
    )


def choose() -> Choices:
    """Ask the code that chooses, so that this page can't disagree with it."""
    precision = default_precision()
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    dtype = _AUTOCAST.get(precision, torch.float32)
    experts = Experts(2, 64, 64, 64, device=device)
    rows, counts = torch.zeros(64, 64, device=device), torch.tensor([32, 32], device=device)
    with torch.no_grad(), torch.autocast(device, dtype, enabled=dtype != torch.float32), flop_counter() as counter:
        experts(rows, counts)
    grouped = torch.ops.aten._grouped_mm in counter.get_flop_counts()["Global"]
    return Choices(device, precision, "grouped" if grouped else "loop")


def measure(device: str, report: Callable[[str], None] = lambda _: None) -> Measured:
    """Measure the device that training would use: about a second for each precision.

    Args:
        device: as in `Choices`.
        report: is told what is being measured.
    """
    peaks = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if dtype == torch.float16 and device == "cpu":
            continue  # 30 times slower than float32 there, see matmul_peak
        report(f"multiplying matrices in {str(dtype)[6:]}")
        peaks[_PRECISION[dtype]] = matmul_peak(device, dtype)
    report("copying memory")
    return Measured(device, peaks, copy_bandwidth(device))


def as_record(machine: Machine, choices: Choices, measured: Measured | None) -> dict[str, Any]:
    """Everything as JSON primitives."""
    return {
        "machine": asdict(machine),
        "choices": asdict(choices),
        "measured": None if measured is None else asdict(measured),
    }


def _gpus() -> list[Gpu]:
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        card = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        with torch.cuda.device(index):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        found.append(Gpu(card.name, f"{card.major}.{card.minor}", total, free, bf16))
    if torch.backends.mps.is_available():
        found.append(Gpu("Apple MPS", None, None, None, True))
    return found


def _compilers() -> tuple[str, ...]:
    """In the order in which Inductor looks for one."""
    return (*([os.environ["CXX"]] if os.environ.get("CXX") else []), "g++", "clang++", "cl")


def _energy(device: torch.device, root: Path) -> dict[str, str]:
    try:
        counter = open_counter(device, powercap=root / "sys/class/powercap")
    except NotMeasured as error:
        return {"source": "not measured", "reason": error.reason, "advice": error.advice}
    return {"source": counter.source, "domain": counter.domain}

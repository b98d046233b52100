"""Hardware counters of energy: RAPL of a CPU's packages, NVML of one NVIDIA card.

- RAPL: Linux power capping framework, `Documentation/power/powercap/powercap.rst`; Intel and AMD. A zone `package-N` is
  everything on that socket. Its subzones (core, uncore) are parts of it, dram is separate on servers, and `psys` holds
  the packages: packages alone are added, so that nothing counts twice. Memory is not in them.
- NVML: `nvmlDeviceGetTotalEnergyConsumption`, Volta and newer; the whole board.

A counter that can't be read says why, and what to do about it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal, Protocol

import torch

POWERCAP = Path("/sys/class/powercap")

Source = Literal["nvml", "rapl", "not measured"]


class NotMeasured(Exception):  # noqa: N818 (no error: most machines have no counter)
    """Energy can't be read here.

    Args:
        reason: why.
        advice: what to do about it.
    """

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(f"{reason}; {advice}")
        self.reason, self.advice = reason, advice


class Counter(Protocol):
    """A running total of energy.

    Attributes:
        source: where it comes from.
        domain: what it covers, in words.
        poll_s: read it at least this often; None if it never wraps.
    """

    source: Source
    domain: str
    poll_s: float | None

    def joules(self) -> float:
        """Energy since some fixed moment, in J.

        Raises:
            NotMeasured: if the counter can't be read (any more).
        """


@dataclass
class _Zone:
    """One package: its files, and what has been read of it."""

    path: Path
    name: str
    range_uj: int
    last_uj: int
    total_uj: int = 0


class RaplCounter:
    """The sum over CPU packages.

    A package's counter starts again at 0 after `max_energy_range_uj`, for 262 kJ at 200 W after 22 minutes; it is read
    once a minute at least, so that no turn is missed.

    Args:
        root: the powercap tree.

    Raises:
        NotMeasured: if there is no readable package.
    """

    source: Source = "rapl"
    poll_s: float | None = 60.0

    def __init__(self, root: Path = POWERCAP) -> None:
        self._zones = [_open(path, name) for name, path in sorted(_packages(root).items())]
        if not self._zones:
            raise NotMeasured(
                f"{root} has no CPU package, which virtual machines and containers usually hide",
                "measure on the machine itself",
            )
        self.domain = f"CPU {' + '.join(zone.name for zone in self._zones)}, without memory"

    def joules(self) -> float:
        """Energy since the counter was opened, in J."""
        for zone in self._zones:
            now = _read(zone.path / "energy_uj")
            # The counter takes range_uj + 1 values, 0 to range_uj.
            zone.total_uj += (now - zone.last_uj) % (zone.range_uj + 1)
            zone.last_uj = now
        return sum(zone.total_uj for zone in self._zones) / 1e6


class NvmlCounter:
    """The board of one NVIDIA card.

    Args:
        device: a CUDA device as torch numbers it; the card is found by its UUID, since NVML numbers all cards and
            knows nothing of CUDA_VISIBLE_DEVICES.
        nvml: the module `pynvml`, imported if None.

    Raises:
        NotMeasured: without `nvidia-ml-py`, without a driver, or for a card that has no counter.
    """

    source: Source = "nvml"
    poll_s: float | None = None

    def __init__(self, device: torch.device, nvml: ModuleType | None = None) -> None:
        self._nvml = _import_nvml() if nvml is None else nvml
        card = torch.cuda.get_device_properties(device)
        try:
            self._nvml.nvmlInit()
            self._handle = self._nvml.nvmlDeviceGetHandleByUUID(f"GPU-{card.uuid}")
        except self._nvml.NVMLError as error:
            raise NotMeasured(
                f"NVML doesn't answer for {card.name} ({error})", "load the driver; a MIG slice has no counter"
            ) from error
        self.domain = f"GPU board {card.name}, without the host"
        self.joules()

    def joules(self) -> float:
        """Energy since the driver was loaded, in J."""
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3
        except self._nvml.NVMLError as error:
            raise NotMeasured(
                f"{self.domain}: no energy counter ({error})", "cards before Volta and MIG slices have none"
            ) from error


def open_counter(device: torch.device, *, powercap: Path = POWERCAP, nvml: ModuleType | None = None) -> Counter:
    """The counter that covers a device.

    Raises:
        NotMeasured: if there is none, or it can't be read.
    """
    if device.type == "cpu":
        return RaplCounter(powercap)
    if device.type == "cuda" and torch.version.hip is None:
        return NvmlCounter(device, nvml)
    raise NotMeasured(f"moevision reads no energy counter of {device.type} devices", "use the vendor's own tools")


def _packages(root: Path) -> dict[str, Path]:
    """Name -> folder of each CPU package; `intel-rapl-mmio` shows the same packages again."""
    packages: dict[str, Path] = {}
    try:
        for path in sorted(root.glob("*rapl:*")):
            name = (path / "name").read_text(encoding="ascii").strip()
            if name.startswith("package-"):
                packages.setdefault(name, path)
    except OSError as error:
        raise NotMeasured(f"{error.filename} can't be read ({error.strerror})", "look at its permissions") from error
    return packages


def _open(path: Path, name: str) -> _Zone:
    return _Zone(path, name, _read(path / "max_energy_range_uj"), _read(path / "energy_uj"))


def _read(file: Path) -> int:
    try:
        return int(file.read_text(encoding="ascii"))
    except PermissionError as error:
        # Since CVE-2020-8694 kernels let only root read it: power betrays what other users compute.
        raise NotMeasured(
            f"{file} may be read by root only",
            f"on a machine of your own, `sudo chmod a+r {POWERCAP}/*rapl:*/energy_uj` opens it until the next boot",
        ) from error
    except (OSError, ValueError) as error:
        raise NotMeasured(f"{file} can't be read ({error})", "look at the kernel's messages") from error


def _import_nvml() -> ModuleType:
    try:
        import pynvml
    except ImportError as error:
        raise NotMeasured("nvidia-ml-py isn't installed", "pip install 'moevision[energy]'") from error
    return pynvml  # type: ignore[no-any-return]

"""Energy of a piece of work, read from a hardware counter: RAPL for a CPU's packages, NVML for one NVIDIA card.

What can't be measured is None with the reason, never 0 and never time multiplied by a nominal power. The idle power is
measured right before the work and subtracted. A counter covers all programs on its domain, so nothing else should run,
and one run is an anecdote: report at least three.

- RAPL, Linux `Documentation/power/powercap/powercap.rst`: the zones `package-N` are added. Their subzones are parts of
  them, `psys` holds them, `intel-rapl-mmio` shows them again. Memory is not in them.
- NVML, `nvmlDeviceGetTotalEnergyConsumption`: the whole board, Volta and newer.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch

from benchmarks.timing import rounded

POWERCAP = Path("/sys/class/powercap")
Source = Literal["nvml", "rapl", "not measured"]


class NotMeasured(Exception):  # noqa: N818 (no error: most machines have no counter)
    """Energy can't be read here: why, and what to do about it."""

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(f"{reason}; {advice}")
        self.reason, self.advice = reason, advice


class RaplCounter:
    """J of all CPU packages since it was opened.

    A package's counter starts again at 0 after `max_energy_range_uj` (262 kJ at 200 W: after 22 minutes), so it has to
    be read every `poll_s`.
    """

    source: Source = "rapl"
    poll_s: float | None = 60.0

    def __init__(self, root: Path = POWERCAP) -> None:
        packages: dict[str, Path] = {}
        try:
            for zone in sorted(root.glob("*rapl:*")):
                name = (zone / "name").read_text(encoding="ascii").strip()
                if name.startswith("package-"):
                    packages.setdefault(name, zone)
        except OSError as error:
            raise NotMeasured(
                f"{error.filename} can't be read ({error.strerror})", "look at its permissions"
            ) from error
        if not packages:
            hidden = "which virtual machines and containers usually hide"
            raise NotMeasured(
                f"{root} has no CPU package, {hidden}", "measure on the machine itself"
            )
        self.domain = f"CPU {' + '.join(sorted(packages))}, without memory"
        # The counter takes range + 1 values, 0 to range.
        self._values = {zone: _read(zone / "max_energy_range_uj") + 1 for zone in packages.values()}
        self._last = {zone: _read(zone / "energy_uj") for zone in self._values}
        self._total_uj = 0

    def joules(self) -> float:
        """Energy so far; raises NotMeasured if a package can't be read any more."""
        for zone, values in self._values.items():
            now = _read(zone / "energy_uj")
            self._total_uj += (now - self._last[zone]) % values
            self._last[zone] = now
        return self._total_uj / 1e6


def _read(file: Path) -> int:
    try:
        return int(file.read_text(encoding="ascii"))
    except PermissionError as error:  # since CVE-2020-8694: power betrays what other users compute
        advice = f"on a machine of your own, `sudo chmod a+r {POWERCAP}/*rapl:*/energy_uj` opens it until the next boot"
        raise NotMeasured(f"{file} may be read by root only", advice) from error
    except (OSError, ValueError) as error:
        raise NotMeasured(
            f"{file} can't be read ({error})", "look at the kernel's messages"
        ) from error


class NvmlCounter:
    """J of one card since its driver was loaded."""

    source: Source = "nvml"
    poll_s: float | None = None

    def __init__(self, device: torch.device) -> None:
        try:
            import pynvml as nvml
        except ImportError as error:
            raise NotMeasured("nvidia-ml-py isn't installed", "pip install nvidia-ml-py") from error
        self._nvml, card = nvml, torch.cuda.get_device_properties(device)
        self.domain = f"GPU board {card.name}, without the host"
        try:  # by UUID: NVML numbers all cards and knows nothing of CUDA_VISIBLE_DEVICES
            nvml.nvmlInit()
            self._handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{card.uuid}")
        except nvml.NVMLError as error:
            reason = f"NVML doesn't answer for {card.name} ({error})"
            raise NotMeasured(reason, "load the driver; a MIG slice has no counter") from error
        self.joules()

    def joules(self) -> float:
        """Energy so far; raises NotMeasured for a card without a counter."""
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3
        except self._nvml.NVMLError as error:
            reason = f"{self.domain}: no energy counter ({error})"
            raise NotMeasured(reason, "cards before Volta and MIG slices have none") from error


def open_counter(device: torch.device, *, powercap: Path = POWERCAP) -> RaplCounter | NvmlCounter:
    """The counter that covers a device; raises NotMeasured if there is none, or it can't be read."""
    if device.type == "cpu":
        return RaplCounter(powercap)
    if device.type == "cuda" and torch.version.hip is None:
        return NvmlCounter(device)
    raise NotMeasured(
        f"no energy counter is read of {device.type} devices", "use the vendor's own tools"
    )


@dataclass(frozen=True)
class EnergyReading:
    """Energy of a piece of work.

    Attributes:
        energy_j: J that the work added to idling; None if nothing was measured. Work too short to stand out of the
            noise of the idle power may come out below 0.
        idle_power_w: W before the work; None if nothing was measured.
        seconds: wall time of the work.
        source: `nvml`, `rapl` or `not measured`.
        domain: what the counter covers; empty if there is none.
        reason: why nothing was measured, and what to do; empty if it was.
    """

    energy_j: float | None
    idle_power_w: float | None
    seconds: float
    source: Source
    domain: str
    reason: str


class EnergyMeter:
    """Measure the energy of what runs inside the scope; on a GPU, its ends wait for what was started there.

    Args:
        device: where the work runs.
        idle_s: seconds of idling to measure first. Keep the model loaded: a card with a context idles higher.
        powercap: the powercap tree of Linux.

    Attributes:
        reading: what the scope took; there after it.
    """

    reading: EnergyReading

    def __init__(
        self, device: torch.device | str, *, idle_s: float = 5.0, powercap: Path = POWERCAP
    ) -> None:
        if idle_s <= 0:
            raise ValueError(
                f"idle_s={idle_s}: without an idle time there is no idle power to subtract"
            )
        self.device, self.idle_s, self._powercap = torch.device(device), idle_s, powercap

    def __enter__(self) -> Self:
        self._fault, self._lock, self._stop = "", threading.Lock(), threading.Event()
        try:
            self._counter = open_counter(self.device, powercap=self._powercap)
            joules, seconds = self._now()
            time.sleep(self.idle_s)
            self._start_j, self._start_s = self._now()
            self._idle_w = (self._start_j - joules) / (self._start_s - seconds)
            if self._counter.poll_s is not None:
                poll = (self._counter.poll_s,)
                threading.Thread(
                    target=self._poll, args=poll, name="energy counter", daemon=True
                ).start()
        except NotMeasured as error:
            self._fault, self._start_s = str(error), time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        try:
            joules, now = (0.0, time.monotonic()) if self._fault else self._now()
        except NotMeasured as silent:  # a counter that falls silent takes the whole figure with it
            self._fault, now = str(silent), time.monotonic()
        seconds = now - self._start_s
        if self._fault:
            self.reading = EnergyReading(None, None, seconds, "not measured", "", self._fault)
            return
        added = joules - self._start_j - self._idle_w * seconds
        self.reading = EnergyReading(
            added, self._idle_w, seconds, self._counter.source, self._counter.domain, ""
        )

    def _now(self) -> tuple[float, float]:
        """(J, s) of one moment."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        with self._lock:
            return self._counter.joules(), time.monotonic()

    def _poll(self, every_s: float) -> None:
        """In a thread: read a counter that wraps, until the scope ends."""
        while not self._stop.wait(every_s):
            try:
                with self._lock:
                    self._counter.joules()
            except NotMeasured as error:
                self._fault = str(error)  # a turn of the counter may be missed from now on
                return


def joules_per_image(reading: EnergyReading, images: int) -> float | None:
    """J per image above idle; None if nothing was measured."""
    return None if reading.energy_j is None else reading.energy_j / images


RUNS = 3
_RUN_S = 5.0  # counters tick slowly: a run must be long beside their step


def energy_of(run: Callable[[], object], images: int, device: torch.device) -> dict[str, Any]:
    """Energy of repeated work above the machine's idle power.

    Args:
        run: one pass, such as a training step.
        images: images that one pass works on.
        device: whose counters are read.

    Returns:
        `joules_per_image` of each of three runs with their median, `source` and `domain`; or `energy`: "not measured"
        with the `reason`.
    """
    with EnergyMeter(device, idle_s=0.01) as meter:
        pass
    per_image: list[float] = []
    for _ in range(RUNS if meter.reading.energy_j is not None else 0):
        passes, start = 0, time.perf_counter()
        with EnergyMeter(device) as meter:
            while time.perf_counter() - start < _RUN_S or passes == 0:
                run()
                passes += 1
        if (value := joules_per_image(meter.reading, passes * images)) is None:
            break
        per_image.append(rounded(value))
    if meter.reading.energy_j is None:
        return {"energy": "not measured", "reason": meter.reading.reason}
    return {
        "energy": "measured",
        "joules_per_image": per_image,
        "median": statistics.median(per_image),
        "source": meter.reading.source,
        "domain": meter.reading.domain,
    }


def energy_text(energy: dict[str, Any]) -> str:
    """In words."""
    if energy["energy"] == "measured":
        return f"{energy['median']:.3g} J/image above idle ({energy['domain']})"
    return f"not measured ({energy['reason']})"

"""Energy of a piece of work, from a hardware counter or not at all.

What isn't measured is None and reads "not measured": never 0, and never time multiplied by somebody's power. The power
that the machine draws anyway is measured right before and subtracted, so the figure is what the work added; a counter
covers all programs on its domain, so nothing else should run. One run is an anecdote: report at least three.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Self

import torch

from moevision.efficiency.energy_counters import POWERCAP, Counter, NotMeasured, Source, open_counter

NOT_MEASURED: Source = "not measured"


@dataclass(frozen=True)
class EnergyReading:
    """Energy since a meter started.

    Attributes:
        energy_j: J that the work added to idling; None if nothing was measured. Work too short to stand out of the
            noise of the idle power may come out below 0, and is then too short.
        idle_power_w: W before the work; None if nothing was measured.
        seconds: wall time since the start.
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

    @property
    def total_j(self) -> float | None:
        """J with the idle power's share."""
        if self.energy_j is None or self.idle_power_w is None:
            return None
        return self.energy_j + self.idle_power_w * self.seconds

    def describe(self) -> str:
        """In words: "12.3 J above 40.0 W idle (rapl: CPU package-0, without memory)" or "not measured (why)"."""
        if self.energy_j is None:
            return f"{NOT_MEASURED} ({self.reason})"
        return f"{self.energy_j:.3g} J above {self.idle_power_w:.1f} W idle ({self.source}: {self.domain})"


class EnergyMeter:
    """Measure the energy of what runs inside the scope.

    On a GPU, `read` waits for what has been started there.

    Args:
        device: where the work runs; its counter covers this CPU's packages or this card's board.
        idle_s: seconds of idling to measure first. Nothing of yours should run in them; on a GPU keep the model
            loaded, since a card with a context idles at a higher power.
        powercap: the powercap tree of Linux.
        nvml: the module `pynvml`; imported if None.
        clock: seconds, rising.
        sleep: waits that many seconds.

    Example:
        >>> with EnergyMeter("cpu", idle_s=0.1) as meter:
        ...     product = torch.ones(256, 256) @ torch.ones(256, 256)
        >>> meter.reading.describe()  # doctest: +SKIP
        'not measured (/sys/class/powercap has no CPU package: ...)'
    """

    def __init__(
        self,
        device: torch.device | str,
        *,
        idle_s: float = 5.0,
        powercap: Path = POWERCAP,
        nvml: ModuleType | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if idle_s <= 0:
            raise ValueError(f"idle_s={idle_s}: without an idle time there is no idle power to subtract")
        self.device, self.idle_s = torch.device(device), idle_s
        self._powercap, self._nvml = powercap, nvml
        self._clock, self._sleep = clock, sleep
        self._counter: Counter | None = None
        self._reason = ""
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._reading: EnergyReading | None = None
        self._lost: NotMeasured | None = None

    def __enter__(self) -> Self:
        self._reading, self._reason, self._idle_w, self._lost = None, "", math.nan, None
        self._stop.clear()
        try:
            self._counter = open_counter(self.device, powercap=self._powercap, nvml=self._nvml)
            self._start_j, self._start_s = self._now()
            self._sleep(self.idle_s)
            joules, seconds = self._now()
            self._idle_w = (joules - self._start_j) / (seconds - self._start_s)
            self._start_j, self._start_s = joules, seconds
            self._keep_polling()
        except NotMeasured as error:
            self._counter, self._reason = None, str(error)
            self._start_s = self._clock()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._reading = self.read()

    @property
    def reading(self) -> EnergyReading:
        """What the whole scope took; only after it.

        Raises:
            RuntimeError: while the scope is open, or before; `read()` tells what has been used so far.
        """
        if self._reading is None:
            raise RuntimeError("the meter is still running, or was never started: use read() inside the scope")
        return self._reading

    def read(self) -> EnergyReading:
        """What has been used since the start, as often as you like."""
        if self._counter is not None:
            try:
                if self._lost is not None:
                    raise self._lost
                joules, now = self._now()
            except NotMeasured as error:  # a counter that falls silent takes the whole figure with it
                self._counter, self._reason = None, str(error)
        if self._counter is None:
            return EnergyReading(None, None, self._clock() - self._start_s, NOT_MEASURED, "", self._reason)
        seconds = now - self._start_s
        added = joules - self._start_j - self._idle_w * seconds
        return EnergyReading(added, self._idle_w, seconds, self._counter.source, self._counter.domain, "")

    def _now(self) -> tuple[float, float]:
        """(J, s) of one moment."""
        assert self._counter is not None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        with self._lock:
            return self._counter.joules(), self._clock()

    def _keep_polling(self) -> None:
        """A thread that reads a counter which wraps, until the scope ends."""
        counter = self._counter
        if counter is None or counter.poll_s is None:
            return
        every_s = counter.poll_s

        def poll() -> None:
            while not self._stop.wait(every_s):
                try:
                    with self._lock:
                        counter.joules()
                except NotMeasured as error:
                    self._lost = error  # a turn of the counter may be missed from now on
                    return

        threading.Thread(target=poll, name="energy counter", daemon=True).start()


def joules_per_image(reading: EnergyReading, images: int) -> float | None:
    """J per image above idle; None if nothing was measured."""
    return None if reading.energy_j is None else reading.energy_j / images


def energy_to_accuracy(history: Iterable[tuple[float, EnergyReading]], target: float) -> EnergyReading | None:
    """What had been used at the first validation that reached an accuracy.

    Args:
        history: (accuracy, `meter.read()`) of each validation in order. Validations cost energy too: make the same
            ones for each model.
        target: the accuracy to reach.

    Returns:
        That reading, which may be "not measured"; None if the accuracy was never reached.
    """
    return next((reading for accuracy, reading in history if accuracy >= target), None)

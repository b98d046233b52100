"""Time in which the process really ran: a night in which the laptop slept is neither training time nor a slow step.

The monotonic clock stands still while Linux and macOS sleep; a process that was stopped (Ctrl-Z, `kill -STOP`) hears of
it by SIGCONT and takes the gap out. On Windows the clock runs on in sleep, and the time counts.
"""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any


def _boot_s() -> float:
    """A clock that runs on while the machine sleeps, where there is one (Linux)."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


class AwakeClock:
    """Seconds since its start without those in which the process was stopped or the machine slept."""

    def __init__(self) -> None:
        self._stopped_s = 0.0
        self._continued = False
        self._last = time.monotonic()
        self._asleep = _boot_s() - self._last
        self._usual_s = 0.0
        self._earlier: Any = None

    def now(self) -> float:
        """Seconds on this clock; only differences mean something."""
        return time.monotonic() - self._stopped_s

    def tick(self) -> float:
        """Say that the process is alive; call it once a step.

        Returns:
            Seconds in which it was stopped or asleep since the last call; 0 nearly always.
        """
        now, asleep = time.monotonic(), _boot_s() - time.monotonic()
        since, slept = now - self._last, max(0.0, asleep - self._asleep)
        stopped = 0.0
        if self._continued:
            stopped = max(0.0, since - self._usual_s)
            self._stopped_s += stopped
        else:
            self._usual_s = since
        self._last, self._asleep, self._continued = now, asleep, False
        return stopped + (slept if slept > 1.0 else 0.0)  # the two clocks are read one after the other

    def __enter__(self) -> AwakeClock:
        """Listen to SIGCONT, where there is one."""
        if hasattr(signal, "SIGCONT") and threading.current_thread() is threading.main_thread():
            self._earlier = signal.signal(signal.SIGCONT, self._on_continue)
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop listening."""
        if self._earlier is not None:
            signal.signal(signal.SIGCONT, self._earlier)
            self._earlier = None

    def _on_continue(self, number: int, frame: FrameType | None) -> None:
        self._continued = True

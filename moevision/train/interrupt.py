"""Being asked to stop: Ctrl-C, a closed terminal, `kill`, or a cluster that wants its machine back.

Before and after training the process ends at once. During training the signal is only noted, and `resume_point.py`
saves and stops between two optimizer steps; a second signal doesn't wait for that. The exit code is 128 plus the
signal's number, as shells have it: 130 Ctrl-C, 129 terminal closed, 143 SIGTERM, 138 SIGUSR1 (on Linux).
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

from moevision.train.messages import tell

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")  # SIGUSR1: `#SBATCH --signal=USR1@120`
_HANGUP = getattr(signal, "SIGHUP", None)  # not on Windows


class Interrupted(SystemExit):
    """The process was asked to stop and does so; `code` is its exit code."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal_name = signal.Signals(number).name


class Interruption:
    """Listens to the signals that ask a process to stop, as a context manager.

    Attributes:
        training: whether a step may be under way, so that stopping waits for its end.
        requested: the signal that asked to stop; None if none did.
        command: what goes on with the run, for the last line that is printed; None if there is nothing to go on with.
    """

    def __init__(self) -> None:
        self.command: str | None = None
        self.training = False
        self.requested: int | None = None
        self._process = os.getpid()
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        """Begin to listen."""
        self.listen()
        return self

    def __exit__(self, *exception: object) -> None:
        """Give every signal back to whoever had it."""
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        self._earlier = {}

    def listen(self) -> None:
        """Take the signals; again after Lightning took some of them, which it does when a fit begins."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (getattr(signal, name) for name in _NAMES if hasattr(signal, name)):
            handler = signal.getsignal(number)
            if number == _HANGUP and handler is signal.SIG_IGN:
                continue  # nohup
            if number not in self._earlier:
                self._earlier[number] = handler
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a worker of the data loader, forked with our handler: the main process decides
        if number == _HANGUP:
            _leave_terminal()
        again, self.requested = self.requested is not None, number
        if again or not self.training:
            raise Interrupted(number)
        name = signal.Signals(number).name
        tell(f"\n{name}: saving when this step is done (validation is finished first); once more to stop without it.")

    def stop(self) -> None:
        """Stop now, because this process or another one was asked to.

        Raises:
            Interrupted: always; with SIGTERM's code if only another process heard the signal.
        """
        raise Interrupted(signal.SIGTERM if self.requested is None else self.requested)


def _leave_terminal() -> None:
    """Let what is printed go nowhere: writing to a terminal that is gone would be an error in the middle of a step."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        if os.isatty(descriptor):
            os.dup2(nowhere, descriptor)
    os.close(nowhere)

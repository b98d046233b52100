"""Formats numbers and times for people, wraps text for the terminal, quotes for the shell, and shows a status line."""

import os
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
_REPORT_INTERVAL_S = 20.0  # between two lines about the progress, where the output is a file
_MIN_ITEMS_FOR_BAR = 4


def signed(value: float, digits: int = 3) -> str:
    """A decimal number with a typographic minus sign, without a plus sign; what rounds to 0 has no sign."""
    text = f"{value:.{digits}f}"
    return text.replace("-", "−") if float(text) else f"{0:.{digits}f}"


def percent(share: float, digits: int = 1) -> str:
    """A share in percent: 0.965 -> `96.5 %`."""
    return f"{signed(100 * share, digits)} %"


def points(difference: float) -> str:
    """A difference of shares in percentage points with its sign: -0.013 -> `−1.3`."""
    return f"{100 * difference:+.1f}".replace("-", "−")


def flops(count: float) -> str:
    """Floating-point operations with a unit: 345_000_000 -> `345.00 M`."""
    if count >= 1e9:
        return f"{count / 1e9:.2f} G"
    return f"{count / 1e6:.2f} M"


def duration(seconds: float) -> str:
    """732.4 -> `12 min 12 s`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    if minutes:
        return f"{minutes} min {seconds} s"
    return f"{seconds} s"


def columns() -> int:
    """Width of help texts in characters: the terminal's, at most 116, which it is also without a terminal."""
    return min(116, shutil.get_terminal_size((116, 24)).columns)


def wrap_lines(text: str) -> str:
    """The text with each line wrapped to `columns()`."""
    width = columns()
    return "\n".join(
        textwrap.fill(line, width, break_on_hyphens=False) for line in text.splitlines()
    )


def shell_word(text: str) -> str:
    """A path or option quoted as one word of a command, which the user may copy into this system's shell.

    `shlex.quote` puts words with a backslash into single quotes, which the shells of Windows don't understand.
    """
    return shlex.quote(text) if os.name == "posix" else subprocess.list2cmdline([text])


@contextmanager
def loading(message: str = "loading PyTorch") -> Iterator[None]:
    """Show a message on a terminal during slow work, such as the import of torch, which takes seconds."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(message):
        yield


def with_progress(items: Iterable[T], task: str, total: int) -> Iterator[T]:
    """Yield the items, and show the progress on stderr: with a bar on a terminal, else with a line now and then."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    if console.is_terminal:
        is_short = total < _MIN_ITEMS_FOR_BAR
        yield from track(items, task, total, console=console, transient=True, disable=is_short)
        return
    start_s = last_report_s = time.monotonic()
    for done, item in enumerate(items):
        now_s = time.monotonic()
        # Without an item done the time left can't be estimated.
        if done and now_s - last_report_s >= _REPORT_INTERVAL_S:
            last_report_s = now_s
            left_s = (now_s - start_s) / done * (total - done)
            print(
                f"{task}: {percent(done / total, 0)}, {duration(left_s)} left",
                file=sys.stderr,
                flush=True,
            )
        yield item

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
_SECONDS_BETWEEN_LINES = 20.0  # of progress, where stderr is no terminal
_MIN_ITEMS_FOR_BAR = 4


def signed(value: float, digits: int = 3) -> str:
    """A decimal number with a typographic minus sign, without one in front of a rounded 0."""
    text = f"{value:.{digits}f}"
    return text.replace("-", "−") if float(text) else f"{0:.{digits}f}"


def percent(share: float, digits: int = 1) -> str:
    """A share in percent: 0.965 -> `96.5 %`."""
    return f"{signed(100 * share, digits)} %"


def points(difference: float) -> str:
    """A difference of shares in percentage points with its sign: -0.013 -> `−1.3`."""
    return f"{100 * difference:+.1f}".replace("-", "−")


def flops(count: float) -> str:
    """A number of FLOPs without its unit: 345_000_000 -> `345.00 M`."""
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
    """Width of help texts in characters: the terminal's, at most 116."""
    return min(116, shutil.get_terminal_size((116, 24)).columns)


def fitted(text: str) -> str:
    """The text with each line wrapped to `columns()`."""
    width = columns()
    lines = [textwrap.fill(line, width, break_on_hyphens=False) for line in text.splitlines()]
    return "\n".join(lines)


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
    """Go through items with a progress bar; where stderr is no terminal, with a line every 20 s."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    if console.is_terminal:
        is_short = total < _MIN_ITEMS_FOR_BAR
        yield from track(items, task, total, console=console, transient=True, disable=is_short)
        return
    start_s = last_line_s = time.monotonic()
    for num_done, item in enumerate(items):  # those before this one
        now_s = time.monotonic()
        if num_done and now_s - last_line_s >= _SECONDS_BETWEEN_LINES:
            last_line_s = now_s
            left_s = (now_s - start_s) / num_done * (total - num_done)
            print(
                f"{task}: {percent(num_done / total, 0)}, {duration(left_s)} left",
                file=sys.stderr,
                flush=True,
            )
        yield item

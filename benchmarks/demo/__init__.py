"""The explorer as visitors meet it: waiting times, and many at once."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np


def launch(playwright: Any) -> Any:
    """Debian's chromium, or what MOEVISION_CHROMIUM names, or else playwright's own."""
    path = os.environ.get("MOEVISION_CHROMIUM") or shutil.which("chromium")
    return playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])


def summary_of(times: list[float]) -> dict[str, Any]:
    """How many times were measured, their median, 95th percentile and the longest, in milliseconds."""
    middle, p95 = np.percentile(times, (50, 95)).tolist()
    return {
        "n": len(times),
        "median_ms": round(middle, 1),
        "p95_ms": round(p95, 1),
        "max_ms": round(max(times), 1),
    }


@contextmanager
def running_demo(*arguments: str) -> Iterator[tuple[int, str]]:
    """`moevision demo` as a user starts it; its process and its address, as soon as it says that."""
    command = [sys.executable, "-u", "-m", "moevision", "demo", "--no-browser", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline() if process.stdout else ""
        if not line.startswith("The explorer is at "):
            raise RuntimeError(f"moevision demo did not start: {line!r}")
        yield process.pid, line.split()[-1]
    finally:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()

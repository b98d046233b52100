"""glibc keeps freed memory when asked to: page faults and the heap's end, each seen in a process of its own."""

import platform
import subprocess
import sys
from typing import Any

import pytest

from moevision import limits
from moevision.limits import SWITCH, keep_freed_memory

pytestmark = pytest.mark.deep

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")

TENSOR_MIB, REPEATS = 64, 5
FAULTS = f"""
import resource
import torch
from moevision.limits import keep_freed_memory
kept = keep_freed_memory()
def use():
    torch.ones({TENSOR_MIB} * 2**20 // 4)
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({REPEATS}):
    use()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

# Memory that is never written costs nothing. `sbrk(0)` is where the heap ends.
TRIMMED = """
import ctypes
from moevision.limits import keep_freed_memory
assert keep_freed_memory()
c = ctypes.CDLL(None)
c.malloc.restype = c.sbrk.restype = ctypes.c_void_p
c.malloc.argtypes, c.free.argtypes, c.sbrk.argtypes = [ctypes.c_size_t], [ctypes.c_void_p], [ctypes.c_ssize_t]
before = c.sbrk(0)
block = c.malloc(3 << 30)
grown = c.sbrk(0)
c.free(block)
print(grown - before, c.sbrk(0) - before)
"""


def run(program: str, monkeypatch: pytest.MonkeyPatch, switch: str | None = None) -> list[str]:
    """Words that `program` prints in a process whose allocator nobody else has set."""
    malloc = ("TRIM_THRESHOLD", "MMAP_MAX", "MMAP_THRESHOLD")
    for name in (SWITCH, "LD_PRELOAD", *(f"MALLOC_{option}_" for option in malloc)):
        monkeypatch.delenv(name, raising=False)
    if switch is not None:
        monkeypatch.setenv(SWITCH, switch)
    command = [sys.executable, "-c", program]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=300
    ).stdout.split()


@glibc
def test_memory_that_is_kept_is_not_handed_out_again(monkeypatch):
    """Without it every page is faulted in each time, huge pages of 2 MiB at the least: 5 · 64 / 2 = 160 faults."""
    kept, faults = run(FAULTS, monkeypatch)
    assert kept == "True"
    assert int(faults) < 30
    kept, faults = run(FAULTS, monkeypatch, switch="0")
    assert kept == "False"
    assert int(faults) >= REPEATS * TENSOR_MIB // 2


@glibc
def test_no_size_is_too_large_to_be_kept(monkeypatch):
    """3 GiB: more than an int's 2 GiB, which the threshold once was."""
    grown, left = (int(word) for word in run(TRIMMED, monkeypatch))
    if grown < 2.5 * 2**30:  # a part may have been free before
        pytest.skip("the system gave no 3 GiB of address space to the heap")
    assert left == grown


@pytest.mark.parametrize("refused", ["switch", "platform", "library", "call"])
def test_it_says_when_it_could_not(refused, monkeypatch):
    class Library:
        """glibc in which no call succeeds, or another C library."""

        def __init__(self, name: Any) -> None:
            if refused != "library":
                self.gnu_get_libc_version = lambda: b"2.36"

        def mallopt(self, name: Any, value: Any) -> int:
            assert refused == "call"
            return 0

    monkeypatch.setattr(limits.ctypes, "CDLL", Library)
    monkeypatch.setattr(limits.sys, "platform", "win32" if refused == "platform" else "linux")
    monkeypatch.setenv(SWITCH, "0" if refused == "switch" else "1")
    assert keep_freed_memory() is False

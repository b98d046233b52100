"""What this process may use of the machine: cores, and memory within the limit of its control group.

A container or a job of SLURM sees the memory of the whole machine and is killed where it takes more than was granted.

Sources: Linux' Documentation/admin-guide/cgroup-v2.rst (memory.max; a limit of any ancestor holds), proc(5).
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

SWITCH = "MOEVISION_KEEP_MEMORY"
"""Environment variable; 0 leaves the C library's allocator as it is."""
ROOT = Path("/")


def usable_cores() -> int:
    """Logical cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def total_memory_bytes() -> int | None:
    """Physical memory of the machine; None where the system has no plain way to ask (Windows)."""
    names = getattr(os, "sysconf_names", {})
    if "SC_PAGE_SIZE" not in names or "SC_PHYS_PAGES" not in names:
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def usable_memory_bytes(root: Path = ROOT) -> int | None:
    """Physical memory, or what the control group grants of it; None where the system doesn't say."""
    sizes = (total_memory_bytes(), *(limit for limit, _ in _memory_limits(root)))
    return min((size for size in sizes if size is not None), default=None)


def memory_available_bytes(root: Path = ROOT) -> int | None:
    """Memory that new programs can have without swapping, within the control group's limit."""
    free = [max(0, limit - used) for limit, used in _memory_limits(root)]
    for line in _text(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            free.append(int(line.split()[1]) * 1024)
    return min(free, default=None)


def _memory_limits(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use, in bytes, of this process's control group and its ancestors, as far as they have a limit."""
    for folder in _groups(root):
        limit = _text(folder / "memory.max").strip()
        if limit and limit != "max":
            # Files that it holds in memory and hasn't read lately the kernel gives up when asked.
            rows = dict(line.split() for line in _text(folder / "memory.stat").splitlines())
            used = int(_text(folder / "memory.current") or 0) - int(rows.get("inactive_file", 0))
            yield int(limit), max(0, used)


def _groups(root: Path) -> Iterator[Path]:
    """The folders of this process's control group and its ancestors."""
    groups = _text(root / "proc/self/cgroup").splitlines()
    paths = [line.removeprefix("0::") for line in groups if line.startswith("0::")]
    if not paths:
        return
    # Inside a container the path may be one of the host's, which isn't mounted: then the top is the group.
    top = root / "sys/fs/cgroup"
    group = top / paths[0].strip("/")
    for folder in (group, *group.parents):
        if folder.is_relative_to(top) and folder.is_dir():
            yield folder


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:  # another system, or a kernel without it: the question has no answer here
        return ""


# ---- memory that a step frees
#
# glibc gives large blocks back as soon as they are free, and trims the heap behind smaller ones. The next step takes
# the same memory again, and the system hands it out page by page, each zeroed first: a ViT's training step on a CPU can
# spend more time on that than on its matrix products (benchmarks/performance has figures).

# Of <malloc.h>, unchanged since glibc 2.0.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_SETTINGS = (
    (_M_MMAP_MAX, 0),
    (_M_TRIM_THRESHOLD, -1),
)  # -1 is never; 2**31 - 1 would still trim 2 GiB
_kept = False


def keep_freed_memory() -> bool:
    """Ask glibc to keep freed memory for the rest of this process; whether that was done.

    For programs that do the same thing over and over, such as a training. Not without glibc (musl, macOS, Windows), nor
    where `MOEVISION_KEEP_MEMORY=0` asks for the library's own behaviour.
    """
    global _kept
    if os.environ.get(SWITCH) == "0" or not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    # No block is mapped from the system on its own, and the heap is never trimmed. Both calls answer 1 on success.
    _kept = all(
        library.mallopt(ctypes.c_int(name), ctypes.c_int(value)) == 1 for name, value in _SETTINGS
    )
    return _kept


def is_kept() -> bool:
    """Whether `keep_freed_memory` was called in this process and could do it."""
    return _kept

"""What this process may use of the machine: cores, and memory within the limit of its control group (cgroup v2).

A container or a job of SLURM sees the memory of the whole machine, and is killed if it takes more than was granted.

Sources: Linux' Documentation/admin-guide/cgroup-v2.rst (memory.max; the limits of all ancestors hold too), proc(5).
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

SWITCH = "MOEVISION_KEEP_MEMORY"
"""Environment variable; with the value 0 `keep_freed_memory` does nothing."""
ROOT = Path("/")  # of the file system


def usable_cores() -> int:
    """Logical cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def physical_memory_bytes() -> int | None:
    """Physical memory of the machine; None if `os.sysconf` doesn't know it (Windows)."""
    if not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_limit_bytes(root: Path = ROOT) -> int | None:
    """The smaller of the physical memory and the smallest limit of the control groups; None if neither is known."""
    sizes = [limit for limit, _ in _memory_limits(root)]
    physical = physical_memory_bytes()
    if physical is not None:
        sizes.append(physical)
    return min(sizes, default=None)


def available_memory_bytes(root: Path = ROOT) -> int | None:
    """Memory that can be allocated without swapping, within the limits of the control groups; None if unknown."""
    free_bytes = [max(0, limit - used) for limit, used in _memory_limits(root)]
    for line in _read_text(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            free_bytes.append(int(line.split()[1]) * 1024)  # the file has KiB
    return min(free_bytes, default=None)


def _memory_limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, used) in bytes of this process's control group and of its ancestors, where they have a limit."""
    for folder in _cgroup_folders(root):
        limit = _read_text(folder / "memory.max").strip()
        if limit and limit != "max":
            # The inactive page cache (inactive_file) doesn't count as used: the kernel frees it when memory is needed.
            stat = dict(line.split() for line in _read_text(folder / "memory.stat").splitlines())
            current = int(_read_text(folder / "memory.current") or 0)
            used = current - int(stat.get("inactive_file", 0))
            yield int(limit), max(0, used)


def _cgroup_folders(root: Path) -> Iterator[Path]:
    """The folders of this process's control group and its ancestors."""
    lines = _read_text(root / "proc/self/cgroup").splitlines()
    paths = [line.removeprefix("0::") for line in lines if line.startswith("0::")]  # cgroup v2
    if not paths:
        return

    # In a container the path may be that on the host. There it isn't visible, but the container's group is mounted as
    # the root: folders that don't exist are skipped, and the mount point remains.
    mount = root / "sys/fs/cgroup"
    group = mount / paths[0].strip("/")
    for folder in (group, *group.parents):
        if folder.is_relative_to(mount) and folder.is_dir():
            yield folder


def _read_text(file: Path) -> str:
    """The text of a file, empty if it can't be read."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:  # no Linux, or a kernel without this file
        return ""


# ---- memory that a training step frees
#
# glibc returns memory to the system as soon as it is freed: a large block, which was mapped for it alone, and a large
# free end of the heap. The next step needs the same memory again, and the system hands it out page by page, each zeroed
# first: a ViT's training step on a CPU can spend more time on that than on its matrix products (benchmarks/performance
# has figures).

# Parameters of mallopt in <malloc.h>, unchanged since glibc 2.0.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_MALLOPT_SETTINGS = (
    (_M_MMAP_MAX, 0),  # blocks with a mapping of their own: none, all come from the heap
    # Free bytes at the end of the heap from which on they are returned: -1 is never; 2**31 - 1 would return 2 GiB.
    (_M_TRIM_THRESHOLD, -1),
)
_keeps_memory = False


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the rest of this process; returns whether it does.

    For programs whose steps need the same memory again and again, such as a training. It does nothing without glibc
    (musl, macOS, Windows) and with `MOEVISION_KEEP_MEMORY=0`.
    """
    if os.environ.get(SWITCH) == "0" or not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    global _keeps_memory
    # mallopt returns 1 on success.
    _keeps_memory = all(
        library.mallopt(ctypes.c_int(parameter), ctypes.c_int(value)) == 1
        for parameter, value in _MALLOPT_SETTINGS
    )
    return _keeps_memory


def keeps_freed_memory() -> bool:
    """Whether `keep_freed_memory` was called in this process and succeeded."""
    return _keeps_memory

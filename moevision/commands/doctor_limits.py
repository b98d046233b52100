"""What Linux lets this process have: control groups, load, memory; None where a system has no such thing.

Sources: Documentation/admin-guide/cgroup-v2.rst (cpu.max, memory.max; a limit of any ancestor holds), cgroup-v1
(cpu.cfs_quota_us, memory.limit_in_bytes), proc(5) (/proc/stat, /proc/meminfo, /proc/cpuinfo).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
# What decides how fast matrices are multiplied, and in what precision.
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "asimd", "sve", "bf16", "i8mm")
_V1_UNLIMITED = 2**60  # cgroup v1 says "no limit" with almost 2**63


def usable_cores() -> int:
    """Logical cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota(root: Path = ROOT) -> float | None:
    """Cores' worth of time that the control group grants; None without a limit."""
    quotas = []
    for folder in _groups(root, "cpu"):
        words = _words(folder / "cpu.max") or [
            *_words(folder / "cpu.cfs_quota_us"),
            *_words(folder / "cpu.cfs_period_us"),
        ]
        if len(words) == 2 and words[0] not in ("max", "-1"):
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def memory_limit_bytes(root: Path = ROOT) -> int | None:
    """Memory that the control group grants; None without a limit."""
    limits = []
    for folder in _groups(root, "memory"):
        words = _words(folder / "memory.max") or _words(folder / "memory.limit_in_bytes")
        if words and words[0] != "max" and int(words[0]) < _V1_UNLIMITED:
            limits.append(int(words[0]))
    return min(limits, default=None)


def memory_available_bytes(root: Path = ROOT) -> int | None:
    """Memory that new programs can have without swapping, within the control group's limit.

    What the group's page cache holds counts as used, though the kernel would give it up.
    """
    free = next((int(words[1]) * 1024 for words in _lines(root / "proc/meminfo") if words[0] == "MemAvailable"), None)
    left = []
    for folder in _groups(root, "memory"):
        limit = _words(folder / "memory.max") or _words(folder / "memory.limit_in_bytes")
        used = _words(folder / "memory.current") or _words(folder / "memory.usage_in_bytes")
        if limit and used and limit[0] != "max" and int(limit[0]) < _V1_UNLIMITED:
            left.append(max(0, int(limit[0]) - int(used[0])))
    return min([*left, *([] if free is None else [free])], default=None)


def cpu_flags(root: Path = ROOT) -> list[str]:
    """Vector and matrix instructions, as the kernel names them."""
    for words in _lines(root / "proc/cpuinfo"):
        if words[0] in ("flags", "Features"):
            return [flag for flag in _FLAGS if flag in words]
    return []


def physical_cores(root: Path = ROOT) -> int | None:
    """Cores without their second threads; None if the kernel doesn't say (Arm)."""
    package, cores = "", set()
    for words in _lines(root / "proc/cpuinfo"):
        if words[:2] == ["physical", "id"]:
            package = words[-1]
        elif words[:2] == ["core", "id"]:
            cores.add((package, words[-1]))
    return len(cores) or None


@dataclass(frozen=True)
class Load:
    """What runs on the cores that this process may use, in cores.

    Attributes:
        busy: time in programs and the kernel.
        stolen: time in which a virtual machine wanted to run and its host ran something else.
    """

    busy: float
    stolen: float


def current_load(
    root: Path = ROOT, *, seconds: float = 0.5, sleep: Callable[[float], None] = time.sleep
) -> Load | None:
    """Load while this process sleeps, so that it is that of others. A container sees its whole machine's."""
    before = _ticks(root)
    sleep(seconds)
    after = _ticks(root)
    if not before or before.keys() != after.keys():
        return None
    busy = stolen = 0.0
    for core, start in before.items():
        spent = [end - begin for begin, end in zip(start, after[core], strict=True)]
        # user nice system idle iowait irq softirq steal; guest times are in user and nice already.
        total = sum(spent[:8]) or 1
        busy += (total - spent[3] - spent[4] - spent[7]) / total
        stolen += spent[7] / total
    return Load(busy, stolen)


def _ticks(root: Path) -> dict[int, list[int]]:
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    ticks = {}
    for words in _lines(root / "proc/stat"):
        number = words[0].removeprefix("cpu")
        if words[0].startswith("cpu") and number.isdecimal() and (allowed is None or int(number) in allowed):
            ticks[int(number)] = [int(word) for word in words[1:]]
    return ticks


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's control group and its ancestors, version 2 or 1."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            top = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            top = root / "sys/fs/cgroup" / controller
        else:
            continue
        # Inside a container the path may be one of the host's, which isn't mounted: then the top is the group.
        folder = top / path.strip("/")
        yield from (place for place in (folder, *folder.parents) if place.is_relative_to(top) and place.is_dir())


def _lines(file: Path) -> Iterator[list[str]]:
    return (words for line in _text(file).splitlines() if (words := line.replace(":", " ").split()))


def _words(file: Path) -> list[str]:
    return _text(file).split()


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:  # another system, or a kernel without it: the question has no answer here
        return ""

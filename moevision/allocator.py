"""Whether the C library keeps the memory that a training step frees, or gives it back to the system.

glibc gives large blocks back as soon as they are free, and trims the heap behind smaller ones. The next step takes the
same memory again, and the system hands it out page by page, each zeroed first: a ViT's training step on a CPU can spend
more time on that than on its matrix products (benchmarks/performance has figures). Memory that is kept costs nothing
as long as the process needs it again, which a training does until its end.
"""

from __future__ import annotations

import ctypes
import os
import sys

SWITCH = "MOEVISION_KEEP_MEMORY"
"""Environment variable; 0 leaves the allocator as it is."""

# Of <malloc.h>, unchanged since glibc 2.0.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = -1  # 2**31 - 1 would still trim 2 GiB

_SETTINGS = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER))
_kept = False


def keep_freed_memory() -> bool:
    """Ask glibc to keep freed memory for the rest of this process.

    For programs that do the same thing over and over, such as a training: what was once needed is held until the
    process ends. GPU memory is not concerned.

    Returns:
        Whether it was done: not without glibc (musl, macOS, Windows), nor where `MOEVISION_KEEP_MEMORY=0` asks for the
        library's own behaviour.
    """
    global _kept
    if os.environ.get(SWITCH) == "0" or not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    # No block is mapped from the system on its own, and the heap is never trimmed. Both calls answer 1 on success.
    _kept = all(library.mallopt(ctypes.c_int(name), ctypes.c_int(value)) == 1 for name, value in _SETTINGS)
    return _kept


def is_kept() -> bool:
    """Whether `keep_freed_memory` was called in this process and could do it."""
    return _kept

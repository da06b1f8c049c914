"""The C library's memory on a CPU: kept between steps, not given back to the system and asked for again."""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's malloc.h
_NEVER = -1


def keep_freed_memory() -> bool:
    """Let this process keep what it frees for its own next request; returns whether the C library can (glibc).

    glibc maps every block beyond 32 MiB anew, and the system then clears it page by page: at 256x256 every large map of
    every step, a tenth of a step in float32 (docs/performance.md). It holds for the whole process, so programs call it,
    libraries do not. The peak of memory grows by a few per cent, and stays until the process ends.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, _NEVER))

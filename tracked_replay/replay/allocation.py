"""How the process gets its memory from the system."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next allocation, from now on and for the whole process.

    glibc hands large blocks back to the kernel as soon as they are freed. A replay frees and takes the same sizes over
    and over, and then a third of its time is the kernel zeroing pages. Afterwards the process holds what it needed at
    its peak until it ends. Other C libraries are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)

"""Shortages of memory, processes or open files: recognition of their errors, and checks in advance."""

from __future__ import annotations

import contextlib
import errno
import os
import re

from utils.errors import UsageError

GIB = 2**30
#: Minimum bytes per input pixel in a network: 3 floats, and 64 features at half the resolution.
LEAST_BYTES = 4 * (3 + 64 // 4)
#: Phrases in the out-of-memory errors of PyTorch, the CUDA libraries, NumPy, OpenCV and C++.
MEMORY = (
    "out of memory",
    "allocate memory",
    "Cannot allocate",
    "Unable to allocate",
    "Failed to allocate",
    "not enough memory",
    "Insufficient memory",
    "bad_alloc",
    "ALLOC_FAILED",
)
_SIZE = re.compile(r"allocate (\d+) bytes|allocate ([\d.]+ [KMGTP]i?B)", re.IGNORECASE)


def shortage(error: BaseException) -> str | None:
    """Return a description of the shortage that caused `error`; None if it was not caused by one."""
    text = str(error)
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, MemoryError) or number == errno.ENOMEM or any(words in text for words in MEMORY):
        found = _SIZE.search(text)
        if found is None:
            return "out of memory"
        size = found[2] or f"{int(found[1]) / GIB:.2f} GiB"
        return f"out of memory (for another {size})"
    if number == errno.EAGAIN or "can't start new thread" in text:
        return "no more processes or threads can be started"
    if number in (errno.EMFILE, errno.ENFILE) or "Too many open files" in text:
        return "too many open files"
    return None


def physical_memory() -> int:
    """Return the memory available to this process in bytes: that of the machine or the container limit."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with (
            contextlib.suppress(OSError, ValueError),
            open(path, encoding="ascii") as file,
        ):  # "max": no limit
            limits.append(int(file.read()))
    return min(limits)


def check_fits(flags: str, pixels: float) -> None:
    """Check that images can fit into memory at all, instead of being killed while they are computed.

    Args:
        flags: the flags that decide the number of pixels, for the error.
        pixels: number of pixels that a network processes together.

    Raises:
        UsageError: this machine has less memory than they need at least.
    """
    check_memory(flags, LEAST_BYTES * pixels)


def check_memory(flags: str, needed: float) -> None:
    """Check that this machine has `needed` bytes of memory.

    Raises:
        UsageError: it has less; names the flags to lower.
    """
    if needed > (there := physical_memory()):
        raise UsageError(
            f"{flags}: needs more than {needed / GIB:.0f} GiB of memory, but this machine has "
            f"{there / GIB:.0f}; give smaller values"
        )

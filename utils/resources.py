"""Shortages of the machine, recognized and reported in one line: memory, processes, open files."""

from __future__ import annotations

import contextlib
import errno
import os
import re

from utils.errors import UsageError

GIB = 2**30
#: Bytes that a pixel takes at the very least in a network: three floats, and 64 features at half the size.
LEAST_BYTES = 4 * (3 + 64 // 4)
#: Phrases of the errors that PyTorch, CUDA's libraries, NumPy, OpenCV and C++ raise when memory is short.
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
    """Return what ran short when `error` was raised, with the amount where it says so; None otherwise."""
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
    """Return the bytes of memory that this process can ever have: the machine's, or its container's limit."""
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
    needed = LEAST_BYTES * pixels
    if needed > (there := physical_memory()):
        raise UsageError(
            f"{flags}: needs more than {needed / GIB:.0f} GiB of memory, and this machine has "
            f"{there / GIB:.0f}; give less"
        )

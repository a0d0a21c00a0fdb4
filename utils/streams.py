"""Standard streams that never raise: on a full disk, a closed pipe, or a character they can't encode."""

from __future__ import annotations

import contextlib
import io
import os
import sys


class _Forgiving(io.RawIOBase):
    """A raw stream that ignores write errors, such as a full disk or a closed pipe."""

    def __init__(self, file: int):
        self._file = file

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._file

    def isatty(self) -> bool:
        return os.isatty(self._file)

    def write(self, content) -> int:  # type: ignore[override]  # takes any buffer
        content = memoryview(content).cast("B")
        with contextlib.suppress(OSError):
            return os.write(self._file, content)
        return len(content)


def secure() -> None:
    r"""Make printing to standard output and standard error never raise.

    Characters that the encoding lacks are written as escapes (\u9053), and write errors are ignored. The
    results of a command are files, and a lost terminal must not prevent writing them. Call this once, at the
    start.
    """
    # If a standard descriptor is closed, the next opened file would get its number and receive printed text.
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
            os.set_inheritable(number, True)  # otherwise it would be closed in child processes
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is not None and _descriptor(stream) != number:
            continue  # captured, for example by a test
        encoding = getattr(stream, "encoding", None) or "utf-8"
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        line_buffering = name == "stderr" or os.isatty(number) or getattr(stream, "write_through", False)
        secured = io.TextIOWrapper(
            io.BufferedWriter(_Forgiving(number)), encoding, "backslashreplace", line_buffering=line_buffering
        )
        setattr(sys, name, secured)


def _descriptor(stream: object) -> int | None:
    try:
        return stream.fileno()  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):
        return None

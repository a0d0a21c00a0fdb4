"""Standard streams that never end a command: full, closed, or of an encoding that lacks a letter."""

from __future__ import annotations

import contextlib
import io
import os
import sys


class _Forgiving(io.RawIOBase):
    """A raw stream that drops what its file refuses: a full disk, a reader that has gone."""

    def __init__(self, file: int):
        self._file = file

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._file

    def isatty(self) -> bool:
        return os.isatty(self._file)

    def write(self, content) -> int:  # type: ignore[override]  # of any buffer
        content = memoryview(content).cast("B")
        with contextlib.suppress(OSError):
            return os.write(self._file, content)
        return len(content)


def secure() -> None:
    """Make standard output and error take everything that is printed.

    A letter that the encoding lacks is written as its escape (\\u9053), and what the file refuses is dropped:
    the results of a command are files, which must not be lost with its terminal. Call it once, at the start.
    """
    # A descriptor that was closed would become that of the next file that is opened, and get what is printed.
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
            os.set_inheritable(number, True)  # processes that this one starts would have it closed again
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is not None and _descriptor(stream) != number:
            continue  # captured, as by a test
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

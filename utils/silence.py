"""Suppression of warnings that image libraries write to standard error from C code."""

from __future__ import annotations

import os
import tempfile
import threading
from typing import IO


class Silence:
    """A context manager that redirects file descriptor 2, so that output of C libraries is hidden too.

    Several threads may be inside: the first one redirects the descriptor, and the last one restores it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._terminal = -1
        self._sink: IO[bytes] | None = None
        self._collects = False

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                if self._sink is None:
                    self._sink = open(os.devnull, "r+b", buffering=0)
                try:
                    self._terminal = os.dup(2)
                except OSError:  # standard error is closed
                    self._terminal = -1
                else:
                    os.dup2(self._sink.fileno(), 2)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._restore()

    def _restore(self) -> None:
        if self._terminal >= 0:
            os.dup2(self._terminal, 2)
            os.close(self._terminal)

    def collect(self) -> None:
        """Keep the hidden output for `take`; use it in processes that decode in a single thread."""
        self._sink = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        self._collects = True

    def take(self) -> list[str]:
        """Return the distinct lines hidden since the last call; empty without `collect`."""
        if not self._collects:
            return []
        assert self._sink is not None
        self._sink.seek(0)
        lines = self._sink.read().decode(errors="replace").splitlines()
        self._sink.seek(0)
        self._sink.truncate()
        return list(dict.fromkeys(line.strip() for line in lines if line.strip()))

    def reset(self) -> None:
        """Restore the state in a forked process, where the threads inside the context do not exist."""
        if self._inside:
            self._restore()
            self._inside = 0
        self._lock = threading.Lock()


silence = Silence()
os.register_at_fork(after_in_child=silence.reset)

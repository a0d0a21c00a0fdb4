"""Image libraries write warnings to standard error, in C, where no Python code can catch them."""

from __future__ import annotations

import os
import tempfile
import threading
from typing import IO


class Silence:
    """A context in which what is written to file 2, by libraries in C too, does not reach the terminal.

    Several threads may be inside: the first one redirects the file, the last one puts it back.
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
                except OSError:  # closed: nothing to keep clean
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
        """Keep what is written from now on for `take`. For processes that decode in one thread."""
        self._sink = tempfile.TemporaryFile(buffering=0)
        self._collects = True

    def take(self) -> list[str]:
        """Return the lines written since the last call, each once; none without `collect`."""
        if not self._collects:
            return []
        assert self._sink is not None
        self._sink.seek(0)
        lines = self._sink.read().decode(errors="replace").splitlines()
        self._sink.seek(0)
        self._sink.truncate()
        return list(dict.fromkeys(line.strip() for line in lines if line.strip()))

    def reset(self) -> None:
        """Undo in a forked process what threads had begun that it does not have."""
        if self._inside:
            self._restore()
            self._inside = 0
        self._lock = threading.Lock()


silence = Silence()
os.register_at_fork(after_in_child=silence.reset)

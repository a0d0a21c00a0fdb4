"""Progress reporting."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import TextIO


class Progress:
    """A progress report: a line every few seconds and one at the end.

    Args:
        total: number of items; None if unknown, as for a camera.
        what: name of one item.
        interval: seconds between lines.
        stream: output stream, by default standard output. If another stream is given and is a terminal, one
            line is updated in place.
    """

    def __init__(
        self, total: int | None, what: str = "picture", interval: float = 5.0, stream: TextIO | None = None
    ):
        self.total = total
        self.what = what
        self.stream = stream
        self.in_place = stream is not None and stream.isatty()
        self.interval = 0.1 if self.in_place else interval
        self.start = self.last = time.monotonic()

    def show(self, done: int) -> None:
        """Print a line if it is due, after `done` items."""
        now = time.monotonic()
        if now - self.last < self.interval and done != self.total:
            return
        self.last = now
        rate = done / max(now - self.start, 1e-9)
        line = f"{self.what} {done}"
        if self.total is not None:
            left = timedelta(seconds=round(max(0, self.total - done) / max(rate, 1e-9)))
            line += f"/{self.total}  {rate:.2f} {self.what}s/s  {left} left"
        else:
            line += f"  {rate:.2f} {self.what}s/s"
        if self.in_place:
            # Return to the start of the line, and clear the rest of a longer previous line.
            end = "\n" if done == self.total else ""
            print(f"\r{line}\x1b[K", end=end, file=self.stream, flush=True)
        else:
            print(line, file=self.stream or sys.stdout, flush=True)

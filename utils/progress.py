"""Progress reporting."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import TextIO


class Progress:
    """Print a line at most every few seconds, and one at the end.

    Args:
        total: number of what is counted; None where it is unknown, as for a camera.
        what: the name of one.
        interval: seconds between lines.
        stream: where the lines go, standard output without it. Another one that is a terminal gets one line,
            which is drawn again in place.
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
            # To the line's beginning, and what is left of a longer one removed.
            end = "\n" if done == self.total else ""
            print(f"\r{line}\x1b[K", end=end, file=self.stream, flush=True)
        else:
            print(line, file=self.stream or sys.stdout, flush=True)

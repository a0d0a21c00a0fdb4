"""How far long work has come."""

import time
from datetime import timedelta


class Progress:
    """A line at most every few seconds, and one at the end.

    Args:
        total: of what is counted; None where nobody knows, as of a camera.
        what: the name of one.
        interval: seconds between lines.
    """

    def __init__(self, total: int | None, what: str = "picture", interval: float = 5.0):
        self.total = total
        self.what = what
        self.interval = interval
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
        print(line, flush=True)

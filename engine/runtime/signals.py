"""SIGTERM and SIGINT as a request to end the run after the step under way."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType

#: A second SIGINT after this many seconds ends the process at once; earlier ones are copies of the first,
#: which a terminal sends to every process of a group and a launcher passes on to its own.
IMPATIENCE = 2.0
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """What the signals have asked for so far."""

    def __init__(self) -> None:
        #: The name of the first signal, such as SIGTERM.
        self.signal: str | None = None
        self._time = 0.0

    def _note(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._time = signal.Signals(number).name, now
        elif number == signal.SIGINT and now - self._time > IMPATIENCE:
            raise KeyboardInterrupt


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """While it is entered SIGTERM and SIGINT are only noted. Main thread alone."""
    request = StopRequest()
    previous = {number: signal.signal(number, request._note) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def ignore_interrupts() -> None:
    """For helper processes: a terminal's SIGINT is for the process that they help, which then ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

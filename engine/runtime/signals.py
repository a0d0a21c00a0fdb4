"""SIGTERM and SIGINT as a request to end the run after the current step."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType

#: A second SIGINT after this many seconds ends the process immediately. An earlier SIGINT is a copy of the
#: first: a terminal sends the signal to every process of a group, and a launcher forwards the signal to its
#: processes.
IMPATIENCE = 2.0
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """A record of whether a signal has asked the run to end."""

    def __init__(self) -> None:
        #: Name of the first signal, such as SIGTERM; None if there was none.
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
    """Record SIGTERM and SIGINT instead of ending the process. Only the main thread may call this."""
    request = StopRequest()
    previous = {number: signal.signal(number, request._note) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def ignore_interrupts() -> None:
    """Ignore SIGINT in a helper process. The parent process handles the signal and ends the helper."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

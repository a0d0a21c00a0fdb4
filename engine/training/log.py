"""Progress of a training run: on the screen, in log.jsonl, and as curves and pictures in TensorBoard."""

from __future__ import annotations

import contextlib
import json
import os
import time
from datetime import timedelta
from typing import Any

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from utils.errors import UsageError
from utils.files import check_outputs, put_aside, read_input, write_file
from utils.run_files import LOG, entry

#: How each line of log.jsonl begins.
ENTRY = b'{"step": '


class RunLog:
    """The log of one run; entries of a resumed run continue those up to the step that it continues from.

    A log.jsonl that holds anything but entries is kept under another name, with a line saying so.

    Everything is written at once, so that whatever the disk refuses is an OSError here. (SummaryWriter writes
    from a thread; where that fails, the run waits for it for ever.)

    Args:
        directory: where log.jsonl and the TensorBoard events go.
        start: steps done before.
        steps: steps of the whole run.
        samples_per_step: the global batch size.

    Raises:
        UsageError: something other than a file has the log's name, or other than a folder that of the events.
        OSError: the disk refuses it.
    """

    def __init__(self, directory: str, start: int, steps: int, samples_per_step: int):
        self.steps = steps
        self.samples_per_step = samples_per_step
        path, events = os.path.join(directory, LOG), os.path.join(directory, "tensorboard")
        check_outputs("--snapshot-dir", [path])
        if not os.path.isdir(events) and os.path.lexists(events):
            raise UsageError(f"--snapshot-dir: {events} is no folder; take it away")
        self._keep_until(path, start)
        self._file = open(path, "a", encoding="utf-8")
        os.makedirs(events, exist_ok=True)
        self._events = EventsWriter(os.path.join(events, "events"), f".{os.getpid()}")
        # TensorBoard then hides what an earlier process wrote after `start`.
        self._events.write_event(Event(step=start + 1, session_log=SessionLog(status=SessionLog.START)))
        self._last_step, self._last_time = start, time.monotonic()
        self._first_step, self._first_time = start, self._last_time

    @staticmethod
    def _keep_until(path: str, step: int) -> None:
        """Drop the entries after `step`: those steps are about to be done again."""
        try:
            lines = read_input(path).splitlines(keepends=True)
        except FileNotFoundError:
            return
        if lines and not lines[-1].endswith(b"\n") and lines[-1].startswith(ENTRY):
            lines.pop()  # what a kill or a power cut left of an entry
        entries = [entry(line) if line.endswith(b"\n") else None for line in lines]
        if None in entries:
            print(
                f"{path}: line {entries.index(None) + 1} is no entry of a log; now {put_aside(path)}",
                flush=True,
            )
        kept = [line for line, found in zip(lines, entries, strict=True) if found and found["step"] <= step]
        write_file(path, b"".join(kept))

    def write(self, step: int, loss: float, lr: float, **more: Any) -> None:
        """Log `step` (from 1) with its loss and learning rate; numbers among `more` become curves too."""
        now = time.monotonic()
        seconds = max(now - self._last_time, 1e-9)
        rate = (step - self._last_step) * self.samples_per_step / seconds
        # From the whole run so far: single intervals jump with the disk.
        left = (now - self._first_time) / (step - self._first_step) * (self.steps - step)
        entry = {"step": step, "loss": loss, "lr": lr, "images_per_second": round(rate, 4), **more}
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        for name, value in entry.items():
            if name != "step" and isinstance(value, (int, float)):
                self._add(step, summary.scalar(f"train/{name}", value))
        self._events.flush()
        print(
            f"step {step}/{self.steps}  loss {loss:.4f}  lr {lr:.3e}  {rate:.2f} images/s  "
            f"{timedelta(seconds=round(left))} left",
            flush=True,
        )
        self._last_step, self._last_time = step, now

    def score(self, step: int, mean_iou: float, best: bool) -> None:
        """Log what the validation after `step` gave."""
        self._add(step, summary.scalar("val/mean_iou", mean_iou))
        self._events.flush()
        print(
            f"step {step}/{self.steps}  mean IoU {mean_iou:.4f}{', the best so far' if best else ''}",
            flush=True,
        )

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """Show a picture, uint8 [h, w, 3] RGB, in TensorBoard."""
        self._add(step, summary.image(name, picture, dataformats="HWC"))
        self._events.flush()

    def _add(self, step: int, content: Any) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, summary=content))

    def close(self) -> None:
        """All of it is written already; what a full disk has refused stays out."""
        for file in (self._file, self._events):
            with contextlib.suppress(OSError):
                file.close()

"""Log of a training run: lines on the screen, entries in log.jsonl, and TensorBoard events."""

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

#: Beginning of each line of log.jsonl.
ENTRY = b'{"step": '


class RunLog:
    """The log of one run.

    A resumed run keeps the entries up to the step that it continues from. If log.jsonl holds anything other
    than entries, the file is renamed, and a line is printed.

    Every method writes immediately and raises OSError if the disk is full. SummaryWriter writes in a
    background thread and would hang the run on an error, so SummaryWriter is not used.

    Args:
        directory: folder of log.jsonl and the TensorBoard events.
        start: number of steps that are already done.
        steps: number of steps of the whole run.
        samples_per_step: global batch size.

    Raises:
        UsageError: log.jsonl is not a file, or tensorboard is not a folder.
        OSError: a file can't be written.
    """

    def __init__(self, directory: str, start: int, steps: int, samples_per_step: int):
        self.steps = steps
        self.samples_per_step = samples_per_step
        path, events = os.path.join(directory, LOG), os.path.join(directory, "tensorboard")
        check_outputs("--snapshot-dir", [path])
        if not os.path.isdir(events) and os.path.lexists(events):
            raise UsageError(f"--snapshot-dir: {events} is not a folder; move it away")
        self._keep_until(path, start)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - stays open until close()
        os.makedirs(events, exist_ok=True)
        self._events = EventsWriter(os.path.join(events, "events"), f".{os.getpid()}")
        # TensorBoard then hides the events that an earlier process wrote after `start`.
        self._events.write_event(Event(step=start + 1, session_log=SessionLog(status=SessionLog.START)))
        self._last_step, self._last_time = start, time.monotonic()
        self._first_step, self._first_time = start, self._last_time

    @staticmethod
    def _keep_until(path: str, step: int) -> None:
        """Drop the entries after `step`, because the run repeats the steps after `step`."""
        try:
            lines = read_input(path).splitlines(keepends=True)
        except FileNotFoundError:
            return
        if lines and not lines[-1].endswith(b"\n") and lines[-1].startswith(ENTRY):
            lines.pop()  # partly written before a kill or a power failure
        entries = [entry(line) if line.endswith(b"\n") else None for line in lines]
        if None in entries:
            print(
                f"{path}: line {entries.index(None) + 1} is not a log entry; renamed to {put_aside(path)}",
                flush=True,
            )
        kept = [line for line, found in zip(lines, entries, strict=True) if found and found["step"] <= step]
        write_file(path, b"".join(kept))

    def write(self, step: int, loss: float, lr: float, **more: Any) -> None:
        """Write the entry of a step, and print a line.

        Args:
            step: number of the step, from 1.
            loss: loss of the step.
            lr: learning rate of the step.
            **more: further values of the entry. Numbers are also written as TensorBoard curves.

        Raises:
            OSError: a file can't be written.
        """
        now = time.monotonic()
        seconds = max(now - self._last_time, 1e-9)
        rate = (step - self._last_step) * self.samples_per_step / seconds
        # Average over all steps so far, because the time of single intervals varies with the disk.
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
        """Log the mean IoU of the validation after `step`; `best` marks the best score so far."""
        self._add(step, summary.scalar("val/mean_iou", mean_iou))
        self._events.flush()
        print(
            f"step {step}/{self.steps}  mean IoU of the validation {mean_iou:.4f}"
            + (", the best so far, saved as CS_scenes_best.pth" if best else ""),
            flush=True,
        )

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """Write a picture, uint8 [h, w, 3] RGB, for TensorBoard."""
        self._add(step, summary.image(name, picture, dataformats="HWC"))
        self._events.flush()

    def _add(self, step: int, content: Any) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, summary=content))

    def close(self) -> None:
        """Close the files. Errors are ignored, because all entries are already written."""
        for file in (self._file, self._events):
            with contextlib.suppress(OSError):
                file.close()

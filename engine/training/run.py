"""The training loop, and what keeps it from losing anything: states, snapshots, validation, orderly ends."""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from engine.data.transfer import Batch
from engine.runtime.distributed import World
from engine.runtime.signals import StopRequest
from engine.training import checkpoint, schedule
from engine.training.checkpoint import State, Validation
from engine.training.ema import WeightAverage
from engine.training.log import RunLog
from engine.training.step import Diverged, Report, Stepper
from utils.environment import commit, machine
from utils.errors import RunError, UsageError
from utils.files import put_aside, read_input, unwritable, write_file


class Intervals(NamedTuple):
    """In steps; the last step has everything."""

    log: int
    snapshot: int
    state: int
    validation: int  # 0 is never


class Task(NamedTuple):
    """What is particular to what is learnt.

    batches: (steps from 0) -> this process's share of each, or the error that ends the run before it.
    learning_rate: (step from 0) -> of that step.
    seed: (step from 1) -> seed of PyTorch's random numbers in that step, on this process.
    train_mode: sets the network to training.
    validate: (network, error that ends it early) -> mean IoU over all processes.
    examples: (image, label, outputs) of a sample -> what TensorBoard shows of it: names, uint8 [h, w, 3] RGB.
        May set the network to evaluation.
    """

    batches: Callable[[range], Iterator[Batch | Exception]]
    learning_rate: Callable[[int], float]
    seed: Callable[[int], int]
    train_mode: Callable[[], object]
    validate: Callable[[nn.Module, Callable[[], Exception | None]], float]
    examples: Callable[[Tensor, Tensor, Tensor], dict[str, np.ndarray]]


class Run:
    """A training run in a directory, fresh or resumed.

    Whatever ends it early (a signal, a picture that can't be read, a loss that is not finite, a dead data
    worker) ends it on all processes between two steps, with a state of the last one saved; a full disk, which
    has no room for one, with the states before. A resumed run goes the same way as one that was never
    interrupted.

    Args:
        directory: where states, snapshots and the log go; `checkpoint.locked`.
        stop: when to end early.
        recipe: what decides the result of the run.
        arguments: noted beside the log.
        all_used: whether the loss uses every weight; otherwise a state may lack the momentum of some.
    """

    def __init__(
        self,
        directory: str,
        world: World,
        stop: StopRequest,
        task: Task,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        stepper: Stepper,
        average: WeightAverage | None,
        steps: int,
        intervals: Intervals,
        keep_states: int,
        recipe: Mapping[str, Any],
        arguments: Mapping[str, Any],
        all_used: bool = True,
    ):
        self.directory = directory
        self.world = world
        self.stop = stop
        self.task = task
        self.model = model
        self.stepper = stepper
        self.average = average
        self.steps = steps
        self.intervals = intervals
        self.keep_states = keep_states
        self.recipe = recipe
        self.arguments = arguments
        self.all_used = all_used
        self.optimizer = optimizer
        self.parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "scaler": stepper.scaler}
        if average is not None:
            self.parts["average"] = average
        self.state: State | None = None  # the newest that is saved
        self.validation = Validation()

    def restore(self, change_recipe: bool) -> None:
        """Load the newest state, if there is one. Until every process has it, no file of the run is changed.

        Args:
            change_recipe: whether the state may be of a run with another recipe.

        Raises:
            UsageError: the state is of another recipe and may not be, or can't be used.
        """
        # Rank 0 decides for all: the others may see another state of a shared disk.
        found: list[State | None] = []
        self.world.on_main(lambda: found.append(checkpoint.newest_state(self.directory)))
        state = self.world.gather(found[0] if found else None)[0]
        if state is None:
            return
        self.world.on_main(lambda: checkpoint.check_run_files(self.directory))
        if unseen := self.world.first(None if os.path.exists(state.path) else state.path):
            raise UsageError(f"--snapshot-dir: {unseen} is not on every machine; share the directory")
        if not change_recipe:
            checkpoint.check_recipe(state, self.recipe)
        if state.step > self.steps:
            raise UsageError(
                f"--num-steps {self.steps}: {state.path} is the state after step {state.step}; give at least "
                f"{state.step}"
            )
        failure = None
        try:
            checkpoint.load(state, self.parts, partial=change_recipe or not self.all_used)
        except UsageError as error:
            failure = error
        if failure := self.world.first(failure):
            raise failure
        self.state, self.validation = state, state.validation

    def train(self, start: int) -> None:
        """Take the steps after those of the state that was restored; without one, those after `start`.

        Raises:
            UsageError: the state is of a step before `start`.
        """
        if self.state is not None and self.state.step < start:
            raise UsageError(
                f"--start-iters {start}: {self.state.path} is the state after step {self.state.step}; leave "
                "the flag out, or start over in another --snapshot-dir"
            )
        start = self.state.step if self.state is not None else start
        interrupted = self.state is not None and self._due(
            start, self.intervals.validation, self.validation.step
        )
        if start >= self.steps and not interrupted:
            self._say(f"{self.directory}: the run is finished, all {self.steps} steps are done")
            return
        with contextlib.ExitStack() as held:
            self._on_main(lambda: held.enter_context(contextlib.closing(self._open_log(start))))
            if interrupted:
                self._validate(start)
            self._take_steps(start)

    def _open_log(self, start: int) -> RunLog:
        if self.state is not None:
            self._say(f"{self.state.path}: continuing after step {start}")
        elif earlier := checkpoint.set_aside(self.directory):
            self._say(f"{self.directory}: states and log of an earlier run are now in {earlier}")
        checkpoint.remove_leftovers(self.directory)
        write_file(os.path.join(self.directory, "args.json"), json.dumps(dict(self.arguments), indent=2))
        self._note_environment(start)
        self.log = RunLog(self.directory, start, self.steps, self.arguments["batch_size"])
        return self.log

    def _note_environment(self, start: int) -> None:
        """Add the machine, software and step of this start to those of earlier starts in environment.json."""
        path = os.path.join(self.directory, "environment.json")
        about = machine(str(self.world.device)) | {"processes": self.world.size, "commit": commit()}
        starts = [{"step": start, **about}]
        try:
            if os.path.exists(path):
                earlier = json.loads(read_input(path))
                if not isinstance(earlier, list):
                    raise ValueError
                starts = earlier + starts
            text = json.dumps(starts, indent=2)
        except (ValueError, RecursionError):
            self._say(f"{path}: no list of starts; now {put_aside(path)}")
            text = json.dumps(starts[-1:], indent=2)
        write_file(path, text)

    def _take_steps(self, start: int) -> None:
        if start >= self.steps:
            return
        batches = self.task.batches(range(start, self.steps))
        waited = 0.0
        for step in range(start + 1, self.steps + 1):
            lr = self.task.learning_rate(step - 1)
            schedule.set_lr(self.optimizer, lr)
            before = time.monotonic()
            batch: Any = next(batches)
            waited += time.monotonic() - before
            # A signal may have reached the workers too: it is the cause.
            end = self._stopped(step - 1) or (batch if isinstance(batch, Exception) else None)
            end = self.world.first(end)
            if end is not None:
                self._end(end, step - 1, start)
            # Dropout draws its masks by itself (engine/training/dropout.py). For other random layers: a
            # function of (seed, step, rank), so that a resumed run needs no random state.
            torch.manual_seed(self.task.seed(step))
            try:
                report = self.stepper.step(step, batch.images, batch.labels, batch.records)
            except Diverged as error:
                self._end(error, step - 1, start)
            if self.average is not None:
                self.average.update(step)
            if self._due(step, self.intervals.log):
                self._log(step, lr, waited, report, batch)
                waited = 0.0
            snapshot, validate = (
                self._due(step, interval) for interval in (self.intervals.snapshot, self.intervals.validation)
            )
            if (snapshot or validate or self._due(step, self.intervals.state)) and not self._is_finite():
                self.world.barrier()  # a launcher may end rank 0 as soon as another one is gone
                raise RunError(
                    f"step {step}: its update made weights that are not finite; they are not saved. Lower "
                    "--learning-rate; --resume continues from the newest state"
                )
            if snapshot:
                self._save_snapshot(step)
            if snapshot or validate:
                self._show(step, batch, report)
            if snapshot or validate or self._due(step, self.intervals.state):
                self._save_state(step)
            if validate:
                self._validate(step)

    def _is_finite(self) -> bool:
        """Return whether all weights and statistics, which every process has alike, are finite."""
        values = [value for value in self.model.state_dict().values() if value.is_floating_point()]
        return math.isfinite(torch.nn.utils.get_total_norm(values, float("inf")))

    def _end(self, error: Exception, step: int, start: int) -> NoReturn:
        """Raise `error` with the state after `step` saved; every process does."""
        if step > start:
            self._save_state(step)
        self.world.barrier()  # a launcher may end rank 0 as soon as another one is gone
        raise error

    def _due(self, step: int, interval: int, done: int = -1) -> bool:
        """Return whether an action of this interval is due after `step` and was not done by step `done`."""
        return interval > 0 and 0 < step and step > done and (step % interval == 0 or step == self.steps)

    def _stopped(self, step: int) -> RunError | None:
        if self.stop.signal is None:
            return None
        return RunError(f"ended by {self.stop.signal} after step {step}; --resume continues from there")

    def _say(self, line: str) -> None:
        if self.world.is_main:
            print(line, flush=True)

    def _on_main(self, action: Callable[[], object]) -> None:
        """Do `action` on rank 0; where the disk refuses it, the run ends on all processes."""

        def guarded() -> None:
            try:
                action()
            except OSError as error:
                then = "start it again: it had no state yet"
                if self.state is not None:
                    then = f"--resume continues after step {self.state.step}"
                error.filename = error.filename or self.directory
                raise unwritable(error, then) from error

        self.world.on_main(guarded)

    def _save_state(self, step: int) -> None:
        if self.state is not None and self.state.step == step:
            return
        state = State(step, checkpoint.state_path(self.directory, step), dict(self.recipe), self.validation)
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        self._on_main(lambda: checkpoint.save(state, parts, self.keep_states))
        self.state = state

    def _save_snapshot(self, step: int) -> None:
        def save() -> None:
            path = checkpoint.save_snapshot(self.directory, step, self.model.state_dict())
            self._say(f"saved {path}")
            if self.average is not None:
                checkpoint.save_snapshot(self.directory, f"{step}_ema", self.average.state_dict())

        self._on_main(save)

    def _show(self, step: int, batch: Batch, report: Report) -> None:
        """What there is to see of the last sample of the batch, for TensorBoard."""

        def show() -> None:
            pictures = self.task.examples(batch.images[-1], batch.labels[-1], report.outputs[0][-1])
            for name, picture in pictures.items():
                self.log.picture(step, name, picture)

        self._on_main(show)
        self.task.train_mode()

    def _validate(self, step: int) -> None:
        """Score the weights after `step` and keep them if they are the best; the state of `step` is saved."""
        with self.average.in_model() if self.average is not None else contextlib.nullcontext():
            mean_iou = self.task.validate(self.model, lambda: self._stopped(step))
            self.validation = self.validation.with_score(step, mean_iou)
            best = self.validation.best_step == step

            def save() -> None:
                if best:
                    checkpoint.save_snapshot(self.directory, "best", self.model.state_dict())
                self.log.score(step, mean_iou, best)

            self._on_main(save)
        self.task.train_mode()
        assert self.state is not None
        state = self.state = self.state._replace(validation=self.validation)
        self._on_main(lambda: checkpoint.note_validation(state))

    def _log(self, step: int, lr: float, waited: float, report: Report, batch: Batch) -> None:
        names = ("main_loss", "auxiliary_loss")
        records = [record for share in self.world.gather(batch.records) for record in share]
        more = {"loss_scale": report.scale} if self.stepper.scaler.is_enabled() else {}
        self._on_main(
            lambda: self.log.write(
                step,
                report.loss,
                lr,
                **dict(zip(names, report.parts, strict=False)),
                gradient_norm=report.gradient_norm if math.isfinite(report.gradient_norm) else None,
                **more,
                data_seconds=round(waited, 4),
                memory_mb=round(_peak_memory(self.world.device) / 2**20),
                samples=records,
            )
        )


def _peak_memory(device: torch.device) -> int:
    """Bytes: on the device, or of the process where that is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

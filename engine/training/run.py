"""A training run in a directory: resuming, logging, saving, validating, and ending without losing steps."""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, NamedTuple, NoReturn, cast

import numpy as np
import torch
from torch import Tensor, nn

from engine.data.loader import Loading, PictureSource
from engine.data.transfer import Batch
from engine.evaluation.evaluate import evaluate
from engine.evaluation.metrics import mean_iou
from engine.inference import predict_classes
from engine.options import TrainOptions
from engine.runtime.distributed import World, is_restarted
from engine.runtime.signals import StopRequest
from engine.training import checkpoint
from engine.training.checkpoint import State, Validation
from engine.training.ema import WeightAverage
from engine.training.log import RunLog
from engine.training.step import Diverged, StepResult
from utils.environment import commit, machine
from utils.errors import RunError, UsageError
from utils.files import put_aside, read_input, unwritable, write_file
from utils.run_files import ARGUMENTS, CLASSES

#: Function that draws a sample: (image [3, h, w], label [h, w], logits [C, H, W]) -> pictures by name, uint8
#: [h, w, 3] RGB.
Draw = Callable[[Tensor, Tensor, Tensor], Mapping[str, np.ndarray]]


#: Names of the parts of the loss in the log: those of both heads and of the category-consistent loss.
LOSSES = ("main_loss", "auxiliary_loss", "ccl_variance", "ccl_distance", "ccl_regularization")


class Parts(NamedTuple):
    """Objects that are saved in a state."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: WeightAverage | None = None

    def present(self) -> dict[str, Any]:
        """Return the objects that the run has, by name."""
        return {name: part for name, part in self._asdict().items() if part is not None}


class Data(NamedTuple):
    """The parts of a data set that a run needs besides the batches.

    Attributes:
        validation: pictures to validate on; None if --val-every is 0.
        draw: function that draws a sample for TensorBoard.
        class_table: content of classes.tsv, for a run whose flags do not give a class table but whose data
            set has one; None otherwise.
    """

    validation: PictureSource | None
    draw: Draw
    class_table: str | None = None


@contextlib.contextmanager
def exclusive(directory: str, world: World) -> Iterator[None]:
    """Lock the directory of a run against other runs.

    Raises:
        UsageError: see `checkpoint.locked`; raised on every process.
    """
    with contextlib.ExitStack() as held:
        world.on_main(lambda: held.enter_context(checkpoint.locked(directory)))
        yield


class Run:
    """A training run in a directory, new or resumed.

        with Run(...) as run:
            for step, batch in run.steps(batches):
                run.record(step, batch, stepper.step(step, batch))

    On entry, a resumed run restores the newest state. Then the log is opened.

    A signal, an unreadable picture, a loss that is not finite, or a dead data worker ends the run on all
    processes. The run ends between two steps, after the state of the last step is saved. If the disk is full,
    the run ends without a new state, and the saved states remain. So it does if the loss is not finite and
    steps wait late (`engine.training.step.StepOptions.late`).

    On a CPU, a resumed run is bit-identical to an uninterrupted run.

    Args:
        options: options of train.py.
        world: processes of the run.
        stop: signals that end the run early.
        parts: objects that are saved in a state and restored from a state.
        recipe: values that determine how the weights change in a step (see engine/options.py), and a digest
            of the data. A resumed run must have the same recipe.
        data: what the run gets of its data set, besides the batches.
    """

    def __init__(
        self,
        options: TrainOptions,
        world: World,
        stop: StopRequest,
        parts: Parts,
        recipe: Mapping[str, Any],
        data: Data,
    ):
        self.options = options
        self.directory = options.snapshot_dir
        self.world = world
        self.stop = stop
        self.parts = parts
        self.recipe = recipe
        self.data = data
        self.start = options.start_iters  # steps done before
        self.state: State | None = None  # the newest saved state
        self.validation = Validation()
        self._waited = 0.0  # seconds for batches since the last line of the log
        self._step = self.start  # steps done
        self._latest: StepResult | None = None  # result of the last step
        self._held = contextlib.ExitStack()

    def __enter__(self) -> Run:
        # Each machine counts its restarts separately.
        if self.world.first(self.options.resume or is_restarted() or None):
            self._restore()
        if self.state is not None:
            if self.state.step < self.start:
                raise UsageError(
                    f"--start-iters {self.start}: {self.state.path} is the state after step "
                    f"{self.state.step}; omit the flag, or start over in another --snapshot-dir"
                )
            self._step = self.start = self.state.step
        if not self.remaining and not self._owes_validation():
            self._say(f"{self.directory}: the run is finished, all {self.options.num_steps} steps are done")
            return self
        try:
            self._on_main(lambda: self._held.enter_context(contextlib.closing(self._open_log())))
        except BaseException:
            self._held.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._held:
            # Every process raises Diverged, before the step changes the weights.
            if isinstance(error, Diverged):
                if error.late:  # a later step has already changed the running statistics: save no state
                    self.world.barrier()
                else:
                    self._end(error)

    @property
    def _own_table(self) -> bool:
        """Whether the run writes its class table."""
        return self.data.class_table is not None

    @property
    def remaining(self) -> range:
        """The remaining steps, counted from 0; empty for a finished run."""
        return range(self.start, self.options.num_steps)

    def steps(self, batches: Iterator[Batch | Exception]) -> Iterator[tuple[int, Batch]]:
        """Yield the number, counted from 1, and the batch of every remaining step.

        Args:
            batches: for each step of `remaining`, this process's share of the batch, or the error that ends
                the run.

        Raises:
            InputError, RunError: the error that ends the run. The error is raised on every process, after the
                state of the last step is saved.
        """
        if self._owes_validation():
            self._validate(self.start)
        for step in (done + 1 for done in self.remaining):
            before = time.monotonic()
            batch = next(batches)
            self._waited += time.monotonic() - before
            # Check for a signal first: it may have reached the data workers too and caused their error. Where
            # steps wait late, the device still computes the last step while the processes agree.
            end = self._stopped(step - 1) or (batch if isinstance(batch, Exception) else None)
            if (end := self.world.first(end)) is not None:
                self._end(end)
            yield step, cast(Batch, batch)

    def record(self, step: int, batch: Batch, result: StepResult) -> None:
        """Log, save a snapshot, save a state and validate after a step, each action if due.

        Args:
            step: number of the step, from 1.
            batch: this process's share of the batch.
            result: result of the step.

        Raises:
            RunError: the numbers of the step or the weights are not finite, or the disk is full.
        """
        log = self._due(step, self.options.print_frequency)
        snapshot = self._due(step, self.options.save_pred_every)
        validate = self._due(step, self.options.val_every)
        state = snapshot or validate or self._due(step, self.options.save_state_every)
        if log or state:
            result.numbers()  # raises an error if they are not finite
        self._step, self._latest = step, result
        if log:
            self._log(step, batch, result)
        if state and not self._is_finite():
            self.world.barrier()  # a launcher may end rank 0 as soon as another process is gone
            raise RunError(
                f"step {step}: its update made weights that are not finite; they are not saved. Lower "
                "--learning-rate; --resume continues from the newest state"
            )
        if snapshot:
            self._save_snapshot(step)
        if snapshot or validate:
            self._show(step, batch, result)
        if state:
            self._save_state(step)
        if validate:
            self._validate(step)

    def _restore(self) -> None:
        """Load the newest state, if there is one.

        Damaged states are renamed. No other file of the run is changed before every process has loaded the
        state.

        Raises:
            UsageError: the state has another recipe, or can't be used.
        """
        # Rank 0 decides: on a shared disk, other processes may see another newest state.
        found: list[State | None] = []
        self.world.on_main(lambda: found.append(checkpoint.newest_state(self.directory)))
        state = self.world.gather(found[0] if found else None)[0]
        if state is None:
            return
        self.world.on_main(lambda: checkpoint.check_run_files(self.directory, self._own_table))
        if unseen := self.world.first(None if os.path.exists(state.path) else state.path):
            raise UsageError(f"--snapshot-dir: {unseen} is not on every machine; share the directory")
        if not self.options.change_recipe:
            checkpoint.check_recipe(state, self.recipe)
        if state.step > self.options.num_steps:
            raise UsageError(
                f"--num-steps {self.options.num_steps}: {state.path} is the state after step {state.step}; "
                f"give at least {state.step}"
            )
        failure = None
        partial = self.options.change_recipe or not self.options.all_weights_used
        try:
            checkpoint.load(state, self.parts.present(), partial)
        except UsageError as error:
            failure = error
        if failure := self.world.first(failure):
            raise failure
        self.state, self.validation = state, state.validation

    def _open_log(self) -> RunLog:
        if self.state is not None:
            self._say(f"{self.state.path}: continuing after step {self.start}")
        elif earlier := checkpoint.set_aside(self.directory, self._own_table):
            self._say(f"{self.directory}: states and log of an earlier run are now in {earlier}")
        checkpoint.remove_leftovers(self.directory)
        arguments = dict(vars(self.options))
        if self.data.class_table is not None:
            # The commands that read a checkpoint find the table by args.json. A bare name is a file in the
            # folder of the run, which may be moved.
            arguments["classes"] = CLASSES
            path = os.path.join(self.directory, CLASSES)
            # A resumed run has the same classes, possibly under new names.
            if self.state is None or self.options.change_recipe or not os.path.exists(path):
                write_file(path, self.data.class_table)
        elif self.options.classes is not None and not os.path.dirname(self.options.classes):
            arguments["classes"] = os.path.join(os.curdir, self.options.classes)
        write_file(os.path.join(self.directory, ARGUMENTS), json.dumps(arguments, indent=2))
        self._note_environment()
        self.log = RunLog(self.directory, self.start, self.options.num_steps, self.options.batch_size)
        return self.log

    def _note_environment(self) -> None:
        """Append the machine, the software and the steps done before this start to environment.json."""
        path = os.path.join(self.directory, "environment.json")
        about = machine(str(self.world.device)) | {"processes": self.world.size, "commit": commit()}
        starts = [{"step": self.start, **about}]
        try:
            if os.path.exists(path):
                earlier = json.loads(read_input(path))
                if not isinstance(earlier, list):
                    raise ValueError
                starts = earlier + starts
            text = json.dumps(starts, indent=2)
        except (ValueError, RecursionError):
            self._say(f"{path}: not a list of starts; renamed to {put_aside(path)}")
            text = json.dumps(starts[-1:], indent=2)
        write_file(path, text)

    def _owes_validation(self) -> bool:
        """Return whether the run was interrupted between a state and the validation of the same step."""
        return self.state is not None and self._due(
            self.start, self.options.val_every, done=self.validation.step
        )

    def _is_finite(self) -> bool:
        """Return whether all weights and running statistics are finite; the same on all processes."""
        values = [value for value in self.parts.model.state_dict().values() if value.is_floating_point()]
        return math.isfinite(torch.nn.utils.get_total_norm(values, float("inf")))

    def _end(self, error: Exception) -> NoReturn:
        """Save the state of the last step and raise `error`, on every process."""
        if self._latest is not None:
            self._latest.numbers()  # raises its own error if they are not finite
        if self._step > self.start:
            self._save_state(self._step)
        self.world.barrier()  # a launcher may end rank 0 as soon as another process is gone
        raise error

    def _due(self, step: int, interval: int, done: int = -1) -> bool:
        """Return whether an action with this interval is due after `step`.

        An action is due after every `interval` steps and after the last step. An action with interval 0 is
        never due. Steps up to `done` have been handled already, and nothing is due for them.
        """
        last = self.options.num_steps
        return interval > 0 and step > max(0, done) and (step % interval == 0 or step == last)

    def _stopped(self, step: int) -> RunError | None:
        if self.stop.signal is None:
            return None
        return RunError(f"ended by {self.stop.signal} after step {step}; --resume continues from there")

    def _say(self, line: str) -> None:
        if self.world.is_main:
            print(line, flush=True)

    def _on_main(self, action: Callable[[], object]) -> None:
        """Call `action` on rank 0. If `action` can't write a file, the run ends on all processes."""

        def guarded() -> None:
            try:
                action()
            except OSError as error:
                then = "start over: there is no state yet"
                if self.state is not None:
                    then = f"--resume continues after step {self.state.step}"
                error.filename = error.filename or self.directory
                raise unwritable(error, then) from error

        self.world.on_main(guarded)

    def _save_state(self, step: int) -> None:
        if self.state is not None and self.state.step == step:
            return
        state = State(step, checkpoint.state_path(self.directory, step), dict(self.recipe), self.validation)
        values = {name: part.state_dict() for name, part in self.parts.present().items()}
        self._on_main(lambda: checkpoint.save(state, values, self.options.keep_states))
        self.state = state

    def _save_snapshot(self, step: int) -> None:
        def save() -> None:
            path = checkpoint.save_snapshot(self.directory, step, self.parts.model.state_dict())
            self._say(f"saved {path}")
            if self.parts.average is not None:
                checkpoint.save_snapshot(self.directory, f"{step}_ema", self.parts.average.state_dict())

        self._on_main(save)

    def _show(self, step: int, batch: Batch, result: StepResult) -> None:
        """Draw the last sample of the batch for TensorBoard."""

        def show() -> None:
            with _in_evaluation_mode(self.parts.model):
                pictures = self.data.draw(batch.images[-1], batch.labels[-1], result.outputs[0][-1])
            for name, picture in pictures.items():
                self.log.picture(step, name, picture)

        self._on_main(show)

    def _validate(self, step: int) -> None:
        """Validate after `step`, whose state is saved, and save the weights if their score is the best."""
        assert self.state is not None and self.data.validation is not None
        model, options = self.parts.model, self.options
        average = contextlib.nullcontext() if self.parts.average is None else self.parts.average.in_model()
        with average, _in_evaluation_mode(model):
            result = evaluate(
                lambda images: predict_classes(
                    model, images, [1.0], False, options.input_size, options.num_classes
                ),
                self.data.validation,
                self.world,
                Loading(workers=options.num_workers),
                interrupted=lambda: self._stopped(step),
            )
            score = mean_iou(result.confusion)
            self.validation = self.validation.with_score(step, score)
            best = self.validation.best_step == step

            def save() -> None:
                if best:
                    checkpoint.save_snapshot(self.directory, "best", model.state_dict())
                self.log.score(step, score, best)

            self._on_main(save)
        state = self.state = self.state._replace(validation=self.validation)
        self._on_main(lambda: checkpoint.note_validation(state))

    def _log(self, step: int, batch: Batch, result: StepResult) -> None:
        numbers = result.numbers()
        records = [record for share in self.world.gather(batch.records) for record in share]
        more = {"loss_scale": numbers.scale} if self.parts.scaler.is_enabled() else {}
        self._on_main(
            lambda: self.log.write(
                step,
                numbers.loss,
                self.parts.optimizer.param_groups[0]["lr"],
                **dict(zip(LOSSES, numbers.parts, strict=False)),
                gradient_norm=numbers.gradient_norm if math.isfinite(numbers.gradient_norm) else None,
                **more,
                data_seconds=round(self._waited, 4),
                memory_mb=round(_peak_memory(self.world.device) / 2**20),
                samples=records,
            )
        )
        self._waited = 0.0


@contextlib.contextmanager
def _in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Set `model` to evaluation mode, and restore the mode of every module afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: of the GPU, or of the process if the device is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

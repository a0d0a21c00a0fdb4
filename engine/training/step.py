"""A training step: forward pass, global loss, backward pass, check of loss and gradient, update."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

import fused
from engine.acceleration import autocast, record
from engine.data.transfer import Batch, to_host
from engine.randomness import seed_of
from engine.runtime.distributed import World
from engine.training.dropout_masks import DropoutMasks
from utils.errors import RunError

#: Loss scale below which an overflow has another cause than the scale.
SMALLEST_SCALE = 1.0


class Diverged(RunError):
    """The loss or the gradient is not finite. The step has not changed the weights.

    Args:
        message: the error message.
        late: whether a later step may have begun (see `StepOptions.late`). The running statistics are then
            not those of the weights.
    """

    def __init__(self, message: str, late: bool = False):
        super().__init__(message)
        self.late = late


class Total(Protocol):
    """The weighted sum of the losses and the sum of the weights, as in loss.ohem.Total."""

    @property
    def loss(self) -> Tensor:
        """Weighted sum of the losses of the pixels, a scalar."""
        ...

    @property
    def weight(self) -> Tensor:
        """Sum of the weights of the pixels, a scalar."""
        ...


class Criterion(Protocol):
    """A loss of several heads (loss.CriterionDSN is one)."""

    @property
    def head_weights(self) -> Sequence[float]:
        """Weight of the loss of each head."""
        ...

    def totals(self, outputs: Sequence[Tensor], target: Tensor) -> Sequence[Total]:
        """Return the weighted sum of the losses and the sum of the weights for each head.

        Args:
            outputs: logits of each head, [n, C, H, W].
            target: class indices, [n, h, w].
        """
        ...


class StepOptions(NamedTuple):
    """Options of a `Stepper`.

    Attributes:
        precision: one of PRECISIONS, or None for the precision of the weights. With fp16, the loss is scaled,
            and steps that overflow are skipped.
        accumulate: number of sequential parts into which the share of a process is split.
        seed: seed of the dropout masks.
        late: whether to wait for the numbers of a step only in the next step, so that the device always has
            work. The device itself skips the updates after a loss or gradient that is not finite. This
            requires a fused optimizer, and another precision than fp16.
        graph: whether to record forward and backward pass as a CUDA graph. This requires a single process, a
            GPU, `accumulate` = 1, another precision than fp16, and batches of constant size.
    """

    precision: str | None = None
    accumulate: int = 1
    seed: int = 0
    late: bool = False
    graph: bool = False


def waits_late(device: torch.device, precision: str | None) -> bool:
    """Return whether train.py waits late for a step (see `StepOptions.late`).

    Like the fused operators, this has not run on a GPU yet. On a CPU, nothing runs ahead.
    """
    return device.type == "cuda" and precision != "fp16" and fused.active(device)


def updates_at_once(device: torch.device, channels_last: bool) -> bool:
    """Return whether train.py updates all weights in one kernel.

    On a CPU, this kernel is slower than the default for channels_last weights (benchmarks/step.py).
    """
    return fused.active(device) and (device.type == "cuda" or not channels_last)


class StepNumbers(NamedTuple):
    """The numbers of one step, over all processes.

    Attributes:
        loss: loss of the step.
        parts: loss of each head, before the factors of the heads.
        gradient_norm: 2-norm of the gradient of all weights.
        scale: loss scale of fp16, 1 otherwise.
    """

    loss: float
    parts: list[float]
    gradient_norm: float
    scale: float


class StepResult(NamedTuple):
    """The result of one step.

    Attributes:
        numbers: function that waits for the device and returns the numbers. It raises `Diverged` if they are
            not finite.
        outputs: outputs of the network for the last part of the batch of this process, on the device.
    """

    numbers: Callable[[], StepNumbers]
    outputs: Sequence[Tensor]


class Stepper:
    """Train a network step by step.

    The loss is the mean over the pixels that the criterion counts, of all processes. The channels that
    dropout zeroes depend on the seed, the step and the sample. With `accumulate` = 1, loss and gradient are
    therefore the same for any number of processes, up to rounding, unless the criterion uses statistics of
    one process, as OHEM does. With `accumulate` > 1, the share of a
    process is split into equal parts, and the loss is the mean of the losses of the parts. The number of
    processes then decides which samples form a part.

    Args:
        model: network to train, wrapped for the processes of `world` and possibly compiled.
        criterion: loss of the network.
        optimizer: updates the weights of the network.
        world: processes that share each batch.
        options: precision and implementation of a step.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        optimizer: torch.optim.Optimizer,
        world: World,
        options: StepOptions = StepOptions(),  # noqa: B008
    ):
        self.model = model
        self.criterion = criterion
        self.optimizer = optimizer
        self.world = world
        self.options = options
        self.dropout = DropoutMasks(model, options.seed, world.device)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=options.precision == "fp16")
        # The forward pass changes the running statistics before it is known whether the step is finite.
        self._statistics = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self._statistics_before = [buffer.clone() for buffer in self._statistics]
        self._previous: Callable[[], StepNumbers] | None = None  # numbers that were not waited for
        self._skip = torch.zeros(1, device=world.device)  # 1 after a step whose numbers are not finite
        self._graph: _Graph | None = None

    def step(self, number: int, batch: Batch) -> StepResult:
        """Take step `number` with this process's share of the batch.

        Args:
            number: number of the step, from 1.
            batch: n samples, the same n on every process, divisible by `accumulate`. Rank r has samples
                r * n to (r + 1) * n - 1 of the global batch.

        Raises:
            Diverged: the loss is not finite, or the gradient is not finite for another reason than an
                overflow of fp16. The error is raised on every process, before the weights are changed. The
                message names the samples of the processes whose loss is not finite. With the option `late`,
                the error may be about the previous step, and `StepResult.numbers` raises it too.
        """
        # Dropout draws its own masks. Other random layers depend on seed, step and rank, so that a resumed
        # run needs no random state.
        torch.manual_seed(seed_of(self.options.seed, number, self.world.rank))
        torch._foreach_copy_(self._statistics_before, self._statistics)
        if self._graph is None:  # the recorded backward pass overwrites the gradients
            self.optimizer.zero_grad()
        first = self.world.rank * len(batch.images)
        self.dropout.draw(number, range(first, first + len(batch.images)))
        parts, own, outputs = self._gradients(batch.images, batch.labels)
        self.scaler.unscale_(self.optimizer)
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        norm = torch.nn.utils.get_total_norm([w.grad for w in weights if w.grad is not None])
        # All processes get the same values: loss and gradients are already reduced.
        values = torch.cat([parts, norm.view(1)])
        if self.options.late:
            self._skip.logical_or_(~values.isfinite().all())
            self.optimizer.found_inf = self._skip  # type: ignore[attr-defined]  # read by fused optimizers
            self.optimizer.step()
        arrived = to_host(values)

        def numbers() -> StepNumbers:
            return self._checked(number, arrived().tolist(), own, batch.records)

        if self.options.late:
            previous, self._previous = self._previous, numbers
            if previous is not None:
                previous()
            return StepResult(numbers, outputs)
        found = numbers()
        if _finite(found.gradient_norm):
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.scaler.update(found.scale * self.scaler.get_backoff_factor())
        return StepResult(lambda: found, outputs)

    def _checked(
        self, number: int, values: Sequence[float], own: Tensor, records: Sequence[str]
    ) -> StepNumbers:
        """Return the numbers of step `number`; raise `Diverged` if they end the run.

        Args:
            number: number of the step.
            values: loss of each head over all processes, and norm of the gradient.
            own: share of this process in the losses.
            records: samples of this process.
        """
        *losses, norm = values
        loss = sum(w * part for w, part in zip(self.criterion.head_weights, losses, strict=False))
        scale = self.scaler.get_scale()
        overflow = self.scaler.is_enabled() and not _finite(norm) and scale >= SMALLEST_SCALE
        if not _finite(loss) or not (_finite(norm) or overflow):
            # These are the statistics before the newest step. If it was a later one, nothing is saved.
            torch._foreach_copy_(self._statistics, self._statistics_before)
            self.optimizer.zero_grad()
            raise self._diverged(number, loss, norm, bool(own.isfinite().all()), records)
        return StepNumbers(loss, losses, norm, scale)

    def _gradients(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """Compute the gradients, by a CUDA graph if requested; see `_backward`."""
        if not self.options.graph:
            return self._backward(images, labels)
        if self._graph is None:

            def backward(*batch: Tensor) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
                self.optimizer.zero_grad()  # otherwise the recorded pass would add to the gradients
                return self._backward(*batch)

            self._graph = _Graph(backward, images, labels)
            # Recording has run the forward pass a few times.
            torch._foreach_copy_(self._statistics, self._statistics_before)
        return self._graph.replay(images, labels)

    def _backward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """Compute the gradients.

        Returns:
            The loss of each head over all processes, the share of this process in this loss, and the outputs
            of the last part.
        """
        device, outputs = self.world.device, []
        own = torch.zeros(0)
        for part, (some_images, some_labels) in enumerate(
            zip(images.chunk(self.options.accumulate), labels.chunk(self.options.accumulate), strict=True)
        ):
            last = part == self.options.accumulate - 1
            with self._synchronized(last), self.dropout.applied(part, self.options.accumulate):
                with autocast(device, self.options.precision):
                    outputs = self.model(some_images)
                totals = self.criterion.totals(outputs, some_labels)
                weight = torch.stack([total.weight for total in totals]).detach()
                self.world.all_reduce(weight)
                # The share of this process in the mean over all.
                shares = torch.stack([total.loss for total in totals]) / weight.where(weight > 0, 1)
                weighted = [w * share for w, share in zip(self.criterion.head_weights, shares, strict=False)]
                # The data-parallel wrapper divides by the number of processes.
                loss = torch.stack(weighted).sum() * (self.world.size / self.options.accumulate)
                self.scaler.scale(loss).backward()
            shares = shares.detach() / self.options.accumulate
            own = own + shares if part else shares
        common = own.clone()
        self.world.all_reduce(common)
        return common, own, [output.detach() for output in outputs]

    def _synchronized(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        if last or self.world.size == 1:
            return contextlib.nullcontext()
        return self.model.no_sync()  # type: ignore[operator]

    def _diverged(
        self, number: int, loss: float, norm: float, own_is_finite: bool, records: Sequence[str]
    ) -> Diverged:
        shares = self.world.gather((own_is_finite, list(records)))
        guilty = [rank for rank, (finite, _) in enumerate(shares) if not finite]
        where = f"on process {', '.join(map(str, guilty))}" if guilty else "over all processes"
        names = [record for rank in guilty or range(len(shares)) for record in shares[rank][1]]
        late = self.options.late
        then = "--resume continues from the newest state. " if late else ""
        return Diverged(
            f"step {number}: the loss is {loss:.6g} {where} and the gradient's norm {norm:.6g}; stopped "
            f"before the weights were changed. {then}Lower --learning-rate, or check the samples: "
            + "; ".join(names),
            late,
        )


class _Graph:
    """A CUDA graph of a function of a batch.

    Args:
        function: function of images and labels that returns tensors; it is called a few times.
        images: images of the first batch; all batches have the same shape and memory format.
        labels: labels of the first batch.
    """

    def __init__(
        self,
        function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Sequence[Tensor]]],
        images: Tensor,
        labels: Tensor,
    ):
        self._inputs = images.clone(), labels.clone()
        self._graph, self._outputs = record(lambda: function(*self._inputs), images.device)

    def replay(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """Compute the function of a batch. The next call overwrites the last of the three results."""
        for static, value in zip(self._inputs, (images, labels), strict=True):
            static.copy_(value)
        self._graph.replay()
        first, second, outputs = self._outputs
        return first.clone(), second.clone(), outputs


def _finite(value: float) -> bool:
    return abs(value) < float("inf")

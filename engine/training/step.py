"""A training step: forward pass, global loss, backward pass, check of loss and gradient, update."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from engine.acceleration import autocast
from engine.data.transfer import Batch
from engine.randomness import seed_of
from engine.runtime.distributed import World
from engine.training.dropout_masks import DropoutMasks
from utils.errors import RunError

#: Loss scale below which an overflow has another cause than the scale.
SMALLEST_SCALE = 1.0


class Diverged(RunError):
    """The loss or the gradient is not finite. The step has not changed the weights."""


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


class StepResult(NamedTuple):
    """The result of one step, over all processes.

    Attributes:
        loss: loss of the step.
        parts: loss of each head, before the factors of the heads.
        gradient_norm: 2-norm of the gradient of all weights.
        scale: loss scale of fp16, 1 otherwise.
        outputs: outputs of the network for the last part of the batch of this process, on the device.
    """

    loss: float
    parts: list[float]
    gradient_norm: float
    scale: float
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
        precision: one of PRECISIONS, or None for the precision of the weights. With fp16, the loss is scaled,
            and steps that overflow are skipped.
        accumulate: number of sequential parts into which the share of a process is split.
        seed: seed of the dropout masks.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        optimizer: torch.optim.Optimizer,
        world: World,
        precision: str | None = None,
        accumulate: int = 1,
        seed: int = 0,
    ):
        self.model = model
        self.criterion = criterion
        self.optimizer = optimizer
        self.world = world
        self.precision = precision
        self.accumulate = accumulate
        self.seed = seed
        self.dropout = DropoutMasks(model, seed, world.device)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=precision == "fp16")
        # The forward pass changes the running statistics before it is known whether the step is finite.
        self._statistics = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self._statistics_before = [buffer.clone() for buffer in self._statistics]

    def step(self, number: int, batch: Batch) -> StepResult:
        """Take step `number` with this process's share of the batch.

        Args:
            number: number of the step, from 1.
            batch: n samples, the same n on every process, divisible by `accumulate`. Rank r has samples
                r * n to (r + 1) * n - 1 of the global batch.

        Raises:
            Diverged: the loss is not finite, or the gradient is not finite for another reason than an
                overflow of fp16. The error is raised on every process, before the weights are changed. The
                message names the samples of the processes whose loss is not finite.
        """
        # Dropout draws its own masks. Other random layers depend on seed, step and rank, so that a resumed
        # run needs no random state.
        torch.manual_seed(seed_of(self.seed, number, self.world.rank))
        torch._foreach_copy_(self._statistics_before, self._statistics)
        self.optimizer.zero_grad()
        first = self.world.rank * len(batch.images)
        self.dropout.draw(number, range(first, first + len(batch.images)))
        parts, own, outputs = self._backward(batch.images, batch.labels)
        self.scaler.unscale_(self.optimizer)
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        norm = torch.nn.utils.get_total_norm([w.grad for w in weights if w.grad is not None])
        # The only wait for the device. All processes get the same values: loss and gradients are already
        # reduced.
        *losses, norm_value = torch.cat([parts, norm.view(1)]).tolist()
        loss = sum(w * part for w, part in zip(self.criterion.head_weights, losses, strict=False))
        scale = self.scaler.get_scale()
        overflow = self.scaler.is_enabled() and not _finite(norm_value) and scale >= SMALLEST_SCALE
        if not _finite(loss) or not (_finite(norm_value) or overflow):
            torch._foreach_copy_(self._statistics, self._statistics_before)
            self.optimizer.zero_grad()
            raise self._diverged(number, loss, norm_value, bool(own.isfinite().all()), batch.records)
        if overflow:
            self.scaler.update(scale * self.scaler.get_backoff_factor())
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return StepResult(loss, losses, norm_value, scale, outputs)

    def _backward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """Compute the gradients.

        Returns:
            The loss of each head over all processes, the share of this process in this loss, and the outputs
            of the last part.
        """
        device, outputs = self.world.device, []
        own = torch.zeros(0)
        for part, (some_images, some_labels) in enumerate(
            zip(images.chunk(self.accumulate), labels.chunk(self.accumulate), strict=True)
        ):
            last = part == self.accumulate - 1
            with self._synchronized(last), self.dropout.applied(part, self.accumulate):
                with autocast(device, self.precision):
                    outputs = self.model(some_images)
                totals = self.criterion.totals(outputs, some_labels)
                weight = torch.stack([total.weight for total in totals]).detach()
                self.world.all_reduce(weight)
                # The share of this process in the mean over all.
                shares = torch.stack([total.loss for total in totals]) / weight.where(weight > 0, 1)
                weighted = [w * share for w, share in zip(self.criterion.head_weights, shares, strict=False)]
                # The data-parallel wrapper divides by the number of processes.
                loss = torch.stack(weighted).sum() * (self.world.size / self.accumulate)
                self.scaler.scale(loss).backward()
            shares = shares.detach() / self.accumulate
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
        return Diverged(
            f"step {number}: the loss is {loss:.6g} {where} and the gradient's norm {norm:.6g}; stopped "
            "before the weights were changed. Lower --learning-rate, or check the samples: "
            + "; ".join(names)
        )


def _finite(value: float) -> bool:
    return abs(value) < float("inf")

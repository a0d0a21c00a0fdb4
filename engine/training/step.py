"""One training step: forward, global loss, backward, a look at the gradients, the update."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from engine.runtime.distributed import World
from engine.training.dropout import DropoutMasks
from utils.errors import RunError

#: Autocast's type for each precision that train.py offers.
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
#: A loss scale below this one overflows for another reason than its size.
SMALLEST_SCALE = 1.0


class Diverged(RunError):
    """Loss or gradient are not finite; the network is as it was before the step."""


class Total(Protocol):
    """A mean in two scalars (loss.ohem.Total is one)."""

    @property
    def loss(self) -> Tensor: ...

    @property
    def weight(self) -> Tensor: ...


class Criterion(Protocol):
    """What a step needs of a loss (loss.CriterionDSN is one)."""

    @property
    def head_weights(self) -> Sequence[float]: ...

    def totals(self, outputs: Sequence[Tensor], target: Tensor) -> Sequence[Total]: ...


class Report(NamedTuple):
    """Of one step, over all processes, on the CPU: the loss, its part by each head, the norm of the gradient.

    `outputs` are the network's for the last images of this process.
    """

    loss: float
    parts: list[float]
    gradient_norm: float
    scale: float
    outputs: Sequence[Tensor]


class Stepper:
    """Takes training steps.

    The loss is the mean over the kept pixels of all processes together, and the channels that dropout zeroes
    depend on `seed`, the step and the sample: the loss and its gradient are the same for any number of
    processes. With `accumulate` the loss is the mean of that over the parts of the batch.

    Args:
        model: whose weights are trained.
        parallel: the same, wrapped for the processes of `world` and perhaps compiled.
        precision: one of PRECISIONS or None for that of the weights. fp16 scales the loss and skips the steps
            that overflow.
        accumulate: parts in which the share of a process is computed, one after the other.
        seed: seed of the dropout masks.
    """

    def __init__(
        self,
        model: nn.Module,
        parallel: nn.Module,
        criterion: Criterion,
        optimizer: torch.optim.Optimizer,
        world: World,
        precision: str | None = None,
        accumulate: int = 1,
        seed: int = 0,
    ):
        self.parallel = parallel
        self.criterion = criterion
        self.optimizer = optimizer
        self.world = world
        self.precision = precision
        self.accumulate = accumulate
        self.dropout = DropoutMasks(model, seed, world.device)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=precision == "fp16")
        # The forward changes the running statistics before it is known whether the step is sound.
        self._statistics = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self._statistics_before = [buffer.clone() for buffer in self._statistics]

    def step(self, number: int, images: Tensor, labels: Tensor, records: Sequence[str]) -> Report:
        """Take step `number` with this process's share of the batch: rank r has samples r n to r n + n - 1.

        Args:
            images, labels: [n, 3, h, w] and [n, h, w] on the device, n divisible by `accumulate`; the same n
                on every process.
            records: a line for each sample.

        Raises:
            Diverged: on every process, saying which of them had which samples; nothing is changed.
        """
        torch._foreach_copy_(self._statistics_before, self._statistics)
        self.optimizer.zero_grad()
        first = self.world.rank * len(images)
        self.dropout.draw(number, range(first, first + len(images)))
        parts, own, outputs = self._backward(images, labels)
        self.scaler.unscale_(self.optimizer)
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        norm = torch.nn.utils.get_total_norm([w.grad for w in weights if w.grad is not None])
        # The one wait for the device. All processes see the same: loss and gradients are already common to
        # them.
        *losses, norm_value = torch.cat([parts, norm.view(1)]).tolist()
        loss = sum(w * part for w, part in zip(self.criterion.head_weights, losses, strict=False))
        scale = self.scaler.get_scale()
        overflow = self.scaler.is_enabled() and not _finite(norm_value) and scale >= SMALLEST_SCALE
        if not _finite(loss) or not (_finite(norm_value) or overflow):
            torch._foreach_copy_(self._statistics, self._statistics_before)
            self.optimizer.zero_grad()
            raise self._diverged(number, loss, norm_value, bool(own.isfinite().all()), records)
        if overflow:
            self.scaler.update(scale * self.scaler.get_backoff_factor())
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return Report(loss, losses, norm_value, scale, outputs)

    def _backward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """Gradients; the parts of the loss over all processes, those of this process, and the outputs."""
        device, outputs = self.world.device, []
        own = torch.zeros(0)
        for part, (some_images, some_labels) in enumerate(
            zip(images.chunk(self.accumulate), labels.chunk(self.accumulate), strict=True)
        ):
            last = part == self.accumulate - 1
            with self._synchronized(last), self.dropout.handed_in(part, self.accumulate):
                with torch.autocast(
                    device.type, PRECISIONS.get(self.precision or ""), enabled=self.precision is not None
                ):
                    outputs = self.parallel(some_images)
                totals = self.criterion.totals(outputs, some_labels)
                weight = torch.stack([total.weight for total in totals]).detach()
                self.world.all_reduce(weight)
                # This process's share of the mean over all.
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
        return self.parallel.no_sync()  # type: ignore[operator]

    def _diverged(
        self, number: int, loss: float, norm: float, own_is_finite: bool, records: Sequence[str]
    ) -> Diverged:
        shares = self.world.gather((own_is_finite, list(records)))
        guilty = [rank for rank, (finite, _) in enumerate(shares) if not finite]
        where = f"on process {', '.join(map(str, guilty))}" if guilty else "over all processes"
        names = [record for rank in guilty or range(len(shares)) for record in shares[rank][1]]
        return Diverged(
            f"step {number}: the loss is {loss:.6g} {where} and the gradient's norm {norm:.6g}; stopped "
            "before the weights were changed. Lower --learning-rate, or look at the samples: "
            + "; ".join(names)
        )


def _finite(value: float) -> bool:
    return abs(value) < float("inf")

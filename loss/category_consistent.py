"""Category-consistent loss: features of a class lie close together, means of classes far apart.

Source: CCNet, TPAMI version (arXiv 1811.11721v2), section 3.4. The authors have not released code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from loss.criterion import CriterionDSN
from loss.ohem import Total

#: Factors of variance, distance and regularization in the paper.
WEIGHTS = (1.0, 1.0, 0.001)
LABELS = 256  # values of a label picture


class Group(Protocol):
    """Processes that share the classes and their means, such as engine.runtime.distributed.World."""

    size: int

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum `tensor` over the processes, in place."""
        ...


class Parts(NamedTuple):
    """The parts of the loss, scalars without their factors."""

    variance: Tensor
    distance: Tensor
    regularization: Tensor


class CategoryConsistentLoss(nn.Module):
    """Category-consistent loss of features and labels.

    With the classes C of the labels, N_c pixels of class c, features h_i, means mu_c, and their distance d:

    - variance: 1/|C| sum_c 1/N_c sum_i phi(d(h_i, mu_c)). phi is 0 up to delta_v, (d - delta_v)^2 up to
      delta_d, and d - delta_d + (delta_d - delta_v)^2 from there on, so that far features do not dominate;
    - distance: 1/(|C| (|C| - 1)) sum over pairs a != b of max(2 delta_d - d(mu_a, mu_b), 0)^2;
    - regularization: 1/|C| sum_c |mu_c|.

    The paper weighs the parts by 1, 1 and 0.001. It leaves open what follows; this implementation decides:
    labels have the resolution of the features, gradients flow through the means, sums are in float32 (in
    float64 for float64 features), and the distance is 0 if there is one class. In training, classes, means
    and numbers of pixels are those of all processes (`totals`), so the loss does not depend on their number.

    Source: CCNet, TPAMI version (arXiv 1811.11721v2), section 3.4, as quoted by others: the formulas agree in
    all of them.

    Args:
        delta_v: distance of a feature to its mean that costs nothing.
        delta_d: distance from which the variance grows linearly, and half the distance of means that costs
            nothing.
        ignore_index: label of ignored pixels.
        num_classes: labels are below this number.
    """

    def __init__(
        self, delta_v: float = 0.5, delta_d: float = 1.5, ignore_index: int = 255, num_classes: int = LABELS
    ):
        super().__init__()
        if not 0 <= delta_v <= delta_d:
            raise ValueError(f"delta_v must be between 0 and delta_d={delta_d}, got {delta_v}")
        self.delta_v = delta_v
        self.delta_d = delta_d
        self.ignore_index = ignore_index
        self.num_classes = num_classes
        self.group: Group | None = None  # of `totals`; None for this process alone

    def forward(self, features: Tensor, target: Tensor) -> Parts:
        """Compute the loss of this process.

        Args:
            features: [N, D, H, W].
            target: class indices, integer [N, h, w]. If the size differs from that of the features, the
                labels nearest to the feature pixels are used.

        Returns:
            The three parts; all are 0 with zero gradients if all pixels are ignored.
        """
        return self._parts(features, target, None)

    def totals(self, features: Tensor, target: Tensor) -> list[Total]:
        """Return this process's share of each part, as weighted sums whose weights add up to 1.

        The gradients of all processes together are those of the loss over all of them.

        Args:
            features: see `forward`.
            target: see `forward`.
        """
        size = 1 if self.group is None else self.group.size
        parts = self._parts(features, target, self.group)
        weight = parts.variance.new_tensor(1 / size)
        return [Total(parts.variance, weight), *(Total(part / size, weight) for part in parts[1:])]

    def _parts(self, features: Tensor, target: Tensor, group: Group | None) -> Parts:
        """Return the parts. With a group, the variance is the share of this process."""
        dtype = torch.promote_types(features.dtype, torch.float32)
        pixels = features.movedim(1, -1).flatten(0, -2).to(dtype)  # [P, D]
        labels = nearest(target, features.shape[2:]).flatten().long()
        kept = labels != self.ignore_index
        labels = labels.where(kept, self.num_classes)  # a class of its own, which is dropped
        pixels = pixels.where(kept[:, None], 0)

        shape = self.num_classes + 1, pixels.shape[1]
        sums = pixels.new_zeros(shape).index_add(0, labels, pixels)[:-1]
        counts = torch.bincount(labels, minlength=shape[0])[:-1].to(dtype)
        if group is not None and group.size > 1:
            group.all_reduce(counts)
            sums = _AllReduce.apply(sums, group)
        present = counts > 0
        number = present.sum().to(dtype)
        divisor = number.clamp(min=1)
        means = sums / counts.clamp(min=1)[:, None]

        of_pixels = torch.cat([means, means.new_zeros(1, shape[1])])[labels]
        cost = self.variance_cost(length(pixels - of_pixels))
        each = torch.cat([counts, counts.new_ones(1)])[labels]
        variance = (cost / each).where(kept, 0).sum() / divisor

        far = length(means[:, None] - means)
        pairs = present[:, None] & present & ~torch.eye(len(means), dtype=torch.bool, device=means.device)
        cost = (2 * self.delta_d - far).clamp(min=0).square().where(pairs, 0)
        distance = cost.sum() / (number * (number - 1)).clamp(min=1)
        regularization = length(means).sum() / divisor  # the means of absent classes are 0
        return Parts(variance, distance, regularization)

    def variance_cost(self, d: Tensor) -> Tensor:
        """Return phi of distances to the mean."""
        square = (d - self.delta_v).clamp(min=0).square()
        linear = d - self.delta_d + (self.delta_d - self.delta_v) ** 2
        return linear.where(d > self.delta_d, square)


class WithConsistency(nn.Module):
    """Add the category-consistent loss to a criterion.

    The third output of the network are the features of the loss.

    Args:
        criterion: loss of the two heads, such as `CriterionDSN`.
        loss: the category-consistent loss.
    """

    def __init__(self, criterion: CriterionDSN, loss: CategoryConsistentLoss):
        super().__init__()
        self.criterion = criterion
        self.consistency = loss

    @property
    def head_weights(self) -> tuple[float, ...]:
        """Weights of main head, auxiliary head, variance, distance and regularization."""
        return *self.criterion.head_weights, *WEIGHTS

    def totals(self, outputs: Sequence[Tensor], target: Tensor) -> list[Total]:
        """Return the sums of both heads and of the three parts of the category-consistent loss.

        Args:
            outputs: [logits, dsn_logits, features].
            target: class indices, integer [N, h, w].
        """
        *heads, features = outputs
        return [*self.criterion.totals(heads, target), *self.consistency.totals(features, target)]


def length(vectors: Tensor) -> Tensor:
    """Return the 2-norm of vectors [..., D]. Its gradient is 0 at 0."""
    squares = vectors.square().sum(-1)
    nonzero = squares > 0
    return squares.where(nonzero, 1).sqrt().where(nonzero, 0)


def nearest(target: Tensor, size: torch.Size) -> Tensor:
    """Return labels [N, h, w] at the positions of feature pixels, [N, *size].

    The corners of both grids coincide, as where logits are upsampled.
    """
    for axis, (have, want) in enumerate(zip(target.shape[1:], size, strict=True), 1):
        if have != want:
            positions = torch.linspace(0, have - 1, want, dtype=torch.float64, device=target.device)
            target = target.index_select(axis, positions.round().long())
    return target


class _AllReduce(torch.autograd.Function):
    """Sum over processes, of values and, in the backward pass, of gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        x = x.clone()
        group.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        ctx.group.all_reduce(grad)
        return grad, None

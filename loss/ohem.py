"""Online hard example mining for the cross entropy (original: loss/loss.py)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Total(NamedTuple):
    """A mean in two scalars: the sum over the pixels, and how much these count together."""

    loss: Tensor
    weight: Tensor

    def mean(self) -> Tensor:
        """Of no pixels it is 0, with zero gradients."""
        return self.loss / self.weight.where(self.weight > 0, 1)


def total_cross_entropy(
    logits: Tensor, target: Tensor, ignore_label: int, class_weights: Tensor | None = None
) -> Total:
    """Cross entropy over the pixels that are not `ignore_label`.

    logits [N, C, h, w], target int [N, h, w], class_weights [C]
    """
    if class_weights is not None:
        class_weights = class_weights.to(logits.dtype)
    # CUDA sums in an order of chance inside cross_entropy.
    loss = F.cross_entropy(logits, target, class_weights, ignore_index=ignore_label, reduction="none").sum()
    kept = target != ignore_label
    if class_weights is None:
        return Total(loss, kept.sum().to(loss.dtype))
    return Total(loss, class_weights[target.where(kept, 0)].where(kept, 0).sum())


class OhemCrossEntropy2d(nn.Module):
    """Cross entropy over the hard pixels: those whose class has at most a threshold probability.

    The threshold is the `min_kept`-th smallest probability of the true class, and at least `thresh`. It is
    found on a grid coarser by `factor`, as scipy.ndimage.zoom of the original lays it; `min_kept` counts
    pixels of the full resolution, over the images of this process. All of it runs on the logits' device,
    without waiting for it.

    Args:
        ignore_label: pixels of this label are never kept.
        thresh: probability below which a pixel is always kept.
        min_kept: pixels to keep at least, where there are as many.
        factor: coarseness of the grid that the threshold is found on.
    """

    def __init__(self, ignore_label: int = 255, thresh: float = 0.7, min_kept: int = 100000, factor: int = 8):
        super().__init__()
        self.ignore_label = ignore_label
        self.thresh = float(thresh)
        self.min_kept = int(min_kept)
        self.factor = factor

    def forward(self, predict: Tensor, target: Tensor) -> Tensor:
        """logits [N, C, h, w], target int [N, h, w] -> scalar; 0 and zero gradients where nothing is kept."""
        target = target.long()
        return total_cross_entropy(predict, self.hard_target(predict, target), self.ignore_label).mean()

    @torch.no_grad()
    def hard_target(self, predict: Tensor, target: Tensor) -> Tensor:
        """`target` with `ignore_label` in place of every easy pixel."""
        probability = predict.softmax(1)
        valid = target != self.ignore_label
        of_true_class = probability.gather(1, target.where(valid, 0).unsqueeze(1)).squeeze(1)  # [N, h, w]
        return target.where(
            valid & (of_true_class <= self._threshold(probability, target)), self.ignore_label
        )

    def _threshold(self, probability: Tensor, target: Tensor) -> Tensor:
        """Scalar: the k-th smallest probability of the true class on the coarse grid, at least `thresh`."""
        kept = self.min_kept // self.factor**2
        hard = self._coarse_probability(probability, target).flatten()
        valid = hard.isfinite().sum()
        threshold = hard.new_full((), self.thresh)
        if 0 < kept <= hard.numel():
            threshold = hard.sort().values[kept - 1].clamp(min=self.thresh)
        return threshold.where(valid > kept, 1.0)

    def _coarse_probability(self, probability: Tensor, target: Tensor) -> Tensor:
        """Probability [N, h', w'] of the true class on the coarse grid; inf where the label there is ignored.

        Probabilities are interpolated linearly (in float64, as scipy does), labels taken from the nearest
        pixel.
        """
        y0, y1, wy, y_nearest, y_inside = _zoom(target.shape[1], self.factor, target.device)
        x0, x1, wx, x_nearest, x_inside = _zoom(target.shape[2], self.factor, target.device)
        inside = y_inside[:, None] & x_inside
        label = target[:, y_nearest[:, None], x_nearest].where(inside, 0)
        valid = label != self.ignore_label
        index = label.where(valid, 0).unsqueeze(1)

        def corner(y: Tensor, x: Tensor) -> Tensor:
            return probability[:, :, y[:, None], x].gather(1, index).squeeze(1).double()

        wy = wy[:, None]
        coarse = corner(y0, x0) * (1 - wy) * (1 - wx) + corner(y0, x1) * (1 - wy) * wx
        coarse = coarse + corner(y1, x0) * wy * (1 - wx) + corner(y1, x1) * wy * wx
        coarse = coarse.where(inside, 0).to(probability.dtype)
        return coarse.where(valid, float("inf"))


def _zoom(size: int, factor: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Where scipy.ndimage.zoom(., 1 / factor) samples an axis of `size` pixels: the ends fall together.

    Returns:
        lower and upper neighbor, weight of the upper (float64), nearest neighbor, and whether the position
        is on the axis: rounding can push the last one beyond the end, where scipy puts zero.
    """
    samples = round(size / factor)
    step = (size - 1) / (samples - 1) if samples > 1 else 1.0
    position = torch.arange(samples, dtype=torch.float64, device=device) * step
    inside = position <= size - 1
    position = position.clamp(max=size - 1)
    lower = position.floor()
    nearest = (position + 0.5).floor().clamp(max=size - 1)
    upper = (lower + 1).clamp(max=size - 1)
    return lower.long(), upper.long(), position - lower, nearest.long(), inside

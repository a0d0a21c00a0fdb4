"""Cross entropy with online hard example mining (OHEM).

Source: loss/loss.py of the original CCNet repository.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fused


class Total(NamedTuple):
    """The two scalars of a weighted mean: the sum of the losses and the sum of the weights of the pixels."""

    loss: Tensor
    weight: Tensor

    def mean(self) -> Tensor:
        """Return the mean. If the sum of the weights is 0, the mean is 0, with zero gradients."""
        return self.loss / self.weight.where(self.weight > 0, 1)


def total_cross_entropy(
    logits: Tensor, target: Tensor, ignore_label: int, class_weights: Tensor | None = None
) -> Total:
    """Return the summed cross entropy of the pixels whose label is not `ignore_label`.

    Args:
        logits: [N, C, h, w].
        target: class indices, int64 [N, h, w].
        ignore_label: label of ignored pixels.
        class_weights: [C], weight of the pixels of each class; None weights all classes equally.
    """
    if class_weights is not None:
        class_weights = class_weights.to(logits.dtype)
    # Sum separately: the reduction inside cross_entropy is not deterministic on CUDA.
    loss = F.cross_entropy(logits, target, class_weights, ignore_index=ignore_label, reduction="none").sum()
    kept = target != ignore_label
    if class_weights is None:
        return Total(loss, kept.sum().to(loss.dtype))
    return Total(loss, class_weights[target.where(kept, 0)].where(kept, 0).sum())


class OhemCrossEntropy2d(nn.Module):
    """Mean cross entropy over the hard pixels.

    A pixel is hard if the predicted probability of its true class is at most a threshold. The threshold is
    the `min_kept`-th smallest probability of the true class, but at least `thresh`. As in the original CCNet
    repository, the threshold is determined on a grid downsampled by `factor`, with the sampling positions of
    scipy.ndimage.zoom. `min_kept` counts pixels at full resolution, over all images of this process. All
    computations run on the device of the logits, without synchronization.

    Training uses `hard_target` only. Calling the module is for other programs.

    Args:
        ignore_label: label of ignored pixels, which are never kept.
        thresh: pixels with a probability up to this value are always kept.
        min_kept: minimum number of pixels to keep; with fewer pixels, all are kept.
        factor: downsampling factor of the grid on which the threshold is determined.
    """

    def __init__(self, ignore_label: int = 255, thresh: float = 0.7, min_kept: int = 100000, factor: int = 8):
        super().__init__()
        self.ignore_label = ignore_label
        self.thresh = float(thresh)
        self.min_kept = int(min_kept)
        self.factor = factor

    def forward(self, predict: Tensor, target: Tensor) -> Tensor:
        """Compute the loss.

        Args:
            predict: logits [N, C, h, w].
            target: class indices, integer [N, h, w].

        Returns:
            The loss, a scalar; 0 with zero gradients if no pixel is kept.
        """
        target = target.long()
        return total_cross_entropy(predict, self.hard_target(predict, target), self.ignore_label).mean()

    @torch.no_grad()
    def hard_target(self, predict: Tensor, target: Tensor) -> Tensor:
        """Return `target` with the label of every easy pixel replaced by `ignore_label`."""
        probability = predict.softmax(1)
        valid = target != self.ignore_label
        of_true_class = probability.gather(1, target.where(valid, 0).unsqueeze(1)).squeeze(1)  # [N, h, w]
        threshold = self._threshold(self._coarse_probability(probability, target))
        return target.where(valid & (of_true_class <= threshold), self.ignore_label)

    @torch.no_grad()
    def fused_threshold(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the threshold of the pixels to keep, with the fused operator.

        Args:
            logits: [N, C, H, W], before they are upsampled to the size of the target.
            target: class indices, integer [N, h, w].

        Returns:
            The threshold, a scalar. `fused.segmentation_loss` with it counts the pixels that `hard_target`
            keeps for the upsampled logits.
        """
        size = (round(target.shape[1] / self.factor), round(target.shape[2] / self.factor))
        return self._threshold(fused.coarse_probability(logits, target, size, ignore_index=self.ignore_label))

    def _threshold(self, coarse: Tensor) -> Tensor:
        """Return the threshold, a scalar: the k-th smallest coarse probability, but at least `thresh`.

        k is `min_kept` divided by `factor` ** 2, rounded down.

        Args:
            coarse: probabilities [N, h', w'] on the coarse grid; inf for ignored pixels.
        """
        kept = self.min_kept // self.factor**2
        hard = coarse.flatten()
        valid = hard.isfinite().sum()
        threshold = hard.new_full((), self.thresh)
        if 0 < kept <= hard.numel():
            threshold = hard.sort().values[kept - 1].clamp(min=self.thresh)
        return threshold.where(valid > kept, 1.0)

    def _coarse_probability(self, probability: Tensor, target: Tensor) -> Tensor:
        """Return the probability [N, h', w'] of the true class on the coarse grid; inf for ignored pixels.

        Probabilities are interpolated linearly in float64, as in scipy. Labels are taken from the nearest
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
    """Return the sampling positions of scipy.ndimage.zoom(x, 1 / factor) on an axis of `size` pixels.

    The first and last positions are the first and last pixels.

    Returns:
        Lower and upper neighbor, weight of the upper neighbor (float64), nearest neighbor, and whether the
        position is within the axis. Rounding can move the last position beyond the end, where scipy gives 0.
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

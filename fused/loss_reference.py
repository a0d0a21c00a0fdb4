"""The functions of fused.loss in plain PyTorch. They specify the results; the tests compare them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def upsample(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Upsample logits [N, C, H, W] bilinearly with aligned corners, in float32 or float64."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).contiguous()
    return F.interpolate(wide, size=size, mode="bilinear", align_corners=True)


def probability_of_label(logits: Tensor, label: Tensor) -> Tensor:
    """Return the probability [N, h, w] of class `label` [N, h, w], for logits [N, C, h, w]."""
    return logits.softmax(1).gather(1, label.unsqueeze(1)).squeeze(1)


def segmentation_loss(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = 255,
    class_weights: Tensor | None = None,
    threshold: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the weighted cross entropy, and the sum of the weights (`fused.loss.segmentation_loss`)."""
    target = target.long()
    upsampled = upsample(logits, (target.shape[1], target.shape[2]))
    counts = target != ignore_index
    label = target.where(counts, 0)
    if threshold is not None:
        counts &= ~(probability_of_label(upsampled, label) > threshold)
    weight = torch.ones_like(upsampled[:, 0]) if class_weights is None else class_weights.to(upsampled)[label]
    loss = F.cross_entropy(upsampled, label, reduction="none")
    return (weight * loss).where(counts, 0).sum(), weight.where(counts, 0).sum()


def coarse_probability(
    logits: Tensor, target: Tensor, size: tuple[int, int], *, ignore_index: int = 255
) -> Tensor:
    """Return the probability of the true class on a coarse grid (`fused.loss.coarse_probability`)."""
    target = target.long()
    height, width = target.shape[1:]
    upsampled = upsample(logits, (height, width))
    rows, columns = _positions(height, size[0]), _positions(width, size[1])
    inside = (rows <= height - 1)[:, None] & (columns <= width - 1)
    rows, columns = rows.clamp(max=height - 1)[:, None], columns.clamp(max=width - 1)
    nearest_row = (rows + 0.5).floor().long().clamp(max=height - 1)
    nearest_column = (columns + 0.5).floor().long().clamp(max=width - 1)
    label = target[:, nearest_row, nearest_column].where(inside, 0)
    ignored = label == ignore_index
    label = label.where(~ignored, 0)

    def corner(y: Tensor, x: Tensor) -> Tensor:
        at_pixels = upsampled[:, :, y.long().clamp(max=height - 1), x.long().clamp(max=width - 1)]
        return probability_of_label(at_pixels, label).double()

    y, x = rows.floor(), columns.floor()
    wy, wx = rows - y, columns - x
    between = corner(y, x) * (1 - wy) * (1 - wx) + corner(y, x + 1) * (1 - wy) * wx
    between = between + corner(y + 1, x) * wy * (1 - wx) + corner(y + 1, x + 1) * wy * wx
    return between.where(inside, 0).to(upsampled.dtype).where(~ignored, torch.inf)


def upsampled_classes(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the class with the largest upsampled logit (`fused.loss.upsampled_classes`)."""
    largest, classes = upsample(logits, size).max(1)
    return classes.to(torch.uint8).where(~largest.isnan(), 255)


def _positions(pixels: int, samples: int) -> Tensor:
    """Return the positions of scipy.ndimage.zoom on an axis, in float64."""
    step = (pixels - 1) / (samples - 1) if samples > 1 else 1.0
    return torch.arange(samples, dtype=torch.float64) * step

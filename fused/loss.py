"""Cross entropy and classes of upsampled logits, without storing the upsampled logits.

The functions need the compiled operators (`fused.active`). `fused.loss_reference` computes the same in plain
PyTorch. An autocast region does not change them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused._library import REGISTERS, refuse_double_backward


def segmentation_loss(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = 255,
    class_weights: Tensor | None = None,
    threshold: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the weighted cross entropy of upsampled logits, summed over the pixels that count.

    The logits are upsampled to the size of the target, bilinearly with aligned corners. A pixel counts if its
    label is not `ignore_index` and, with a threshold, if the predicted probability of its class is at most
    the threshold. The gradient is computed together with the loss. It can't be differentiated again.

    Args:
        logits: [N, C, H, W], any floating dtype. Half-precision logits are converted to float32 first.
        target: class indices, integer [N, h, w].
        ignore_index: label of ignored pixels.
        class_weights: [C], weight of the pixels of each class; None weights all classes equally.
        threshold: one element; see above.

    Returns:
        The sum of weight * loss, and the sum of the weights: scalars, float64 for float64 logits and float32
        for others. The first is differentiable with respect to the logits.

    Raises:
        RuntimeError: shapes or devices do not match; a label is neither ignored nor a class (only on a CPU;
            on a GPU, the loss is NaN); or a backward pass has create_graph=True.
    """
    if torch.is_grad_enabled() and logits.requires_grad:
        totals = _SegmentationLoss.apply(logits, target, ignore_index, class_weights, threshold)
    else:
        totals, _ = torch.ops.fused.segmentation_loss(
            logits, target, ignore_index, class_weights, threshold, False
        )
    return totals[0], totals[1].detach()


def coarse_probability(
    logits: Tensor, target: Tensor, size: tuple[int, int], *, ignore_index: int = 255
) -> Tensor:
    """Return the predicted probability of the true class on a coarse grid of the upsampled picture.

    The grid is that of scipy.ndimage.zoom (`loss.ohem.OhemCrossEntropy2d`). Probabilities are interpolated
    linearly between the pixels of the upsampled picture. Labels are those of the nearest pixel. At a pixel,
    the probability is exactly the one that `segmentation_loss` compares with its threshold.

    Args:
        logits: [N, C, H, W], any floating dtype.
        target: class indices, integer [N, h, w].
        size: rows and columns of the grid.
        ignore_index: label of ignored pixels.

    Returns:
        Probabilities [N, *size], float64 for float64 logits and float32 for others; infinity for ignored
        pixels, NaN for labels that are not classes, and 0 for grid points that rounding moves beyond the
        last pixel.

    Raises:
        RuntimeError: shapes or devices do not match.
    """
    return torch.ops.fused.coarse_probability(logits.detach(), target, ignore_index, *size)


def upsampled_classes(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the class with the largest logit, for logits upsampled bilinearly with aligned corners.

    Args:
        logits: [N, C, H, W], any floating dtype; at most 255 classes.
        size: height and width, (h, w).

    Returns:
        Classes, uint8 [N, h, w]. Ties give the lowest class index; pixels with a NaN logit give 255.

    Raises:
        RuntimeError: there are too many classes, or a size is 0.
    """
    return torch.ops.fused.upsampled_classes(logits.detach(), *size)


class _SegmentationLoss(torch.autograd.Function):
    """The totals, with the gradient that the operator computes together with them."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        ignored: int,
        class_weights: Tensor | None,
        threshold: Tensor | None,
    ) -> Tensor:
        totals, grad = torch.ops.fused.segmentation_loss(
            logits, target, ignored, class_weights, threshold, True
        )
        ctx.save_for_backward(grad)
        ctx.dtype = logits.dtype
        return totals

    @staticmethod
    def backward(ctx: Any, grad_totals: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("segmentation_loss")
        (grad,) = ctx.saved_tensors
        # In the precision of the sums: the factor is small, and a half-precision gradient without it could
        # overflow.
        return (grad * grad_totals[0]).to(ctx.dtype), None, None, None, None


def _register_shapes() -> None:
    """Register fake implementations: shapes and dtypes without data."""

    def wide(logits: Tensor) -> torch.dtype:
        return torch.float64 if logits.dtype == torch.float64 else torch.float32

    @torch.library.register_fake("fused::segmentation_loss")
    def _(
        logits: Tensor,
        target: Tensor,
        ignored: int,
        class_weights: Tensor | None,
        threshold: Tensor | None,
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = wide(logits)
        shape = logits.shape if needs_grad else (0,)
        return logits.new_empty(2, dtype=dtype), logits.new_empty(shape, dtype=dtype)

    @torch.library.register_fake("fused::coarse_probability")
    def _(logits: Tensor, target: Tensor, ignored: int, rows: int, columns: int) -> Tensor:
        return logits.new_empty((logits.shape[0], rows, columns), dtype=wide(logits))

    @torch.library.register_fake("fused::upsampled_classes")
    def _(logits: Tensor, height: int, width: int) -> Tensor:
        return logits.new_empty((logits.shape[0], height, width), dtype=torch.uint8)


if REGISTERS:
    _register_shapes()

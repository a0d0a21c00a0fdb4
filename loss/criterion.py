"""Training losses: cross entropy of the main head plus 0.4 times that of the auxiliary head.

Source: loss/criterion.py of the original CCNet repository.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fused
from loss.ohem import OhemCrossEntropy2d, Total, total_cross_entropy

AUXILIARY_WEIGHT = 0.4


def upsample(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Upsample logits [N, C, H, W] to (height, width) `size`, bilinearly with aligned corners.

    Half-precision logits are converted to float32 first. The result is contiguous: a softmax over the classes
    of channels_last logits would copy the result twice.
    """
    if logits.element_size() < 4:
        logits = logits.float()
    return F.interpolate(logits.contiguous(), size=tuple(size), mode="bilinear", align_corners=True)


class CriterionDSN(nn.Module):
    """Cross entropy of the main head plus 0.4 times that of the auxiliary head, on upsampled logits.

    The means are over the pixels of this process that are not ignored. The loss is 0 if all pixels are
    ignored.

    Args:
        ignore_index: label of ignored pixels.
        class_weights: [C], weight of the pixels of each class; None weights all classes equally.
    """

    #: Weights of the main head and the auxiliary head.
    head_weights = (1.0, AUXILIARY_WEIGHT)
    class_weights: Tensor | None

    def __init__(self, ignore_index: int = 255, class_weights: Tensor | None = None):
        super().__init__()
        self.ignore_index = ignore_index
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(self, outputs: Sequence[Tensor], target: Tensor) -> Tensor:
        """Compute the loss.

        Args:
            outputs: [logits, dsn_logits] or [logits], each [N, C, H, W].
            target: class indices, integer [N, h, w].

        Returns:
            The loss, a scalar.
        """
        means = [total.mean() for total in self.totals(outputs, target)]
        return torch.stack([w * mean for w, mean in zip(self.head_weights, means, strict=False)]).sum()

    def totals(self, outputs: Sequence[Tensor], target: Tensor) -> list[Total]:
        """Return the sum of the losses and the sum of the weights of the pixels for each head.

        The weights of the heads are not applied.
        """
        target = target.long()
        main, *auxiliary = outputs
        # The main head is finished first: without the fused operator, each head needs the memory of upsampled
        # logits.
        return [self.main_total(main, target), *(self.total(logits, target) for logits in auxiliary)]

    def main_total(self, logits: Tensor, target: Tensor) -> Total:
        """Return the sums of the main head, for logits [N, C, H, W] and target int64 [N, h, w]."""
        return self.total(logits, target)

    def total(self, logits: Tensor, target: Tensor) -> Total:
        """Return the sums of the cross entropy of upsampled logits, for the same arguments."""
        if fused.applies(logits):
            return self._fused_total(logits, target)
        return self._plain_total(upsample(logits, target.shape[1:]), target)

    def _fused_total(self, logits: Tensor, target: Tensor, threshold: Tensor | None = None) -> Total:
        return Total(
            *fused.segmentation_loss(
                logits,
                target,
                ignore_index=self.ignore_index,
                class_weights=self.class_weights,
                threshold=threshold,
            )
        )

    def _plain_total(self, upsampled: Tensor, target: Tensor) -> Total:
        return total_cross_entropy(upsampled, target, self.ignore_index, self.class_weights)


class CriterionOhemDSN(CriterionDSN):
    """CriterionDSN with online hard example mining (OHEM) on the main head.

    The auxiliary head uses every pixel.

    Args:
        ignore_index: label of ignored pixels.
        thresh: see `OhemCrossEntropy2d`.
        min_kept: see `OhemCrossEntropy2d`.
        class_weights: see `CriterionDSN`.
    """

    def __init__(
        self,
        ignore_index: int = 255,
        thresh: float = 0.7,
        min_kept: int = 100000,
        class_weights: Tensor | None = None,
    ):
        super().__init__(ignore_index, class_weights)
        self.ohem = OhemCrossEntropy2d(ignore_index, thresh, min_kept)

    def main_total(self, logits: Tensor, target: Tensor) -> Total:
        """Return the sums of the main head over the hard pixels."""
        if fused.applies(logits):
            return self._fused_total(logits, target, self.ohem.fused_threshold(logits, target))
        upsampled = upsample(logits, target.shape[1:])
        return self._plain_total(upsampled, self.ohem.hard_target(upsampled, target))

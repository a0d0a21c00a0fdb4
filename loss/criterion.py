"""Training losses: cross entropy of the main head plus 0.4 times that of the auxiliary head.

Source: loss/criterion.py of the original CCNet repository.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loss.ohem import OhemCrossEntropy2d, Total, total_cross_entropy

AUXILIARY_WEIGHT = 0.4


def upsample(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Upsample logits [N, C, H, W] to (height, width) `size`, bilinearly with aligned corners.

    Half-precision logits are converted to float32 first.
    """
    if logits.element_size() < 4:
        logits = logits.float()
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=True)


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
        logits = [upsample(output, target.shape[1:]) for output in outputs]
        auxiliary = [
            total_cross_entropy(output, target, self.ignore_index, self.class_weights)
            for output in logits[1:]
        ]
        return [self.main_total(logits[0], target), *auxiliary]

    def main_total(self, logits: Tensor, target: Tensor) -> Total:
        """Return the sums of the main head, for upsampled logits [N, C, h, w] and target int64 [N, h, w]."""
        return total_cross_entropy(logits, target, self.ignore_index, self.class_weights)


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
        return super().main_total(logits, self.ohem.hard_target(logits, target))

"""The training loss: main head plus 0.4 times the auxiliary head (original: loss/criterion.py)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from loss.ohem import OhemCrossEntropy2d, cross_entropy

AUXILIARY_WEIGHT = 0.4


def upsample(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, corners aligned; half precision is widened first."""
    if logits.element_size() < 4:
        logits = logits.float()
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=True)


class CriterionDSN(nn.Module):
    """Cross entropy of the upsampled logits, plus 0.4 times that of the auxiliary head's.

    Means are over the pixels of the local process that are not ignored; where there is none the loss is 0.

    Args:
        ignore_index: label of the pixels that do not count.
    """

    def __init__(self, ignore_index: int = 255):
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, outputs: Sequence[Tensor], target: Tensor) -> Tensor:
        """[logits, dsn_logits] or [logits], each [N, C, H, W], and target int [N, h, w] -> scalar."""
        main, *auxiliary = self.parts(outputs, target)
        return main + AUXILIARY_WEIGHT * sum(auxiliary) if auxiliary else main

    def parts(self, outputs: Sequence[Tensor], target: Tensor) -> list[Tensor]:
        """The loss of each head by itself, unweighted."""
        target = target.long()
        logits = [upsample(output, target.shape[1:]) for output in outputs]
        auxiliary = [cross_entropy(output, target, self.ignore_index) for output in logits[1:]]
        return [self.main_loss(logits[0], target), *auxiliary]

    def main_loss(self, logits: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(logits, target, self.ignore_index)


class CriterionOhemDSN(CriterionDSN):
    """CriterionDSN with online hard example mining on the main head (the auxiliary one keeps every pixel).

    Args:
        ignore_index, thresh, min_kept: see OhemCrossEntropy2d.
    """

    def __init__(self, ignore_index: int = 255, thresh: float = 0.7, min_kept: int = 100000):
        super().__init__(ignore_index)
        self.ohem = OhemCrossEntropy2d(ignore_index, thresh, min_kept)

    def main_loss(self, logits: Tensor, target: Tensor) -> Tensor:
        return self.ohem(logits, target)

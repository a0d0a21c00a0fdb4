"""CCNet: dilated ResNet, recurrent criss-cross attention and an auxiliary head."""

from __future__ import annotations

import os
from collections.abc import Callable

from torch import Tensor

from networks.base import Network
from networks.heads import RCCAHead
from networks.weights import load_weights


class Seg_Model(Network):  # noqa: N801
    """The CCNet segmentation network.

    State-dict entries are named as in the original CCNet repository. With resnet101 and 19 classes there are
    562 entries and 71,287,911 parameters.

    Source: CCNet, arXiv 1811.11721; networks/ccnet.py of the original CCNet repository.

    Args:
        num_classes: number of classes.
        criterion: loss, called as criterion([logits, dsn_logits], labels) if `forward` gets labels. For other
            programs; train.py computes its loss outside the network.
        pretrained_model: path of a checkpoint of CCNet or of an ImageNet backbone, which is loaded. For other
            programs; train.py loads its weights itself.
        recurrence: number of applications of the attention (R in the paper); 0 omits the attention.
        backbone: "resnet101" or "resnet50".
        dropout: probability of channel dropout in both heads.
        abn: backend of the activated batch norm, "torch", "inplace" or "apex" (see `ABN`).
        variant: "ccnet", or the architecture of another release, "mmseg" or "torchvision" (see
            networks/variants.py).

    Raises:
        ValueError: an argument is out of range.
        utils.errors.CheckpointError: `pretrained_model` is unreadable or belongs to another network.
    """

    def __init__(  # noqa: PLR0913
        self,
        num_classes: int,
        criterion: Callable[[list[Tensor], Tensor], Tensor] | None = None,
        pretrained_model: str | os.PathLike | None = None,
        recurrence: int = 2,
        backbone: str = "resnet101",
        dropout: float = 0.1,
        abn: str = "torch",
        variant: str = "ccnet",
    ):
        super().__init__(RCCAHead, num_classes, backbone, dropout, abn, variant, recurrence=recurrence)
        self.criterion = criterion
        if pretrained_model is not None:
            load_weights(self, pretrained_model)

    def forward(  # type: ignore[override]  # the loss is returned for other programs only
        self, images: Tensor, labels: Tensor | None = None
    ) -> list[Tensor] | Tensor:
        """Compute the logits of both heads, or the loss.

        Args:
            images: [N, 3, h, w], BGR minus mean.
            labels: [N, h, w] class indices.

        Returns:
            [logits, dsn_logits], see `Network.forward`. If `labels` and a criterion were given, the loss.
        """
        outputs = super().forward(images)
        if self.criterion is not None and labels is not None:
            return self.criterion(outputs, labels)
        return outputs

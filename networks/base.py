"""The network that all models share: a backbone, a main head and an auxiliary head."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from networks.abn import ABN
from networks.clips import features_of_clips
from networks.dropout import ChannelDropout
from networks.recomputation import recomputation
from networks.resnet import ResNet


class Network(ResNet):
    """The dilated ResNet with a main head on layer4 and an auxiliary head on layer3.

    The models of --model differ only in the main head (networks/models.py). A subclass with another backbone
    overrides `channels` and `features`, and calls `add_heads`.

    Source: networks/ccnet.py, pspnet.py and deeplabv3.py of the original CCNet repository, whose networks
    have the same backbone and auxiliary head ("dsn", deep supervision).

    Args:
        head: class of the main head, called as head(in_channels, num_classes, dropout=..., backend=...,
            activation=...) with `options` in addition. It maps [N, in_channels, H, W] to logits [N,
            num_classes, H, W]. docs/extending.md has the rules for its modules.
        num_classes: number of classes.
        backbone: "resnet101" or "resnet50".
        dropout: probability of channel dropout in both heads.
        abn: backend of the activated batch norm, "torch", "inplace" or "apex" (see `ABN`).
        variant: "ccnet", or the architecture of another release (see networks/variants.py).
        **options: further arguments of the head.

    Raises:
        ValueError: an argument is out of range.
    """

    #: Number of channels of layer3 and layer4.
    channels = (1024, 2048)
    #: Whether the outputs of batch norm are computed again in the backward pass (networks/recomputation.py).
    recompute = False

    def __init__(
        self,
        head: Callable[..., nn.Module],
        num_classes: int,
        backbone: str = "resnet101",
        dropout: float = 0.1,
        abn: str = "torch",
        variant: str = "ccnet",
        **options: Any,
    ):
        super().__init__(backbone, abn, variant)
        activation, dsn_channels = self.variant.activation, self.variant.dsn_channels
        self.add_heads(head, num_classes, dropout, abn, activation, dsn_channels, **options)

    def add_heads(
        self,
        head: Callable[..., nn.Module],
        num_classes: int,
        dropout: float,
        abn: str,
        activation: str = "leaky_relu",
        dsn_channels: int = 512,
        **options: Any,
    ) -> None:
        """Add the main head and the auxiliary head, for features of `channels` channels.

        Args:
            head: see `Network`, as are the other arguments that are not explained here.
            num_classes: number of classes.
            dropout: probability of channel dropout in both heads.
            abn: backend of the activated batch norm.
            activation: activation of the activated batch norm (see `ABN`).
            dsn_channels: channels of the auxiliary head.
            **options: further arguments of the head.
        """
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        layer3, layer4 = self.channels
        self.head: Any = head(
            layer4, num_classes, dropout=dropout, backend=abn, activation=activation, **options
        )
        self.dsn: nn.Sequential | None = nn.Sequential(  # None in a copy for inference
            nn.Conv2d(layer3, dsn_channels, 3, padding=1),
            ABN(dsn_channels, activation, abn),
            ChannelDropout(dsn_channels, dropout),
            nn.Conv2d(dsn_channels, num_classes, 1),
        )
        self.consistency: nn.Conv2d | None = None

    def add_consistency(self, channels: int) -> None:
        """Add features for loss.CategoryConsistentLoss: a 1x1 convolution of the output of the attention.

        They are computed in training mode only. Networks for inference do without them, and ignore their
        weights in a checkpoint.

        Args:
            channels: number of channels of the features.
        """
        self.consistency = nn.Conv2d(self.head.channels, channels, 1)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute the logits of both heads.

        Args:
            images: [N, 3, h, w], BGR minus mean. A clip of T frames is a picture of 3 * T channels
                (networks/clips.py), for a head that takes clips.

        Returns:
            [logits, dsn_logits] of the main head and the auxiliary head, each [N, num_classes, H, W] at 1/8
            of the input size. For clips, they are those of the middle frame. Without the auxiliary head
            (`networks.fold_batch_norm`), only [logits]. In training mode after `add_consistency`, the third
            output is its features [N, channels, H, W].
        """
        with recomputation() if self.recompute else contextlib.nullcontext():
            # Only a head for clips looks at the number of channels, which torch.fx can't trace.
            clips = getattr(self.head, "takes_clips", False)
            layer3, layer4 = features_of_clips(self.features, images) if clips else self.features(images)
            if self.consistency is None or not self.training:
                outputs = [self.head(layer4)]
                if self.dsn is not None:
                    outputs.append(self.dsn(layer3))
                return outputs
            logits, context = self.head.with_context(layer4)
            assert self.dsn is not None
            return [logits, self.dsn(layer3), self.consistency(context)]

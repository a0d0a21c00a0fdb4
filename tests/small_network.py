"""A small CCNet for tests of everything but the network: `--model small --backbone small`.

It has 0.7 million parameters in place of 49 million, so a step takes milliseconds and a state 6 MB. The
structure is that of the real network: dilated ResNet, recurrent criss-cross attention, auxiliary head,
channel dropout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from networks import ABN, MODELS, ChannelDropout, Seg_Model
from networks.heads import RCCAHead
from networks.resnet import ResNet
from networks.variants import DEPTHS

#: Name of the model and of its backbone.
NAME = "small"
#: Number of blocks in the four layers, and the factor by which they have fewer channels than the real ones.
BLOCKS, NARROWER = (1, 1, 1, 1), 8


class SmallNetwork(Seg_Model):
    """CCNet with an eighth of the channels."""

    def __init__(
        self,
        num_classes: int,
        recurrence: int = 2,
        backbone: str = NAME,
        dropout: float = 0.1,
        abn: str = "torch",
        variant: str = "ccnet",
    ):
        ResNet.__init__(self, backbone, abn, variant)
        width = 512 // NARROWER
        activation = self.variant.activation
        self.head = RCCAHead(
            2048 // NARROWER, num_classes, recurrence, width, dropout, abn, activation=activation
        )
        self.dsn = nn.Sequential(
            nn.Conv2d(1024 // NARROWER, width, 3, padding=1),
            ABN(width, activation, abn),
            ChannelDropout(width, dropout),
            nn.Conv2d(width, num_classes, 1),
        )
        self.criterion = None

    @staticmethod
    def _layer(in_channels: int, planes: int, *others) -> nn.Sequential:
        if planes > 64:  # the first layer follows the stem, which is as wide as the real one
            in_channels //= NARROWER
        return ResNet._layer(in_channels, planes // NARROWER, *others)


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """Let the commands know the small network."""
    before = NAME in MODELS
    DEPTHS[NAME], MODELS[NAME] = BLOCKS, SmallNetwork
    try:
        yield
    finally:
        if not before:
            del DEPTHS[NAME], MODELS[NAME]

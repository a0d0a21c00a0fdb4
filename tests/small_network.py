"""A small CCNet for tests of everything but the network: `--model small --backbone small`.

It has 0.7 million parameters in place of 49 million, so a step takes milliseconds and a state 6 MB. The
structure is that of the real network: dilated ResNet, recurrent criss-cross attention, auxiliary head,
channel dropout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from networks import MODELS, Network, Seg_Model
from networks.heads import RCCAHead
from networks.models import Architecture
from networks.resnet import ResNet
from networks.variants import DEPTHS

#: Name of the model and of its backbone.
NAME = "small"
#: Number of blocks in the four layers, and the factor by which they have fewer channels than the real ones.
BLOCKS, NARROWER = (1, 1, 1, 1), 8


class Narrow(Network):
    """A network with an eighth of the channels."""

    channels = (1024 // NARROWER, 2048 // NARROWER)

    def __init__(
        self,
        head: Callable[..., nn.Module],
        num_classes: int,
        backbone: str = NAME,
        dropout: float = 0.1,
        abn: str = "torch",
        variant: str = "ccnet",
        **options: Any,
    ):
        ResNet.__init__(self, backbone, abn, variant)
        width = 512 // NARROWER
        activation = self.variant.activation
        self.add_heads(head, num_classes, dropout, abn, activation, width, channels=width, **options)

    @staticmethod
    def _layer(in_channels: int, planes: int, *others) -> nn.Sequential:
        if planes > 64:  # the first layer follows the stem, which is as wide as the real one
            in_channels //= NARROWER
        return ResNet._layer(in_channels, planes // NARROWER, *others)


class SmallNetwork(Narrow, Seg_Model):
    """CCNet with an eighth of the channels."""

    criterion = None

    def __init__(self, num_classes: int, **options: Any):
        Narrow.__init__(self, RCCAHead, num_classes, **options)


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """Let the commands know the small network."""
    before = NAME in MODELS
    DEPTHS[NAME], MODELS[NAME] = BLOCKS, Architecture(RCCAHead, recurrence=2, network=SmallNetwork)
    try:
        yield
    finally:
        if not before:
            del DEPTHS[NAME], MODELS[NAME]

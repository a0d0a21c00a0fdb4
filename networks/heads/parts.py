"""Layers that several heads consist of."""

from __future__ import annotations

from torch import nn

from networks.abn import ABN
from networks.dropout import ChannelDropout
from networks.resnet import convolution


def convolution_norm(
    in_channels: int, out_channels: int, kernel: int, backend: str, activation: str, dilation: int = 1
) -> nn.Sequential:
    """Return a convolution without bias and its activated batch norm."""
    return nn.Sequential(
        convolution(in_channels, out_channels, kernel, dilation=dilation),
        ABN(out_channels, activation, backend),
    )


def classification(
    in_channels: int,
    channels: int,
    num_classes: int,
    dropout: float,
    backend: str,
    activation: str,
    kernel: int = 3,
) -> nn.Sequential:
    """Return the last layers of a head: convolution, activated batch norm, channel dropout, classifier."""
    return nn.Sequential(
        convolution(in_channels, channels, kernel),
        ABN(channels, activation, backend),
        ChannelDropout(channels, dropout),
        nn.Conv2d(channels, num_classes, 1),
    )

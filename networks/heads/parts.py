"""Layers that several heads consist of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

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


class ContextHead(nn.Module):
    """The frame of CCNet's head around a context module.

    A 3x3 convolution reduces the channels, the context module and another 3x3 convolution follow, and the
    result is concatenated with the input and classified.

    Source: RCCAModule in networks/ccnet.py of the original CCNet repository.

    Args:
        in_channels: channels of the input.
        num_classes: number of classes.
        name: name of the context module in the state dict.
        make_context: function that returns the context module, from `channels` to `channels` channels.
        channels: channels of the context module.
        dropout: probability of channel dropout before the classifier.
        backend: backend of the activated batch norm (see `ABN`).
        activation: activation of the activated batch norm (see `ABN`).
    """

    def __init__(  # noqa: PLR0913
        self,
        in_channels: int,
        num_classes: int,
        name: str,
        make_context: Callable[[], nn.Module],
        channels: int,
        dropout: float,
        backend: str,
        activation: str,
    ):
        super().__init__()
        self.channels = channels
        self._name = name
        norm = (backend, activation)
        # The order of the layers is that of their initial random weights.
        self.conva = convolution_norm(in_channels, channels, 3, *norm)
        self.add_module(name, make_context())
        self.convb = convolution_norm(channels, channels, 3, *norm)
        self.bottleneck = classification(in_channels + channels, channels, num_classes, dropout, *norm)

    @property
    def context(self) -> Any:
        """The context module."""
        return getattr(self, self._name)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [N, num_classes, H, W] of x [N, in_channels, H, W]."""
        return self.with_context(x)[0]

    def with_context(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits, and the output of the context module [N, channels, H, W]."""
        context = self.context(self.conva(x))
        return self.bottleneck(torch.cat([x, self.convb(context)], 1)), context

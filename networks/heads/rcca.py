"""Recurrent criss-cross attention (RCCA), the head of CCNet (original: RCCAModule in networks/ccnet.py)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cc_attention import RecurrentCrissCrossAttention
from networks.abn import ABN
from networks.dropout import ChannelDropout
from networks.resnet import convolution


class RCCAHead(nn.Module):
    """Reduce, attend `recurrence` times with the same weights, join with the input, classify.

    [N, in_channels, H, W] -> logits [N, num_classes, H, W]
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        recurrence: int = 2,
        channels: int = 512,
        dropout: float = 0.1,
        backend: str = "torch",
        activation: str = "leaky_relu",
    ):
        super().__init__()
        self.conva = nn.Sequential(convolution(in_channels, channels, 3), ABN(channels, activation, backend))
        self.cca = RecurrentCrissCrossAttention(channels, recurrence)
        self.convb = nn.Sequential(convolution(channels, channels, 3), ABN(channels, activation, backend))
        self.bottleneck = nn.Sequential(
            convolution(in_channels + channels, channels, 3),
            ABN(channels, activation, backend),
            ChannelDropout(channels, dropout),
            nn.Conv2d(channels, num_classes, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.convb(self.cca(self.conva(x)))
        return self.bottleneck(torch.cat([x, y], 1))

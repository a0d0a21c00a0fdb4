"""Atrous spatial pyramid pooling (ASPP), the head of DeepLabv3."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from networks.heads.parts import classification, convolution_norm


class AtrousPyramid(nn.Module):
    """The average of the image, a 1x1 convolution, and 3x3 convolutions of several dilations, concatenated.

    Each branch has activated batch norm.

    Source: Chen et al., Rethinking Atrous Convolution, arXiv 1706.05587, section 3.3; ASPPModule in
    networks/deeplabv3.py of the original CCNet repository.

    Args:
        in_channels: channels C of the input.
        channels: channels of each branch.
        dilations: dilations of the 3x3 convolutions.
        backend: backend of the activated batch norm (see `ABN`).
        activation: activation of the activated batch norm (see `ABN`).

    Shape:
        Input: [N, C, H, W]. Output: [N, (2 + len(dilations)) * channels, H, W].
    """

    def __init__(
        self, in_channels: int, channels: int, dilations: tuple[int, ...], backend: str, activation: str
    ):
        super().__init__()
        norm = (backend, activation)
        self.image = convolution_norm(in_channels, channels, 1, *norm)
        self.branches = nn.ModuleList(
            [
                convolution_norm(in_channels, channels, 1, *norm),
                *(convolution_norm(in_channels, channels, 3, *norm, dilation) for dilation in dilations),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the image branch and the others."""
        image = self.image(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
        return torch.cat([image, *(branch(x) for branch in self.branches)], 1)


class ASPPHead(nn.Module):
    """The head of DeepLabv3: ASPP, a 1x1 convolution over its result, and the classifier.

    Source: DeepLabv3, arXiv 1706.05587; networks/deeplabv3.py of the original CCNet repository. Dilations of
    12, 24 and 36, those of output stride 8; branches of 256 channels.

    Args:
        in_channels: channels of the input.
        num_classes: number of classes.
        channels: channels before the classifier; each branch has half as many.
        dropout: probability of channel dropout before the classifier.
        backend: backend of the activated batch norm (see `ABN`).
        activation: activation of the activated batch norm (see `ABN`).
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        channels: int = 512,
        dropout: float = 0.1,
        backend: str = "torch",
        activation: str = "leaky_relu",
    ):
        super().__init__()
        dilations, inner = (12, 24, 36), channels // 2
        norm = (backend, activation)
        self.aspp = AtrousPyramid(in_channels, inner, dilations, *norm)
        wide = (2 + len(dilations)) * inner
        self.bottleneck = classification(wide, channels, num_classes, dropout, *norm, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [N, num_classes, H, W] of x [N, in_channels, H, W]."""
        return self.bottleneck(self.aspp(x))

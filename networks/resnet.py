"""Dilated ResNet backbone, output stride 8 (original, with a deep stem: networks/ccnet.py)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks.abn import ABN
from networks.variants import DEPTHS, VARIANTS


def convolution(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, dilation: int = 1
) -> nn.Conv2d:
    """A convolution without bias that keeps the size at stride 1."""
    padding = dilation * (kernel // 2)
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding, dilation, bias=False)


class Bottleneck(nn.Module):
    """1x1, 3x3 (strided, dilated), 1x1 to four times the planes, and the residual."""

    expansion = 4

    def __init__(self, in_channels: int, planes: int, stride: int, dilation: int, backend: str):
        super().__init__()
        out_channels = planes * self.expansion
        self.conv1 = convolution(in_channels, planes, 1)
        self.bn1 = ABN(planes, "identity", backend)
        self.conv2 = convolution(planes, planes, 3, stride, dilation)
        self.bn2 = ABN(planes, "identity", backend)
        self.conv3 = convolution(planes, out_channels, 1)
        self.bn3 = ABN(out_channels, "identity", backend)
        # Blocks start as the identity: from random weights the network then learns from the first steps on
        # (Goyal et al., arXiv 1706.02677). A checkpoint overwrites it.
        nn.init.zeros_(self.bn3.weight)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                convolution(in_channels, out_channels, 1, stride), ABN(out_channels, "identity", backend)
            )

    def forward(self, x: Tensor) -> Tensor:
        # The ReLUs are not in-place: an in-place ABN keeps its output for the backward pass.
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        residual = x if self.downsample is None else self.downsample(x)
        return F.relu(y + residual)


class ResNet(nn.Module):
    """images [N, 3, h, w] -> (layer3 [N, 1024, H, W], layer4 [N, 2048, H, W]), H = ceil(h / 8) up to
    rounding.

    layer3 and layer4 keep the resolution and dilate by 2 and 4 instead; stem, pool and the dilation of their
    first blocks are those of `variant` (networks/variants.py).
    """

    def __init__(self, depth: str = "resnet101", backend: str = "torch", variant: str = "ccnet"):
        super().__init__()
        if depth not in DEPTHS:
            raise ValueError(f"backbone is one of {', '.join(sorted(DEPTHS))}, not {depth!r}")
        if variant not in VARIANTS:
            raise ValueError(f"variant is one of {', '.join(sorted(VARIANTS))}, not {variant!r}")
        self.variant = VARIANTS[variant]
        self.shift: Tensor | None
        self.register_buffer("shift", torch.zeros(3) if self.variant.shift else None)
        stem = self.variant.stem
        self.conv1 = convolution(3, stem[0], self.variant.kernel, stride=2)
        self.bn1 = ABN(stem[0], "identity", backend)
        if len(stem) == 3:
            self.conv2 = convolution(stem[0], stem[1], 3)
            self.bn2 = ABN(stem[1], "identity", backend)
            self.conv3 = convolution(stem[1], stem[2], 3)
            self.bn3 = ABN(stem[2], "identity", backend)
        blocks = DEPTHS[depth]
        first = (1, 2) if self.variant.contract_dilation else (2, 4)
        self.layer1 = self._layer(stem[-1], 64, blocks[0], 1, 1, 1, backend)
        self.layer2 = self._layer(256, 128, blocks[1], 2, 1, 1, backend)
        self.layer3 = self._layer(512, 256, blocks[2], 1, first[0], 2, backend)
        self.layer4 = self._layer(1024, 512, blocks[3], 1, first[1], 4, backend)

    @staticmethod
    def _layer(
        in_channels: int,
        planes: int,
        blocks: int,
        stride: int,
        first_dilation: int,
        dilation: int,
        backend: str,
    ) -> nn.Sequential:
        out_channels = planes * Bottleneck.expansion
        first = Bottleneck(in_channels, planes, stride, first_dilation, backend)
        rest = [Bottleneck(out_channels, planes, 1, dilation, backend) for _ in range(blocks - 1)]
        return nn.Sequential(first, *rest)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = images if self.shift is None else images + self.shift.view(3, 1, 1)
        x = F.relu(self.bn1(self.conv1(x)))
        if len(self.variant.stem) == 3:
            x = F.relu(self.bn2(self.conv2(x)))
            x = F.relu(self.bn3(self.conv3(x)))
        # CCNet's ceil_mode: 1024 x 2048 pictures give 129 x 257 features, as its released checkpoints were
        # trained with.
        x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1, ceil_mode=self.variant.ceil_mode)
        x = self.layer3(self.layer2(self.layer1(x)))
        return x, self.layer4(x)

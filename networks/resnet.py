"""Dilated ResNet backbone with output stride 8 (networks/ccnet.py of the original CCNet repository)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks.abn import ABN
from networks.variants import DEPTHS, VARIANTS


def convolution(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, dilation: int = 1
) -> nn.Conv2d:
    """Return a convolution without bias. With stride 1, the padding preserves the height and width."""
    padding = dilation * (kernel // 2)
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding, dilation, bias=False)


class Bottleneck(nn.Module):
    """A bottleneck block: 1x1, 3x3 and 1x1 convolutions with a residual connection.

    The 3x3 convolution has the stride and the dilation. The output has 4 * planes channels.
    """

    expansion = 4

    def __init__(self, in_channels: int, planes: int, stride: int, dilation: int, backend: str):
        super().__init__()
        out_channels = planes * self.expansion
        self.conv1 = convolution(in_channels, planes, 1)
        self.bn1 = ABN(planes, "relu", backend)
        self.conv2 = convolution(planes, planes, 3, stride, dilation)
        self.bn2 = ABN(planes, "relu", backend)
        self.conv3 = convolution(planes, out_channels, 1)
        self.bn3 = ABN(out_channels, "relu", backend)
        # Start each block as the identity, so that training from random weights makes progress from the first
        # steps (Goyal et al., arXiv 1706.02677). Loading a checkpoint overwrites this.
        nn.init.zeros_(self.bn3.weight)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                convolution(in_channels, out_channels, 1, stride), ABN(out_channels, "identity", backend)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to x [N, in_channels, H, W]."""
        y = self.bn1(self.conv1(x))
        y = self.bn2(self.conv2(y))
        return self.bn3(self.conv3(y), x if self.downsample is None else self.downsample(x))


class ResNet(nn.Module):
    """The dilated ResNet backbone.

    layer3 and layer4 keep the resolution of layer2 and use dilation 2 and 4. The variant determines the stem,
    the pooling and the dilation of the first block of layer3 and layer4 (networks/variants.py).

    Args:
        depth: "resnet50" or "resnet101".
        backend: backend of the activated batch norm (see `ABN`).
        variant: name of an entry of `networks.variants.VARIANTS`.

    Raises:
        ValueError: an argument is unknown.
    """

    def __init__(self, depth: str = "resnet101", backend: str = "torch", variant: str = "ccnet"):
        super().__init__()
        if depth not in DEPTHS:
            raise ValueError(f"backbone must be one of {', '.join(sorted(DEPTHS))}, got {depth!r}")
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(sorted(VARIANTS))}, got {variant!r}")
        self.variant = VARIANTS[variant]
        self.shift: Tensor | None
        self.register_buffer("shift", torch.zeros(3) if self.variant.shift else None)
        stem = self.variant.stem
        self.conv1 = convolution(3, stem[0], self.variant.kernel, stride=2)
        self.bn1 = ABN(stem[0], "relu", backend)
        if len(stem) == 3:
            self.conv2 = convolution(stem[0], stem[1], 3)
            self.bn2 = ABN(stem[1], "relu", backend)
            self.conv3 = convolution(stem[1], stem[2], 3)
            self.bn3 = ABN(stem[2], "relu", backend)
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
        """Return the outputs of layer3 [N, 1024, H, W] and layer4 [N, 2048, H, W] for images [N, 3, h, w].

        H and W are about h / 8 and w / 8. In the "ccnet" variant, 1024 x 2048 images give 129 x 257 features.
        """
        x = images if self.shift is None else images + self.shift.view(3, 1, 1)
        x = self.bn1(self.conv1(x))
        if len(self.variant.stem) == 3:
            x = self.bn2(self.conv2(x))
            x = self.bn3(self.conv3(x))
        # The released checkpoints of CCNet were trained with ceil_mode.
        x = F.max_pool2d(x, 3, stride=2, padding=1, ceil_mode=self.variant.ceil_mode)
        x = self.layer3(self.layer2(self.layer1(x)))
        return x, self.layer4(x)

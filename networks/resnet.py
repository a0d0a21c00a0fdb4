"""Dilated ResNet backbone with a deep stem, output stride 8 (original: networks/ccnet.py)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from networks.abn import ABN

#: Bottleneck blocks in each of the four layers.
DEPTHS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}


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

    layer3 and layer4 keep the resolution and dilate by 2 and 4 instead, in every block.
    """

    def __init__(self, depth: str = "resnet101", backend: str = "torch"):
        super().__init__()
        if depth not in DEPTHS:
            raise ValueError(f"backbone is one of {', '.join(sorted(DEPTHS))}, not {depth!r}")
        self.conv1 = convolution(3, 64, 3, stride=2)
        self.bn1 = ABN(64, "identity", backend)
        self.conv2 = convolution(64, 64, 3)
        self.bn2 = ABN(64, "identity", backend)
        self.conv3 = convolution(64, 128, 3)
        self.bn3 = ABN(128, "identity", backend)
        blocks = DEPTHS[depth]
        self.layer1 = self._layer(128, 64, blocks[0], 1, 1, backend)
        self.layer2 = self._layer(256, 128, blocks[1], 2, 1, backend)
        self.layer3 = self._layer(512, 256, blocks[2], 1, 2, backend)
        self.layer4 = self._layer(1024, 512, blocks[3], 1, 4, backend)

    @staticmethod
    def _layer(
        in_channels: int, planes: int, blocks: int, stride: int, dilation: int, backend: str
    ) -> nn.Sequential:
        out_channels = planes * Bottleneck.expansion
        first = Bottleneck(in_channels, planes, stride, dilation, backend)
        rest = [Bottleneck(out_channels, planes, 1, dilation, backend) for _ in range(blocks - 1)]
        return nn.Sequential(first, *rest)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        # ceil_mode: 1024 x 2048 pictures give 129 x 257 features, as the released checkpoints were trained
        # with.
        x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1, ceil_mode=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        return x, self.layer4(x)

"""Pyramid pooling, the head of PSPNet."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks.heads.parts import classification, convolution_norm


class PyramidPooling(nn.Module):
    """Averages over grids of several sizes, resized to the input and concatenated with it.

    Each grid has a 1x1 convolution and activated batch norm. The order is that of the sizes, then the input.

    Source: Zhao et al., Pyramid Scene Parsing Network, arXiv 1612.01105, section 3.2; PSPModule in
    networks/pspnet.py of the original CCNet repository.

    Args:
        in_channels: channels C of the input.
        channels: channels of each grid.
        sizes: number of rows and columns of each grid.
        backend: backend of the activated batch norm (see `ABN`).
        activation: activation of the activated batch norm (see `ABN`).

    Shape:
        Input: [N, C, H, W]. Output: [N, C + len(sizes) * channels, H, W].
    """

    def __init__(
        self, in_channels: int, channels: int, sizes: tuple[int, ...], backend: str, activation: str
    ):
        super().__init__()
        self.sizes = sizes
        self.stages = nn.ModuleList(
            convolution_norm(in_channels, channels, 1, backend, activation) for _ in sizes
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the grids and x."""
        averaged = x.contiguous(memory_format=torch.channels_last)  # once for all grids
        grids = [
            F.interpolate(
                stage(average_grid(averaged, size)), x.shape[2:], mode="bilinear", align_corners=True
            )
            for size, stage in zip(self.sizes, self.stages, strict=True)
        ]
        return torch.cat([*grids, x], 1)


def average_grid(x: Tensor, size: int) -> Tensor:
    """Average x [N, C, H, W] over the cells of a grid, as F.adaptive_avg_pool2d does.

    Row i of the grid covers rows floor(i * H / size) to ceil((i + 1) * H / size) of x, likewise for columns.
    Cells may overlap. Matrix products compute it: on a GPU, the gradient of adaptive_avg_pool2d is not
    deterministic, and export does not support it for images of any size.

    Args:
        x: [N, C, H, W], without a copy if it is channels_last.
        size: number of rows and of columns of the grid.

    Returns:
        [N, C, size, size].
    """
    if size == 1:
        return x.mean((2, 3), keepdim=True)
    x = x.permute(0, 2, 3, 1)
    for _ in range(2):  # first W, then H
        x = _average_lines(x, size).transpose(1, 2)
    return x.permute(0, 3, 1, 2)


def _average_lines(x: Tensor, size: int) -> Tensor:
    """Average x [N, K, L, C] over `size` groups of neighboring lines; the result is [N, K, size, C]."""
    length = x.shape[2]
    group = torch.arange(size, device=x.device)[:, None]
    begin, end = group * length // size, ((group + 1) * length + size - 1) // size
    line = torch.arange(length, device=x.device)
    inside = (line >= begin) & (line < end)  # [size, L]
    # The number of lines comes last: 0 and 1 / 64 are exact in 16 bits, and their sums do not overflow.
    return (inside.to(x.dtype) / 64 @ x) / ((end - begin).to(x.dtype) / 64)


class PSPHead(nn.Module):
    """The head of PSPNet: pyramid pooling, a 3x3 convolution over its result, and the classifier.

    Source: PSPNet, arXiv 1612.01105; networks/pspnet.py of the original CCNet repository. Grids of 1, 2, 3
    and 6, with 512 channels each.

    Args:
        in_channels: channels of the input.
        num_classes: number of classes.
        channels: channels of each grid, and before the classifier.
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
        sizes = (1, 2, 3, 6)
        norm = (backend, activation)
        self.psp = PyramidPooling(in_channels, channels, sizes, *norm)
        wide = in_channels + len(sizes) * channels
        self.bottleneck = classification(wide, channels, num_classes, dropout, *norm)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [N, num_classes, H, W] of x [N, in_channels, H, W]."""
        return self.bottleneck(self.psp(x))

"""A fully convolutional head without a context module: the baseline of the papers."""

from __future__ import annotations

from torch import Tensor, nn

from networks.heads.parts import classification


class FCNHead(nn.Module):
    """A 3x3 convolution, activated batch norm, dropout and a 1x1 classifier.

    Source: the baseline of CCNet's tables is the dilated ResNet without a context module (arXiv 1811.11721,
    section 4.2). Its layers are not given there. These are the last layers of the RCCA head, without the
    attention; FCNHead of torchvision has the same.

    Args:
        in_channels: channels of the input.
        num_classes: number of classes.
        channels: channels before the classifier.
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
        self.bottleneck = classification(in_channels, channels, num_classes, dropout, backend, activation)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [N, num_classes, H, W] of x [N, in_channels, H, W]."""
        return self.bottleneck(x)

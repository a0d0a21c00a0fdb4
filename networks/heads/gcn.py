"""Large separable convolutions, the context module of the Global Convolutional Network (GCN)."""

from __future__ import annotations

from torch import Tensor, nn

from networks.heads.parts import ContextHead


class GlobalConvolution(nn.Module):
    """A large k x k convolution of low rank, as the sum of two separable branches.

    One branch is a k x 1 convolution followed by a 1 x k convolution, the other one has the reverse order.
    There is no activation and no bias, so that the whole is one k x k convolution whose kernel has a low
    rank. The batch norm that follows in the head has a bias.

    Source: Peng et al., Large Kernel Matters, arXiv 1703.02719, section 3.1 and figure 2 B.

    Args:
        channels: channels of input and output.
        inner: channels between the two convolutions of a branch.
        kernel: the kernel size k, odd.

    Shape:
        Input and output: [N, channels, H, W].
    """

    def __init__(self, channels: int, inner: int, kernel: int):
        super().__init__()
        along_height = {"kernel_size": (kernel, 1), "padding": (kernel // 2, 0)}
        along_width = {"kernel_size": (1, kernel), "padding": (0, kernel // 2)}
        self.height_width = self._branch(channels, inner, along_height, along_width)
        self.width_height = self._branch(channels, inner, along_width, along_height)

    @staticmethod
    def _branch(channels: int, inner: int, first: dict, second: dict) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(channels, inner, bias=False, **first), nn.Conv2d(inner, channels, bias=False, **second)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of both branches."""
        return self.height_width(x) + self.width_height(x)


class GCNHead(ContextHead):
    """A global convolution in the frame of CCNet's head.

    Source: Peng et al., arXiv 1703.02719; the row "+GCN" of CCNet's table of context modules (TPAMI). The
    table does not say how the module was built. Chosen here: the layers before and after it are those of the
    RCCA head, so that only the context module differs. The kernel size is 15, the largest and best one in
    Peng's ablation, where it nearly covers features of 16 x 16. Features of 97 x 97 are seen in part only.
    The branches have channels / 8 = 64 channels inside, as query and key of the attention have; in Peng's
    network, which applies the convolution to the scores, it is the number of classes. Whether the table's
    network had Peng's boundary refinement is unknown. It is left out.

    Args:
        in_channels: channels of the input.
        num_classes: number of classes.
        channels: channels of the global convolution.
        kernel: kernel size of the global convolution.
        dropout: probability of channel dropout before the classifier.
        backend: backend of the activated batch norm (see `ABN`).
        activation: activation of the activated batch norm (see `ABN`).
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        channels: int = 512,
        kernel: int = 15,
        dropout: float = 0.1,
        backend: str = "torch",
        activation: str = "leaky_relu",
    ):
        super().__init__(
            in_channels,
            num_classes,
            "gcn",
            lambda: GlobalConvolution(channels, channels // 8, kernel),
            channels,
            dropout,
            backend,
            activation,
        )

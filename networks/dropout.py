"""Channel dropout that takes its masks from outside of the network's graph."""

from __future__ import annotations

from torch import Tensor, nn


class ChannelDropout(nn.Dropout2d):
    """Zero whole channels of each sample in training, and scale the others by 1 / (1 - p).

    The training step draws `kept` before the forward pass, from the step and the sample alone
    (engine/training/dropout.py). A sample then loses the same channels on any number of processes, and a
    compiled network or CUDA graph holds no random numbers. Without `kept`, masks come from PyTorch's
    generator.

    Args:
        channels: number of channels C.
        p: probability of a channel to be zeroed.

    Shape: [N, C, ...] -> the same.
    """

    #: bool [N, C], the channels that each sample keeps; None draws them here.
    kept: Tensor | None = None

    def __init__(self, channels: int, p: float):
        super().__init__(p)
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None or not self.training:
            return super().forward(x)
        scale = 1 / (1 - self.p) if self.p < 1 else 0.0
        factors = self.kept.to(x.dtype) * scale
        return x * factors[(...,) + (None,) * (x.dim() - 2)]

    def extra_repr(self) -> str:
        return f"{self.channels}, {super().extra_repr()}"

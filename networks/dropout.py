"""Channel dropout with masks set by the caller."""

from __future__ import annotations

from torch import Tensor, nn


class ChannelDropout(nn.Dropout2d):
    """Apply channel dropout with masks set by the caller.

    In training, whole channels of each sample are zeroed and the others are scaled by 1 / (1 - p). The
    training step sets the mask `kept` before the forward pass (engine/training/dropout_masks.py). The mask
    depends only on the seed, the step and the sample, so results do not depend on the number of processes. A
    compiled network or CUDA graph then generates no random numbers. If `kept` is None, masks are drawn from
    PyTorch's generator.

    Args:
        channels: number of channels C.
        p: probability of zeroing a channel.

    Shape:
        Input and output: [N, C, ...].
    """

    #: bool [N, C], the channels that each sample keeps; if None, `forward` draws the channels.
    kept: Tensor | None = None

    def __init__(self, channels: int, p: float):
        super().__init__(p)
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        """Apply the dropout to x [N, C, ...]."""
        if self.kept is None or not self.training:
            return super().forward(x)
        scale = 1 / (1 - self.p) if self.p < 1 else 0.0
        factors = self.kept.to(x.dtype) * scale
        return x * factors[(...,) + (None,) * (x.dim() - 2)]

    def extra_repr(self) -> str:
        """Return the arguments shown by `repr`."""
        return f"{self.channels}, {super().extra_repr()}"

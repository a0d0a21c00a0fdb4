"""Criss-cross attention modules, as used in CCNet's head."""

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from cc_attention.ops import criss_cross_attention, to_channels_last


def _operand(x: Tensor, channels: int, module: str) -> Tensor:
    """Return x [N, channels, H, W] in channels_last; raise RuntimeError for any other shape."""
    if has_torch_function((x,)):
        return handle_torch_function(_operand, (x,), x, channels, module)
    if x.dim() != 4 or x.shape[1] != channels:
        raise RuntimeError(f"{module}: x must be [N, {channels}, H, W], got shape {list(x.shape)}")
    return to_channels_last(x)


class CrissCrossAttention(nn.Module):
    """Criss-cross attention with 1x1 convolutions for query, key and value, and a residual connection.

    The module computes ``x + gamma * criss_cross_attention(query_conv(x), key_conv(x), value_conv(x))``.
    gamma is learned and starts at 0, so a new module is the identity.

    Source: CCNet, arXiv 1811.11721, eq. 1-2. Parameters are named as in cc_attention/functions.py of the
    original CCNet repository.

    Args:
        in_dim: number of input channels, at least 8; query and key have in_dim // 8 channels.

    Raises:
        ValueError: in_dim is below 8, so query and key would have no channels.
    """

    def __init__(self, in_dim: int) -> None:
        super().__init__()
        self.in_dim = in_dim
        if in_dim < 8:
            raise ValueError(
                f"CrissCrossAttention needs in_dim >= 8 (query and key get in_dim // 8), got {in_dim}"
            )
        self.query_conv = nn.Conv2d(in_dim, in_dim // 8, kernel_size=1)
        self.key_conv = nn.Conv2d(in_dim, in_dim // 8, kernel_size=1)
        self.value_conv = nn.Conv2d(in_dim, in_dim, kernel_size=1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the attention.

        Args:
            x: [N, in_dim, H, W].

        Returns:
            [N, in_dim, H, W], channels_last.

        Raises:
            RuntimeError: x has another shape.
        """
        # Convert once for all three convolutions; a no-op if the network runs in channels_last.
        x = _operand(x, self.in_dim, type(self).__name__)
        attention = criss_cross_attention(self.query_conv(x), self.key_conv(x), self.value_conv(x))
        # One pass over memory, not two. In an autocast region, a float32 gamma would promote the result.
        return torch.addcmul(x, self.gamma.to(attention.dtype), attention)


class RecurrentCrissCrossAttention(CrissCrossAttention):
    """Recurrent criss-cross attention (RCCA): CrissCrossAttention applied repeatedly with shared weights.

    With recurrence 2, every pixel receives information from every other pixel. The information passes through
    the two pixels where the row of one crosses the column of the other.

    Source: CCNet, arXiv 1811.11721, section 3.3, without the convolutions around the attention.

    Args:
        in_dim: number of input channels, at least 8.
        recurrence: number of applications, R in the paper; 0 is the identity.

    Raises:
        ValueError: in_dim is below 8, or recurrence is negative.
    """

    def __init__(self, in_dim: int, recurrence: int = 2) -> None:
        if recurrence < 0:
            raise ValueError(f"recurrence must be 0 or more, got {recurrence}")
        super().__init__(in_dim)
        self.recurrence = recurrence

    def forward(self, x: Tensor) -> Tensor:
        """Apply the attention `recurrence` times.

        Args:
            x: [N, in_dim, H, W].

        Returns:
            [N, in_dim, H, W], channels_last (x itself if recurrence is 0).

        Raises:
            RuntimeError: x has another shape.
        """
        for _ in range(self.recurrence):
            x = super().forward(x)
        return x

"""The criss-cross attention modules of CCNet's head."""

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from cc_attention.ops import criss_cross_attention, to_channels_last


def _operand(x: Tensor, channels: int, module: str) -> Tensor:
    """Return x [N, channels, H, W] in the operator's layout, or raise RuntimeError by the module's name."""
    if has_torch_function((x,)):
        return handle_torch_function(_operand, (x,), x, channels, module)
    if x.dim() != 4 or x.shape[1] != channels:
        raise RuntimeError(f"{module}: x must be [N, {channels}, H, W], got shape {list(x.shape)}")
    return to_channels_last(x)


class CrissCrossAttention(nn.Module):
    """x + gamma * attention(query(x), key(x), value(x)), each of the three a 1x1 convolution.

    gamma starts at 0, so a new module is the identity.

    Source: CCNet, arXiv 1811.11721, eq. 1-2; the parameters' names are those of the original's
    cc_attention/functions.py.

    Args:
        in_dim: channels of the input, at least 8; query and key have in_dim // 8.
    Raises:
        ValueError: in_dim is below 8, which would leave query and key without channels.
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
        """x [N, in_dim, H, W] -> [N, in_dim, H, W], channels_last; another shape is a RuntimeError"""
        # Once for the three projections; nothing to do where the network runs in that layout.
        x = _operand(x, self.in_dim, type(self).__name__)
        attention = criss_cross_attention(self.query_conv(x), self.key_conv(x), self.value_conv(x))
        return torch.addcmul(x, self.gamma, attention)  # one pass over memory instead of two


class RecurrentCrissCrossAttention(CrissCrossAttention):
    """CrissCrossAttention applied `recurrence` times with the same weights: the paper's RCCA, between the
    convolutions of its head. Two times pass information from every pixel to every other, by way of the two
    pixels that are in the row of one and the column of the other.

    Source: CCNet, arXiv 1811.11721, section 3.3.

    Args:
        in_dim: channels of the input, at least 8.
        recurrence: R of the paper; 0 is the identity.
    Raises:
        ValueError: in_dim is below 8, or recurrence below 0.
    """

    def __init__(self, in_dim: int, recurrence: int = 2) -> None:
        if recurrence < 0:
            raise ValueError(f"recurrence must be 0 or more, not {recurrence}")
        super().__init__(in_dim)
        self.recurrence = recurrence

    def forward(self, x: Tensor) -> Tensor:
        """x [N, in_dim, H, W] -> [N, in_dim, H, W], channels_last unless recurrence is 0"""
        for _ in range(self.recurrence):
            x = super().forward(x)
        return x

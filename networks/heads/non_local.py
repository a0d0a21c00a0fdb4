"""Non-local attention: every pixel attends to every pixel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks.heads.parts import ContextHead

#: Number of rows of the attention matrix that attention maps compute at once.
BLOCK = 1024


class NonLocalAttention(nn.Module):
    """Attention over all positions, applied `recurrence` times with shared weights.

    One application computes ``gamma * softmax(query . key) value + x``, where query, key and value are 1x1
    convolutions of x, and the softmax is over all positions (the embedded Gaussian form). The convolutions,
    the missing scale 1 / sqrt(C / 8) and gamma, which starts at 0, are those of `CrissCrossAttention`.

    Source: Wang et al., Non-local Neural Networks, arXiv 1711.07971, section 3.2.

    Args:
        in_dim: channels C of the input; query and key have C / 8.
        recurrence: number of applications; 0 is the identity.

    Shape:
        Input and output: [N, C, H, W].

    Raises:
        ValueError: in_dim is below 8, or recurrence is negative.
    """

    def __init__(self, in_dim: int, recurrence: int = 1):
        super().__init__()
        if in_dim < 8 or recurrence < 0:
            raise ValueError(f"in_dim must be at least 8 and recurrence 0, got {in_dim} and {recurrence}")
        self.recurrence = recurrence
        self.query_conv = nn.Conv2d(in_dim, in_dim // 8, 1)
        self.key_conv = nn.Conv2d(in_dim, in_dim // 8, 1)
        self.value_conv = nn.Conv2d(in_dim, in_dim, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the attention `recurrence` times to x."""
        for _ in range(self.recurrence):
            x = self._attend(x)
        return x

    def _attend(self, x: Tensor) -> Tensor:
        query, key, value = (
            layer(x).flatten(2).mT.unsqueeze(1)  # [N, 1, H * W, channels]
            for layer in (self.query_conv, self.key_conv, self.value_conv)
        )
        seen = F.scaled_dot_product_attention(query, key, value, scale=1.0)
        return x + self.gamma.to(seen.dtype) * seen.squeeze(1).mT.reshape(x.shape)

    @torch.no_grad()
    def maps(self, x: Tensor, pixels: Sequence[tuple[int, int]]) -> Tensor:
        """Return what pixels attend to after each recurrence, as `cc_attention.attention_maps` does.

        Args:
            x: [1, C, H, W].
            pixels: P pairs (row, column).

        Returns:
            Maps [R, P, H, W], float32 or float64. Each one sums to 1. The first is a row of the softmax, the
            others are that row of the product of the attention matrices.
        """
        height, width = x.shape[2:]
        wide = torch.promote_types(x.dtype, torch.float32)
        start = torch.zeros(len(pixels), height * width, dtype=wide, device=x.device)
        for number, (row, column) in enumerate(pixels):
            start[number, row * width + column] = 1
        attentions, maps = [], []
        for _ in range(self.recurrence):
            attentions.append([layer(x).flatten(2)[0].to(wide) for layer in (self.query_conv, self.key_conv)])
            seen = start
            for query, key in reversed(attentions):
                seen = _rows_times(seen, query, key)
            maps.append(seen.view(-1, height, width))
            x = self._attend(x)
        return torch.stack(maps) if maps else start.new_empty(0, len(pixels), height, width)


def _rows_times(rows: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Multiply rows [P, L] by the attention matrix [L, L] of query and key [c, L], block by block."""
    product = torch.zeros_like(rows)
    with torch.autocast(rows.device.type, enabled=False):
        for used in rows.any(0).nonzero()[:, 0].split(BLOCK):
            product += rows[:, used] @ (query[:, used].mT @ key).softmax(1)
    return product


class NonLocalHead(ContextHead):
    """Non-local attention in the frame of CCNet's head.

    All layers but the attention are those of the RCCA head, and so are the channels and the initialization.
    A comparison with the RCCA head therefore isolates the attention.

    Source: the rows "+NL" of CCNet's tables, arXiv 1811.11721, section 4.2: attention on 512 channels at the
    full resolution of the features. Recurrence 2 is a row of the TPAMI version ("NL, R=2").

    Args:
        in_channels: channels of the input.
        num_classes: number of classes.
        recurrence: number of applications of the attention.
        channels: channels of the attention.
        dropout: probability of channel dropout before the classifier.
        backend: backend of the activated batch norm (see `ABN`).
        activation: activation of the activated batch norm (see `ABN`).
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        recurrence: int = 1,
        channels: int = 512,
        dropout: float = 0.1,
        backend: str = "torch",
        activation: str = "leaky_relu",
    ):
        super().__init__(
            in_channels,
            num_classes,
            "attention",
            lambda: NonLocalAttention(channels, recurrence),
            channels,
            dropout,
            backend,
            activation,
        )

    @property
    def recurrence(self) -> int:
        """Number of applications of the attention."""
        return self.context.recurrence

    def attention_maps(self, x: Tensor, pixels: Sequence[tuple[int, int]]) -> Tensor:
        """Return the attention maps [R, P, H, W] of P pixels of x [1, in_channels, H, W]."""
        return self.context.maps(self.conva(x), pixels)

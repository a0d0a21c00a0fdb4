"""Recurrent criss-cross attention (RCCA), the head of CCNet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from cc_attention import RecurrentCrissCrossAttention, attention_maps
from networks.heads.parts import ContextHead


class RCCAHead(ContextHead):
    """The RCCA head of CCNet.

    The head reduces the channels, applies criss-cross attention `recurrence` times with shared weights,
    concatenates the result with the input, and classifies.

    Source: CCNet, arXiv 1811.11721, section 3.1; RCCAModule in networks/ccnet.py of the original CCNet
    repository.

    Args:
        in_channels: channels of the input.
        num_classes: number of classes.
        recurrence: number of applications of the attention.
        channels: channels of the attention.
        dropout: probability of channel dropout before the classifier.
        backend: backend of the activated batch norm (see `ABN`).
        activation: activation of the activated batch norm (see `ABN`).
    """

    #: Class of the attention.
    attention: type[Any] = RecurrentCrissCrossAttention
    cca: Any

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        recurrence: int = 2,
        channels: int = 512,
        dropout: float = 0.1,
        backend: str = "torch",
        activation: str = "leaky_relu",
    ):
        super().__init__(
            in_channels,
            num_classes,
            "cca",
            lambda: self.attention(channels, recurrence),
            channels,
            dropout,
            backend,
            activation,
        )

    @property
    def recurrence(self) -> int:
        """Number of applications of the attention."""
        return self.cca.recurrence

    def attention_maps(self, x: Tensor, pixels: Sequence[tuple[int, int]]) -> Tensor:
        """Return the attention maps [R, P, H, W] of P pixels of x [1, in_channels, H, W].

        See `cc_attention.attention_maps`.
        """
        return attention_maps(self.cca, self.conva(x), pixels)

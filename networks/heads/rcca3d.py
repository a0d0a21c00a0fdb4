"""Recurrent criss-cross attention over clips, the head of CCNet for videos."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from cc_attention import RecurrentCrissCrossAttention3d, attention_maps
from networks.heads.rcca import RCCAHead


class ClipAttention(RecurrentCrissCrossAttention3d):
    """RecurrentCrissCrossAttention3d with the weights of the 2-D module.

    A 1x1x1 convolution over a clip is a 1x1 convolution over each frame. With weights of four dimensions, the
    state dict has the entries of the 2-D module, and the memory format of the network applies to them.
    """

    convolution = nn.Conv2d  # type: ignore[assignment]

    def project(self, layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Apply a layer of the 2-D module to each frame of x [N, in_dim, T, H, W]."""
        # In channels_last, frames and clips are the same memory, so nothing is copied.
        return _clips(layer(x.transpose(1, 2).flatten(0, 1)), x.shape[2])


class RCCA3dHead(RCCAHead):
    """The RCCA head over clips, with the labels of the middle frame.

    The first convolution is applied to every frame, and the attention to the whole clip. The layers after the
    attention are applied to the middle frame only. Layers, entries of the state dict and their shapes are
    those of `RCCAHead`, which this head equals for clips of one frame.

    Source: CCNet, arXiv 1811.11721v2 (TPAMI), section on 3-D criss-cross attention. The authors have not
    released code for it.

    Args:
        in_channels: channels of the input.
        num_classes: number of classes.
        recurrence: number of applications of the attention. With 3, a pixel receives information from every
            pixel of the clip.
        channels: channels of the attention.
        dropout: probability of channel dropout before the classifier.
        backend: backend of the activated batch norm (see `ABN`).
        activation: activation of the activated batch norm (see `ABN`).
    """

    attention = ClipAttention
    #: Whether the input of the network may be clips (networks/clips.py).
    takes_clips = True

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        recurrence: int = 3,
        channels: int = 512,
        dropout: float = 0.1,
        backend: str = "torch",
        activation: str = "leaky_relu",
    ):
        super().__init__(in_channels, num_classes, recurrence, channels, dropout, backend, activation)

    def with_context(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits and the output of the attention for the middle frames of clips.

        Args:
            x: [N, T, in_channels, H, W]; features [N, in_channels, H, W] are clips of one frame.

        Returns:
            Logits [N, num_classes, H, W] and output of the attention [N, channels, H, W].
        """
        clips = x if x.dim() == 5 else x[:, None]
        middle = clips.shape[1] // 2
        context = self.cca(self._reduced(clips))[:, :, middle]
        return self.bottleneck(torch.cat([clips[:, middle], self.convb(context)], 1)), context

    def attention_maps(self, x: Tensor, pixels: Sequence[tuple[int, int]]) -> Tensor:
        """Return the attention maps of P pixels of the middle frame of x [1, T, in_channels, H, W].

        See `cc_attention.attention_maps`.

        Returns:
            Maps [R, P, T, H, W]; [R, P, H, W] for features [1, in_channels, H, W].
        """
        clips = x if x.dim() == 5 else x[:, None]
        middle = clips.shape[1] // 2
        maps = attention_maps(self.cca, self._reduced(clips), [(middle, *pixel) for pixel in pixels])
        return maps if x.dim() == 5 else maps[:, :, 0]

    def _reduced(self, clips: Tensor) -> Tensor:
        """Return the input of the attention [N, channels, T, H, W] for clips [N, T, in_channels, H, W]."""
        return _clips(self.conva(clips.flatten(0, 1)), clips.shape[1])


def _clips(frames: Tensor, number: int) -> Tensor:
    """Return frames [N * T, C, H, W] as clips [N, C, T, H, W] of `number` frames, T."""
    return frames.unflatten(0, (-1, number)).transpose(1, 2)

"""Attention maps of a whole network, for pixels of its input image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from networks.base import Network
from networks.clips import features_of_clips


def has_attention(model: Network) -> bool:
    """Return whether a network applies an attention whose maps `picture_attention` can return."""
    return getattr(model.head, "recurrence", 0) > 0


def picture_attention(model: Network, image: Tensor, pixels: Sequence[tuple[int, int]]) -> Tensor:
    """Return the attention of selected pixels of an image (see `cc_attention.attention_maps`).

    Args:
        model: network in evaluation mode, whose head has an attention with recurrence R.
        image: [1, 3, h, w], BGR minus mean; a clip of T > 1 frames has 3 * T channels.
        pixels: P pairs (row, column) of the image or, for a clip, of its middle frame.

    Returns:
        Maps [R, P, H, W] or, for a clip, [R, P, T, H, W]. H and W are the size of the features, about h / 8
        and w / 8. If R is 0, there are no maps.

    Raises:
        ValueError: a pixel is outside of the image.
    """
    height, width = image.shape[2:]
    for row, column in pixels:
        if not (0 <= row < height and 0 <= column < width):
            raise ValueError(f"pixel ({row}, {column}) is outside of {height} rows and {width} columns")
    with torch.no_grad():
        x = features_of_clips(model.features, image)[1]
        return model.head.attention_maps(x, [head_pixel(pixel, (height, width), x.shape) for pixel in pixels])


def head_pixel(
    pixel: tuple[int, int], size: tuple[int, int], feature_shape: Sequence[int]
) -> tuple[int, int]:
    """Map a pixel of the image to the feature map (align_corners=True).

    Args:
        pixel: (row, column) in the image.
        size: (height, width) of the image.
        feature_shape: shape [..., H, W] of the feature map.

    Returns:
        (row, column) in the feature map.
    """
    row, column = (
        round(at * (few - 1) / max(many - 1, 1))
        for at, many, few in zip(pixel, size, feature_shape[-2:], strict=True)
    )
    return row, column

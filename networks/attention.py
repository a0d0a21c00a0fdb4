"""The attention of a whole network, for pixels of a picture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cc_attention import attention_maps
from networks.ccnet import Seg_Model


def picture_attention(model: Seg_Model, image: Tensor, pixels: Sequence[tuple[int, int]]) -> Tensor:
    """What pixels of a picture gather, as `cc_attention.attention_maps` has it.

    Args:
        model: in evaluation mode.
        image: [1, 3, h, w], BGR minus mean.
        pixels: P pairs (row, column) of the picture.

    Returns:
        [R, P, H, W] at the resolution of the head, about h / 8 and w / 8; empty where R is 0.

    Raises:
        ValueError: a pixel outside of the picture.
    """
    height, width = image.shape[2:]
    for row, column in pixels:
        if not (0 <= row < height and 0 <= column < width):
            raise ValueError(f"pixel ({row}, {column}) is outside of {height} rows and {width} columns")
    with torch.no_grad():
        x = model.head.conva(model.features(image)[1])
    return attention_maps(
        model.head.cca, x, [head_pixel(pixel, (height, width), x.shape) for pixel in pixels]
    )


def head_pixel(
    pixel: tuple[int, int], size: tuple[int, int], feature_shape: Sequence[int]
) -> tuple[int, int]:
    """The pixel of features [..., H, W] over that of a picture of `size`, corners aligned."""
    row, column = (
        round(at * (few - 1) / max(many - 1, 1))
        for at, many, few in zip(pixel, size, feature_shape[-2:], strict=True)
    )
    return row, column

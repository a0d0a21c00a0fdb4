"""Attention maps of a whole network, for pixels of its input image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from networks.base import Network
from networks.clips import features_of_clips

#: Maximum number of bytes of the maps of a block of pixels, at the size of the features. Each block reduces
#: the channels of the features again, which takes longer than the maps: one block is enough for 1024 x 2048.
BLOCK_BYTES = 2**29


class AttentionGrid(NamedTuple):
    """Attention of the pixels of a grid (see `grid_attention`).

    Attributes:
        weights: [R, rows, columns, rows, columns]; R recurrences, the cell that attends, and the cell that it
            attends to. A weight is the mean over the pixels of the second cell.
        size: height and width (H, W) of the features.
    """

    weights: Tensor
    size: tuple[int, int]


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


def grid_attention(
    model: Network, image: Tensor, grid: tuple[int, int] | None = None, most: int = 2048
) -> AttentionGrid:
    """Return the attention of a grid of pixels to the cells of the same grid.

    The features [H, W] are divided into a grid of equal cells. The middle pixel of each cell attends, and its
    map is averaged over each cell (area resampling: a pixel across a border counts for both cells). A grid of
    the size of the features has the maps of all pixels, unchanged.

    Args:
        model: network in evaluation mode, whose head has an attention with recurrence R.
        image: [1, 3, h, w], BGR minus mean.
        grid: rows and columns, each at most as many as the features have (more are taken as that many). By
            default, cells are square, and there are about `most`.
        most: maximum number of cells without `grid`.

    Returns:
        The weights on the device of the image, float32 or float64.
    """
    with torch.no_grad():
        x = model.features(image)[1]
        height, width = size = (int(x.shape[-2]), int(x.shape[-1]))
        rows, columns = choose_grid(size, grid, most)
        pixels = [(row, column) for row in middles(rows, height) for column in middles(columns, width)]
        length = max(1, BLOCK_BYTES // (4 * height * width))
        means = []
        for start in range(0, len(pixels), length):
            maps = model.head.attention_maps(x, pixels[start : start + length])
            with torch.autocast(x.device.type, enabled=False):
                down, across = (
                    _cell_means(few, many).to(maps) for few, many in ((rows, height), (columns, width))
                )
                means.append(down @ maps @ across.mT)
        weights = torch.cat(means, 1)
    return AttentionGrid(weights.unflatten(1, (rows, columns)), size)


def choose_grid(
    size: tuple[int, int], grid: tuple[int, int] | None = None, most: int = 2048
) -> tuple[int, int]:
    """Return the rows and columns of the grid of `grid_attention`, for features of a size (H, W)."""
    if grid is not None:
        return min(grid[0], size[0]), min(grid[1], size[1])
    scale = min(1.0, (most / (size[0] * size[1])) ** 0.5)
    rows, columns = (max(1, round(side * scale)) for side in size)
    # Rounding may exceed the maximum, most of all that of a side to 1.
    if rows > columns:
        return min(rows, max(1, most // columns)), columns
    return rows, min(columns, most // rows)


def middles(cells: int, pixels: int) -> list[int]:
    """Return the middle pixel of each of some cells that divide a line of pixels."""
    return [(2 * cell + 1) * pixels // (2 * cells) for cell in range(cells)]


def _cell_means(cells: int, pixels: int) -> Tensor:
    """Return the matrix [cells, pixels] that averages a line of pixels over equal cells, float64."""
    edges = torch.arange(cells + 1, dtype=torch.float64) * pixels / cells
    begins = torch.arange(pixels, dtype=torch.float64)
    covered = torch.minimum(edges[1:, None], begins + 1) - torch.maximum(edges[:-1, None], begins)
    return covered.clamp(min=0) * cells / pixels


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

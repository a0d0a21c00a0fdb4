"""Logits of whole pictures: in one piece, by overlapping tiles, at several scales (original: evaluate.py)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

Model = Callable[[Tensor], Tensor | Sequence[Tensor]]

OVERLAP = 1 / 3


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, corners aligned: [N, C, h, w] -> [N, C, *size]."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)


def predict_whole(model: Model, image: Tensor) -> Tensor:
    """Logits of whole images.

    Args:
        model: [N, 3, h, w] -> logits of any size, or a sequence whose first entry they are.
        image: [N, 3, h, w].

    Returns:
        logits [N, C, h, w], at least float32.
    """
    outputs = model(image)
    logits = outputs if isinstance(outputs, Tensor) else outputs[0]
    return resize(logits.float() if logits.element_size() < 4 else logits, image.shape[2:])


def tile_offsets(size: int, tile: int, stride: int) -> list[int]:
    """Where the tiles of one axis begin: `stride` apart, the last one moved back to the border."""
    if size <= tile:
        return [0]
    number = math.ceil((size - tile) / stride) + 1
    return [min(index * stride, size - tile) for index in range(number)]


def predict_sliding(model: Model, image: Tensor, tile_size: tuple[int, int], num_classes: int) -> Tensor:
    """Logits of images, averaged over overlapping tiles.

    Both axes advance by ceil(tile height * 2/3), as the original's, but never by more than the tile is wide.
    Images smaller than the tile are padded with zeros at the bottom and right. Every image of a batch is
    scored by its own logits.

    Args:
        model: see `predict_whole`.
        image: [N, 3, h, w].
        tile_size: (height, width).
        num_classes: C.

    Returns:
        logits [N, C, h, w], at least float32.
    """
    batch, _, height, width = image.shape
    tile_height, tile_width = tile_size
    # In floating point, as the original: 129 gives 87, exact thirds would give 86.
    stride = math.ceil(tile_height * (1 - OVERLAP))
    dtype = torch.promote_types(image.dtype, torch.float32)
    total = torch.zeros(batch, num_classes, height, width, dtype=dtype, device=image.device)
    visits = torch.zeros(1, 1, height, width, dtype=dtype, device=image.device)
    for top in tile_offsets(height, tile_height, stride):
        for left in tile_offsets(width, tile_width, min(stride, tile_width)):
            window = (..., slice(top, top + tile_height), slice(left, left + tile_width))
            tile = image[window]
            rows, columns = tile.shape[2:]
            tile = F.pad(tile, (0, tile_width - columns, 0, tile_height - rows))
            total[window] += predict_whole(model, tile)[..., :rows, :columns]
            visits[window] += 1
    return total.div_(visits)


def predict_multiscale(
    model: Model,
    image: Tensor,
    scales: Sequence[float],
    flip: bool,
    tile_size: tuple[int, int] | None = None,
    num_classes: int | None = None,
) -> Tensor:
    """Logits averaged over resized images, and over their mirror images too.

    Args:
        model: see `predict_whole`.
        image: [N, 3, h, w].
        scales: factors of height and width; each prediction is resized back before it is averaged.
        flip: average with the mirrored (left to right) prediction of the mirrored image.
        tile_size: predict by tiles of this (height, width); None in one piece.
        num_classes: C, needed with `tile_size`.

    Returns:
        logits [N, C, h, w].

    Raises:
        ValueError: no scale, or tiles without `num_classes`.
    """
    if not scales:
        raise ValueError("predict_multiscale: give at least one scale")
    if tile_size is None:
        predict: Callable[[Tensor], Tensor] = partial(predict_whole, model)
    elif num_classes is None:
        raise ValueError("predict_multiscale: prediction by tiles needs num_classes")
    else:
        predict = partial(predict_sliding, model, tile_size=tile_size, num_classes=num_classes)

    height, width = image.shape[2:]
    total = torch.zeros((), device=image.device)
    for scale in scales:
        scaled = resize(image, (max(1, round(height * scale)), max(1, round(width * scale))))
        logits = predict(scaled)
        if flip:
            logits = (logits + predict(scaled.flip(-1)).flip(-1)) / 2
        total = total + resize(logits, (height, width))
    return total / len(scales)

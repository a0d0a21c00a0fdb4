"""Attention maps: how strongly a pixel attends to every other pixel."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from cc_attention.module import CrissCrossAttention
from cc_attention.ops import ca_weight
from cc_attention.reference import with_self


def attention_maps(module: CrissCrossAttention, x: Tensor, pixels: Sequence[tuple[int, int]]) -> Tensor:
    """Return the attention from selected pixels to all pixels, after each recurrence.

    Recurrence i is a sparse matrix A_i over the pixels: row u holds the attention weights of pixel u over its
    row and column, and zeros elsewhere. The map of pixel u after r recurrences is row u of A_r ... A_1. The
    maps are exact, and no matrix is formed. The first map is a cross; the second (figure 6 of the paper)
    covers the whole image. The maps ignore the residual and gamma. Each map sums to 1.

    Args:
        module: CrissCrossAttention, or RecurrentCrissCrossAttention with R recurrences.
        x: input of the module, [1, in_dim, H, W].
        pixels: P pairs (row, column).

    Returns:
        Maps [R, P, H, W] on the device of x, float32 (float64 if x is float64). R is 1 for
        CrissCrossAttention. The maps have no gradient for backward(), but torch.func transforms and
        forward-mode differentiation work.

    Raises:
        ValueError: x has several images or a wrong number of channels, or a pixel is outside of the image.
    """
    if x.dim() != 4 or x.shape[0] != 1 or x.shape[1] != module.in_dim:
        raise ValueError(f"x must be one image [1, {module.in_dim}, H, W], got shape {list(x.shape)}")
    height, width = x.shape[2:]
    for row, column in pixels:
        if not (0 <= row < height and 0 <= column < width):
            raise ValueError(f"pixel ({row}, {column}) is outside of {height} rows and {width} columns")
    transformed = torch._C._are_functorch_transforms_active()
    with contextlib.nullcontext() if transformed else torch.no_grad():
        wide = torch.promote_types(x.dtype, torch.float32)
        start = torch.zeros(1, len(pixels), height, width, dtype=wide, device=x.device)
        for number, (row, column) in enumerate(pixels):
            start[0, number, row, column] = 1.0
        weights: list[Tensor] = []
        maps: list[Tensor] = []
        for _ in range(getattr(module, "recurrence", 1)):
            weights.append(ca_weight(module.query_conv(x), module.key_conv(x)).to(wide).softmax(1))
            seen = start
            for weight in reversed(weights):
                seen = _row_times(seen, weight)
            maps.append(seen[0])
            x = CrissCrossAttention.forward(module, x)
        return torch.stack(maps) if maps else start.new_empty(0, *start.shape[1:])


def _row_times(rows: Tensor, weight: Tensor) -> Tensor:
    """Multiply row vectors [1, P, H, W] by the matrix A of `weight` [1, H + W - 1, H, W].

    The multiplication is the transpose of `ca_map`.
    """
    width = rows.shape[3]
    column = with_self(weight[:, width:].transpose(1, 2))  # [1, H, H, W]: (y, x) attends to (v, x)
    to_row = torch.einsum("nuyx,npyx->npyu", weight[:, :width], rows)
    return to_row + torch.einsum("nyvx,npyx->npvx", column, rows)

"""Attention maps: how strongly a pixel attends to every other pixel."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from cc_attention import reference
from cc_attention.module import CrissCrossAttention, CrissCrossAttention3d


def attention_maps(
    module: CrissCrossAttention | CrissCrossAttention3d, x: Tensor, pixels: Sequence[tuple[int, ...]]
) -> Tensor:
    """Return the attention from selected pixels to all pixels, after each recurrence.

    Recurrence i is a sparse matrix A_i over the pixels: row u holds the attention weights of pixel u over its
    row and column (and over the frames of a video), and zeros elsewhere. The map of pixel u after r
    recurrences is row u of A_r ... A_1. The maps are exact, and no matrix is formed. The first map is a
    cross; the second (figure 6 of the paper) covers the whole image. The maps ignore the residual and gamma.
    Each map sums to 1.

    Args:
        module: CrissCrossAttention, or RecurrentCrissCrossAttention with R recurrences, or one of their 3-D
            forms.
        x: input of the module, [1, in_dim, H, W] or, for the 3-D forms, [1, in_dim, T, H, W].
        pixels: P pairs (row, column) or, for the 3-D forms, triples (frame, row, column).

    Returns:
        Maps [R, P, H, W] or [R, P, T, H, W] on the device of x, float32 (float64 if x is float64). R is 1 for
        modules without recurrence. The maps have no gradient for backward(), but torch.func transforms and
        forward-mode differentiation work.

    Raises:
        ValueError: x has several images or a wrong number of dimensions or channels, or a pixel is outside of
            the image.
    """
    video = isinstance(module, CrissCrossAttention3d)
    if x.dim() != 4 + video or x.shape[0] != 1 or x.shape[1] != module.in_dim:
        what, sizes = ("one video", "T, H, W") if video else ("one image", "H, W")
        raise ValueError(f"x must be {what} [1, {module.in_dim}, {sizes}], got shape {list(x.shape)}")
    size = tuple(x.shape[2:])
    for pixel in pixels:
        if len(pixel) != len(size) or not all(0 <= at < end for at, end in zip(pixel, size, strict=True)):
            frames = f"{size[0]} frames, " if video else ""
            raise ValueError(
                f"pixel {tuple(pixel)} is outside of {frames}{size[-2]} rows and {size[-1]} columns"
            )
    axes = tuple(range(len(size)))
    transformed = torch._C._are_functorch_transforms_active()
    with contextlib.nullcontext() if transformed else torch.no_grad():
        wide = torch.promote_types(x.dtype, torch.float32)
        start = torch.zeros(1, len(pixels), *size, dtype=wide, device=x.device)
        for number, pixel in enumerate(pixels):
            start[(0, number, *pixel)] = 1.0
        weights: list[Tensor] = []
        maps: list[Tensor] = []
        for _ in range(getattr(module, "recurrence", 1)):
            query, key = (module.project(layer, x).to(wide) for layer in (module.query_conv, module.key_conv))
            with torch.autocast(x.device.type, enabled=False):
                weights.append(reference.scores(query, key, axes).softmax(1))
            seen = start
            for weight in reversed(weights):
                seen = _row_times(seen, weight, axes)
            maps.append(seen[0])
            x = module.attend(x)
        return torch.stack(maps) if maps else start.new_empty(0, *start.shape[1:])


def _row_times(rows: Tensor, weight: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Multiply row vectors [1, P, *spatial] by the matrix A of `weight` [1, L, *spatial].

    The multiplication is the transpose of `cc_attention.ca_map`.
    """
    seen = [
        torch.einsum("n...ij,np...i->np...j", line, rows.movedim(axis + 2, -1)).movedim(-1, axis + 2)
        for axis, line in reference.line_weights(weight, axes)
    ]
    return sum(seen[1:], seen[0])

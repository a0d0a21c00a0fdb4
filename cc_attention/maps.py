"""What a pixel looks at: the attention weights as maps."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from cc_attention.module import CrissCrossAttention
from cc_attention.ops import ca_weight
from cc_attention.reference import with_self


def attention_maps(module: CrissCrossAttention, x: Tensor, pixels: Sequence[tuple[int, int]]) -> Tensor:
    """What each of some pixels gathers from every other, after each recurrence.

    A recurrence is a sparse matrix A over the pixels: row u holds u's softmax over its criss-cross, zero
    elsewhere. After r of them a pixel has gathered by the row of A_r ... A_1, computed here exactly, without
    ever forming a matrix. The first map is a cross, the second (the paper's figure 6) reaches every pixel.
    The residual and gamma are left out; a map sums to 1.

    Args:
        module: CrissCrossAttention, or RecurrentCrissCrossAttention with R recurrences.
        x: its input [1, in_dim, H, W].
        pixels: P pairs (row, column).

    Returns:
        float32 (float64 where x is) [R, P, H, W] on the device of x; R is 1 of a plain module. Without a
        gradient for backward(); torch.func's transforms and forward-mode differentiation see through it.

    Raises:
        ValueError: several pictures, channels that are not the module's, or a pixel outside of them.
    """
    if x.dim() != 4 or x.shape[0] != 1 or x.shape[1] != module.in_dim:
        raise ValueError(f"x is {list(x.shape)}; one picture [1, {module.in_dim}, H, W] expected")
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
    """Multiply rows [1, P, H, W] by the matrix of the softmaxed `weight` [1, L, H, W]: ca_map's transpose."""
    width = rows.shape[3]
    column = with_self(weight[:, width:].transpose(1, 2))  # [1, H, H, W]: (y, x) sees (v, x)
    to_row = torch.einsum("nuyx,npyx->npyu", weight[:, :width], rows)
    return to_row + torch.einsum("nyvx,npyx->npvx", column, rows)

"""Criss-cross attention in plain PyTorch, which works on every device and is differentiable to any order.

This module is the specification of the operators, the fallback without compiled kernels, and the reference
that the tests compare with.

Shapes: N is the batch size, C and c are numbers of channels, H is the number of rows, and W is the number of
columns. Each pixel (y, x) attends to L = H + W - 1 positions. First come the W pixels (y, 0) .. (y, W - 1) of
its row, including itself. Then come the H - 1 other pixels of its column, top to bottom.

Source: Huang et al., CCNet: Criss-Cross Attention for Semantic Segmentation, arXiv 1811.11721, eq. 1
(affinity) and eq. 2 (aggregation); cc_attention/functions.py of the original CCNet repository, whose CUDA
code has the same order of positions.
"""

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

_Function = TypeVar("_Function", bound=Callable[..., Tensor])


def check_operands(op: str, **operands: Tensor) -> None:
    """Raise RuntimeError if the operands of `op` do not match.

    All operands must be floating-point tensors [N, any, H, W] with H and W at least 1, and share N, H, W,
    dtype and device.
    """
    (first_name, first), *_ = operands.items()
    for name, tensor in operands.items():
        if tensor.dim() != 4:
            raise RuntimeError(f"{op}: {name} must have 4 dimensions, got shape {list(tensor.shape)}")
        if tensor.shape[2] < 1 or tensor.shape[3] < 1:
            raise RuntimeError(
                f"{op}: {name} must have at least one row and one column, got shape {list(tensor.shape)}"
            )
        if tensor.shape[0] != first.shape[0] or tensor.shape[2:] != first.shape[2:]:
            raise RuntimeError(
                f"{op}: {first_name} and {name} must agree in batch, height and width, "
                f"got shapes {list(first.shape)} and {list(tensor.shape)}"
            )
        if tensor.dtype != first.dtype:
            raise RuntimeError(
                f"{op}: {first_name} and {name} must have the same dtype, "
                f"got {first.dtype} and {tensor.dtype}"
            )
        if not tensor.is_floating_point():
            raise RuntimeError(f"{op}: {name} must be floating point, got {tensor.dtype}")
        if tensor.device != first.device:
            raise RuntimeError(
                f"{op}: {first_name} and {name} must be on the same device, "
                f"got {first.device} and {tensor.device}"
            )


def check_channels(op: str, expected: int, meaning: str, **operand: Tensor) -> None:
    """Raise RuntimeError unless the operand has `expected` channels; `meaning` explains this number."""
    ((name, tensor),) = operand.items()
    if tensor.shape[1] != expected:
        raise RuntimeError(
            f"{op}: {name} must have {expected} channels ({meaning}), got shape {list(tensor.shape)}"
        )


def autocast_enabled(tensor: Tensor) -> bool:
    """Return whether autocast is enabled for the device of `tensor`; False for a device without autocast."""
    device_type = tensor.device.type
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def cast_for_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors cast to the autocast dtype; float64 is left unchanged, as in PyTorch's autocast."""
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _float32_under_autocast(function: _Function) -> _Function:
    """Wrap `function` so that it runs in float32 under autocast.

    CCNet does not scale its scores by 1 / sqrt(c), so the scores can overflow float16.
    """

    @functools.wraps(function)
    def wrapper(*tensors: Tensor) -> Tensor:
        if not autocast_enabled(tensors[0]):
            return function(*tensors)
        with torch.autocast(tensors[0].device.type, enabled=False):
            return function(*(t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors))

    return wrapper  # type: ignore[return-value]


def _without_self(column: Tensor) -> Tensor:
    """Drop the diagonal of [N, H (query), H (key), W], giving [N, H, H - 1, W].

    Diagonal elements are H + 1 apart in the flattened H * H. After dropping element 0, the diagonal elements
    form the last column of an (H - 1) x (H + 1) matrix, so no index or mask is needed.
    """
    n, h, _, w = column.shape
    return column.flatten(1, 2)[:, 1:].reshape(n, h - 1, h + 1, w)[:, :, :-1].reshape(n, h, h - 1, w)


def with_self(column: Tensor) -> Tensor:
    """Insert a diagonal of zeros into [N, H (query), H - 1 (key), W], giving [N, H, H, W]."""
    n, h, _, w = column.shape
    column = F.pad(column.reshape(n, h - 1, h, w), (0, 0, 0, 1))  # [N, H - 1, H + 1, W]
    return F.pad(column.flatten(1, 2), (0, 0, 1, 0)).reshape(n, h, h, w)


@_float32_under_autocast
def ca_weight(query: Tensor, key: Tensor) -> Tensor:
    """Compute the affinities, the unscaled dot products of each query with the keys in its row and column.

    The affinities are those of eq. 1 of the paper, before the softmax.

    Args:
        query: [N, c, H, W].
        key: [N, c, H, W], same dtype and device.

    Returns:
        Scores [N, L, H, W], contiguous; float32 in an autocast region.

    Raises:
        RuntimeError: shapes, dtypes or devices do not match.
    """
    check_operands("ca_weight", query=query, key=key)
    check_channels("ca_weight", query.shape[1], "those of query", key=key)
    row = torch.einsum("ncyx,ncyu->nuyx", query, key)  # [N, W, H, W]: (y, x) attends to (y, u)
    column = torch.einsum("ncyx,ncvx->nyvx", query, key)  # [N, H, H, W]: (y, x) attends to (v, x)
    return torch.cat([row, _without_self(column).transpose(1, 2)], dim=1)


@_float32_under_autocast
def ca_map(weight: Tensor, value: Tensor) -> Tensor:
    """Return, for each pixel, the weighted sum of the values in its row and column.

    The sum is that of eq. 2 of the paper, without the residual.

    Args:
        weight: [N, L, H, W], positions in the order of `ca_weight`.
        value: [N, C, H, W], same dtype and device.

    Returns:
        Weighted sums [N, C, H, W]; float32 in an autocast region.

    Raises:
        RuntimeError: shapes, dtypes or devices do not match.
    """
    check_operands("ca_map", weight=weight, value=value)
    h, w = value.shape[2:]
    check_channels("ca_map", h + w - 1, "H + W - 1, the positions of a criss-cross", weight=weight)
    column = with_self(weight[:, w:].transpose(1, 2))  # [N, H, H, W]
    from_row = torch.einsum("nuyx,ncyu->ncyx", weight[:, :w], value)  # [N, C, H, W]
    from_column = torch.einsum("nyvx,ncvx->ncyx", column, value)  # [N, C, H, W]
    return from_row + from_column


def criss_cross_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute criss-cross attention: ``ca_map(softmax(ca_weight(query, key), dim=1), value)``.

    Half-precision inputs are computed in float32, and the result is rounded once. An autocast region casts
    the inputs to its dtype first. `cc_attention.criss_cross_attention` shows an example.

    Args:
        query: [N, c, H, W].
        key: [N, c, H, W], same dtype and device.
        value: [N, C, H, W], same dtype and device.

    Returns:
        Weighted sums [N, C, H, W] in the dtype of value.

    Raises:
        RuntimeError: shapes, devices or dtypes do not match (dtypes may differ in an autocast region).
    """
    if autocast_enabled(value):
        query, key, value = cast_for_autocast(query, key, value)
    check_operands("criss_cross_attention", value=value, query=query, key=key)
    check_channels("criss_cross_attention", query.shape[1], "those of query", key=key)
    wide = torch.promote_types(value.dtype, torch.float32)
    weight = F.softmax(ca_weight(query.to(wide), key.to(wide)), dim=1)  # [N, L, H, W]
    return ca_map(weight, value.to(wide)).to(value.dtype)

"""Criss-cross attention in plain PyTorch, which works on every device and is differentiable to any order.

This module is the specification of the operators, the fallback without compiled kernels, and the reference
that the tests compare with.

Shapes: N is the batch size, C and c are numbers of channels, T is the number of frames, H is the number of
rows, and W is the number of columns. Each pixel attends to L positions, those of one line along each axis.
First come the pixels along the last axis, including the pixel itself. Then come the other pixels along the
axis before, and so on. In a picture, these are the W pixels (y, 0) .. (y, W - 1) of the row of pixel (y, x),
then the H - 1 other pixels of its column, top to bottom: L = H + W - 1.

Source: Huang et al., CCNet: Criss-Cross Attention for Semantic Segmentation, arXiv 1811.11721, eq. 1
(affinity) and eq. 2 (aggregation); cc_attention/functions.py of the original CCNet repository, whose CUDA
code has the same order of positions.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

_Function = TypeVar("_Function", bound=Callable[..., Tensor])

PICTURE = (0, 1)  # the axes of a picture


def check_operands(op: str, *, video: bool = False, **operands: Tensor) -> None:
    """Raise RuntimeError if the operands of `op` do not match.

    All operands must be floating-point tensors [N, any, H, W], or [N, any, T, H, W] if `video` is allowed.
    The sizes of all axes must be at least 1. The operands must share all sizes but the channels, dtype and
    device.
    """
    (first_name, first), *_ = operands.items()
    dim = first.dim()
    for name, tensor in operands.items():
        if tensor.dim() != dim or (dim != 4 and not (video and dim == 5)):
            dims = "4 or 5 dimensions" if video else "4 dimensions"
            like = ", like the others" if dim == 5 and video else ""
            raise RuntimeError(f"{op}: {name} must have {dims}{like}, got shape {list(tensor.shape)}")
        if any(size < 1 for size in tensor.shape[2:]):  # min() would compare sizes that torch.export varies
            frame = " and frame" if dim == 5 else ""
            raise RuntimeError(
                f"{op}: {name} must have at least one row and one column{frame}, "
                f"got shape {list(tensor.shape)}"
            )
        if tensor.shape[0] != first.shape[0] or tensor.shape[2:] != first.shape[2:]:
            frames = "frames, " if dim == 5 else ""
            raise RuntimeError(
                f"{op}: {first_name} and {name} must agree in batch, {frames}height and width, "
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


def check_options(
    op: str, query: Tensor, value: Tensor, residual: Tensor | None, gamma: Tensor | None, heads: int
) -> None:
    """Raise RuntimeError if heads, residual or gamma of `op` do not match the maps."""
    if heads < 1:
        raise RuntimeError(f"{op}: heads must be at least 1, got {heads}")
    for name, tensor in (("query", query), ("value", value)):
        if tensor.shape[1] % heads:
            raise RuntimeError(
                f"{op}: the channels of {name} must be divisible by heads={heads}, "
                f"got shape {list(tensor.shape)}"
            )
    if (residual is None) != (gamma is None):
        raise RuntimeError(f"{op}: residual and gamma must be given together")
    if gamma is not None and gamma.numel() != 1:
        raise RuntimeError(f"{op}: gamma must have one element, got shape {list(gamma.shape)}")


def check_attention(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    residual: Tensor | None,
    gamma: Tensor | None,
    heads: int,
) -> None:
    """Raise RuntimeError if the operands of `criss_cross_attention` do not match."""
    check_operands(op, video=True, value=value, query=query, key=key)
    check_channels(op, query.shape[1], "those of query", key=key)
    check_options(op, query, value, residual, gamma, heads)
    if residual is not None:
        check_operands(op, video=True, value=value, residual=residual)
        check_channels(op, value.shape[1], "those of value", residual=residual)


def check_types(op: str, scale: float, gamma: Tensor | None, axes: Sequence[int] | None) -> None:
    """Raise TypeError if an option of `op` has a wrong type.

    The compiled operator would give a scale that is a tensor no gradient.
    """
    if isinstance(scale, Tensor):
        raise TypeError(f"{op}: scale must be a number; multiply query by a scale that is learned")
    if gamma is not None and not isinstance(gamma, Tensor):
        raise TypeError(f"{op}: gamma must be a tensor with one element, got {type(gamma).__name__}")
    if axes is not None and not isinstance(axes, Sequence):
        raise TypeError(f"{op}: axes must be a list or tuple of numbers, got {axes!r}")


def used_axes(op: str, axes: Sequence[int] | None, dim: int) -> tuple[int, ...]:
    """Return the spatial axes attended along, in ascending order.

    Args:
        op: name of the operator, for the message.
        axes: numbers of spatial axes, counted from 0; None is all of them.
        dim: number of dimensions of the maps, including batch and channels.

    Raises:
        ValueError: there is no axis, an axis is given twice, or does not exist.
    """
    spatial = range(dim - 2)
    if axes is None:
        return tuple(spatial)
    if not axes or len(set(axes)) < len(axes) or not set(axes) <= set(spatial):
        raise ValueError(
            f"{op}: axes must be different numbers from 0 to {len(spatial) - 1} for maps of {dim} "
            f"dimensions, got {tuple(axes)}"
        )
    return tuple(sorted(axes))


def autocast_enabled(tensor: Tensor) -> bool:
    """Return whether autocast is enabled for the device of `tensor`; False for a device without autocast."""
    device_type = tensor.device.type
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def cast_for_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors cast to the autocast dtype; float64 is left unchanged, as in PyTorch's autocast."""
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context without autocast for the device of `tensor`."""
    if not autocast_enabled(tensor):
        return contextlib.nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


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


def _without_self(line: Tensor) -> Tensor:
    """Drop the diagonal of [..., n (query), n (key)], giving [..., n, n - 1].

    Diagonal elements are n + 1 apart in the flattened n * n. After dropping element 0, the diagonal elements
    form the last column of an (n - 1) x (n + 1) matrix, so no index or mask is needed.
    """
    n = line.shape[-1]
    return line.flatten(-2)[..., 1:].unflatten(-1, (n - 1, n + 1))[..., :-1].reshape(*line.shape[:-1], n - 1)


def _with_self(line: Tensor) -> Tensor:
    """Insert a diagonal of zeros into [..., n (query), n - 1 (key)], giving [..., n, n]."""
    n = line.shape[-2]
    line = F.pad(line.reshape(*line.shape[:-2], n - 1, n), (0, 1))  # [..., n - 1, n + 1]
    return F.pad(line.flatten(-2), (1, 0)).unflatten(-1, (n, n))


def fold_heads(x: Tensor, heads: int) -> Tensor:
    """Make each head of x [N, heads * C, *spatial] a sample of its own: [N * heads, C, *spatial]."""
    return x if heads == 1 else x.unflatten(1, (heads, x.shape[1] // heads)).flatten(0, 1)


def unfold_heads(x: Tensor, heads: int) -> Tensor:
    """Undo `fold_heads`."""
    return x if heads == 1 else x.unflatten(0, (x.shape[0] // heads, heads)).flatten(1, 2)


def _pixels_of(x: Tensor, axis: int) -> Tensor:
    """Return the lines of x [N, C, *spatial] along an axis, as [N, *others, n, C]."""
    return x.movedim((axis + 2, 1), (-2, -1))


def scores(query: Tensor, key: Tensor, axes: Sequence[int]) -> Tensor:
    """Compute the affinities of each pixel with the L positions on its lines.

    Args:
        query: [N, c, *spatial].
        key: [N, c, *spatial].
        axes: spatial axes, ascending.

    Returns:
        Scores [N, L, *spatial].
    """
    parts = []
    for axis in reversed(axes):
        # [N, *others, n (query), n (key)] = [N, *others, n, c] x [N, *others, c, n]
        line = torch.matmul(_pixels_of(query, axis), _pixels_of(key, axis).mT)
        if axis != axes[-1]:
            line = _without_self(line)
        parts.append(line.movedim(-1, 1).movedim(-1, axis + 2))
    return torch.cat(parts, dim=1)


def line_weights(weight: Tensor, axes: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """Yield each axis and its weights [N, *others, n (query), n (key)] of weights [N, L, *spatial]."""
    start = 0
    for axis in reversed(axes):
        own = axis == axes[-1]
        end = start + weight.shape[axis + 2] - (not own)
        line = weight[:, start:end].movedim(axis + 2, -1).movedim(1, -1)
        yield axis, line if own else _with_self(line)
        start = end


def weighted_sum(weight: Tensor, value: Tensor, axes: Sequence[int]) -> Tensor:
    """Sum the values at the L positions of each pixel with its weights.

    Args:
        weight: [N, L, *spatial].
        value: [N, C, *spatial].
        axes: spatial axes, ascending.

    Returns:
        [N, C, *spatial].
    """
    sums = [
        torch.matmul(line, _pixels_of(value, axis)).movedim((-1, -2), (1, axis + 2))
        for axis, line in line_weights(weight, axes)
    ]
    return sum(sums[1:], sums[0])


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
    return scores(query, key, PICTURE)


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
    return weighted_sum(weight, value, PICTURE)


def criss_cross_attention(  # noqa: PLR0913
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    heads: int = 1,
    scale: float = 1.0,
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    axes: Sequence[int] | None = None,
) -> Tensor:
    """Compute criss-cross attention, as `cc_attention.criss_cross_attention` does.

    For pictures, one head and no other option, the result is ``ca_map(softmax(ca_weight(query, key), dim=1),
    value)``. Half-precision inputs are computed in float32, and the result is rounded once. An autocast
    region casts the inputs to its dtype first.

    Args:
        query: [N, c, H, W] or [N, c, T, H, W].
        key: same shape, dtype and device as query.
        value: [N, C, H, W] or [N, C, T, H, W], same dtype and device.
        heads: number of equal groups of channels, each of which attends separately.
        scale: factor of the scores, a number.
        residual: map in the shape and dtype of value; requires gamma.
        gamma: one element. With a residual, the result is residual + gamma * attention.
        axes: spatial axes to attend along, counted from 0; None is all.

    Returns:
        Map in the shape and dtype of value.

    Raises:
        RuntimeError: shapes, devices or dtypes do not match (dtypes may differ in an autocast region).
        ValueError: axes are given twice or do not exist.
        TypeError: scale is a tensor, gamma is not, or axes is not a list or tuple.
    """
    op = "criss_cross_attention"
    check_types(op, scale, gamma, axes)
    if autocast_enabled(value):
        query, key, value = cast_for_autocast(query, key, value)
        residual = None if residual is None else cast_for_autocast(residual)[0]
    check_attention(op, query, key, value, residual, gamma, heads)
    used = used_axes(op, axes, value.dim())
    wide = torch.promote_types(value.dtype, torch.float32)
    with _without_autocast(value):
        query, key, wide_value = (fold_heads(t.to(wide), heads) for t in (query, key, value))
        score = scores(query, key, used)
        weight = F.softmax(score if scale == 1 else scale * score, dim=1)
        out = unfold_heads(weighted_sum(weight, wide_value, used), heads)
        if residual is not None and gamma is not None:
            out = residual.to(wide) + gamma.to(wide).reshape(()) * out
    return out.to(value.dtype)

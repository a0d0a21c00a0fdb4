"""Public operators: the compiled kernels if they were built, otherwise the plain PyTorch reference."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from cc_attention import reference

_BUILD = (
    "in a checkout, build it with `python setup.py build_ext --inplace`; "
    "otherwise install a C++ compiler and reinstall the package"
)

ARGUMENTS = 10  # of the fused operator, in csrc/ops.cpp


def _load_library() -> bool:
    """Register the compiled operators with PyTorch, and return whether the operators can be used.

    A library that exists but does not load is an error: a silent fallback would make programs slower without
    an explanation.
    """
    spec = importlib.util.find_spec("cc_attention._C")
    if spec is None or spec.origin is None:
        warnings.warn(
            f"the compiled criss-cross attention is missing; using the slower PyTorch reference ({_BUILD})",
            stacklevel=2,
        )
        return False
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        raise ImportError(
            f"{spec.origin} does not load: it is damaged or was built for another PyTorch. Rebuild it "
            f"({_BUILD}), or delete it to use the PyTorch reference."
        ) from error
    if len(torch.ops.cc_attention.criss_cross_attention.default._schema.arguments) != ARGUMENTS:
        raise ImportError(
            f"{spec.origin} was built from another version of the source. Rebuild it ({_BUILD})."
        )
    try:
        importlib.import_module("cc_attention._registration")
    except (ImportError, AttributeError) as error:
        # The registration uses private parts of PyTorch, which may change in a newer release.
        warnings.warn(
            f"PyTorch {torch.__version__} has changed internals that the compiled criss-cross attention uses "
            f"({error}); using the slower PyTorch reference. Install a version of PyTorch named in "
            "docs/operator.md, or a newer cc_attention",
            stacklevel=2,
        )
        return False
    return True


DEVICE_TYPES: frozenset[str] = frozenset()  # device types that have compiled kernels
if _load_library():
    DEVICE_TYPES = frozenset(
        device_type
        for device_type in ("cpu", "cuda")
        if torch._C._dispatch_has_kernel_for_dispatch_key("cc_attention::ca_weight", device_type.upper())
    )


#: Environment variable that, set to 1, allows CUDA kernels that no GPU has run yet (docs/operator.md). The
#: compiled operators read it at each call.
UNTESTED = "CC_ATTENTION_UNTESTED"
#: Device types whose kernels serve all of `criss_cross_attention`. No GPU has run the CUDA kernels for heads,
#: scale, axes, videos, a residual and parts of larger maps yet. Until "cuda" is here, these are composed on a
#: GPU of what has been tested.
WHOLE_DEVICE_TYPES = {"cpu"} | ({"cuda"} if os.environ.get(UNTESTED) == "1" else set())
PICTURE_MASK = 2 | 4  # the axes of a picture, as in csrc/kernels.h
LONGEST_LINE = 272  # of the tensor-core kernels, as in csrc/cuda/tensor_core.h


@contextlib.contextmanager
def untested_kernels() -> Iterator[None]:
    """Allow, during a `with` block, CUDA kernels that no GPU has run yet. For tests and benchmarks."""
    environment, before = os.environ.get(UNTESTED), set(WHOLE_DEVICE_TYPES)
    os.environ[UNTESTED] = "1"
    WHOLE_DEVICE_TYPES.update(DEVICE_TYPES)
    try:
        yield
    finally:
        if environment is None:
            del os.environ[UNTESTED]
        else:
            os.environ[UNTESTED] = environment
        WHOLE_DEVICE_TYPES.clear()
        WHOLE_DEVICE_TYPES.update(before)


@functools.cache
def _warn_no_cuda() -> None:
    warnings.warn(
        "the compiled criss-cross attention has no CUDA kernels; using the slower PyTorch reference on the "
        f"GPU ({_BUILD}; this needs nvcc of PyTorch's CUDA version)",
        stacklevel=4,
    )


def _compiled_for(tensor: Tensor) -> bool:
    """Return whether compiled kernels exist for the device of `tensor`; warn once if a GPU has none."""
    if tensor.device.type in DEVICE_TYPES:
        return True
    if tensor.device.type == "cuda" and DEVICE_TYPES and not torch.compiler.is_compiling():
        _warn_no_cuda()
    return False


@torch.compiler.assume_constant_result  # torch.compile can't trace this setting, but guards on it
def _tf32_allowed() -> bool:
    """Return whether float32 products on a GPU may use TF32.

    Setting the older allow_tf32 also changes fp32_precision. Reading allow_tf32 is an error once
    fp32_precision has been set, so only fp32_precision is read.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _tensor_core_step(value: Tensor, tf32: bool) -> int:
    """Return the elements in 16 bytes if tensor cores are expected for the dtype of `value`, otherwise 1.

    They are expected for 16-bit types, and for float32 if TF32 is allowed.
    """
    dtype = value.dtype
    if reference.autocast_enabled(value) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(value.device.type)
    bits16 = dtype in (torch.float16, torch.bfloat16)
    return 16 // dtype.itemsize if bits16 or (tf32 and dtype == torch.float32) else 1


def _has_tensor_cores(value: Tensor) -> bool:
    """Return whether the device of `value` has tensor cores for the kernels."""
    if not (value.is_cuda and torch.cuda.is_available()):
        return False
    return torch.cuda.get_device_capability(value.device) >= (8, 0)


def slow_cause(value: Tensor, mask: int, tf32: bool) -> str | None:
    """Return why the tensor cores of a GPU can't be used where they are expected; None if they can.

    The conditions are those of `fits` in csrc/cuda/tensor_core.h, except for its limits on the number of
    elements, and for what `aligned` provides.

    Args:
        value: the map of values.
        mask: the axes, as in `PICTURE_MASK`.
        tf32: whether TF32 is allowed.
    """
    dim = value.dim()
    if _tensor_core_step(value, tf32) == 1:
        return None
    if max(value.shape[axis + 2] for axis in range(dim - 2) if mask & 1 << (axis + 5 - dim)) > LONGEST_LINE:
        return f"a line has more than {LONGEST_LINE} pixels"
    return None


def aligned(x: Tensor, heads: int, step: int) -> Tensor:
    """Return a map whose pixels and heads begin at multiples of 16 bytes, as the tensor cores need them.

    Channels of zeros are added to each head where their number is no multiple of `step`, and slices that
    begin elsewhere are copied. This costs less than the general kernels.

    Args:
        x: map [N, heads * channels, ...] in channels_last, or some channels of a larger map.
        heads: number of heads.
        step: number of elements in 16 bytes.
    """
    channels = x.shape[1] // heads
    if channels % step:
        by_heads = x.movedim(1, -1).unflatten(-1, (heads, channels))
        return F.pad(by_heads, (0, -channels % step)).flatten(-2).movedim(-1, 1)
    if (
        in_transform() or torch.compiler.is_compiling()
    ):  # there, inputs are no slices, or a copy is made anyway
        return x
    if x.storage_offset() % step or (x.stride(1) == 1 and x.stride(-1) % step):
        return x.clone(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    return x


def _without_padding(x: Tensor, heads: int, channels: int) -> Tensor:
    """Return a map of the operator with `channels` channels in all: the first of each head."""
    if x.shape[1] == channels:
        return x
    by_heads = x.movedim(1, -1).unflatten(-1, (heads, x.shape[1] // heads))
    return to_channels_last(by_heads[..., : channels // heads].flatten(-2).movedim(-1, 1))


@functools.cache
def _warn_slow(description: str) -> None:
    warnings.warn(
        f"criss_cross_attention: {description}, so the tensor cores can't be used; the general kernels are "
        "several times slower (this is said once)",
        stacklevel=5,
    )


def _check_speed(value: Tensor, mask: int, tf32: bool) -> None:
    """Warn once in a process if a GPU can't use its tensor cores because of the shape."""
    if torch.compiler.is_compiling() or _warn_slow.cache_info().currsize:
        return
    if cause := slow_cause(value, mask, tf32):
        _warn_slow(f"{cause} (value {list(value.shape)}, {value.dtype})")


def to_channels_last(x: Tensor) -> Tensor:
    """Return x [N, C, H, W] or [N, C, T, H, W] in channels_last, the memory format of the kernels.

    A tensor with another number of dimensions is returned unchanged, and the operator rejects the tensor.
    Inside a torch.func transform, the format can't be changed: x is also returned unchanged, and the operator
    converts x.
    """
    if x.dim() not in (4, 5) or torch._C._are_functorch_transforms_active():
        return x
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


def readable(x: Tensor) -> Tensor:
    """Return x, converted to channels_last unless the kernels read it in place.

    They read some channels of a larger map in channels_last, such as a part of a joint projection.
    """
    if x.dim() in (4, 5) and not torch._C._are_functorch_transforms_active():
        pixels, pitch = 1, x.stride(-1)
        in_place = x.stride(1) == 1 and pitch >= x.shape[1]
        for axis in (*range(x.dim() - 1, 1, -1), 0):
            in_place = in_place and x.stride(axis) == pixels * pitch
            pixels *= x.shape[axis]
        if in_place:
            return x
    return to_channels_last(x)


def _axes_mask(axes: Sequence[int] | None, dim: int) -> int:
    """Return the operators' argument `axes`: 1 for T, 2 for H, 4 for W, added up."""
    if dim not in (4, 5):  # the operator rejects the maps
        return PICTURE_MASK
    return sum(1 << (axis + 5 - dim) for axis in reference.used_axes("criss_cross_attention", axes, dim))


def _gamma_dtype(value: Tensor) -> torch.dtype:
    """Return the dtype in which the operator takes gamma."""
    dtype = value.dtype
    if reference.autocast_enabled(value) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(value.device.type)
    return torch.promote_types(dtype, torch.float32)


def _composed(  # noqa: PLR0913
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    heads: int,
    scale: float,
    residual: Tensor | None,
    gamma: Tensor | None,
    axes: Sequence[int] | None,
) -> Tensor:
    """Compute `criss_cross_attention` where the kernels serve pictures with one head and no option only."""
    if value.dim() != 4 or reference.used_axes("criss_cross_attention", axes, 4) != reference.PICTURE:
        return reference.criss_cross_attention(
            query, key, value, heads=heads, scale=scale, residual=residual, gamma=gamma, axes=axes
        )
    if reference.autocast_enabled(value):
        query, key, value = reference.cast_for_autocast(query, key, value)
        residual = None if residual is None else reference.cast_for_autocast(residual)[0]
    reference.check_attention("criss_cross_attention", query, key, value, residual, gamma, heads)
    query = query if scale == 1 else scale * query
    out = criss_cross_attention(*(reference.fold_heads(t, heads) for t in (query, key, value)))
    out = reference.unfold_heads(out, heads)
    if residual is None or gamma is None:
        return out
    return torch.addcmul(residual.to(out.dtype), gamma.to(out.dtype), out)


def ca_weight(query: Tensor, key: Tensor) -> Tensor:
    """Compute the affinities, the unscaled dot products of each query with the keys in its row and column.

    Source: CCNet, arXiv 1811.11721, eq. 1, before the softmax; cc_attention/functions.py of the original
    CCNet repository.

    Args:
        query: [N, c, H, W], float32, float64, float16 or bfloat16.
        key: [N, c, H, W], same dtype and device.

    Returns:
        Scores [N, H + W - 1, H, W], contiguous; float32 in an autocast region. Dimension 1 holds the W pixels
        of the row (including the pixel itself), then the H - 1 other pixels of the column, top to bottom. See
        `criss_cross_attention` for a picture.

    Raises:
        RuntimeError: shapes, dtypes or devices do not match.
    """
    if has_torch_function((query, key)):  # needed for torch.fx tracing, here and in the operators below
        return handle_torch_function(ca_weight, (query, key), query, key)
    if _compiled_for(query):
        return torch.ops.cc_attention.ca_weight(query, key)
    return reference.ca_weight(query, key)


def ca_map(weight: Tensor, value: Tensor) -> Tensor:
    """Return, for each pixel, the weighted sum of the values in its row and column.

    Source: CCNet, arXiv 1811.11721, eq. 2, without the residual; cc_attention/functions.py of the original
    CCNet repository.

    Args:
        weight: [N, H + W - 1, H, W], positions in the order of `ca_weight`.
        value: [N, C, H, W], same dtype and device.

    Returns:
        Weighted sums [N, C, H, W]; float32 in an autocast region.

    Raises:
        RuntimeError: shapes, dtypes or devices do not match.
    """
    if has_torch_function((weight, value)):
        return handle_torch_function(ca_map, (weight, value), weight, value)
    if _compiled_for(value):
        return torch.ops.cc_attention.ca_map(weight, value)
    return reference.ca_map(weight, value)


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
    """Compute fused criss-cross attention: each pixel attends to its row and its column.

    The result is that of ``ca_map(softmax(ca_weight(query, key), dim=1), value)``, but the compiled kernels
    never allocate a tensor of the size of the attention weights. Scores are not scaled by 1 / sqrt(c).

    Example: in a 3x4 map, the pixel in row 1, column 2 attends to the H + W - 1 = 6 marked pixels, which
    include the pixel itself. The numbers are the positions in dimension 1 of the output of `ca_weight`::

        .  .  4  .
        0  1  2  3      position 2 is the pixel itself
        .  .  5  .

    A second application reaches all 12 pixels: every pixel shares a row or a column with one of these 6.

    In a video [N, c, T, H, W], a pixel also attends to the same place in all frames: T + H + W - 2 positions.
    A third application then reaches all pixels. With `axes`, pixels attend along some axes only: ``axes=[1]``
    of a picture is row attention, as in axial attention.

    Numerics: scores, softmax and sums of half-precision inputs are computed in float32. On a GPU, float32
    products use TF32 if ``torch.backends.cuda.matmul.fp32_precision`` is "tf32" (or if its older name,
    ``allow_tf32``, is set). An autocast region casts all maps to its dtype, as in
    `torch.nn.functional.scaled_dot_product_attention`. Forward and backward are deterministic: the same
    inputs give the same bits. A score of -inf masks a position. A pixel with all positions masked gets NaN.

    The gradient of the operator can't be differentiated again. docs/operator.md lists the supported
    torch.func transforms. The kernels use the channels_last memory format. They read some channels of a
    larger map in place, so parts of a joint projection are not copied. Inputs in another format are copied
    once.

    Source: CCNet, arXiv 1811.11721, section 3.2, eq. 1-2; cc_attention/functions.py of the original CCNet
    repository. The TPAMI version of the paper (arXiv 1811.11721v2) adds the frames.

    Args:
        query: [N, c, H, W] or [N, c, T, H, W], float32, float64, float16 or bfloat16.
        key: same shape, dtype and device as query.
        value: [N, C, H, W] or [N, C, T, H, W], same dtype and device.
        heads: number of equal groups of channels of query, key and value, each of which attends separately.
        scale: factor of the scores, a number.
        residual: map in the shape and dtype of value; requires gamma.
        gamma: factor of the attention, one element of any dtype. With a residual, the result is
            ``residual + gamma * attention``, computed in the same pass.
        axes: spatial axes to attend along, counted from 0: (H, W) or (T, H, W). None is all of them.

    Returns:
        Weighted sums in the shape and dtype of value, channels_last.

    Raises:
        RuntimeError: shapes, devices or dtypes do not match (dtypes may differ in an autocast region).
        ValueError: axes are given twice or do not exist.
        TypeError: scale is a tensor, gamma is not, or axes is not a list or tuple.
    """
    maps = (query, key, value)
    options: dict[str, Any] = {
        "heads": heads,
        "scale": scale,
        "residual": residual,
        "gamma": gamma,
        "axes": axes,
    }
    given = [t for t in (*maps, residual, gamma) if t is not None]
    if has_torch_function(given):
        return handle_torch_function(criss_cross_attention, given, *maps, **options)
    if not _compiled_for(value):
        return reference.criss_cross_attention(*maps, **options)
    reference.check_types("criss_cross_attention", scale, gamma, axes)
    mask = _axes_mask(axes, value.dim())
    whole = value.device.type in WHOLE_DEVICE_TYPES
    if not whole and not (heads == scale == 1 and mask == PICTURE_MASK and residual is None):
        return _composed(*maps, **options)
    # Convert here and not inside the operator, so that the backward pass reuses the copies.
    convert = readable if whole else to_channels_last
    query, key, value = (convert(t) for t in maps)
    if residual is not None and gamma is not None:
        residual, gamma = convert(residual), gamma.to(_gamma_dtype(value))
    tf32 = value.is_cuda and _tf32_allowed()
    all_channels = value.shape[1]
    if value.dim() in (4, 5) and _has_tensor_cores(value) and (step := _tensor_core_step(value, tf32)) > 1:
        _check_speed(value, mask, tf32)
        matches = query.shape == key.shape and (residual is None or residual.shape == value.shape)
        divisible = heads > 0 and query.shape[1] % heads == value.shape[1] % heads == 0
        # Otherwise the operator raises the error, which added channels could hide.
        if matches and divisible and slow_cause(value, mask, tf32) is None:
            query, key, value = (aligned(t, heads, step) for t in (query, key, value))
            residual = None if residual is None else aligned(residual, heads, step)
    keep = _is_differentiated(query, key, value, residual, gamma)
    out, _, total = torch.ops.cc_attention.criss_cross_attention(
        query, key, value, residual, gamma, heads, scale, mask, tf32, keep
    )
    return _without_padding(out if residual is None else total, heads, all_channels)


def _is_differentiated(*tensors: Tensor | None) -> bool:
    """Return whether derivatives may be needed."""
    return in_transform() or (
        torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    )


class _JointAttention(torch.autograd.Function):
    """Attention of a joint projection, whose gradient is one map."""

    @staticmethod
    def forward(
        ctx: Any,
        projection: Tensor,
        query_channels: int,
        residual: Tensor,
        gamma: Tensor,
        axes: int,
        tf32: bool,
    ) -> Tensor:
        parts = _split(projection, query_channels)
        out, normalizer, total = torch.ops.cc_attention.criss_cross_attention(
            *parts, residual, gamma, 1, 1.0, axes, tf32
        )
        ctx.save_for_backward(projection, out, normalizer, gamma)
        ctx.options = query_channels, axes, tf32
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        projection, out, normalizer, gamma = ctx.saved_tensors
        query_channels, axes, tf32 = ctx.options
        parts = _split(projection, query_channels)
        of_projection, _, _, of_gamma = torch.ops.cc_attention.criss_cross_attention_backward(
            grad, *parts, out, normalizer, gamma, 1, 1.0, axes, True, tf32
        )
        return of_projection, None, grad, of_gamma.reshape(gamma.shape), None, None


def _split(projection: Tensor, query_channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return views of query, key and value."""
    query, key, value = projection.split([query_channels] * 2 + [projection.shape[1] - 2 * query_channels], 1)
    return query, key, value


def in_transform() -> bool:
    """Return whether a transform of torch.func or forward-mode differentiation is active."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def joins(x: Tensor) -> bool:
    """Return whether a module should compute one projection for query, key and value of x.

    This is faster where the kernels read and write parts of a larger map in place.
    """
    if has_torch_function((x,)) or x.device.type not in DEVICE_TYPES & WHOLE_DEVICE_TYPES:
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or in_transform():
        return False
    # On tensor cores, `criss_cross_attention` adds channels to maps that are not aligned.
    step = _tensor_core_step(x, _tf32_allowed()) if _has_tensor_cores(x) else 1
    return x.shape[1] % step == 0 and x.shape[1] // 8 % step == 0


def joint_attention(projection: Tensor, query_channels: int, residual: Tensor, gamma: Tensor) -> Tensor:
    """Compute `criss_cross_attention` of a map that holds query, key and value, with a residual.

    Plain autograd would put the gradients of the three parts together by a copy. The kernels write them into
    one map.

    Args:
        projection: channels of query, key and value, one after the other: [N, 2 * c + C, *spatial].
        query_channels: c.
        residual: map [N, C, *spatial].
        gamma: one element.

    Returns:
        residual + gamma * attention, [N, C, *spatial], channels_last.
    """
    if not _is_differentiated(projection, residual, gamma):
        return criss_cross_attention(*_split(projection, query_channels), residual=residual, gamma=gamma)
    axes = _axes_mask(None, projection.dim())
    tf32 = projection.is_cuda and _tf32_allowed()
    gamma = gamma.to(_gamma_dtype(projection))
    return _JointAttention.apply(projection, query_channels, readable(residual), gamma, axes, tf32)

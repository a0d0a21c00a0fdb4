"""The public operators: the compiled ones where they were built, the reference elsewhere."""

import functools
import importlib.util
import warnings
from typing import Any

import torch
from torch import Tensor

from cc_attention import reference
from cc_attention.reference import check_channels, check_operands

_BUILD = (
    "`python setup.py build_ext --inplace` builds it in a checkout; "
    "elsewhere, install the package again where there is a C++ compiler"
)
_POSITIONS = "H + W - 1, the positions of a criss-cross"


def _load_library() -> bool:
    """Registers the compiled operators with PyTorch; False where they were not built.

    A library that is there and does not load is an error, since silence would only show as slowness.
    """
    spec = importlib.util.find_spec("cc_attention._C")
    if spec is None or spec.origin is None:
        warnings.warn(
            f"the compiled criss-cross attention is missing, the plain PyTorch reference serves ({_BUILD})",
            stacklevel=2,
        )
        return False
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        raise ImportError(
            f"{spec.origin} does not load: it is damaged or was built for another PyTorch. Build it again "
            f"({_BUILD}), or delete it to use the reference."
        ) from error
    return True


def _register() -> None:
    """What torch.compile, autograd and autocast need to know of the operators in csrc/ops.cpp."""

    # The fakes give shapes, dtypes and layouts without data; while tracing, their checks stand in for
    # csrc/common.h.

    def empty_map(like: Tensor) -> Tensor:
        return torch.empty(
            like.shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
        )

    @torch.library.register_fake("cc_attention::criss_cross_attention")
    def _(query: Tensor, key: Tensor, value: Tensor, tf32: bool = False) -> tuple[Tensor, Tensor]:
        check_operands("criss_cross_attention", value=value, query=query, key=key)
        check_channels("criss_cross_attention", query.shape[1], "those of query", key=key)
        n, _, h, w = value.shape
        wide = torch.float32 if value.dtype.itemsize < 4 else torch.float64
        return empty_map(value), value.new_empty((n, h, w), dtype=wide)

    @torch.library.register_fake("cc_attention::criss_cross_attention_backward")
    def _(
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        tf32: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        check_operands(
            "criss_cross_attention_backward", value=value, query=query, key=key, out=out, grad=grad
        )
        return empty_map(query), empty_map(key), empty_map(value)

    @torch.library.register_fake("cc_attention::ca_weight")
    def _(query: Tensor, key: Tensor) -> Tensor:
        check_operands("ca_weight", query=query, key=key)
        check_channels("ca_weight", query.shape[1], "those of query", key=key)
        n, _, h, w = query.shape
        return query.new_empty((n, h + w - 1, h, w))

    @torch.library.register_fake("cc_attention::ca_weight_backward")
    def _(grad: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        check_operands("ca_weight_backward", query=query, key=key, grad=grad)
        return empty_map(query), empty_map(key)

    @torch.library.register_fake("cc_attention::ca_map")
    def _(weight: Tensor, value: Tensor) -> Tensor:
        check_operands("ca_map", weight=weight, value=value)
        check_channels("ca_map", value.shape[2] + value.shape[3] - 1, _POSITIONS, weight=weight)
        return empty_map(value)

    @torch.library.register_fake("cc_attention::ca_map_backward")
    def _(grad: Tensor, weight: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        check_operands("ca_map_backward", weight=weight, value=value, grad=grad)
        return weight.new_empty(weight.shape), empty_map(value)

    def save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def ca_weight_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.cc_attention.ca_weight_backward(grad, *ctx.saved_tensors)

    def ca_map_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.cc_attention.ca_map_backward(grad, *ctx.saved_tensors)

    def save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        query, key, value, ctx.tf32 = inputs
        out, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(query, key, value, out, lse)

    def attention_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients = torch.ops.cc_attention.criss_cross_attention_backward(grad, *ctx.saved_tensors, ctx.tf32)
        return *gradients, None

    def no_double_backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            "criss-cross attention: double backward is not supported by the compiled operators; "
            "cc_attention.reference can be differentiated twice"
        )

    torch.library.register_autograd(
        "cc_attention::criss_cross_attention", attention_backward, setup_context=save_attention
    )
    torch.library.register_autograd("cc_attention::ca_weight", ca_weight_backward, setup_context=save_inputs)
    torch.library.register_autograd("cc_attention::ca_map", ca_map_backward, setup_context=save_inputs)
    for op in ("criss_cross_attention", "ca_weight", "ca_map"):
        torch.library.register_autograd(f"cc_attention::{op}_backward", no_double_backward)

    # The fused operator runs in the region's dtype, as PyTorch's own attention does: its scores are float32
    # anyway. torch.library.register_autocast would fix the dtype now.
    def autocast(query: Tensor, key: Tensor, value: Tensor, tf32: bool = False) -> tuple[Tensor, Tensor]:
        device_type = value.device.type
        operands = reference.cast_for_autocast(query, key, value)
        with torch.autocast(device_type, enabled=False):
            return torch.ops.cc_attention.criss_cross_attention(*operands, tf32)

    for dispatch_key in ("AutocastCPU", "AutocastCUDA"):
        torch.library.impl("cc_attention::criss_cross_attention", dispatch_key, autocast)

    # float32, because CCNet does not scale its scores and float16 ones overflow.
    for op in ("cc_attention::ca_weight", "cc_attention::ca_map"):
        for device_type in ("cpu", "cuda"):
            torch.library.register_autocast(op, device_type, torch.float32)


DEVICE_TYPES: frozenset[str] = frozenset()  # those with compiled kernels
if _load_library():
    _register()
    DEVICE_TYPES = frozenset(
        device_type
        for device_type in ("cpu", "cuda")
        if torch._C._dispatch_has_kernel_for_dispatch_key("cc_attention::ca_weight", device_type.upper())
    )


@functools.cache
def _warn_no_cuda() -> None:
    warnings.warn(
        "the compiled criss-cross attention has no CUDA kernels, the reference serves on the GPU "
        f"({_BUILD}; it needs nvcc of PyTorch's CUDA version)",
        stacklevel=4,
    )


def _compiled_for(tensor: Tensor) -> bool:
    """Whether the compiled operators run on the tensor's device."""
    if tensor.device.type in DEVICE_TYPES:
        return True
    if tensor.device.type == "cuda" and DEVICE_TYPES and not torch.compiler.is_compiling():
        _warn_no_cuda()
    return False


def ca_weight(query: Tensor, key: Tensor) -> Tensor:
    """Affinity: the unscaled scalar products of each pixel's query with the keys on its criss-cross.

    Source: CCNet, arXiv 1811.11721, eq. 1, before the softmax; the original's cc_attention/functions.py.

    Args:
        query: [N, c, H, W], float32, float64, float16 or bfloat16
        key: [N, c, H, W], of the same dtype and device
    Returns:
        [N, H + W - 1, H, W], contiguous. First the W pixels of the row, the pixel itself among them; then the
        H - 1 other pixels of the column, top to bottom. In an autocast region in float32.
    Raises:
        RuntimeError: shapes, dtypes or devices do not agree.
    """
    if _compiled_for(query):
        return torch.ops.cc_attention.ca_weight(query, key)
    return reference.ca_weight(query, key)


def ca_map(weight: Tensor, value: Tensor) -> Tensor:
    """Aggregation: each pixel's weighted sum of the values on its criss-cross.

    Source: CCNet, arXiv 1811.11721, eq. 2, without the residual; the original's cc_attention/functions.py.

    Args:
        weight: [N, H + W - 1, H, W], the positions in the order of ca_weight
        value: [N, C, H, W], of the same dtype and device
    Returns:
        [N, C, H, W]; in an autocast region in float32.
    Raises:
        RuntimeError: shapes, dtypes or devices do not agree.
    """
    if _compiled_for(value):
        return torch.ops.cc_attention.ca_map(weight, value)
    return reference.ca_map(weight, value)


def criss_cross_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """ca_map(softmax(ca_weight(query, key)), value) in one: a pixel attends to its row and column, to itself
    once. No tensor of the size of the weights is ever in memory.

    Half-precision inputs have float32 scores, softmax and sums. float32 products are exact, or those of tf32
    where torch.backends.cuda.matmul.allow_tf32 says so. In an autocast region all is cast to its dtype, as in
    PyTorch's scaled_dot_product_attention. Same inputs, same bits, forward and backward.

    channels_last is the layout of the kernels: inputs of another layout are copied once.

    Args:
        query: [N, c, H, W]
        key: [N, c, H, W]
        value: [N, C, H, W]
    Returns:
        [N, C, H, W] in the dtype of value, channels_last.
    Raises:
        RuntimeError: shapes, devices or dtypes do not agree (inside an autocast region dtypes may differ).
    """
    if not _compiled_for(value):
        return reference.criss_cross_attention(query, key, value)
    # Here and not in the operator, so that the backward finds the copies.
    query, key, value = (t.contiguous(memory_format=torch.channels_last) for t in (query, key, value))
    tf32 = value.is_cuda and torch.backends.cuda.matmul.allow_tf32
    return torch.ops.cc_attention.criss_cross_attention(query, key, value, tf32)[0]

"""Public operators: the compiled kernels if they were built, otherwise the plain PyTorch reference."""

import functools
import importlib
import importlib.util
import warnings

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from cc_attention import reference

_BUILD = (
    "in a checkout, build it with `python setup.py build_ext --inplace`; "
    "otherwise install a C++ compiler and reinstall the package"
)


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


def to_channels_last(x: Tensor) -> Tensor:
    """Return x [N, C, H, W] in channels_last, the memory format of the kernels.

    A tensor without 4 dimensions is returned unchanged, and the operator rejects the tensor. Inside a
    torch.func transform, the format can't be changed: x is also returned unchanged, and the operator converts
    x.
    """
    if x.dim() != 4 or torch._C._are_functorch_transforms_active():
        return x
    return x.contiguous(memory_format=torch.channels_last)


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


def criss_cross_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute fused criss-cross attention: each pixel attends to its row and its column.

    The result is that of ``ca_map(softmax(ca_weight(query, key), dim=1), value)``, but the compiled kernels
    never allocate a tensor of the size of the attention weights. Scores are not scaled by 1 / sqrt(c).

    Example: in a 3x4 map, the pixel in row 1, column 2 attends to the H + W - 1 = 6 marked pixels, which
    include the pixel itself. The numbers are the positions in dimension 1 of the output of `ca_weight`::

        .  .  4  .
        0  1  2  3      position 2 is the pixel itself
        .  .  5  .

    A second application reaches all 12 pixels: every pixel shares a row or a column with one of these 6.

    Numerics: scores, softmax and sums of half-precision inputs are computed in float32. On a GPU, float32
    products use TF32 if ``torch.backends.cuda.matmul.fp32_precision`` is "tf32" (or if its older name,
    ``allow_tf32``, is set). An autocast region casts all inputs to its dtype, as in
    `torch.nn.functional.scaled_dot_product_attention`. Forward and backward are deterministic: the same
    inputs give the same bits. A score of -inf masks a position. A pixel with all positions masked gets NaN.

    The gradient of the operator can't be differentiated again. docs/operator.md lists the supported
    torch.func transforms.
    The kernels use the channels_last memory format, and inputs in another format are copied once.

    Source: CCNet, arXiv 1811.11721, section 3.2, eq. 1-2, without the residual; cc_attention/functions.py of
    the original CCNet repository.

    Args:
        query: [N, c, H, W], float32, float64, float16 or bfloat16.
        key: [N, c, H, W], same dtype and device.
        value: [N, C, H, W], same dtype and device.

    Returns:
        Weighted sums [N, C, H, W] in the dtype of value, channels_last.

    Raises:
        RuntimeError: shapes, devices or dtypes do not match (dtypes may differ in an autocast region).
    """
    if has_torch_function((query, key, value)):
        return handle_torch_function(criss_cross_attention, (query, key, value), query, key, value)
    if not _compiled_for(value):
        return reference.criss_cross_attention(query, key, value)
    # Convert here and not inside the operator, so that the backward pass reuses the copies.
    query, key, value = (to_channels_last(t) for t in (query, key, value))
    tf32 = value.is_cuda and _tf32_allowed()
    return torch.ops.cc_attention.criss_cross_attention(query, key, value, tf32)[0]

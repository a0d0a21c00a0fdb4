"""The public operators: the compiled ones where they were built, the reference elsewhere."""

import functools
import importlib
import importlib.util
import warnings

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from cc_attention import reference

_BUILD = (
    "`python setup.py build_ext --inplace` builds it in a checkout; "
    "elsewhere, install the package again where there is a C++ compiler"
)


def _load_library() -> bool:
    """Register the compiled operators with PyTorch; return False where the reference has to serve.

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
    try:
        importlib.import_module("cc_attention._registration")
    except (ImportError, AttributeError) as error:
        # It builds on what PyTorch's own registration of operators is made of, which is not public.
        warnings.warn(
            f"PyTorch {torch.__version__} has changed what the compiled criss-cross attention builds on "
            f"({error}), the plain PyTorch reference serves; install a version of PyTorch named in "
            "docs/operator.md, or a newer cc_attention",
            stacklevel=2,
        )
        return False
    return True


DEVICE_TYPES: frozenset[str] = frozenset()  # those with compiled kernels
if _load_library():
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
    """Return whether the compiled operators run on the tensor's device."""
    if tensor.device.type in DEVICE_TYPES:
        return True
    if tensor.device.type == "cuda" and DEVICE_TYPES and not torch.compiler.is_compiling():
        _warn_no_cuda()
    return False


@torch.compiler.assume_constant_result  # torch.compile can't read the setting; it guards it
def _tf32_allowed() -> bool:
    """Return whether float32 products on a GPU may be those of tf32.

    Both settings show in this one. Reading the older one, allow_tf32, is an error where this one was set.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def to_channels_last(x: Tensor) -> Tensor:
    """Return x [N, C, H, W] in the kernels' layout.

    Returned as it is: a tensor of another number of dimensions, which the operator refuses, and one within a
    transform of torch.func, which can't convert it; there the operator does.
    """
    if x.dim() != 4 or torch._C._are_functorch_transforms_active():
        return x
    return x.contiguous(memory_format=torch.channels_last)


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
    if has_torch_function((query, key)):  # torch.fx traces so; see also the others
        return handle_torch_function(ca_weight, (query, key), query, key)
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
    if has_torch_function((weight, value)):
        return handle_torch_function(ca_map, (weight, value), weight, value)
    if _compiled_for(value):
        return torch.ops.cc_attention.ca_map(weight, value)
    return reference.ca_map(weight, value)


def criss_cross_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """ca_map(softmax(ca_weight(query, key)), value) in one: a pixel attends to its row and column, to itself
    once. No tensor of the size of the weights is ever in memory.

    Half-precision inputs have float32 scores, softmax and sums. float32 products are exact, or those of tf32
    where torch.backends.cuda.matmul.fp32_precision is "tf32" (or allow_tf32, its older name, is set). In an
    autocast region all is cast to its dtype, as in PyTorch's scaled_dot_product_attention. Same inputs, same
    bits, forward and backward. A score of -inf masks a position; a pixel that has no other gets NaN.

    Differentiable once; see docs/operator.md for the transforms of torch.func.

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
    if has_torch_function((query, key, value)):
        return handle_torch_function(criss_cross_attention, (query, key, value), query, key, value)
    if not _compiled_for(value):
        return reference.criss_cross_attention(query, key, value)
    # Here and not in the operator, so that the backward finds the copies.
    query, key, value = (to_channels_last(t) for t in (query, key, value))
    tf32 = value.is_cuda and _tf32_allowed()
    return torch.ops.cc_attention.criss_cross_attention(query, key, value, tf32)[0]

"""Registration of the compiled operators with PyTorch, except for the kernels, which csrc/ops.cpp registers.

The module registers fake implementations (shapes), derivatives, vmap, autocast and FLOP formulas. Importing
the module is enough. The compiled library must be loaded before.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.utils.flop_counter import register_flop_formula

from cc_attention import reference
from cc_attention.reference import check_channels, check_operands

OPERATORS = torch.ops.cc_attention
POSITIONS = "H + W - 1, the positions of a criss-cross"
_LIBRARY = torch.library.Library("cc_attention", "FRAGMENT")


# Fake implementations: shapes, dtypes and memory formats without data. They check the operands too, because
# the checks of csrc/common.h do not run while tracing.


def _empty_map(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


@torch.library.register_fake("cc_attention::criss_cross_attention")
def _attention_shapes(query: Tensor, key: Tensor, value: Tensor, tf32: bool = False) -> tuple[Tensor, Tensor]:
    check_operands("criss_cross_attention", value=value, query=query, key=key)
    check_channels("criss_cross_attention", query.shape[1], "those of query", key=key)
    n, _, h, w = value.shape
    summed = torch.float64 if value.dtype == torch.float64 else torch.float32
    return _empty_map(value), value.new_empty((n, h, w, 2), dtype=summed)


@torch.library.register_fake("cc_attention::criss_cross_attention_backward")
def _attention_backward_shapes(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    normalizer: Tensor,
    tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    check_operands("criss_cross_attention_backward", value=value, query=query, key=key, out=out, grad=grad)
    return _empty_map(query), _empty_map(key), _empty_map(value)


@torch.library.register_fake("cc_attention::ca_weight")
def _ca_weight_shapes(query: Tensor, key: Tensor) -> Tensor:
    check_operands("ca_weight", query=query, key=key)
    check_channels("ca_weight", query.shape[1], "those of query", key=key)
    n, _, h, w = query.shape
    return query.new_empty((n, h + w - 1, h, w))


@torch.library.register_fake("cc_attention::ca_weight_backward")
def _ca_weight_backward_shapes(grad: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    check_operands("ca_weight_backward", query=query, key=key, grad=grad)
    return _empty_map(query), _empty_map(key)


@torch.library.register_fake("cc_attention::ca_map")
def _ca_map_shapes(weight: Tensor, value: Tensor) -> Tensor:
    check_operands("ca_map", weight=weight, value=value)
    check_channels("ca_map", value.shape[2] + value.shape[3] - 1, POSITIONS, weight=weight)
    return _empty_map(value)


@torch.library.register_fake("cc_attention::ca_map_backward")
def _ca_map_backward_shapes(grad: Tensor, weight: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    check_operands("ca_map_backward", weight=weight, value=value, grad=grad)
    return weight.new_empty(weight.shape), _empty_map(value)


# Derivatives. torch.library.register_autograd does not support torch.func.grad, vjp and jacrev, and drops the
# tangents of forward-mode differentiation. The functions here differentiate at one functorch transform level,
# like PyTorch's own operators. Each active transform of torch.func is one such level. Calling the operator
# below autograd enters the next level, so levels nest.


def _below_autograd(keyset: Any, operator: Any, *args: Any) -> Any:
    """Call the operator without differentiating at this functorch transform level."""
    with torch._C._AutoDispatchBelowAutograd():
        if not torch._C._are_functorch_transforms_active():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)
        # PyTorch calls `forward` with these modes off, but the outer levels need them.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)


@contextlib.contextmanager
def _tangents(*saved: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the saved inputs without the tangents of this functorch transform level.

    Forward-mode differentiation is enabled inside the block. PyTorch calls `jvp` with this mode off, but the
    outer levels need forward-mode differentiation.
    """
    with forward_ad._set_fwd_grad_enabled(True):
        yield tuple(forward_ad.unpack_dual(t, level=0).primal for t in saved)


def _sum_of_products(product: Callable[..., Tensor], *pairs: tuple[Tensor | None, Tensor | None]) -> Tensor:
    """Sum product(a, b) over all pairs in which neither element is None.

    There must be at least one such pair.
    """
    first, *others = (product(a, b) for a, b in pairs if a is not None and b is not None)
    return sum(others, first)


class _Level(_SingleLevelFunction):
    """Base class of autograd functions that differentiate at one functorch level.

    A level is one active torch.func transform. In contrast, torch.autograd.Function handles all levels at
    once.
    """

    _compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)


class _Attention(_Level):
    @staticmethod
    def forward(
        ctx: Any, keyset: Any, query: Tensor, key: Tensor, value: Tensor, tf32: bool = False
    ) -> tuple[Tensor, Tensor]:
        operator = OPERATORS.criss_cross_attention.default
        out, normalizer = _below_autograd(keyset, operator, query, key, value, tf32)
        ctx.tf32 = tf32
        ctx.mark_non_differentiable(normalizer)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, out, normalizer)
        ctx.save_for_forward(query, key, value)
        return out, normalizer

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 5
        gradients = OPERATORS.criss_cross_attention_backward(grad, *ctx.saved_tensors, ctx.tf32)
        return None, *gradients, None

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor, None]:
        with _tangents(*ctx.saved_tensors) as inputs:
            wide = torch.promote_types(inputs[2].dtype, torch.float32)
            query, key, value = (t.to(wide) for t in inputs)
            dquery, dkey, dvalue = (None if t is None else t.to(wide) for t in tangents[:3])
            weight = OPERATORS.ca_weight(query, key).softmax(1)
            dweight = None
            if dquery is not None or dkey is not None:
                dscore = _sum_of_products(OPERATORS.ca_weight, (dquery, key), (query, dkey))
                dweight = weight * (dscore - (weight * dscore).sum(1, keepdim=True))
            tangent = _sum_of_products(OPERATORS.ca_map, (dweight, value), (weight, dvalue))
            return tangent.to(inputs[2].dtype), None


class _Weight(_Level):
    @staticmethod
    def forward(ctx: Any, keyset: Any, query: Tensor, key: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key)
        ctx.save_for_forward(query, key)
        return _below_autograd(keyset, OPERATORS.ca_weight.default, query, key)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 3
        return None, *OPERATORS.ca_weight_backward(grad, *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, _: None, dquery: Tensor | None, dkey: Tensor | None) -> Tensor:
        with _tangents(*ctx.saved_tensors) as (query, key):
            return _sum_of_products(OPERATORS.ca_weight, (dquery, key), (query, dkey))


class _Map(_Level):
    @staticmethod
    def forward(ctx: Any, keyset: Any, weight: Tensor, value: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight, value)
        ctx.save_for_forward(weight, value)
        return _below_autograd(keyset, OPERATORS.ca_map.default, weight, value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 3
        return None, *OPERATORS.ca_map_backward(grad, *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, _: None, dweight: Tensor | None, dvalue: Tensor | None) -> Tensor:
        with _tangents(*ctx.saved_tensors) as (weight, value):
            return _sum_of_products(OPERATORS.ca_map, (dweight, value), (weight, dvalue))


class _Gradient(_Level):
    """Autograd function of a backward operator; double backward raises an error with advice."""

    @staticmethod
    def forward(ctx: Any, keyset: Any, operator: Any, *args: Any) -> Any:
        ctx.name = operator._opname.removesuffix("_backward")
        return _below_autograd(keyset, operator, *args)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"{ctx.name}: double backward is not supported by the compiled operators; "
            "cc_attention.reference can be differentiated twice"
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(
            f"{ctx.name}: a forward-mode derivative of the gradient (jvp or jacfwd over grad, vjp, jacrev or "
            "backward, as in torch.func.hessian) is not supported by the compiled operators; jacfwd over "
            "jacfwd and jacrev over jacfwd are, and cc_attention.reference can be differentiated twice"
        )


def _plain_attention(query: Tensor, key: Tensor, value: Tensor, tf32: bool = False) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = reference.ca_weight(query.to(wide), key.to(wide))
    top = scores.amax(1)
    normalizer = torch.stack([top, (scores - top.unsqueeze(1)).exp().sum(1)], dim=-1)
    return reference.criss_cross_attention(query, key, value), normalizer


def _implement_autograd(
    name: str, function: Any, *first: Any, plain: Callable[..., Any] | None = None
) -> None:
    """Register the Autograd kernel of an operator.

    Args:
        name: name of the operator.
        function: autograd function; applied to `first` and the arguments if derivatives are needed.
        *first: leading arguments of `function`.
        plain: function that computes the same with PyTorch's own operators; used by torch.onnx.export.
    """
    operator = getattr(OPERATORS, name).default

    def kernel(keyset: Any, *args: Any) -> Any:
        if plain is not None and torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export():
            return plain(*args)
        if torch._C._are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                return function.apply(keyset, *first, *args)
        differentiated = torch.is_grad_enabled() and any(
            isinstance(arg, Tensor) and arg.requires_grad for arg in args
        )
        if differentiated or forward_ad._current_level >= 0:
            return function.apply(keyset, *first, *args)
        return _below_autograd(keyset, operator, *args)

    _LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)


_implement_autograd("criss_cross_attention", _Attention, plain=_plain_attention)
_implement_autograd("ca_weight", _Weight, plain=reference.ca_weight)
_implement_autograd("ca_map", _Map, plain=reference.ca_map)
for _name in ("criss_cross_attention_backward", "ca_weight_backward", "ca_map_backward"):
    _implement_autograd(_name, _Gradient, getattr(OPERATORS, _name).default)


# vmap: the mapped dimension is folded into the batch dimension.


def _implement_vmap(name: str) -> None:
    operator = getattr(OPERATORS, name).default
    names = [argument.name for argument in operator._schema.arguments]

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        dims = {n: dim for n, arg, dim in zip(names, args, in_dims, strict=False) if isinstance(arg, Tensor)}
        tensors = dict(zip(dims, args, strict=False))
        if info.batch_size:  # check one sample, so that errors show the shapes that the caller sees
            samples = {n: t if dims[n] is None else t.select(dims[n], 0) for n, t in tensors.items()}
            check_operands(name, **{n: t for n, t in samples.items() if n != "normalizer"})
        batched = [
            t.expand(info.batch_size, *t.shape) if dims[n] is None else t.movedim(dims[n], 0)
            for n, t in tensors.items()
        ]
        folded, size = (t.flatten(0, 1) for t in batched), batched[0].shape[:2]
        result = operator(*folded, *args[len(dims) :])
        if isinstance(result, Tensor):
            return result.unflatten(0, size), 0
        return tuple(t.unflatten(0, size) for t in result), (0,) * len(result)

    torch.library.register_vmap(f"cc_attention::{name}", rule)


for _name in ("criss_cross_attention", "ca_weight", "ca_map"):
    _implement_vmap(_name)
    _implement_vmap(f"{_name}_backward")


# Autocast. The fused operator runs in the dtype of the region, like PyTorch's own attention, since its scores
# are float32 in any case. torch.library.register_autocast would fix the dtype at registration.


def _autocast(query: Tensor, key: Tensor, value: Tensor, tf32: bool = False) -> tuple[Tensor, Tensor]:
    operands = reference.cast_for_autocast(query, key, value)
    with torch.autocast(value.device.type, enabled=False):
        return OPERATORS.criss_cross_attention(*operands, tf32)


for _key in ("AutocastCPU", "AutocastCUDA"):
    _LIBRARY.impl("criss_cross_attention", _autocast, _key)

# ca_weight and ca_map run in float32: CCNet does not scale its scores, so float16 scores overflow.
for _name in ("cc_attention::ca_weight", "cc_attention::ca_map"):
    for _device_type in ("cpu", "cuda"):
        torch.library.register_autocast(_name, _device_type, torch.float32)


# FLOP formulas: a multiply-add counts as two operations. The softmax is not counted, as in PyTorch's own
# formulas.


def _products(channels: Any, n: int, _: int, h: int, w: int) -> int:
    """Return the FLOPs of criss-cross scores or weighted sums of n maps [channels, h, w]."""
    return 2 * n * h * w * (h + w - 1) * channels


@register_flop_formula(OPERATORS.criss_cross_attention)
def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Return the FLOPs of the scores and the weighted sums."""
    return _products(query[1] + value[1], *value)


@register_flop_formula(OPERATORS.criss_cross_attention_backward)
def _attention_backward_flops(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Return the FLOPs of the backward pass.

    The scores are computed again. For each product of the forward pass, there are two more products.
    """
    return _products(3 * query[1] + 2 * value[1], *value)


@register_flop_formula(OPERATORS.ca_weight)
def _ca_weight_flops(query: Any, key: Any, **_: Any) -> int:
    return _products(query[1], *query)


@register_flop_formula(OPERATORS.ca_map)
def _ca_map_flops(weight: Any, value: Any, **_: Any) -> int:
    return _products(value[1], *value)


@register_flop_formula([OPERATORS.ca_weight_backward, OPERATORS.ca_map_backward])
def _half_backward_flops(grad: Any, first: Any, second: Any, **_: Any) -> int:
    return _products(2 * second[1], *second)

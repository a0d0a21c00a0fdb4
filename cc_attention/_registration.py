"""Registration of the compiled operators with PyTorch, except for the kernels, which csrc/ops.cpp registers.

The module registers fake implementations (shapes), derivatives, vmap, autocast and FLOP formulas. Importing
the module is enough. The compiled library must be loaded before.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.utils.flop_counter import register_flop_formula

from cc_attention import reference
from cc_attention.reference import check_attention, check_channels, check_operands

OPERATORS = torch.ops.cc_attention
POSITIONS = "H + W - 1, the positions of a criss-cross"
_LIBRARY = torch.library.Library("cc_attention", "FRAGMENT")


# Fake implementations: shapes, dtypes and memory formats without data. They check the operands too, because
# the checks of csrc/common.h do not run while tracing.


def _empty_map(like: Tensor, channels: int | None = None) -> Tensor:
    shape = list(like.shape)
    shape[1] = shape[1] if channels is None else channels
    layout = torch.channels_last if like.dim() == 4 else torch.channels_last_3d
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def _summing_dtype(like: Tensor) -> torch.dtype:
    return torch.promote_types(like.dtype, torch.float32)


@torch.library.register_fake("cc_attention::criss_cross_attention")
def _attention_shapes(  # noqa: PLR0913
    query: Tensor,
    key: Tensor,
    value: Tensor,
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    heads: int = 1,
    scale: float = 1.0,
    axes: int = 6,
    tf32: bool = False,
    keep: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    check_attention("criss_cross_attention", query, key, value, residual, gamma, heads)
    normalizer = value.new_empty((value.shape[0], *value.shape[2:], heads, 2), dtype=_summing_dtype(value))
    if residual is None:
        return _empty_map(value), normalizer, value.new_empty(0)
    return _empty_map(value) if keep else value.new_empty(0), normalizer, _empty_map(value)


@torch.library.register_fake("cc_attention::criss_cross_attention_backward")
def _attention_backward_shapes(  # noqa: PLR0913
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    normalizer: Tensor,
    gamma: Tensor | None = None,
    heads: int = 1,
    scale: float = 1.0,
    axes: int = 6,
    joint: bool = False,
    tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    operands = {"value": value, "query": query, "key": key, "out": out, "grad": grad}
    check_operands("criss_cross_attention_backward", video=True, **operands)
    of_gamma = value.new_empty(0) if gamma is None else gamma.new_empty(1)
    if joint:
        whole = _empty_map(value, 2 * query.shape[1] + value.shape[1])
        return whole, value.new_empty(0), value.new_empty(0), of_gamma
    return _empty_map(query), _empty_map(key), _empty_map(value), of_gamma


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


def _with_defaults(args: tuple[Any, ...], name: str = "criss_cross_attention") -> tuple[Any, ...]:
    """Return the arguments of an operator, with the default values that PyTorch leaves out at the end."""
    schema = getattr(OPERATORS, name).default._schema.arguments
    return *args, *(argument.default_value for argument in schema[len(args) :])


def _axes_of(mask: int, dim: int) -> tuple[int, ...]:
    """Return the spatial axes, counted from 0, of the operators' argument `axes`."""
    return tuple(axis for axis in range(dim - 2) if mask & 1 << (axis + 5 - dim))


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
def _tangents(*saved: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Yield the saved inputs without the tangents of this functorch transform level.

    Forward-mode differentiation is enabled inside the block. PyTorch calls `jvp` with this mode off, but the
    outer levels need forward-mode differentiation.
    """
    with forward_ad._set_fwd_grad_enabled(True):
        yield tuple(None if t is None else forward_ad.unpack_dual(t, level=0).primal for t in saved)


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
    """The fused operator. Its arguments after `keyset` are those of the operator."""

    @staticmethod
    def forward(ctx: Any, keyset: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        *all_but_keep, _ = _with_defaults(args)  # the backward pass needs out
        query, key, value, residual, gamma, *options = all_but_keep
        operator = OPERATORS.criss_cross_attention.default
        out, normalizer, total = _below_autograd(keyset, operator, *all_but_keep)
        ctx.options, ctx.arguments = options, len(args)
        # With a residual, the sum is the only differentiable result.
        ctx.mark_non_differentiable(normalizer, total if residual is None else out)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, out, normalizer, gamma)
        ctx.save_for_forward(query, key, value, gamma)
        return out, normalizer, total

    @staticmethod
    def backward(
        ctx: Any, grad_out: Tensor | None, _: Tensor | None, grad_sum: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        *saved, gamma = ctx.saved_tensors
        grad = grad_out if gamma is None else grad_sum
        gradients: list[Tensor | None] = [None] * 5
        if grad is not None:
            heads, scale, axes, tf32 = ctx.options
            *of_maps, of_gamma = OPERATORS.criss_cross_attention_backward(
                grad, *saved, gamma, heads, scale, axes, False, tf32
            )
            gradients[:3] = of_maps
            if gamma is not None:
                gradients[3:] = [grad, of_gamma.reshape(gamma.shape)]
        return None, *(gradients + [None] * 5)[: ctx.arguments]

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor | None, None, Tensor | None]:
        heads, scale, mask, _tf32 = ctx.options
        tangents = (*tangents, None, None)  # residual and gamma may have been left out
        with _tangents(*ctx.saved_tensors) as (*inputs, gamma):
            dtype, axes = inputs[2].dtype, _axes_of(mask, inputs[2].dim())
            wide = torch.promote_types(dtype, torch.float32)
            query, key, value = (reference.fold_heads(t.to(wide), heads) for t in inputs)
            dquery, dkey, dvalue = (
                None if t is None else reference.fold_heads(t.to(wide), heads) for t in tangents[:3]
            )
            scores: Any = partial(reference.scores, axes=axes)
            weighted_sum: Any = partial(reference.weighted_sum, axes=axes)
            if (query.dim(), axes) == (4, reference.PICTURE):
                scores, weighted_sum = OPERATORS.ca_weight, OPERATORS.ca_map
            weight = (scale * scores(query, key)).softmax(1)
            parts = [(weight, dvalue)]
            if dquery is not None or dkey is not None:
                dscore = scale * _sum_of_products(scores, (dquery, key), (query, dkey))
                parts.append((weight * (dscore - (weight * dscore).sum(1, keepdim=True)), value))
            attended = any(part is not None for _, part in parts)
            out = None
            if attended:
                out = reference.unfold_heads(_sum_of_products(weighted_sum, *parts), heads)
            if gamma is None:
                return None if out is None else out.to(dtype), None, None
            dresidual, dgamma = tangents[3:5]
            terms = [] if dresidual is None else [dresidual.to(wide)]
            if out is not None:
                terms.append(gamma * out)
            if dgamma is not None:
                terms.append(dgamma * reference.unfold_heads(weighted_sum(weight, value), heads))
            return None, None, sum(terms[1:], terms[0]).to(dtype)


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


def _plain_attention(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value, residual, gamma, heads, scale, mask, *_ = _with_defaults(args)
    axes = _axes_of(mask, value.dim())
    options = {"heads": heads, "scale": scale, "axes": axes}
    out = reference.criss_cross_attention(query, key, value, **options)
    wide = _summing_dtype(value)
    folded_query, folded_key = (reference.fold_heads(t.to(wide), heads) for t in (query, key))
    scores = scale * reference.scores(folded_query, folded_key, axes)
    scores = scores.unflatten(0, (-1, heads)).movedim(1, -1)  # [N, L, *spatial, heads]
    top = scores.amax(1)
    normalizer = torch.stack([top, (scores - top.unsqueeze(1)).exp().sum(1)], dim=-1)
    if residual is None:
        return out, normalizer, out.new_empty(0)
    total = reference.criss_cross_attention(query, key, value, residual=residual, gamma=gamma, **options)
    return out, normalizer, total


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


def _batched(size: int, tensor: Tensor, dim: int | None) -> Tensor:
    """Return the tensor with the mapped dimension first."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _check_sample(
    name: str, size: int, dims: Mapping[str, int | None], tensors: Mapping[str, Tensor], video: bool
) -> None:
    """Check one sample, so that errors show the shapes that the caller sees."""
    if size:
        samples = {n: _batched(size, t, dims[n])[0] for n, t in tensors.items()}
        check_operands(name, video=video, **samples)


def _implement_vmap(name: str, maps: int) -> None:
    """Register the vmap rule of an operator whose first `maps` arguments are maps."""
    operator = getattr(OPERATORS, name).default
    names = [argument.name for argument in operator._schema.arguments][:maps]

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        dims, tensors = (dict(zip(names, each, strict=False)) for each in (in_dims, args))
        _check_sample(name, info.batch_size, dims, tensors, False)
        batched = [_batched(info.batch_size, t, dims[n]) for n, t in tensors.items()]
        size = batched[0].shape[:2]
        result = operator(*(t.flatten(0, 1) for t in batched))
        if isinstance(result, Tensor):
            return result.unflatten(0, size), 0
        return tuple(t.unflatten(0, size) for t in result), (0,) * len(result)

    torch.library.register_vmap(f"cc_attention::{name}", rule)


for _name, _maps in (("ca_weight", 2), ("ca_map", 2), ("ca_weight_backward", 3), ("ca_map_backward", 3)):
    _implement_vmap(_name, _maps)


def _factors(size: int, gamma: Tensor, dim: int | None, like: Tensor) -> Tensor:
    """Return gamma of each sample, in a shape that multiplies [size, N, C, *spatial]."""
    return _batched(size, gamma, dim).reshape(size, *[1] * (like.dim() - 1))


def _attention_vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    query, key, value, residual, gamma, *options, _keep = _with_defaults(args)
    dims, size = [*in_dims, None, None], info.batch_size
    names = ("value", "query", "key")
    order = dict(zip(names, (dims[2], dims[0], dims[1]), strict=True))
    _check_sample(
        "criss_cross_attention", size, order, dict(zip(names, (value, query, key), strict=True)), True
    )
    batched = [_batched(size, t, dim) for t, dim in zip((query, key, value), dims, strict=False)]
    out, normalizer, total = OPERATORS.criss_cross_attention(
        *(t.flatten(0, 1) for t in batched), None, None, *options
    )
    out, normalizer = (t.unflatten(0, batched[0].shape[:2]) for t in (out, normalizer))
    if residual is None:
        return (out, normalizer, total), (0, 0, None)
    if size:
        pair = {"value": _batched(size, value, dims[2])[0], "residual": _batched(size, residual, dims[3])[0]}
        if reference.autocast_enabled(value):
            pair = {name: reference.cast_for_autocast(t)[0] for name, t in pair.items()}
        check_operands("criss_cross_attention", video=True, **pair)
        channels = pair["value"].shape[1]
        check_channels("criss_cross_attention", channels, "those of value", residual=pair["residual"])
    wide = _summing_dtype(out)
    product = _factors(size, gamma, dims[4], out) * out.to(wide)
    total = (_batched(size, residual, dims[3]).to(wide) + product).to(out.dtype)
    return (out, normalizer, total), (0, 0, 0)


def _attention_backward_vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    name, size = "criss_cross_attention_backward", info.batch_size
    *tensors, gamma, heads, scale, axes, joint, tf32 = _with_defaults(args, name)
    grad, query, key, value, out, normalizer = (
        _batched(size, t, dim) for t, dim in zip(tensors, in_dims, strict=False)
    )
    of_gamma = value.new_empty(size, 0)
    if gamma is not None:  # each sample has its own gradient of gamma
        wide = _summing_dtype(out)
        of_gamma = (grad.to(wide) * out.to(wide)).flatten(1).sum(1, keepdim=True)
        grad = (_factors(size, gamma, in_dims[6], grad) * grad.to(wide)).to(out.dtype)
    maps = (t.flatten(0, 1) for t in (grad, query, key, value, out, normalizer))
    *gradients, _ = OPERATORS.criss_cross_attention_backward(*maps, None, heads, scale, axes, joint, tf32)
    unfolded = (
        value.new_empty(size, 0) if joint and number else t.unflatten(0, value.shape[:2])
        for number, t in enumerate(gradients)
    )
    return (*unfolded, of_gamma), (0,) * 4


torch.library.register_vmap("cc_attention::criss_cross_attention", _attention_vmap)
torch.library.register_vmap("cc_attention::criss_cross_attention_backward", _attention_backward_vmap)


# Autocast. The fused operator runs in the dtype of the region, like PyTorch's own attention, since its scores
# are float32 in any case. torch.library.register_autocast would fix the dtype at registration.


def _autocast(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    maps = (arg if arg is None else reference.cast_for_autocast(arg)[0] for arg in args[:4])
    with torch.autocast(args[2].device.type, enabled=False):
        return OPERATORS.criss_cross_attention(*maps, *args[4:])


for _key in ("AutocastCPU", "AutocastCUDA"):
    _LIBRARY.impl("criss_cross_attention", _autocast, _key)

# ca_weight and ca_map run in float32: CCNet does not scale its scores, so float16 scores overflow.
for _name in ("cc_attention::ca_weight", "cc_attention::ca_map"):
    for _device_type in ("cpu", "cuda"):
        torch.library.register_autocast(_name, _device_type, torch.float32)


# FLOP formulas: a multiply-add counts as two operations. The softmax and the residual are not counted, as in
# PyTorch's own formulas.


def _products(channels: Any, shape: Any, axes: int = 6) -> int:
    """Return the FLOPs of criss-cross scores or weighted sums, for maps of this shape but with `channels`."""
    n, _, *spatial = shape
    used = _axes_of(axes, len(shape))
    positions = sum(spatial[axis] for axis in used) - len(used) + 1
    return 2 * n * math.prod(spatial) * positions * channels


def _axes_argument(operator: Any, args: tuple[Any, ...], given: Mapping[str, Any]) -> int:
    names = [argument.name for argument in operator.default._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **given}.get("axes", 6)


@register_flop_formula(OPERATORS.criss_cross_attention)
def _attention_flops(query: Any, key: Any, value: Any, *more: Any, out_val: Any = None, **given: Any) -> int:
    """Return the FLOPs of the scores and the weighted sums."""
    axes = _axes_argument(OPERATORS.criss_cross_attention, (query, key, value, *more), given)
    return _products(query[1] + value[1], value, axes)


@register_flop_formula(OPERATORS.criss_cross_attention_backward)
def _attention_backward_flops(
    grad: Any, query: Any, key: Any, value: Any, *more: Any, out_val: Any = None, **given: Any
) -> int:
    """Return the FLOPs of the backward pass.

    The scores are computed again. For each product of the forward pass, there are two more products.
    """
    arguments = (grad, query, key, value, *more)
    axes = _axes_argument(OPERATORS.criss_cross_attention_backward, arguments, given)
    return _products(3 * query[1] + 2 * value[1], value, axes)


@register_flop_formula(OPERATORS.ca_weight)
def _ca_weight_flops(query: Any, key: Any, **_: Any) -> int:
    return _products(query[1], query)


@register_flop_formula(OPERATORS.ca_map)
def _ca_map_flops(weight: Any, value: Any, **_: Any) -> int:
    return _products(value[1], value)


@register_flop_formula([OPERATORS.ca_weight_backward, OPERATORS.ca_map_backward])
def _half_backward_flops(grad: Any, first: Any, second: Any, **_: Any) -> int:
    return _products(2 * second[1], second)

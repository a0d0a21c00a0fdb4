"""Activated batch norm: batch norm, a residual and an activation in one operator.

The forward pass reads the input twice, and the backward pass reads the input and the gradient twice. Nothing
but the input is kept for the backward pass, except where a residual is added.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused._library import REGISTERS, refuse_double_backward

ACTIVATIONS = ("identity", "relu", "leaky_relu")  # enum Activation of csrc/norm.h
OPERATORS = torch.ops.fused


class NormOptions(NamedTuple):
    """Options of an activated batch norm.

    Args:
        training: whether to use the statistics of the batch, and update the running ones; otherwise the
            running statistics are used as constants.
        momentum: value used for the computation of the running statistics, as in torch.nn.BatchNorm2d.
        eps: added to |weight| and to the variance.
        activation: "identity", "relu" or "leaky_relu".
        slope: factor of "leaky_relu" for negative numbers, at least 0.
        all_reduce: function that sums a tensor over processes in place; None if each process has its own
            statistics. It is called once in the forward pass and once in the backward pass. The processes may
            have different numbers of pixels.
    """

    training: bool
    momentum: float = 0.1
    eps: float = 1e-5
    activation: str = "leaky_relu"
    slope: float = 0.01
    all_reduce: Callable[[Tensor], None] | None = None

    @property
    def arguments(self) -> tuple[float, int, float]:
        """Eps, activation and slope as the operators take them."""
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        return self.eps, ACTIVATIONS.index(self.activation), self.slope


def computing_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which maps of `dtype` are computed: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def batch_statistics(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, options: NormOptions
) -> tuple[Tensor, Tensor | None]:
    """Return the statistics that normalize x, without gradients; update the running ones in training.

    Args:
        x: [N, C, ...].
        running_mean: [C], or None in training if there is none.
        running_var: [C], or None in training if there is none.
        options: options of the norm.

    Returns:
        The mean and 1 / sqrt(variance + eps), [2, C]; and the number of pixels of all processes, float64 [1].
        The number is None if the statistics are constants.

    Raises:
        ValueError: there is only one value per channel in training, or there are no running statistics
            otherwise.
    """
    dtype = computing_dtype(x.dtype)
    with torch.no_grad():
        if not options.training:
            if running_mean is None or running_var is None:
                raise ValueError("batch norm needs running statistics unless it is in training mode")
            inverse = (running_var.to(dtype) + options.eps).rsqrt()
            return torch.stack([running_mean.to(dtype), inverse]), None
        sums = OPERATORS.batch_norm_sums(x)
        if options.all_reduce is not None:
            options.all_reduce(sums)
        elif x.numel() == 0:  # nothing to learn from
            running_mean = running_var = None
        elif x.numel() == x.shape[1]:
            raise ValueError(
                f"batch norm needs more than one value per channel in training, got shape {list(x.shape)}"
            )
        statistics = OPERATORS.batch_norm_statistics(
            sums, running_mean, running_var, options.eps, options.momentum, x.dtype
        )
        return statistics, sums[-1:].clone()


def normalize(
    x: Tensor,
    statistics: Tensor,
    weight: Tensor,
    bias: Tensor,
    options: NormOptions,
    residual: Tensor | None = None,
) -> Tensor:
    """Compute the output of `activated_batch_norm` from the statistics of its input, without gradients.

    It gives the same bits as the first time, so an output that was freed can be computed again.

    Args:
        x: [N, C, ...].
        statistics: [2, C] of `batch_statistics`.
        weight: [C].
        bias: [C].
        options: options of the norm.
        residual: map of the shape and dtype of x.

    Returns:
        The output, in the shape, dtype and memory format of x.
    """
    with torch.no_grad():
        return OPERATORS.batch_norm_apply(x, statistics, weight, bias, residual, *options.arguments)


class _ActivatedBatchNorm(torch.autograd.Function):
    """`normalize` with gradients, also through the statistics unless they are constants (count is None)."""

    @staticmethod
    def forward(  # noqa: PLR0913
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        statistics: Tensor,
        count: Tensor | None,
        options: NormOptions,
        keep: bool,
    ) -> Tensor:
        y = normalize(x, statistics, weight, bias, options, residual)
        # Without a residual, the sign of y is computed again from x.
        needs_y = residual is not None and options.activation != "identity"
        kept = (y, None) if keep else (None, residual)
        ctx.save_for_backward(x, weight, bias, statistics, count, *(kept if needs_y else (None, None)))
        ctx.options, ctx.residual = options, residual is not None
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("activated_batch_norm")
        x, weight, bias, statistics, count, y, residual = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_residual, *_ = ctx.needs_input_grad
        options: NormOptions = ctx.options
        if residual is not None:
            y = normalize(x, statistics, weight, bias, options, residual)
        operands = (x, y, statistics, weight, bias)
        sums: Any = None
        grad_x = grad_weight = grad_bias = None
        # The gradient of the residual is then a map of its own.
        masked = ctx.residual and options.activation != "identity"
        if masked or needs_weight or needs_bias or (needs_x and count is not None):
            sums, grad_weight, grad_z = OPERATORS.batch_norm_backward_sums(
                grad, *operands, *options.arguments, masked
            )
            grad_weight, grad_bias = grad_weight.to(weight.dtype), sums[0].to(bias.dtype, copy=True)
            if masked:
                grad = grad_z
        if needs_x:
            if count is None:
                sums = None
            elif options.all_reduce is not None:
                options.all_reduce(sums)
            grad_x = OPERATORS.batch_norm_backward_input(
                grad, *operands, sums, count, *options.arguments, masked
            )
        return (
            grad_x,
            grad_weight if needs_weight else None,
            grad_bias if needs_bias else None,
            grad if needs_residual else None,
            *[None] * 4,
        )


def activated_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    options: NormOptions,
    residual: Tensor | None = None,
) -> Tensor:
    """Normalize x over its batch and pixels, add a residual and apply an activation.

    It computes ``activation((|weight| + eps) * (x - mean) / sqrt(var + eps) + bias + residual)``, like
    networks.abn.ABN. Half-precision maps are computed in float32, and the result is rounded once. An autocast
    region changes nothing. The same inputs give the same bits, for any number of threads. The gradient can't
    be differentiated again.

    Args:
        x: [N, C, ...], float32, float64, float16 or bfloat16.
        weight: [C], any floating-point dtype. The gradient treats 0 as positive.
        bias: [C], any floating-point dtype.
        running_mean: [C], updated in training; None in training if there is none.
        running_var: [C], updated in training with the unbiased variance; None in training if there is none.
        options: options of the norm.
        residual: map of the shape and dtype of x, added before the activation.

    Returns:
        The output, in the shape, dtype and memory format of x (channels_last on a GPU).

    Raises:
        RuntimeError: shapes, dtypes or devices do not match.
        ValueError: the activation is unknown; there is only one value per channel in training; or there are
            no running statistics otherwise.
    """
    return activated_batch_norm_with_statistics(
        x, weight, bias, running_mean, running_var, options, residual
    )[0]


def activated_batch_norm_with_statistics(  # noqa: PLR0913
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    options: NormOptions,
    residual: Tensor | None = None,
    keep: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return the output of `activated_batch_norm`, and the statistics [2, C] for `normalize`.

    The gradient of a sum with a residual needs the output. With `keep` = False, the residual is kept instead,
    and the output is computed again.
    """
    statistics, count = batch_statistics(x, running_mean, running_var, options)
    y = _ActivatedBatchNorm.apply(x, weight, bias, residual, statistics, count, options, keep)
    return y, statistics


# Fake implementations: shapes, dtypes and strides without data.


def _channels_last(x: Tensor) -> Tensor:
    """Return a view of x [N, C, ...] with the channels as the last dimension."""
    return x.movedim(1, -1)


def _empty_map(x: Tensor) -> Tensor:
    """Return an empty map in the layout that csrc/norm_ops.cpp chooses for x."""
    on_gpu = x.device.type == "cuda"
    if _channels_last(x).is_contiguous() or (x.is_contiguous() and not on_gpu):
        return torch.empty_like(x)
    if x.dim() > 2 and (on_gpu or x.stride(1) == 1):
        return x.new_empty(_channels_last(x).shape).movedim(-1, 1)
    return x.new_empty(x.shape)


def _sums_shape(x: Tensor) -> Tensor:
    return x.new_empty(2 * x.shape[1] + 1, dtype=torch.float64)


def _statistics_shape(
    sums: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    momentum: float,
    dtype: torch.dtype,
) -> Tensor:
    return sums.new_empty((2, sums.shape[0] // 2), dtype=computing_dtype(dtype))


def _apply_shape(x: Tensor, *_: Any) -> Tensor:
    return _empty_map(x)


def _backward_sums_shapes(grad: Tensor, x: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    channels, dtype, masked = x.shape[1], computing_dtype(x.dtype), options[-1]
    return (
        x.new_empty((2, channels), dtype=dtype),
        x.new_empty(channels, dtype=dtype),
        _empty_map(x) if masked else x.new_empty(0),
    )


def _backward_input_shape(grad: Tensor, x: Tensor, *_: Any) -> Tensor:
    return _empty_map(x)


if REGISTERS:
    torch.library.register_fake("fused::batch_norm_sums", _sums_shape)
    torch.library.register_fake("fused::batch_norm_statistics", _statistics_shape)
    torch.library.register_fake("fused::batch_norm_apply", _apply_shape)
    torch.library.register_fake("fused::batch_norm_backward_sums", _backward_sums_shapes)
    torch.library.register_fake("fused::batch_norm_backward_input", _backward_input_shape)

"""The activated batch norm in plain PyTorch, which works on every device and is differentiable to any order.

This module is the specification of the operator, and the reference that the tests compare with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused.norm import NormOptions, computing_dtype


class _AllReduce(torch.autograd.Function):
    """A sum over processes. It enters the losses of all processes, so its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, all_reduce: Callable[[Tensor], None]) -> Tensor:
        ctx.all_reduce = all_reduce
        total = tensor.clone()
        all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _AllReduce.apply(grad, ctx.all_reduce), None


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

    See `fused.activated_batch_norm` for the arguments. Half-precision maps are computed in float32. The sums
    from which the statistics follow are in float64, which keeps the variance accurate if the mean is far from
    zero.
    """
    axes = [axis for axis in range(x.dim()) if axis != 1]
    shape = [1, -1] + [1] * (x.dim() - 2)
    wide = computing_dtype(x.dtype)
    if options.training:
        exact = x.double()
        count = exact.new_tensor([x.numel() / x.shape[1]])
        sums = torch.cat([exact.sum(axes), exact.square().sum(axes), count])
        if options.all_reduce is not None:
            sums = _AllReduce.apply(sums, options.all_reduce)
        count = sums[-1]
        mean, square = (sums[:-1] / count).chunk(2)
        variance = (square - mean.square()).clamp(min=0)
        with torch.no_grad():
            if running_mean is not None:
                running_mean.lerp_(mean.to(running_mean.dtype), options.momentum)
            if running_var is not None:
                unbiased = variance * (count / (count - 1))
                running_var.lerp_(unbiased.to(running_var.dtype), options.momentum)
    else:
        assert running_mean is not None and running_var is not None
        mean, variance = running_mean, running_var
    inverse = (variance + options.eps).rsqrt()
    weight = weight.to(wide)
    scale = torch.where(weight >= 0, weight, -weight) + options.eps  # |weight|, with the gradient 1 at 0
    z = (x.to(wide) - mean.to(wide).view(shape)) * (scale * inverse.to(wide)).view(shape)
    z = z + bias.to(wide).view(shape)
    if residual is not None:
        z = z + residual.to(wide)
    if options.activation == "relu":
        z = F.relu(z)
    elif options.activation == "leaky_relu":
        z = F.leaky_relu(z, options.slope)
    return z.to(x.dtype)

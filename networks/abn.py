"""Activated batch norm: the one normalization layer of the network, whichever backend runs it."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.errors import UsageError

BACKENDS = ("torch", "inplace", "apex")


class StatisticsGroup(Protocol):
    """The processes that share batch statistics (engine.runtime.distributed.World)."""

    size: int
    group: Any  # the torch.distributed process group

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum `tensor` over the processes, in place."""


class ABN(nn.Module):
    """Batch norm with affine weight |weight| + eps, then an activation.

    y = activation((|weight| + eps) * (x - mean) / sqrt(var + eps) + bias)

    These are the semantics of the in-place ABN that CCNet was trained with (inplace_abn, every release; in
    the original's own tree libs/src/bn.cu): loading its weights into ordinary batch norm is wrong wherever a
    weight is negative. The gradient treats weight = 0 as positive, as inplace_abn >= 0.1.1.

    Args:
        channels: number of channels C.
        activation: "identity", "relu", or "leaky_relu" with slope 0.01.
        backend: "torch"; "inplace" for the inplace_abn package, which overwrites its input to save memory;
            "apex" for NVIDIA's kernels where statistics are shared by several processes, torch's elsewhere.

    Shape: [N, C, ...] -> the same.
    """

    slope = 0.01

    def __init__(
        self,
        channels: int,
        activation: str = "leaky_relu",
        backend: str = "torch",
        eps: float = 1e-5,
        momentum: float = 0.1,
    ):
        super().__init__()
        if activation not in ("identity", "relu", "leaky_relu"):
            raise ValueError(f"ABN: activation is 'identity', 'relu' or 'leaky_relu', not {activation!r}")
        if backend not in BACKENDS:
            raise ValueError(f"ABN: backend is one of {', '.join(BACKENDS)}, not {backend!r}")
        if backend == "inplace":
            import inplace_abn  # noqa: F401  (fails here, at construction, where the package is missing)
        if backend == "apex":
            import apex.parallel.optimized_sync_batchnorm_kernel  # noqa: F401  (likewise)
        self.activation = activation
        self.backend = backend
        self.eps = eps
        self.momentum = momentum
        self.group: StatisticsGroup | None = None  # set by synchronize()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        if self.backend == "inplace":
            return self._forward_inplace(x)
        weight = torch.where(self.weight >= 0, self.weight, -self.weight) + self.eps
        if self.training and self.group is not None:
            # apex has kernels for these two types only.
            by_apex = self.backend == "apex" and x.dtype in (torch.float32, torch.float16)
            batch_norm = _apex_batch_norm if by_apex else _synchronized_batch_norm
            y = batch_norm(
                x, weight, self.bias, self.running_mean, self.running_var, self.eps, self.momentum, self.group
            )
        else:
            y = F.batch_norm(
                x,
                self.running_mean,
                self.running_var,
                weight,
                self.bias,
                self.training,
                self.momentum,
                self.eps,
            )
        if self.activation == "relu":
            return F.relu(y)
        return F.leaky_relu(y, self.slope) if self.activation == "leaky_relu" else y

    def _forward_inplace(self, x: Tensor) -> Tensor:
        from inplace_abn import functions

        arguments = (x, self.weight, self.bias, self.running_mean, self.running_var)
        options = {
            "training": self.training,
            "momentum": self.momentum,
            "eps": self.eps,
            # It computes its input from its output, which no ReLU allows: that one follows, with its memory.
            "activation": "identity" if self.activation == "relu" else self.activation,
            "activation_param": self.slope,
        }
        if self.training and self.group is not None:
            # The group is named: the package's default is no longer recognized by today's torch and would
            # silently leave the statistics unsynchronized.
            y = functions.inplace_abn_sync(*arguments, group=self.group.group, **options)
        else:
            y = functions.inplace_abn(*arguments, **options)
        return F.relu(y) if self.activation == "relu" else y

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # Written by inplace_abn >= 1.1.0 and by torch's batch norm, read by nothing: optional on load.
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, activation={self.activation!r}, backend={self.backend!r}"


def require_inplace_abn(processes: int, device_type: str) -> None:
    """Check that the inplace-abn package can be used.

    Raises:
        UsageError: it is not installed, or lacks what this run needs.
    """
    if processes > 1 and device_type == "cpu":
        raise UsageError(
            "--abn inplace: the package has no statistics over several CPU processes; use --abn torch"
        )
    try:
        import inplace_abn  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "--abn inplace: the inplace-abn package is not installed; install it, or use --abn torch"
        ) from error


def synchronize(model: nn.Module, group: StatisticsGroup | None) -> None:
    """Let every ABN of `model` take its training statistics over all processes of `group` (None: its own)."""
    for module in model.modules():
        if isinstance(module, ABN):
            module.group = group if group is not None and group.size > 1 else None


def train_mode(model: nn.Module, keep_statistics: bool) -> None:
    """Set `model` to training; `keep_statistics`: every ABN still normalizes by its running ones."""
    model.train()
    for module in model.modules():
        if keep_statistics and isinstance(module, ABN):
            module.eval()


def _apex_batch_norm(x, weight, bias, running_mean, running_var, eps, momentum, group):
    from apex.parallel.optimized_sync_batchnorm_kernel import SyncBatchnormFunction

    # The function puts new storage into the statistics that it gets; ours has to stay, state dicts share it.
    mean, variance = running_mean.clone(), running_var.clone()
    y = SyncBatchnormFunction.apply(x, None, weight, bias, mean, variance, eps, True, momentum, group.group)
    running_mean.copy_(mean)
    running_var.copy_(variance)
    return y


def _synchronized_batch_norm(x, weight, bias, running_mean, running_var, eps, momentum, group):
    if x.is_cuda:
        # torch's own kernels, as nn.SyncBatchNorm calls them; the function lets us pass |weight| + eps.
        from torch.nn.modules._functions import SyncBatchNorm

        return SyncBatchNorm.apply(
            x, weight, bias, running_mean, running_var, eps, momentum, group.group, group.size
        )
    return _SynchronizedBatchNorm.apply(x, weight, bias, running_mean, running_var, eps, momentum, group)


class _SynchronizedBatchNorm(torch.autograd.Function):
    """Batch norm over several processes where torch has none (the CPU): one collective each way.

    The processes may hold different numbers of pixels; each counts by its own.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, eps, momentum, group):
        axes = [axis for axis in range(x.dim()) if axis != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
        variance, mean = torch.var_mean(x.to(wide), axes, correction=0)
        # float64: the sum of squares is combined from values that nearly cancel.
        mean, variance = mean.double(), variance.double()
        count = float(x.numel() // x.size(1))
        sums = torch.cat([mean * count, (variance + mean * mean) * count, mean.new_tensor([count])])
        group.all_reduce(sums)
        total = sums[-1]
        mean, square = (sums[:-1] / total).chunk(2)
        variance = (square - mean * mean).clamp_(min=0)
        if running_mean is not None:
            unbiased = variance * (total / (total - 1))
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
        inverse = (variance + eps).rsqrt()
        normalized = (x.to(wide) - mean.to(wide).view(shape)) * inverse.to(wide).view(shape)
        ctx.save_for_backward(x, weight, mean.to(wide), inverse.to(wide), total)
        ctx.group, ctx.axes, ctx.shape = group, axes, shape
        return torch.addcmul(bias.to(wide).view(shape), normalized, weight.to(wide).view(shape)).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, mean, inverse, total = ctx.saved_tensors
        wide, shape = mean.dtype, ctx.shape
        grad = grad.to(wide)
        normalized = (x.to(wide) - mean.view(shape)) * inverse.view(shape)
        grad_bias = grad.sum(ctx.axes)
        grad_weight = (grad * normalized).sum(ctx.axes)
        sums = torch.cat([grad_bias, grad_weight])
        ctx.group.all_reduce(sums)
        mean_grad, mean_product = (sums / total.to(wide)).chunk(2)
        scale = (weight.to(wide) * inverse).view(shape)
        grad_x = scale * (grad - mean_grad.view(shape) - normalized * mean_product.view(shape))
        # weight and bias get this process's share; the data-parallel wrapper averages them with all the
        # others.
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), *[None] * 5

"""Activated batch norm (ABN), the normalization layer of the networks, with three backends."""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

import fused
from networks.recomputation import current_outputs
from utils.errors import UsageError

BACKENDS = ("torch", "inplace", "apex")


class StatisticsGroup(Protocol):
    """The processes that share batch statistics (engine.runtime.distributed.Statistics is one)."""

    size: int
    group: Any  # the torch.distributed process group

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum `tensor` over the processes in place."""


class ABN(nn.Module):
    """Batch norm with scale |weight| + eps, followed by an activation.

    The layer computes ``activation((|weight| + eps) * (x - mean) / sqrt(var + eps) + bias)``. A residual is
    added before the activation.

    This is the formula of the in-place ABN that CCNet was trained with. Every release of inplace_abn computes
    it, as does libs/src/bn.cu of the original CCNet repository. Ordinary batch norm with weights that were
    trained for ABN gives wrong outputs if a weight is negative. The gradient treats weight = 0 as positive,
    like inplace_abn >= 0.1.1.

    Args:
        channels: number of channels C.
        activation: "identity", "relu", or "leaky_relu" with slope 0.01.
        backend: "torch"; "inplace" for the inplace_abn package, which overwrites its input to save memory; or
            "apex" for NVIDIA's kernels if processes share their statistics (otherwise the same as "torch").
        eps: added to |weight| and to the variance.
        momentum: value used for the computation of running_mean and running_var, as in torch.nn.BatchNorm2d.

    Shape:
        Input and output: [N, C, ...].

    Raises:
        ValueError: `activation` or `backend` is unknown.
        ImportError: the package of the backend is not installed.
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
            raise ValueError(
                f"ABN: activation must be 'identity', 'relu' or 'leaky_relu', got {activation!r}"
            )
        if backend not in BACKENDS:
            raise ValueError(f"ABN: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
        if backend == "inplace":
            import inplace_abn  # noqa: F401  (fail at construction if the package is missing)
        if backend == "apex":
            import apex.parallel.optimized_sync_batchnorm_kernel  # noqa: F401  (see above)
        self.activation = activation
        self.backend = backend
        self.eps = eps
        self.momentum = momentum
        self.group: StatisticsGroup | None = None  # set by networks.synchronize()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalize x [N, C, ...], add a residual of the same shape, if given, and apply the activation."""
        if self._is_fused(x, residual):
            return self._forward_fused(x, residual)
        if self.backend == "inplace":
            # The backward pass of the package recomputes the input from the output, which is impossible after
            # a ReLU or a residual. So these are applied separately below, at the cost of their memory.
            inside = "identity" if self.activation == "relu" or residual is not None else self.activation
            y = self._forward_inplace(x, inside)
            if inside == self.activation:
                return y if residual is None else y + residual
        else:
            y = self._forward_torch(x)
        return _activate(y if residual is None else y + residual, self.activation, self.slope)

    def _is_fused(self, x: Tensor, residual: Tensor | None = None) -> bool:
        """Return whether fused operators compute this layer.

        torch.compile fuses PyTorch's own operators. On a GPU, the operators need channels_last.
        """
        return (
            self.backend != "inplace"
            and not self._is_by_apex(x)
            and fused.applies(x)
            and not torch.compiler.is_compiling()
            and (x.device.type == "cpu" or x.is_contiguous(memory_format=torch.channels_last))
            and (residual is None or (residual.shape, residual.dtype) == (x.shape, x.dtype))
        )

    def _is_by_apex(self, x: Tensor) -> bool:
        """Return whether apex computes this layer; it has kernels for two dtypes."""
        synchronized = self.training and self.group is not None
        return self.backend == "apex" and synchronized and x.dtype in (torch.float32, torch.float16)

    def _forward_fused(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """Normalize x, add a residual and apply the activation in one operator."""
        reduced = self.group.all_reduce if self.training and self.group is not None else None
        options = fused.NormOptions(
            self.training, self.momentum, self.eps, self.activation, self.slope, reduced
        )
        outputs = current_outputs()
        recomputed = outputs is not None and outputs.accepts(residual)
        running = (self.running_mean, self.running_var)
        y, statistics = fused.activated_batch_norm_with_statistics(
            x, self.weight, self.bias, *running, options, residual, not recomputed
        )
        if outputs is not None and recomputed:
            operands = (x.detach(), statistics, self.weight.detach(), self.bias.detach())
            outputs.add(y, partial(fused.normalize, *operands, options), residual, operands)
        return y

    def _forward_torch(self, x: Tensor) -> Tensor:
        """Normalize x without an activation, by PyTorch or apex."""
        weight = torch.where(self.weight >= 0, self.weight, -self.weight) + self.eps
        if self.training and self.group is not None:
            synchronized = _apex_batch_norm if self._is_by_apex(x) else synchronized_batch_norm
            return synchronized(x, weight, self, self.group)
        statistics = (self.running_mean, self.running_var)
        return F.batch_norm(x, *statistics, weight, self.bias, self.training, self.momentum, self.eps)

    def _forward_inplace(self, x: Tensor, activation: str) -> Tensor:
        from inplace_abn import functions

        arguments = (x, self.weight, self.bias, self.running_mean, self.running_var)
        options = {
            "training": self.training,
            "momentum": self.momentum,
            "eps": self.eps,
            "activation": activation,
            "activation_param": self.slope,
        }
        if self.training and self.group is not None:
            # Pass the group explicitly: current versions of torch do not recognize the package's default
            # group, and the statistics would silently stay unsynchronized.
            return functions.inplace_abn_sync(*arguments, group=self.group.group, **options)
        return functions.inplace_abn(*arguments, **options)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # inplace_abn >= 1.1.0 and torch's batch norm write this entry, but nothing reads it.
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Return the arguments shown by `repr`."""
        return f"{self.weight.numel()}, activation={self.activation!r}, backend={self.backend!r}"


class Activation(nn.Module):
    """The activation of an `ABN` that is folded into its convolution. It overwrites its input."""

    def __init__(self, activation: str, slope: float):
        super().__init__()
        self.activation = activation
        self.slope = slope

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Add a residual to x, if given, and apply the activation."""
        if residual is not None:
            x = x.add_(residual)
        return _activate(x, self.activation, self.slope, inplace=True)

    def extra_repr(self) -> str:
        """Return the arguments shown by `repr`."""
        return f"{self.activation!r}"


def _activate(x: Tensor, activation: str, slope: float, inplace: bool = False) -> Tensor:
    if activation == "relu":
        return F.relu(x, inplace)
    return F.leaky_relu(x, slope, inplace) if activation == "leaky_relu" else x


def require_inplace_abn(processes: int, device_type: str) -> None:
    """Check that the inplace-abn package can be used.

    Raises:
        UsageError: the package is not installed, or does not support this run.
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


def _apex_batch_norm(x: Tensor, weight: Tensor, norm: ABN, group: StatisticsGroup) -> Tensor:
    from apex.parallel.optimized_sync_batchnorm_kernel import SyncBatchnormFunction

    # The function replaces the storage of the statistics it gets. The storage of the buffers must stay, since
    # state dicts share this storage.
    mean, variance = norm.running_mean.clone(), norm.running_var.clone()
    y = SyncBatchnormFunction.apply(
        x, None, weight, norm.bias, mean, variance, norm.eps, True, norm.momentum, group.group
    )
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
    return y


def synchronized_batch_norm(
    x: Tensor, weight: Tensor, norm: ABN | _BatchNorm, group: StatisticsGroup
) -> Tensor:
    """Normalize x [N, C, ...] with the statistics of all processes, and update the running statistics.

    Args:
        x: values of this process.
        weight: [C], scale after the normalization.
        norm: layer whose bias, running statistics, eps and momentum are used.
        group: the processes.
    """
    statistics = (norm.running_mean, norm.running_var, norm.eps, norm.momentum)
    if x.is_cuda:
        # Call the kernels behind nn.SyncBatchNorm directly, in order to pass |weight| + eps.
        from torch.nn.modules._functions import SyncBatchNorm

        return SyncBatchNorm.apply(x, weight, norm.bias, *statistics, group.group, group.size)
    return _SynchronizedBatchNorm.apply(x, weight, norm.bias, *statistics, group)


class _SynchronizedBatchNorm(torch.autograd.Function):
    """Synchronized batch norm for the CPU, where torch has none.

    The forward pass and the backward pass each take one collective operation.

    The processes may have different numbers of pixels. The statistics of each process are weighted by its
    pixel count.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, eps, momentum, group):  # noqa: PLR0913
        axes = [axis for axis in range(x.dim()) if axis != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
        variance, mean = torch.var_mean(x.to(wide), axes, correction=0)
        # Use float64, since square - mean * mean below subtracts nearly equal values.
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
        # The gradients of weight and bias are local; the data-parallel wrapper averages them over the
        # processes.
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), *[None] * 5

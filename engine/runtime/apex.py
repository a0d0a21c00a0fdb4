"""Optimizer and data parallelism of NVIDIA apex (https://github.com/NVIDIA/apex), an optional backend.

The synchronized batch norm of apex is a backend of networks.abn. Tag 25.05 is the newest tag that has the
optimizer, the data parallelism and the batch norm.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from utils.errors import UsageError

_BUILD = "build tag 25.05 of github.com/NVIDIA/apex with --cpp_ext and --cuda_ext"
#: Modules to import, in this order, and the problem if an import fails.
_PARTS = {
    "apex.optimizers": "the installed apex is not NVIDIA's, or does not fit this torch",
    "apex.parallel": "this apex has no apex.parallel, which NVIDIA removed after tag 25.05",
    "amp_C": "apex was built without its CUDA extensions, or for another torch",
    "syncbn": "apex was built without its CUDA extensions, or for another torch",
}


def require(device_type: str) -> None:
    """Check that apex can be used on `device_type`.

    Raises:
        UsageError: there is no GPU or no apex, or the installed apex is the unrelated project on PyPI, lacks
            apex.parallel, or lacks the compiled extensions.
    """
    if device_type != "cuda":
        raise UsageError("--backend apex: requires an NVIDIA GPU; omit the flag")
    if importlib.util.find_spec("apex") is None:
        raise UsageError(
            f"--backend apex: apex is not installed; {_BUILD} (apex on PyPI is another project), or omit "
            "the flag"
        )
    for name, problem in _PARTS.items():
        try:
            importlib.import_module(name)
        except ImportError as error:
            reason = str(error).partition("\n")[0]
            raise UsageError(f"--backend apex: {problem} ({reason}); {_BUILD}, or omit the flag") from error


def optimizer(
    parameters: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Return SGD with fused kernels, and with the formula and state of torch.optim.SGD.

    Weight decay is added to the gradient before the momentum. There is no dampening and no Nesterov momentum.
    There are three differences from torch.optim.SGD. The parameters must already be on the GPU. Parameters
    with a dtype other than float32 and float16 are skipped without a warning. zero_grad() has no argument,
    and sets the gradients to None.

    Args:
        parameters: parameters to update.
        lr: learning rate.
        momentum: momentum factor.
        weight_decay: weight decay of all parameters.
    """
    from apex.optimizers import FusedSGD

    return FusedSGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, wd_after_momentum=False)


def data_parallel(model: nn.Module) -> nn.Module:
    """Wrap `model` so that gradients are averaged over all processes, overlapped with the backward pass.

    There are two differences from torch's DistributedDataParallel. Every step must use the same parameters as
    the first backward pass, and there is no find_unused_parameters. At the start, only parameters are
    synchronized, not buffers.

    Raises:
        UsageError: the weights are channels_last. Apex would write their gradients back in the wrong order.
    """
    from apex.parallel import DistributedDataParallel

    if not all(parameter.is_contiguous() for parameter in model.parameters()):
        raise UsageError("--channels-last: not supported by --backend apex; omit one of them")
    parallel = DistributedDataParallel(model, delay_allreduce=False, gradient_average=True)

    @contextlib.contextmanager
    def no_sync() -> Iterator[None]:
        """Accumulate gradients without averaging, as no_sync of torch does."""
        parallel.disable_allreduce()
        try:
            yield
        finally:
            parallel.enable_allreduce()

    parallel.no_sync = no_sync
    return parallel

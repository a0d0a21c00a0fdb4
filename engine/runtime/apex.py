"""NVIDIA's apex (https://github.com/NVIDIA/apex), an optional backend: its optimizer and data parallelism.

Its synchronized batch norm is a backend of networks.abn. Tag 25.05 is the newest that has all three.
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
#: What has to import, in this order, and what is wrong where it does not.
_PARTS = {
    "apex.optimizers": "the installed apex is not NVIDIA's, or does not fit this torch",
    "apex.parallel": "this apex has no apex.parallel, which NVIDIA removed after tag 25.05",
    "amp_C": "apex was built without its CUDA extensions, or for another torch",
    "syncbn": "apex was built without its CUDA extensions, or for another torch",
}


def require(device_type: str) -> None:
    """See that apex can be used on `device_type`.

    Raises:
        UsageError: there is no GPU, no apex, the package index's project of that name, an apex without
            apex.parallel, or one without compiled extensions.
    """
    if device_type != "cuda":
        raise UsageError("--backend apex: its kernels are for NVIDIA GPUs; leave the flag out")
    if importlib.util.find_spec("apex") is None:
        raise UsageError(
            f"--backend apex: apex is not installed; {_BUILD} (the package index has another project of that "
            "name), or leave the flag out"
        )
    for name, problem in _PARTS.items():
        try:
            importlib.import_module(name)
        except ImportError as error:
            reason = str(error).partition("\n")[0]
            raise UsageError(
                f"--backend apex: {problem} ({reason}); {_BUILD}, or leave the flag out"
            ) from error


def optimizer(
    parameters: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """SGD in a few kernels for all weights together, with torch.optim.SGD's formula and state.

    Weight decay joins the gradient before the momentum; no dampening, no Nesterov. Unlike torch's: the
    weights have to be on the GPU already, those of other types than float32 and float16 are passed over
    without a word, and zero_grad() takes no argument (it sets None).
    """
    from apex.optimizers import FusedSGD

    return FusedSGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, wd_after_momentum=False)


def data_parallel(model: nn.Module) -> nn.Module:
    """`model` with gradients averaged over all processes of the run, each bucket while the backward goes on.

    Unlike torch's: there is no find_unused_parameters, nor need for it as long as every step uses the same
    parameters (the first backward finds which); only parameters are made equal at the start, not buffers.

    Raises:
        UsageError: the weights are channels_last; apex would write their gradients back in the wrong order.
    """
    from apex.parallel import DistributedDataParallel

    if not all(parameter.is_contiguous() for parameter in model.parameters()):
        raise UsageError("--channels-last: --backend apex needs contiguous weights; leave one of the two out")
    parallel = DistributedDataParallel(model, delay_allreduce=False, gradient_average=True)

    @contextlib.contextmanager
    def no_sync() -> Iterator[None]:
        """Gradients that are only added up, as in torch's: the next backward outside averages the sum."""
        parallel.disable_allreduce()
        try:
            yield
        finally:
            parallel.enable_allreduce()

    parallel.no_sync = no_sync
    return parallel

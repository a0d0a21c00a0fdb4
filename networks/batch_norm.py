"""All batch norm of a network: its training mode, and its statistics over several processes."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from networks.abn import ABN, StatisticsGroup, synchronized_batch_norm
from utils.errors import UsageError

#: Layers whose result after the normalization is known: PyTorch's, and timm's with dropout and activation.
PLAIN, ACTIVATED = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d"), ("BatchNormAct2d",)


class SynchronizedNorm(_BatchNorm):
    """A batch norm whose training statistics are those of all processes of `group`.

    `convert_batch_norm` makes layers instances of this class and of their own one. The counter of batches,
    which nothing reads, is left out of the state dict.
    """

    group: StatisticsGroup | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x [N, C, ...]; timm's layers then apply dropout and activation."""
        if not (self.training and self.group is not None):
            return super().forward(x)
        y = synchronized_batch_norm(x, self.weight, self, self.group)
        return y if self._kind() in PLAIN else self.get_submodule("act")(self.get_submodule("drop")(y))

    def set_group(self, group: StatisticsGroup | None) -> None:
        """Set the processes that share their statistics.

        Raises:
            UsageError: the statistics of this kind of layer can't be shared.
        """
        if group is not None and (
            self._kind() not in (*PLAIN, *ACTIVATED) or not self.affine or self.momentum is None
        ):
            raise UsageError(
                f"--backbone: its {self._kind()} layers can't share statistics; use a single process"
            )
        self.group = group

    def _kind(self) -> str:
        return type(self).__mro__[2].__name__

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        state_dict.pop(prefix + "num_batches_tracked", None)
        nn.Module._load_from_state_dict(self, state_dict, prefix, *others)


def convert_batch_norm(network: nn.Module) -> None:
    """Make every batch norm of a network a `SynchronizedNorm`, in place."""
    for module in network.modules():
        if isinstance(module, _BatchNorm) and not isinstance(module, SynchronizedNorm):
            module.__class__ = _synchronized(type(module))  # type: ignore[arg-type]
            module.num_batches_tracked = None


@functools.cache
def _synchronized(kind: type[_BatchNorm]) -> type[_BatchNorm]:
    return type(kind.__name__, (SynchronizedNorm, kind), {"__doc__": SynchronizedNorm.__doc__})


def synchronize(model: nn.Module, group: StatisticsGroup | None) -> None:
    """Make every batch norm of `model` compute its training statistics over all processes of `group`.

    Args:
        model: network to change in place.
        group: processes that share their statistics; None makes each process use only its local batch.

    Raises:
        UsageError: the network has batch norm whose statistics can't be shared.
    """
    shared = group if group is not None and group.size > 1 else None
    for module in model.modules():
        if isinstance(module, ABN):
            module.group = shared
        elif isinstance(module, SynchronizedNorm):
            module.set_group(shared)


def train_mode(model: nn.Module, keep_statistics: bool) -> None:
    """Set `model` to training mode.

    Args:
        model: network to change in place.
        keep_statistics: whether to put every batch norm in evaluation mode, which uses and keeps its running
            statistics.
    """
    model.train()
    for module in model.modules():
        if keep_statistics and isinstance(module, (ABN, _BatchNorm)):
            module.eval()

"""The optimizers that --optimizer names."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import nn

#: Choices of --optimizer, with the entries that each keeps for a weight.
ENTRIES: Mapping[str, frozenset[str]] = MappingProxyType(
    {"sgd": frozenset({"momentum_buffer"}), "adamw": frozenset({"step", "exp_avg", "exp_avg_sq"})}
)


def make_optimizer(
    name: str, model: nn.Module, lr: float, momentum: float, weight_decay: float, in_one_kernel: bool
) -> torch.optim.Optimizer:
    """Return an optimizer of all weights of `model`.

    Args:
        name: "sgd", as in the original CCNet repository, or "adamw". AdamW does not decay biases, factors and
            offsets of norms, and other weights with a single dimension, as is usual for transformers.
        model: network whose weights are updated.
        lr: learning rate.
        momentum: momentum factor of SGD.
        weight_decay: factor of the weight decay.
        in_one_kernel: whether one kernel updates all weights.
    """
    weights, fused = list(model.parameters()), in_one_kernel or None
    if name == "sgd":
        return torch.optim.SGD(weights, lr, momentum, weight_decay=weight_decay, fused=fused)
    decayed = {"params": [w for w in weights if w.dim() > 1], "weight_decay": weight_decay}
    others = {"params": [w for w in weights if w.dim() <= 1], "weight_decay": 0.0}
    return torch.optim.AdamW([decayed, others], lr, fused=fused)


def entries_of(optimizer: torch.optim.Optimizer) -> frozenset[str]:
    """Return the entries that `optimizer` keeps for each weight."""
    return ENTRIES["adamw" if isinstance(optimizer, torch.optim.AdamW) else "sgd"]

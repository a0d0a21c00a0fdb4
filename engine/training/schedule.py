"""Learning-rate schedule."""

from __future__ import annotations

import torch


def poly_lr(base: float, step: int, steps: int, power: float) -> float:
    """Return base * (1 - step / steps) ** power, with `step` counted from 0.

    Source: train.py of the original CCNet repository.
    """
    return base * (1 - step / steps) ** power


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all weights of `optimizer`."""
    for group in optimizer.param_groups:
        group["lr"] = lr

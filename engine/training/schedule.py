"""Learning-rate schedule."""

from __future__ import annotations

import torch


def poly_lr(base: float, step: int, steps: int, power: float) -> float:
    """Return base * (1 - step / steps) ** power, with `step` counted from 0.

    Source: train.py of the original CCNet repository.
    """
    return base * (1 - step / steps) ** power


def warm_up(step: int, steps: int) -> float:
    """Return the factor of the learning rate in step `step`, from 0, of a linear warm-up.

    The factor is 1 / steps in the first step, and 1 from the last step of the warm-up on.
    """
    return min((step + 1) / steps, 1.0) if steps else 1.0


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all weights of `optimizer`."""
    for group in optimizer.param_groups:
        group["lr"] = lr

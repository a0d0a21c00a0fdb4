"""Learning-rate schedule."""

from __future__ import annotations

import torch


def poly_lr(base: float, step: int, steps: int, power: float) -> float:
    """base * (1 - step / steps) ** power, `step` counting from 0 (original: train.py)."""
    return base * (1 - step / steps) ** power


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr

"""The random streams of a run: each number is a function of the seed and of its place in the run alone.

Nothing is drawn from a state that moves on. A resumed run, or one on another number of processes, therefore
sees the same samples, augmentations and dropout masks.
"""

from __future__ import annotations

import os

import numpy as np
import torch

#: Separate the streams of sample order, augmentation and dropout masks from each other.
ORDER, AUGMENTATION, DROPOUT = range(3)


def seed_of(*numbers: int) -> int:
    """Return one seed for several numbers; neighboring numbers give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def make_deterministic() -> None:
    """Let PyTorch compute the same bits in every run, also on a GPU.

    Raises later, from PyTorch, if an operator has no such implementation.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)

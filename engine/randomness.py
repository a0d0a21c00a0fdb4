"""The random streams of a run.

Sample order, augmentation and dropout masks depend only on the seed and the position in the run: the step and
the sample. There is no generator state that advances during the run. Sample order, augmentation and dropout
masks are therefore the same in a resumed run and for any number of processes.
"""

from __future__ import annotations

import os

import numpy as np
import torch

#: Numbers that separate the random streams of sample order, augmentation and dropout masks from each other.
ORDER, AUGMENTATION, DROPOUT = range(3)


def seed_of(*numbers: int) -> int:
    """Return one seed for several numbers; neighboring numbers give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def set_deterministic(wanted: bool) -> None:
    """Make PyTorch compute the same bits in every run on a GPU too, or let it choose the fastest kernels.

    If `wanted`, an operator without a deterministic implementation raises a RuntimeError when it is called.
    """
    torch.backends.cudnn.benchmark = not wanted
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)

"""The random streams of a run: every random number depends only on the seed and its position in the run.

There is no generator state that advances during the run. Samples, augmentations and dropout masks are
therefore the same in a resumed run and on any number of processes.
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
    """Make PyTorch compute bit-identical results in every run, also on a GPU.

    An operator without a deterministic implementation raises a RuntimeError when it is called.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)

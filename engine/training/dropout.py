"""Masks of channel dropout that depend on the seed, the step and the sample alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from engine.data.loader import DROPOUT


@runtime_checkable
class ChannelDropout(Protocol):
    """A dropout layer that takes its masks from outside (networks.dropout.ChannelDropout is one)."""

    channels: int
    p: float
    kept: Tensor | None  # bool [n, channels]


class DropoutMasks:
    """Draws the masks of a network's dropout layers and hands them in.

    Args:
        model: its ChannelDropout layers whose rate is not 0 get masks; any other dropout is left alone.
        seed: seed of the run.
        device: device of the network.
    """

    def __init__(self, model: nn.Module, seed: int, device: torch.device):
        self.layers = [
            module for module in model.modules() if isinstance(module, ChannelDropout) and module.p > 0
        ]
        self.seed = seed
        self.device = device
        # One tensor for all steps: a captured CUDA graph reads its masks at a fixed address.
        self._kept = torch.empty(0, dtype=torch.bool, device=device)

    def draw(self, step: int, samples: range) -> None:
        """Make the masks of `step` for `samples`, given by their numbers in the global batch."""
        if not self.layers:
            return
        kept = torch.from_numpy(np.stack([self._sample(step, sample) for sample in samples]))
        if self._kept.shape != kept.shape:
            self._kept = torch.empty_like(kept, device=self.device)
        if self.device.type == "cuda":
            kept = kept.pin_memory()
        self._kept.copy_(kept, non_blocking=True)

    def _sample(self, step: int, sample: int) -> np.ndarray:
        """Return what one sample keeps, bool [channels of all layers, one after the other]."""
        rng = np.random.default_rng((self.seed, DROPOUT, step, sample))
        return np.concatenate([rng.random(layer.channels) >= layer.p for layer in self.layers])

    @contextlib.contextmanager
    def handed_in(self, part: int, parts: int) -> Iterator[None]:
        """Let the layers drop what `draw` chose for one of `parts` equal parts of its samples."""
        if self.layers:
            kept = self._kept.chunk(parts)[part].split([layer.channels for layer in self.layers], 1)
            for layer, own in zip(self.layers, kept, strict=True):
                layer.kept = own
        try:
            yield
        finally:
            for layer in self.layers:
                layer.kept = None

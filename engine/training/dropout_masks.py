"""Masks of channel dropout, each a function of seed, step and sample."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from engine.randomness import DROPOUT


@runtime_checkable
class ChannelDropout(Protocol):
    """A dropout layer whose masks are set by the caller (networks.dropout.ChannelDropout is one)."""

    channels: int
    p: float
    kept: Tensor | None  # bool [n, channels]


class DropoutMasks:
    """Draw the masks of the dropout layers of a network, and set the masks in the layers.

    Args:
        model: network whose ChannelDropout layers with a rate above 0 get masks. Other dropout layers are not
            changed.
        seed: seed of the run.
        device: device of the network.
    """

    def __init__(self, model: nn.Module, seed: int, device: torch.device):
        self.layers = [
            module for module in model.modules() if isinstance(module, ChannelDropout) and module.p > 0
        ]
        self.seed = seed
        self.device = device
        # The same tensor in all steps: a captured CUDA graph reads its masks at a fixed address.
        self._kept = torch.empty(0, dtype=torch.bool, device=device)

    def draw(self, step: int, samples: range) -> None:
        """Draw the masks of a step.

        Args:
            step: number of the step, from 1.
            samples: indices in the global batch.
        """
        if not self.layers:
            return
        kept = torch.from_numpy(np.stack([self._sample(step, sample) for sample in samples]))
        if self._kept.shape != kept.shape:
            self._kept = torch.empty_like(kept, device=self.device)
        if self.device.type == "cuda":
            kept = kept.pin_memory()
        self._kept.copy_(kept, non_blocking=True)

    def _sample(self, step: int, sample: int) -> np.ndarray:
        """Return the channels that one sample keeps, bool [total channels of all layers, in order]."""
        rng = np.random.default_rng((self.seed, DROPOUT, step, sample))
        return np.concatenate([rng.random(layer.channels) >= layer.p for layer in self.layers])

    @contextlib.contextmanager
    def applied(self, part: int, parts: int) -> Iterator[None]:
        """Let the layers use the masks of one part of the samples of `draw`, within a ``with`` statement.

        Args:
            part: index of the part, from 0.
            parts: number of equal parts into which the samples are split.
        """
        if self.layers:
            kept = self._kept.chunk(parts)[part].split([layer.channels for layer in self.layers], 1)
            for layer, own in zip(self.layers, kept, strict=True):
                layer.kept = own
        try:
            yield
        finally:
            for layer in self.layers:
                layer.kept = None

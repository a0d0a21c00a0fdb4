"""The moving average of a network's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class WeightAverage:
    """Exponential moving average of weights and running statistics.

    After each step, the average becomes ``d * average + (1 - d) * weights``. Here d is
    ``min(decay, (1 + step) / (10 + step))``, and `step` is the number of the step, counted from 1. The
    smaller d of the earlier steps lets a short run forget its initial weights.

    Args:
        model: network on its device; its weights are the first average.
        decay: upper limit of d, in [0, 1). d reaches it after about 9 / (1 - decay) steps.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self._weights = _weights(model)
        self._average = {name: value.clone() for name, value in self._weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the average with the weights after `step`, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self._average.values()), list(self._weights.values()), 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average, with the names of the state dict of the model."""
        return dict(self._average)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replace the average by one that `state_dict` returned."""
        for name, value in self._average.items():
            value.copy_(state[name])

    @contextlib.contextmanager
    def in_model(self) -> Iterator[None]:
        """Exchange the weights of the model with the average inside the block."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, value in self._weights.items():
            mine = self._average[name].clone()
            self._average[name].copy_(value)
            value.copy_(mine)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.state_dict().items()}

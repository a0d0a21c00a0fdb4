"""Recomputation of the outputs of batch norm in the backward pass, which saves memory."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

_current: ContextVar[Outputs | None] = ContextVar("recomputation", default=None)


class _Output(NamedTuple):
    tensor: weakref.ref[Tensor]  # the graph must not keep the output
    again: Callable[[], Tensor]  # computes the output again
    joined: bool  # whether a residual was added


class Outputs:
    """The outputs of batch norm that the graph of one forward pass does not keep."""

    def __init__(self) -> None:
        self._outputs: dict[int, _Output] = {}

    def accepts(self, residual: Tensor | None) -> bool:
        """Return whether an output with this residual may be added.

        A residual block adds its input to its output. Only every second output of such a sequence is
        accepted: otherwise each one would be recomputed from all outputs before.
        """
        found = None if residual is None else self._find(residual)
        return found is None or not found.joined

    def add(self, output: Tensor, again: Callable[[Tensor | None], Tensor], residual: Tensor | None) -> None:
        """Add an output.

        Args:
            output: output of a batch norm.
            again: function that computes the output again, without gradients. It gets the residual.
            residual: map that was added, or None. See `accepts`.
        """
        source = self._source(residual)
        self._outputs[id(output)] = _Output(
            weakref.ref(output), lambda: again(source()), residual is not None
        )

    def _source(self, residual: Tensor | None) -> Callable[[], Tensor | None]:
        """Return a function that returns the residual."""
        found = None if residual is None else self._find(residual)
        if found is not None:
            return found.again
        kept = None if residual is None else residual.detach()
        return lambda: kept

    def _find(self, tensor: Tensor) -> _Output | None:
        found = self._outputs.get(id(tensor))
        return found if found is not None and found.tensor() is tensor else None  # ids are used again

    def pack(self, tensor: Tensor) -> Callable[[], Tensor] | None:
        """Return what the graph keeps in place of `tensor`; None if it keeps `tensor` itself."""
        found = self._find(tensor)
        return None if found is None else found.again


def current_outputs() -> Outputs | None:
    """Return the outputs of the enclosing `recomputation`; None if outputs are kept."""
    return _current.get() if torch.is_grad_enabled() else None


@contextlib.contextmanager
def recomputation(keep: Callable[[Tensor], Tensor] = Tensor.detach) -> Iterator[None]:
    """Do not keep the outputs of batch norm for the backward pass of what is computed in this context.

    The backward pass computes them again where a layer needs them. The gradients are the same, bit for bit.
    Only the fused operators can do this (see `networks.ABN`).

    Args:
        keep: called with every other tensor that the graph keeps; returns the tensor, without its history.
    """

    def pack(saved: Tensor) -> Tensor | Callable[[], Tensor]:
        # A layer may save its own output. With its history, the graph would keep itself alive.
        return outputs.pack(saved) or keep(saved)

    def unpack(kept: Tensor | Callable[[], Tensor]) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept()

    outputs = Outputs()
    token = _current.set(outputs)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        _current.reset(token)

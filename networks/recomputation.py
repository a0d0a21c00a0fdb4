"""Recomputation of the outputs of batch norm in the backward pass, which saves memory."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

_current: ContextVar[Outputs | None] = ContextVar("recomputation", default=None)


class _Versions:
    """Tensors that must not change until the backward pass, as PyTorch requires of all that it keeps."""

    def __init__(self, *tensors: Tensor):
        self._found = [(tensor, tensor._version) for tensor in tensors]

    def check(self) -> None:
        if any(tensor._version != version for tensor, version in self._found):
            raise RuntimeError(
                "a tensor needed for the gradients has been modified by an in-place operation since the "
                "forward pass"
            )


def _getter(kept: Tensor) -> Callable[[], Tensor]:
    """Return a function that returns the tensor, and fails if it has changed."""
    versions = _Versions(kept)

    def get() -> Tensor:
        versions.check()
        return kept

    return get


class _Output(NamedTuple):
    tensor: weakref.ref[Tensor]  # the graph must not keep the output
    version: int
    again: Callable[[], Tensor]  # computes the output again
    joined: bool  # whether a residual was added


class Outputs:
    """The outputs of batch norm that the graph of one forward pass does not keep."""

    def __init__(self, keep: Callable[[Tensor], Tensor]) -> None:
        self._keep = keep
        self._outputs: dict[int, _Output] = {}

    def accepts(self, residual: Tensor | None) -> bool:
        """Return whether an output with this residual may be added.

        A residual block adds its input to its output. Only every second output of such a sequence is
        accepted: otherwise each one would be recomputed from all outputs before.
        """
        found = None if residual is None else self._find(residual)
        return found is None or not found.joined

    def add(
        self,
        output: Tensor,
        again: Callable[[Tensor | None], Tensor],
        residual: Tensor | None,
        inputs: Sequence[Tensor],
    ) -> None:
        """Add an output.

        Args:
            output: output of a batch norm.
            again: function that computes the output again, without gradients. It gets the residual.
            residual: map that was added, or None. See `accepts`.
            inputs: tensors that `again` uses.
        """
        source, versions = self._source(residual), _Versions(*inputs)

        def compute() -> Tensor:
            versions.check()
            return again(source())

        self._outputs[id(output)] = _Output(
            weakref.ref(output), output._version, compute, residual is not None
        )

    def _source(self, residual: Tensor | None) -> Callable[[], Tensor | None]:
        """Return a function that returns the residual."""
        found = None if residual is None else self._find(residual)
        if found is not None:
            return found.again
        return (lambda: None) if residual is None else _getter(residual.detach())

    def _find(self, tensor: Tensor) -> _Output | None:
        found = self._outputs.get(id(tensor))
        # Ids are used again. An output that was changed in place is not what the batch norm computes.
        same = found is not None and found.tensor() is tensor and found.version == tensor._version
        return found if same else None

    def pack(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Return what the graph keeps in place of `tensor`: a function that returns the tensor."""
        if found := self._find(tensor):
            return found.again
        # A layer may save its own output. With its history, the graph would keep itself alive.
        return _getter(self._keep(tensor))


def current_outputs() -> Outputs | None:
    """Return the outputs of the enclosing `recomputation`; None if outputs are kept.

    They are kept inside other hooks for saved tensors, such as those of activation checkpointing.
    """
    outputs = _current.get()
    if outputs is None or not torch.is_grad_enabled():
        return None
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return outputs if hooks is not None and hooks[0] == outputs.pack else None


@contextlib.contextmanager
def recomputation(keep: Callable[[Tensor], Tensor] = Tensor.detach) -> Iterator[None]:
    """Do not keep the outputs of batch norm for the backward pass of what is computed in this context.

    The backward pass computes them again where a layer needs them. The gradients are the same, bit for bit.
    Only the fused operators can do this (see `networks.ABN`). Hooks for saved tensors around this context
    have no effect inside, and torch.func can't differentiate there.

    Args:
        keep: called with every other tensor that the graph keeps; returns the tensor, without its history.
    """
    outputs = Outputs(keep)
    token = _current.set(outputs)
    try:
        with torch.autograd.graph.saved_tensors_hooks(outputs.pack, lambda kept: kept()):
            yield
    finally:
        _current.reset(token)

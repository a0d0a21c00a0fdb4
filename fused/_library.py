"""Loading of the compiled operators, and the choice between them and PyTorch's own."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd import forward_ad

MODES = ("auto", "on", "off")
#: Device types whose compiled operators are used by default. No GPU has run the CUDA kernels yet. The rest of
#: what has not run on a GPU follows the same switch: steps that wait late (engine.training.step.waits_late)
#: and a communicator for batch statistics (engine.runtime.distributed.World.statistics).
TESTED = frozenset({"cpu"})


PROBE = "fused::upsampled_classes"  # an operator of the library


def _load_library() -> bool:
    """Register the compiled operators with PyTorch; return whether this call has done so.

    Operators are registered once in a process. Another copy of this package may have registered them: that
    of another clone, or the same one under another name (hubconf.py).

    Raises:
        ImportError: the library does not load. A silent fallback would make programs slower without an
            explanation.
    """
    spec = importlib.util.find_spec(f"{__package__}._C")
    if spec is None or spec.origin is None or _is_registered():
        return False
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        raise ImportError(
            f"{spec.origin} does not load: it is damaged or was built for another PyTorch. Rebuild it "
            "(`python setup.py build_ext --inplace`), or delete it to use PyTorch's own operators."
        ) from error
    return True


def _is_registered() -> bool:
    return PROBE in torch._C._dispatch_get_all_op_names()


#: Whether this copy of the package registered the operators, and has to register their shapes.
REGISTERS = _load_library()
#: Device types that have compiled operators.
DEVICE_TYPES: frozenset[str] = frozenset()
if _is_registered():
    DEVICE_TYPES = frozenset(
        device_type
        for device_type in ("cpu", "cuda")
        if torch._C._dispatch_has_kernel_for_dispatch_key(PROBE, device_type.upper())
    )

_mode = "auto"


def use(mode: str) -> None:
    """Choose whether networks, losses and predictions use the fused operators.

    Args:
        mode: "on" for every device that has them; "off" for none; "auto", the default, for the device types
            whose kernels have been tested (`TESTED`).

    Raises:
        ValueError: the mode is unknown.
    """
    global _mode
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    _mode = mode


@contextlib.contextmanager
def using(mode: str) -> Iterator[None]:
    """Choose a mode (see `use`) inside a ``with`` block."""
    before = _mode
    use(mode)
    try:
        yield
    finally:
        use(before)


def active(device: torch.device) -> bool:
    """Return whether the fused operators are used on `device` (see `use`)."""
    if device.type not in DEVICE_TYPES or _mode == "off":
        return False
    return _mode == "on" or device.type in TESTED


def applies(tensor: Tensor) -> bool:
    """Return whether a fused operator computes a result of `tensor`.

    The operators have no derivatives for torch.func and forward-mode differentiation, and torch.jit.trace
    can't save them.
    """
    return (
        active(tensor.device)
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not torch.jit.is_tracing()
    )


def refuse_double_backward(operator: str) -> None:
    """Raise an error in a backward pass with create_graph=True.

    Without it, the derivatives of the gradient would be missing silently.

    Raises:
        RuntimeError: the backward pass is recorded.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{operator}: a backward pass with create_graph=True is not supported by the fused operators; "
            "fused.use('off') restores PyTorch's own"
        )

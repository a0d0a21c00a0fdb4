"""Precision, memory format and compilation of a network: --amp, --channels-last, --compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.errors import UsageError

#: Autocast type of each precision.
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
#: Value of --amp that chooses bf16 if the device has fast products of it, and float32 otherwise.
AUTO = "auto"
#: File with the flags of the processor, on Linux.
CPU_INFO = Path("/proc/cpuinfo")
#: Flags of processors with products of bfloat16: x86-64 and 64-bit ARM.
PRODUCTS = {"avx512_bf16", "amx_bf16", "bf16"}
#: Compute capability of the first NVIDIA GPUs with products of bfloat16.
AMPERE = (8, 0)


def autocast(device: torch.device, amp: str | None) -> torch.autocast:
    """Return the context in which a network computes in precision `amp`; None is that of its weights."""
    return torch.autocast(device.type, PRECISIONS.get(amp or ""), enabled=amp is not None)


def has_fast_bf16(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 faster than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= AMPERE
    try:
        words = CPU_INFO.read_text(encoding="utf-8", errors="replace").split()
    except OSError:  # not Linux
        return False
    return not PRODUCTS.isdisjoint(words)


def choose_precision(amp: str | None, device: torch.device) -> tuple[str | None, str | None]:
    """Return the precision for a value of --amp, and a line about the choice of "auto".

    Raises:
        UsageError: the value is unknown, or the device does not support it.
    """
    if amp not in (None, AUTO, *PRECISIONS):
        raise UsageError(f"--amp {amp}: is not one of {', '.join((AUTO, *sorted(PRECISIONS)))}")
    if amp == "fp16" and device.type == "cpu":
        raise UsageError("--amp fp16: requires a GPU; use --amp bf16")
    if amp != AUTO:
        return amp, None
    if has_fast_bf16(device):
        return "bf16", f"--amp auto: bf16, which this {_name(device)} multiplies fast"
    return None, f"--amp auto: float32, because this {_name(device)} has no fast products of bf16"


def accelerate(
    model: nn.Module, device: torch.device, amp: str | None, channels_last: bool, compiled: bool
) -> Callable[[Tensor], Tensor | Sequence[Tensor]]:
    """Return a function that computes a network in evaluation mode.

    Args:
        model: the network, on `device`. Its weights are converted to channels_last in place, if requested.
        device: device of the network.
        amp: precision, from `choose_precision`.
        channels_last: whether to store tensors as [N, h, w, C].
        compiled: whether to compile the network with torch.compile.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    if channels_last:
        model.to(memory_format=layout)  # type: ignore[call-overload]
    network: Any = torch.compile(model) if compiled else model

    def run(images: Tensor) -> Tensor | Sequence[Tensor]:
        with autocast(device, amp):
            return network(images.contiguous(memory_format=layout))

    return run


def _name(device: torch.device) -> str:
    return "GPU" if device.type == "cuda" else "processor"

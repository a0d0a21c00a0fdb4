"""Precision of the computation: the values of --amp."""

from __future__ import annotations

from pathlib import Path

import torch

#: Autocast type of each precision.
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
#: Value of --amp that chooses bf16 if the device has fast products of it, and float32 otherwise.
AUTO = "auto"
#: Flags in /proc/cpuinfo of processors with products of bfloat16: x86-64 and 64-bit ARM.
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
        words = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split()
    except OSError:  # not Linux
        return False
    return not PRODUCTS.isdisjoint(words)


def choose_precision(amp: str | None, device: torch.device) -> tuple[str | None, str | None]:
    """Return the precision for a value of --amp, and a line about the choice of "auto"."""
    if amp != AUTO:
        return amp, None
    if has_fast_bf16(device):
        return "bf16", f"--amp auto: bf16, which this {_name(device)} multiplies fast"
    return None, f"--amp auto: float32, because this {_name(device)} has no fast products of bf16"


def _name(device: torch.device) -> str:
    return "GPU" if device.type == "cuda" else "processor"

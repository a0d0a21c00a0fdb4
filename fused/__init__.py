"""Fused operators of a training step and of a prediction, for CPUs and GPUs."""

from fused._library import DEVICE_TYPES, MODES, active, use

__all__ = ["DEVICE_TYPES", "MODES", "active", "use"]

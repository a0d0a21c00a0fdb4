"""Fused operators of a training step and of a prediction, for CPUs and GPUs."""

from fused._library import DEVICE_TYPES, MODES, active, use
from fused.norm import NormOptions, activated_batch_norm

__all__ = ["DEVICE_TYPES", "MODES", "NormOptions", "activated_batch_norm", "active", "use"]

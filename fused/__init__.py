"""Fused operators of a training step and of a prediction, for CPUs and GPUs."""

from fused._library import DEVICE_TYPES, MODES, active, use
from fused.loss import coarse_probability, segmentation_loss, upsampled_classes

__all__ = [
    "DEVICE_TYPES",
    "MODES",
    "active",
    "coarse_probability",
    "segmentation_loss",
    "upsampled_classes",
    "use",
]

"""Fused operators of a training step and of a prediction, for CPUs and GPUs."""

from fused._library import DEVICE_TYPES, MODES, TESTED, active, applies, use, using
from fused.loss import coarse_probability, segmentation_loss, upsampled_classes
from fused.norm import NormOptions, activated_batch_norm, activated_batch_norm_with_statistics, normalize

__all__ = [
    "DEVICE_TYPES",
    "MODES",
    "TESTED",
    "NormOptions",
    "activated_batch_norm",
    "activated_batch_norm_with_statistics",
    "active",
    "applies",
    "coarse_probability",
    "normalize",
    "segmentation_loss",
    "upsampled_classes",
    "use",
    "using",
]

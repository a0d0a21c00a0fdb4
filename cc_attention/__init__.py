"""Criss-cross attention (CCNet, arXiv 1811.11721) for PyTorch."""

from cc_attention.maps import attention_maps
from cc_attention.module import (
    CrissCrossAttention,
    CrissCrossAttention3d,
    RecurrentCrissCrossAttention,
    RecurrentCrissCrossAttention3d,
)
from cc_attention.ops import ca_map, ca_weight, criss_cross_attention

__version__ = "1.0.0"

__all__ = [
    "CrissCrossAttention",
    "CrissCrossAttention3d",
    "RecurrentCrissCrossAttention",
    "RecurrentCrissCrossAttention3d",
    "attention_maps",
    "ca_map",
    "ca_weight",
    "criss_cross_attention",
]

"""Criss-cross attention (CCNet, arXiv 1811.11721) for PyTorch."""

from cc_attention.module import CrissCrossAttention
from cc_attention.ops import ca_map, ca_weight, criss_cross_attention

__all__ = ["CrissCrossAttention", "ca_map", "ca_weight", "criss_cross_attention"]

"""Networks, their layers, and loading and conversion of checkpoints."""

from __future__ import annotations

from networks.abn import ABN, synchronize, train_mode
from networks.ccnet import Seg_Model
from networks.dropout import ChannelDropout
from networks.models import MODELS
from networks.weights import load_weights, match_weights
from utils.errors import CheckpointError

__all__ = [
    "ABN",
    "MODELS",
    "ChannelDropout",
    "CheckpointError",
    "Seg_Model",
    "load_weights",
    "match_weights",
    "synchronize",
    "train_mode",
]

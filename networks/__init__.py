"""Segmentation networks, by the name that `--model` takes."""

from __future__ import annotations

from torch import nn

from networks.abn import ABN, synchronize, train_mode
from networks.ccnet import Seg_Model
from networks.dropout import ChannelDropout
from networks.weights import load_weights, match_weights
from utils.errors import CheckpointError

MODELS: dict[str, type[nn.Module]] = {"ccnet": Seg_Model}

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

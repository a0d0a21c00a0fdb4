"""Networks, their layers, and loading and conversion of checkpoints."""

from __future__ import annotations

from networks.abn import ABN
from networks.base import Network
from networks.batch_norm import synchronize, train_mode
from networks.ccnet import Seg_Model
from networks.dropout import ChannelDropout
from networks.folding import fold_batch_norm
from networks.models import MODELS, make_network
from networks.weights import load_weights, match_weights
from utils.errors import CheckpointError

__all__ = [
    "ABN",
    "MODELS",
    "ChannelDropout",
    "CheckpointError",
    "Network",
    "Seg_Model",
    "fold_batch_norm",
    "load_weights",
    "make_network",
    "match_weights",
    "synchronize",
    "train_mode",
]

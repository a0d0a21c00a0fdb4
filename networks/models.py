"""Registry of the networks that --model names."""

from __future__ import annotations

from torch import nn

from networks.ccnet import Seg_Model

MODELS: dict[str, type[nn.Module]] = {"ccnet": Seg_Model}

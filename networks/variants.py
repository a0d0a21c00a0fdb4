"""The shapes that a dilated ResNet with CCNet's head comes in, and how a state dict shows its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

#: Bottleneck blocks in each of the four layers.
DEPTHS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}


class Variant(NamedTuple):
    """What differs between the releases of this network."""

    stem: tuple[int, ...]  # channels of the stem's convolutions; only the first has stride 2
    kernel: int  # of the first one; the others are 3x3
    contract_dilation: bool  # the first block of a dilated layer has the dilation of the layer before
    ceil_mode: bool  # of the max pool: an even size gets one row and column more
    activation: str  # of the heads, see networks.abn
    dsn_channels: int
    shift: bool  # state dict has "shift" [3], added to the pictures: their border is then the release's own


#: CCNet itself; mmsegmentation's CCNet (ResNetV1c); CCNet's heads on the ResNet of torchvision and timm.
VARIANTS = {
    "ccnet": Variant((64, 64, 128), 3, False, True, "leaky_relu", 512, False),
    "mmseg": Variant((32, 32, 64), 3, True, False, "relu", 256, True),
    "torchvision": Variant((64,), 7, True, False, "leaky_relu", 512, True),
}


def variant_of(state: Mapping[str, Tensor]) -> str:
    """The variant that a state dict belongs to, by its first convolution; "ccnet" where that is no one's."""
    if (weight := state.get("conv1.weight")) is not None:
        for name, variant in VARIANTS.items():
            if weight.shape == (variant.stem[0], 3, variant.kernel, variant.kernel):
                return name
    return "ccnet"


def options_of(state: Mapping[str, Tensor] | None) -> dict[str, str]:
    """What a network has to be told to fit a state dict: nothing where there is none, or it is CCNet's own,
    so that networks without variants can be built the same way."""
    variant = variant_of(state or {})
    return {} if variant == "ccnet" else {"variant": variant}


def blocks_of(state: Mapping[str, Tensor]) -> tuple[int, ...]:
    """How many blocks the four layers of a state dict have, (0, 0, 0, 0) where it is no ResNet's."""
    blocks = [0] * 4
    for name in state:
        if match := re.match(r"layer([1-4])\.([0-9]{1,4})\.", name):
            layer = int(match[1]) - 1
            blocks[layer] = max(blocks[layer], int(match[2]) + 1)
    return tuple(blocks)

"""Variants of a dilated ResNet with CCNet's heads, and their detection from a state dict."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

#: Number of bottleneck blocks in each of the four layers.
DEPTHS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}


class Variant(NamedTuple):
    """The differences between releases of this network."""

    stem: tuple[int, ...]  # channels of the convolutions in the stem; the first has stride 2
    kernel: int  # kernel size of the first convolution; the others are 3x3
    contract_dilation: bool  # the first block of a dilated layer uses the previous dilation
    ceil_mode: bool  # ceil_mode of the max pooling: even sizes get one more row and column
    activation: str  # activation of the heads (see networks.abn)
    dsn_channels: int  # channels of the auxiliary head
    shift: bool  # "shift" [3] of the state dict is added to the input, so that zero padding fits the release


#: CCNet itself; mmsegmentation's CCNet (ResNetV1c); CCNet's heads on a ResNet of torchvision or timm.
VARIANTS = {
    "ccnet": Variant((64, 64, 128), 3, False, True, "leaky_relu", 512, False),
    "mmseg": Variant((32, 32, 64), 3, True, False, "relu", 256, True),
    "torchvision": Variant((64,), 7, True, False, "leaky_relu", 512, True),
}


def variant_of(state: Mapping[str, Tensor]) -> str:
    """Return the variant of a state dict, from the shape of its first convolution; "ccnet" by default."""
    if (weight := state.get("conv1.weight")) is not None:
        for name, variant in VARIANTS.items():
            if weight.shape == (variant.stem[0], 3, variant.kernel, variant.kernel):
                return name
    return "ccnet"


def options_of(state: Mapping[str, Tensor] | None) -> dict[str, Any]:
    """Return the keyword arguments that a network needs to match a state dict.

    The result is empty if there is no state dict, and for the "ccnet" variant. In these two cases, it also
    fits a network without a `variant` argument.
    """
    variant = variant_of(state or {})
    return {} if variant == "ccnet" else {"variant": variant}


def blocks_of(state: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Return the number of blocks in each of the four layers; 0 for a layer without entries in `state`."""
    blocks = [0] * 4
    for name in state:
        if match := re.match(r"layer([1-4])\.([0-9]{1,4})\.", name):
            layer = int(match[1]) - 1
            blocks[layer] = max(blocks[layer], int(match[2]) + 1)
    return tuple(blocks)

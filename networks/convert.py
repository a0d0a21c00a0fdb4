"""Weights of other programs in CCNet's form: their names, their pictures, their batch norm.

Every function is exact in evaluation mode, up to rounding: it computes in float64 and returns float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from networks.ccnet import Seg_Model
from networks.variants import DEPTHS, VARIANTS, blocks_of, variant_of
from networks.weights import CLASSIFIER, FLOATS, HEADS, SHIFT, check_dtype, classes_of
from utils.errors import CheckpointError

#: Of the activated batch norm (networks/abn.py), and of every release's batch norm.
EPS = 1e-5
#: Mean and standard deviation of ImageNet's pictures, R G B in 0..255: what most releases normalize by.
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)
#: timm's deep stem, one nn.Sequential but for its last batch norm, in our names.
TIMM_STEM = {
    "conv1.0": "conv1",
    "conv1.1": "bn1",
    "conv1.3": "conv2",
    "conv1.4": "bn2",
    "conv1.6": "conv3",
    "bn1": "bn3",
}
#: mmsegmentation's modules in our names.
MMSEG = {
    "backbone.stem.0": "conv1",
    "backbone.stem.1": "bn1",
    "backbone.stem.3": "conv2",
    "backbone.stem.4": "bn2",
    "backbone.stem.6": "conv3",
    "backbone.stem.7": "bn3",
    "backbone.layer1": "layer1",
    "backbone.layer2": "layer2",
    "backbone.layer3": "layer3",
    "backbone.layer4": "layer4",
    "decode_head.convs.0.conv": "head.conva.0",
    "decode_head.convs.0.bn": "head.conva.1",
    "decode_head.convs.1.conv": "head.convb.0",
    "decode_head.convs.1.bn": "head.convb.1",
    "decode_head.cca": "head.cca",
    "decode_head.conv_cat.conv": "head.bottleneck.0",
    "decode_head.conv_cat.bn": "head.bottleneck.1",
    "decode_head.conv_seg": "head.bottleneck.3",
    "auxiliary_head.convs.0.conv": "dsn.0",
    "auxiliary_head.convs.0.bn": "dsn.1",
    "auxiliary_head.conv_seg": "dsn.3",
}


def rename(state: Mapping[str, Tensor], modules: Mapping[str, str]) -> dict[str, Tensor]:
    """`state` with the modules renamed that `modules` names, in whole parts: the longest name counts."""
    renamed = {}
    for name, value in state.items():
        parts = name.split(".")
        for length in range(len(parts), 0, -1):
            if new := modules.get(".".join(parts[:length])):
                parts[:length] = [new]
                break
        renamed[".".join(parts)] = value
    return renamed


def _renamed(path: str, state: Mapping[str, Tensor], modules: Mapping[str, str]) -> dict[str, Tensor]:
    """`rename`. Raises CheckpointError where two entries get one name."""
    renamed = rename(state, modules)
    if len(renamed) < len(state):
        raise CheckpointError(
            f"{path}: holds the entries of two networks, which would get the same names; convert one alone"
        )
    return renamed


def imagenet_names(path: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ResNet of torchvision or timm, without its classifier, in our names; its numbers as they are.

    Args:
        path: names the weights in messages.

    Raises:
        CheckpointError: it has another network.
    """
    state = {k: v for k, v in state.items() if not k.startswith("fc.") and _is_weight(k)}
    if "conv1.0.weight" in state:
        state = _renamed(path, state, TIMM_STEM)
    check_network(path, state)
    return state


def mmseg_names(path: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """mmsegmentation's CCNet in our names, its numbers as they are.

    Raises:
        CheckpointError: it has another network.
    """
    state = _renamed(path, {name: value for name, value in state.items() if _is_weight(name)}, MMSEG)
    scale = state.get("head.cca.gamma.scale")
    if scale is not None and scale.numel() == 1:  # a scalar there, a vector of one here
        state["head.cca.gamma"] = state.pop("head.cca.gamma.scale").reshape(1)
    if "dsn.0.weight" in state:
        # The original's auxiliary head has a bias before its batch norm, theirs has none.
        state.setdefault("dsn.0.bias", state["dsn.0.weight"].new_zeros(state["dsn.0.weight"].shape[:1]))
    check_network(path, state)
    return state


def check_network(path: str, state: Mapping[str, Tensor]) -> None:
    """See that `state`, in our names, is a network of ours or its backbone; SHIFT may be missing.

    Raises:
        CheckpointError: naming the first entry that is not.
    """
    if any(".downsample.2." in name for name in state):
        raise CheckpointError(
            f"{path}: its shortcuts average before they convolve (ResNet-D), which CCNet's do not; "
            "take weights without that, such as timm's resnet101c or resnet101s"
        )
    blocks = blocks_of(state)
    backbone = next((name for name, depths in DEPTHS.items() if depths == blocks), None)
    if backbone is None:
        raise CheckpointError(
            f"{path}: its four layers have {', '.join(map(str, blocks))} blocks, as none of "
            f"{', '.join(sorted(DEPTHS))} has; take weights of one of these"
        )
    variant = variant_of(state)
    classes = classes_of(path, state) if CLASSIFIER in state else 1
    with torch.device("meta"):
        network = Seg_Model(classes, backbone=backbone, variant=variant)
    own = network.state_dict()
    if not any(name.startswith(HEADS) for name in state):
        own = {name: value for name, value in own.items() if not name.startswith(HEADS)}
    if missing := [name for name in own if name not in state and name != SHIFT]:
        raise CheckpointError(
            f"{path}: lacks {missing[0]} (in CCNet's names); take a {backbone} of bottlenecks"
        )
    for name, value in own.items():
        if name not in state:
            continue
        if state[name].shape != value.shape:
            raise CheckpointError(
                f"{path}: {name} (in CCNet's names) has shape {list(state[name].shape)} and CCNet's "
                f"{list(value.shape)}; take a plain {backbone}"
            )
        check_dtype(path, name, state[name])
    if unknown := [name for name in state if name not in own]:
        raise CheckpointError(
            f"{path}: has {len(unknown)} entries that CCNet lacks, the first is {unknown[0]}; "
            "take weights of one of the networks that python -m tools.convert --help names"
        )


def to_our_pictures(
    state: Mapping[str, Tensor], mean: Sequence[float], std: Sequence[float], picture_mean: Sequence[float]
) -> dict[str, Tensor]:
    """A network for (RGB - mean) / std as one for BGR - picture_mean, which `CSDataSet` gives.

    Order and scale go into the first convolution. The offset goes to SHIFT where the variant has it, which is
    exact up to the border. CCNet's own has not: there the offset goes into the running mean, and the zeros
    that the convolution puts around the picture stand for picture_mean instead of mean.

    Args:
        state: in our names, with plain batch norm.
        mean, std: R G B in 0..255.
        picture_mean: B G R in 0..255.
    """
    result = dict(state)
    scale = torch.tensor(std, dtype=torch.float64).flip(0)
    offset = torch.tensor(picture_mean, dtype=torch.float64) - torch.tensor(mean, dtype=torch.float64).flip(0)
    weight = state["conv1.weight"].double().flip(1) / scale.view(1, 3, 1, 1)
    result["conv1.weight"] = weight.float()
    if VARIANTS[variant_of(state)].shift:
        result[SHIFT] = offset.float()
    else:
        mean_ = state["bn1.running_mean"].double() - weight.sum((2, 3)) @ offset
        result["bn1.running_mean"] = mean_.float()
    return result


def from_batch_norm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network with plain batch norm as one with ours, whose weight is |weight| + eps.

    Where the weight is negative, the convolution before changes its sign. Where it is nearer to 0 than eps,
    which ours can't be, the convolution is scaled down instead.

    Args:
        state: in our names.
    """
    result = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    for norm in norms_of(state):
        weight = state[f"{norm}.weight"].double()
        factor = torch.where(weight < 0, -1.0, 1.0) * (weight.abs() / EPS).clamp(max=1)
        result[f"{norm}.weight"] = (weight.abs() - EPS).clamp(min=0).float()
        convolution = convolution_before(norm)
        for name in (f"{convolution}.weight", f"{convolution}.bias", f"{norm}.running_mean"):
            if name in state:
                value = state[name].double()
                result[name] = (value * factor.view(-1, *[1] * (value.dim() - 1))).float()
    return result


def to_batch_norm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a network with our batch norm as one with plain batch norm.

    Its weight is |weight| + eps, to the bit. Weights of 16 bits, which can't hold the sum, become float32.
    """
    result = dict(state)
    for norm in norms_of(state):
        weight = state[f"{norm}.weight"]
        result[f"{norm}.weight"] = weight.to(torch.promote_types(weight.dtype, torch.float32)).abs() + EPS
    return result


def may_be_plain(state: Mapping[str, Tensor]) -> bool:
    """Return whether a state dict in our names, without a mark, can be one with plain batch norm.

    Every nn.BatchNorm2d comes with num_batches_tracked, and `to_batch_norm` leaves no weight below EPS: a
    state dict without the one and with the other has our batch norm.
    """
    if not all(_is_weight(name) for name in state):
        return True
    weights = [state[name] for norm in norms_of(state) if (name := f"{norm}.weight") in state]
    # Half of it, as the types of 16 bits round it.
    return not any(weight.dtype in FLOATS and (weight < EPS / 2).any() for weight in weights)


def norms_of(state: Mapping[str, Tensor]) -> list[str]:
    """The names of the batch norms of a state dict."""
    end = ".running_mean"
    return [name.removesuffix(end) for name in state if name.endswith(end)]


def convolution_before(norm: str) -> str:
    """The name of the convolution before a batch norm, in our names: bn2 -> conv2, dsn.1 -> dsn.0."""
    before, dot, last = norm.rpartition(".")
    return before + dot + (last.replace("bn", "conv") if last.startswith("bn") else "0")


def _is_weight(name: str) -> bool:
    return not name.endswith("num_batches_tracked")

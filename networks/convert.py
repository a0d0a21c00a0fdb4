"""Conversion of other programs' weights to CCNet: entry names, input normalization and batch norm.

Converted networks give the same outputs in evaluation mode, up to rounding, except near the image border
for networks without the entry "shift" (`to_our_pictures`). Conversions compute in float64
and return float32. "CCNet names" are the names of the state-dict entries and modules of `Seg_Model`, and of
the heads of the other models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from networks.models import make_network, models_of
from networks.variants import DEPTHS, VARIANTS, blocks_of, variant_of
from networks.weights import CLASSIFIER, FLOATS, HEADS, SHIFT, check_dtype, classes_of
from utils.errors import CheckpointError

#: eps of the activated batch norm (networks/abn.py), and of the batch norm of every supported release.
EPS = 1e-5
#: Mean and standard deviation of ImageNet, RGB in 0..255. Most releases normalize their input with these.
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)
#: Modules of timm's deep stem (one nn.Sequential, except for its last batch norm), and their CCNet names.
TIMM_STEM = {
    "conv1.0": "conv1",
    "conv1.1": "bn1",
    "conv1.3": "conv2",
    "conv1.4": "bn2",
    "conv1.6": "conv3",
    "bn1": "bn3",
}
#: Modules of mmsegmentation, and their CCNet names.
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
    """Rename modules of a state dict.

    Args:
        state: entries by name.
        modules: new name of each module to rename. A module name matches complete components of a dotted
            name, and the longest match is used.

    Returns:
        The same entries under their new names.
    """
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
    """Call `rename`; raise CheckpointError if two entries get the same name."""
    renamed = rename(state, modules)
    if len(renamed) < len(state):
        raise CheckpointError(
            f"{path}: holds two networks whose entries would get the same names; convert each by itself"
        )
    return renamed


def imagenet_names(path: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the entries of a torchvision or timm ResNet to CCNet names, and drop its classifier.

    Args:
        path: name of the weights in error messages.
        state: state dict of the library; its values are not changed.

    Raises:
        CheckpointError: the state dict belongs to another network.
    """
    state = {k: v for k, v in state.items() if not k.startswith("fc.") and _is_weight(k)}
    if "conv1.0.weight" in state:
        state = _renamed(path, state, TIMM_STEM)
    check_network(path, state)
    return state


def mmseg_names(path: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the entries of mmsegmentation's CCNet to CCNet names.

    Args:
        path: name of the weights in error messages.
        state: state dict of mmsegmentation; its values are not changed.

    Raises:
        CheckpointError: the state dict belongs to another network.
    """
    state = _renamed(path, {name: value for name, value in state.items() if _is_weight(name)}, MMSEG)
    scale = state.get("head.cca.gamma.scale")
    if scale is not None and scale.numel() == 1:  # a scalar in mmsegmentation, shape [1] here
        state["head.cca.gamma"] = state.pop("head.cca.gamma.scale").reshape(1)
    if "dsn.0.weight" in state:
        # The auxiliary head of CCNet has a bias before its batch norm; that of mmsegmentation has none.
        state.setdefault("dsn.0.bias", state["dsn.0.weight"].new_zeros(state["dsn.0.weight"].shape[:1]))
    check_network(path, state)
    return state


def model_of(state: Mapping[str, Tensor]) -> str:
    """Return the model whose head a state dict has (see `models.MODELS`); "ccnet" if it has no known head."""
    return next(iter(models_of(state)), "ccnet")


def check_network(path: str, state: Mapping[str, Tensor]) -> None:
    """Check that `state`, with CCNet names, is a complete network or a complete backbone.

    The entry "shift" (`weights.SHIFT`, an offset added to the input images) may be missing, because
    `to_our_pictures` adds this entry.

    Args:
        path: name of the weights in error messages.
        state: state dict to check.

    Raises:
        CheckpointError: an entry is missing, is unknown, or has a wrong shape or dtype; or the backbone is
            not supported.
    """
    if any(".downsample.2." in name for name in state):
        raise CheckpointError(
            f"{path}: is a ResNet-D, with average pooling in its shortcuts, which CCNet does not have; "
            "use other weights, such as timm's resnet101c or resnet101s"
        )
    blocks = blocks_of(state)
    backbone = next((name for name, depths in DEPTHS.items() if depths == blocks), None)
    if backbone is None:
        raise CheckpointError(
            f"{path}: its four layers have {', '.join(map(str, blocks))} blocks, which fits no supported "
            f"backbone; use weights of {' or '.join(sorted(DEPTHS))}"
        )
    variant = variant_of(state)
    classes = classes_of(path, state) if CLASSIFIER in state else 1
    with torch.device("meta"):
        network = make_network(model_of(state), classes, backbone=backbone, variant=variant)
    own = network.state_dict()
    if not any(name.startswith(HEADS) for name in state):
        own = {name: value for name, value in own.items() if not name.startswith(HEADS)}
    if missing := [name for name in own if name not in state and name != SHIFT]:
        raise CheckpointError(
            f"{path}: lacks {missing[0]} (named as in CCNet); use a {backbone} with bottleneck blocks"
        )
    for name, value in own.items():
        if name not in state:
            continue
        if state[name].shape != value.shape:
            raise CheckpointError(
                f"{path}: {name} (named as in CCNet) has shape {list(state[name].shape)}, CCNet needs "
                f"{list(value.shape)}; use a plain {backbone}"
            )
        check_dtype(path, name, state[name])
    if unknown := [name for name in state if name not in own]:
        raise CheckpointError(
            f"{path}: has {len(unknown)} entries that CCNet lacks, the first is {unknown[0]}; "
            "use weights of a network that python -m tools.convert --help lists"
        )


def to_our_pictures(
    state: Mapping[str, Tensor], mean: Sequence[float], std: Sequence[float], picture_mean: Sequence[float]
) -> dict[str, Tensor]:
    """Convert a network whose input is (RGB - mean) / std to one whose input is BGR - picture_mean.

    `CSDataSet` gives BGR minus mean. Channel order and scale are folded into the first convolution. If the
    variant has the entry "shift" (`weights.SHIFT`), the offset is stored in this entry, which is exact
    including the image border. The "ccnet" variant has no such entry, so the offset is folded into the
    running mean of bn1. At the border, the zero padding of the convolution corresponds to picture_mean
    instead of mean.

    Args:
        state: state dict with CCNet names and plain batch norm.
        mean: mean of the network's input, RGB in 0..255.
        std: standard deviation of the network's input, RGB in 0..255.
        picture_mean: mean that the data set subtracts, BGR in 0..255.

    Returns:
        The converted state dict.
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
    """Convert a network with plain batch norm to one with activated batch norm.

    The scale of activated batch norm is |weight| + eps, so the scale can't be negative or smaller than eps.
    For a negative weight, the sign of the preceding convolution is changed. For a weight closer to 0 than
    eps, the preceding convolution is scaled down.

    Args:
        state: state dict with CCNet names.

    Returns:
        The converted state dict.
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
    """Convert a network with activated batch norm to one with plain batch norm.

    The new weight is exactly |weight| + eps. 16-bit weights become float32, because 16-bit types can't
    represent the sum.

    Args:
        state: state dict with CCNet names.

    Returns:
        The converted state dict.
    """
    result = dict(state)
    for norm in norms_of(state):
        weight = state[f"{norm}.weight"]
        result[f"{norm}.weight"] = weight.to(torch.promote_types(weight.dtype, torch.float32)).abs() + EPS
    return result


def may_be_plain(state: Mapping[str, Tensor]) -> bool:
    """Return whether a state dict without a mark may have plain batch norm (see `weights.mark`).

    Plain batch norm comes from nn.BatchNorm2d, which has num_batches_tracked, or from `to_batch_norm`, which
    returns no weight below EPS. A state dict without num_batches_tracked but with a weight below EPS
    therefore has activated batch norm.

    Args:
        state: state dict with CCNet names.
    """
    if not all(_is_weight(name) for name in state):
        return True
    weights = [state[name] for norm in norms_of(state) if (name := f"{norm}.weight") in state]
    # Compare with EPS / 2, to allow for the rounding of 16-bit types.
    return not any(weight.dtype in FLOATS and (weight < EPS / 2).any() for weight in weights)


def norms_of(state: Mapping[str, Tensor]) -> list[str]:
    """Return the module names of the batch norms of a state dict."""
    end = ".running_mean"
    return [name.removesuffix(end) for name in state if name.endswith(end)]


def convolution_before(norm: str) -> str:
    """Return the name of the convolution before a batch norm: bn2 -> conv2, dsn.1 -> dsn.0.

    In the heads, a convolution and its batch norm are the first two layers of an nn.Sequential.
    """
    before, dot, last = norm.rpartition(".")
    return before + dot + (last.replace("bn", "conv") if last.startswith("bn") else "0")


def _is_weight(name: str) -> bool:
    return not name.endswith("num_batches_tracked")

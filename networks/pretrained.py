"""Pretrained ImageNet weights by name, such as `torchvision:resnet101` or `timm:resnet101.a1_in1k`."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from networks.convert import from_batch_norm, imagenet_names, to_our_pictures
from networks.timm_backbone import BACKBONE, PREFIX, import_timm, is_timm, plan_of
from networks.variants import DEPTHS
from networks.weights import check_entries, read_state_dict
from utils.errors import CheckpointError, UsageError

LIBRARIES = ("torchvision", "timm")
#: Default tag of torchvision's weights; its own segmentation networks start from these weights.
TORCHVISION_TAG = "IMAGENET1K_V1"
#: timm's networks that fit CCNet's backbone: with a 7x7 stem, CCNet's stem (s), or mmsegmentation's stem (c).
TIMM_NETWORKS = [depth + stem for depth in DEPTHS for stem in ("", "s", "c")]


class Pretrained(NamedTuple):
    """Pretrained weights of a library, and the input normalization that the weights need."""

    state: dict[str, Tensor]  # in the names of the library
    mean: tuple[float, ...]  # of the input, RGB in 0..255
    std: tuple[float, ...]


def is_library(source: str | os.PathLike) -> bool:
    """Return whether `source` names weights of a library rather than a file."""
    return isinstance(source, str) and source.partition(":")[0] in LIBRARIES


def library_weights(source: str, backbone: str = "resnet101") -> Pretrained:
    """Return the weights that `source` names; the library downloads weights that are not in its cache.

    Args:
        source: `torchvision:NETWORK`, `torchvision:NETWORK.TAG` or `timm:NETWORK[.TAG]`, for example
            `torchvision:resnet50.IMAGENET1K_V2` or `timm:resnet50.a1_in1k`. `torchvision` alone means
            `torchvision:` with `backbone`.
        backbone: network to use if `source` is `torchvision` alone.

    Raises:
        CheckpointError: the weights or the library do not exist, the download fails, or entries are invalid.
    """
    library, _, name = source.partition(":")
    if library == "torchvision":
        weights = _from_torchvision(source, name or backbone)
    else:
        weights = _from_timm(source, name)
    return weights._replace(state=check_entries(source, weights.state))


def read_weights(
    source: str | os.PathLike, picture_mean: Sequence[float], backbone: str = "resnet101"
) -> dict[str, Tensor]:
    """Return the state dict of a checkpoint file, or the converted weights of a library.

    Args:
        source: path of a checkpoint, or a name for `library_weights`.
        picture_mean: mean that the data set subtracts from its pictures, BGR in 0..255.
        backbone: value of --backbone; the network to use if `source` is `torchvision` or `timm` alone.

    Raises:
        CheckpointError: the weights can't be read, downloaded or converted.
    """
    if is_timm(backbone):
        return _for_timm_backbone(source, picture_mean, backbone)
    if not is_library(source):
        return read_state_dict(source)
    weights = library_weights(str(source), backbone)
    state = imagenet_names(str(source), weights.state)
    return from_batch_norm(to_our_pictures(state, weights.mean, weights.std, picture_mean))


def _from_torchvision(source: str, name: str) -> Pretrained:
    network, _, tag = name.partition(".")
    try:
        from torchvision import models
    except (
        ImportError,
        RuntimeError,
    ) as error:  # RuntimeError: a build for another torch fails in its operators
        raise CheckpointError(
            f"{source}: torchvision can't be imported ({_line(error)}); install the build for your torch"
        ) from error
    if network not in DEPTHS:
        raise CheckpointError(f"{source}: does not fit CCNet's backbone; use {' or '.join(sorted(DEPTHS))}")
    choices = models.get_model_weights(network)
    try:
        weights = choices[tag or TORCHVISION_TAG]
    except KeyError:
        tags = ", ".join(choice.name for choice in choices)
        raise CheckpointError(f"{source}: torchvision has no weights {tag}; use one of {tags}") from None
    try:
        state = weights.get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
    except Exception as error:  # of the network, the disk, a damaged file
        raise _not_downloaded(source, error) from error
    pictures = weights.transforms()
    return Pretrained(dict(state), _in_255(pictures.mean), _in_255(pictures.std))


def _from_timm(source: str, name: str) -> Pretrained:
    network = name.partition(".")[0]
    _timm(source)
    if network not in TIMM_NETWORKS:
        raise CheckpointError(
            f"{source}: does not fit CCNet's backbone; use one of timm's {', '.join(TIMM_NETWORKS)}"
        )
    _check_tag(source, name)
    model = _created(source, name, pretrained=True)
    pictures: Any = model.pretrained_cfg
    return Pretrained(model.state_dict(), _in_255(pictures["mean"]), _in_255(pictures["std"]))


def _for_timm_backbone(
    source: str | os.PathLike, picture_mean: Sequence[float], backbone: str
) -> dict[str, Tensor]:
    """Return weights for a `TimmNetwork`: a state dict of this project, or timm's own, converted."""
    network = backbone.removeprefix(PREFIX)
    name, options = network, dict(plan_of(backbone).arguments)
    if is_library(source):
        library, _, named = str(source).partition(":")
        name = named or network
        if library != "timm" or name.partition(".")[0] != network:
            raise CheckpointError(
                f"{source}: does not fit --backbone {backbone}; give {backbone}, a tag of it, or a file"
            )
        _check_tag(str(source), name)
    else:
        state = read_state_dict(source)
        if any(entry.startswith(BACKBONE) for entry in state):
            return state
        _check_timm_names(source, state, backbone)
        options["pretrained_cfg_overlay"] = {"state_dict": dict(state)}
    model = _created(str(source), name, pretrained=True, features_only=True, **options)
    pictures: Any = model.pretrained_cfg
    mean, std = (torch.tensor(pictures[key], dtype=torch.float64).flip(0) * 255 for key in ("mean", "std"))
    own = {
        f"{BACKBONE}network.{entry}": value
        for entry, value in model.state_dict().items()
        if not entry.endswith("num_batches_tracked")
    }
    own[f"{BACKBONE}shift"] = (torch.tensor(picture_mean, dtype=torch.float64) - mean).float()
    own[f"{BACKBONE}scale"] = (1 / std).float()
    return check_entries(source, own)


def _check_timm_names(source: str | os.PathLike, state: Mapping[str, Tensor], backbone: str) -> None:
    """Check that a file has every entry of a network of timm but its classifier.

    timm itself would keep the random values of missing entries.

    Raises:
        CheckpointError: an entry is missing.
    """
    with torch.device("meta"):
        model = import_timm(backbone).create_model(backbone.removeprefix(PREFIX))
    classifier = model.pretrained_cfg.get("classifier") or ()
    ends = tuple(f"{each}." for each in ((classifier,) if isinstance(classifier, str) else classifier))
    if missing := [
        entry
        for entry in model.state_dict()
        if entry not in state and not entry.startswith(ends) and not entry.endswith("num_batches_tracked")
    ]:
        raise CheckpointError(
            f"{source}: lacks {len(missing)} entries of --backbone {backbone}, the first is {missing[0]}; "
            "give the state dict of this network as timm saves it, or a checkpoint of this project"
        )


def _timm(source: str) -> Any:
    """Return the module timm; raise CheckpointError if it can't be imported."""
    try:
        return import_timm(source)
    except UsageError as error:
        raise CheckpointError(str(error)) from error


def _check_tag(source: str, name: str) -> None:
    """Raise CheckpointError unless timm has the weights `name`, a network with or without a tag."""
    network = name.partition(".")[0]
    known = _timm(source).list_models(f"{network}.*", pretrained=True)
    if name not in (network, *known):
        advice = f"use one of {', '.join(known)}" if known else "use another network, or omit --restore-from"
        raise CheckpointError(f"{source}: timm has no such weights; {advice}")


def _created(source: str, name: str, **options: Any) -> Any:
    """Return a network of timm with its weights; raise CheckpointError if they can't be loaded."""
    timm = _timm(source)
    # They warn of every failed attempt, and of the entries of the classifier.
    logs = [logging.getLogger(each) for each in ("huggingface_hub", "timm")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        return timm.create_model(name, **options)
    except Exception as error:  # of the network, the disk, a damaged file
        if "pretrained_cfg_overlay" in options:
            raise CheckpointError(
                f"{source}: does not fit --backbone {PREFIX}{name} ({_line(error)}); name another file"
            ) from error
        raise _not_downloaded(source, error) from error
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def _in_255(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(255 * value for value in values)


def _not_downloaded(source: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{source}: can't be downloaded ({_line(error)}); check the network connection, or copy the file to "
        "this machine, run python -m tools.convert FILE imagenet.pth, and give --restore-from imagenet.pth"
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]

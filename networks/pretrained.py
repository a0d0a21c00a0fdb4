"""Pretrained ImageNet weights by name, such as `torchvision:resnet101` or `timm:resnet101.a1_in1k`."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from networks.convert import from_batch_norm, imagenet_names, to_our_pictures
from networks.variants import DEPTHS
from networks.weights import check_entries, read_state_dict
from utils.errors import CheckpointError

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
        backbone: network to use if `source` is `torchvision` alone.

    Raises:
        CheckpointError: the weights can't be read, downloaded or converted.
    """
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
    try:
        import timm
    except ImportError as error:
        raise CheckpointError(
            f"{source}: timm can't be imported ({_line(error)}); install it with pip install timm"
        ) from error
    network = name.partition(".")[0]
    if network not in TIMM_NETWORKS:
        raise CheckpointError(
            f"{source}: does not fit CCNet's backbone; use one of timm's {', '.join(TIMM_NETWORKS)}"
        )
    known = timm.list_models(f"{network}.*", pretrained=True)
    if name not in (network, *known):
        raise CheckpointError(f"{source}: timm has no such weights; use one of {', '.join(known)}")
    log = logging.getLogger("huggingface_hub")  # it logs a warning for every failed attempt
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:  # of the network, the disk, a damaged file
        raise _not_downloaded(source, error) from error
    finally:
        log.setLevel(level)
    pictures: Any = model.pretrained_cfg
    return Pretrained(model.state_dict(), _in_255(pictures["mean"]), _in_255(pictures["std"]))


def _in_255(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(255 * value for value in values)


def _not_downloaded(source: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{source}: can't be downloaded ({_line(error)}); check the network connection, or copy the file to "
        "this machine, run python -m tools.convert FILE imagenet.pth, and give --restore-from imagenet.pth"
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]

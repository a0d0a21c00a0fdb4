"""Registry of the networks that --model names."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from networks.base import Network
from networks.ccnet import Seg_Model
from networks.heads import ASPPHead, FCNHead, GCNHead, NonLocalHead, PSPHead, RCCA3dHead, RCCAHead
from networks.timm_backbone import TimmNetwork, check_name, is_timm
from networks.variants import DEPTHS
from utils.args import quoted
from utils.errors import UsageError


class Architecture(NamedTuple):
    """A network that --model names, and the options that it takes besides those of every network.

    Attributes:
        head: class of the main head.
        recurrence: default of --recurrence; None if the network does not take this option.
        pools: whether a batch norm of the head has one value for each picture. Statistics of a single picture
            are impossible there.
        network: subclass of `Network`, called as network(num_classes, backbone=..., ...); None for `Network`
            itself, with the head.
        clip: default of --clip, the number of frames of a clip; None if the network takes pictures.
    """

    head: Callable[..., nn.Module]
    recurrence: int | None = None
    pools: bool = False
    network: Callable[..., Network] | None = None
    clip: int | None = None


MODELS: dict[str, Architecture] = {
    "ccnet": Architecture(RCCAHead, recurrence=2, network=Seg_Model),
    "ccnet3d": Architecture(RCCA3dHead, recurrence=3, clip=3),
    "fcn": Architecture(FCNHead),
    "gcn": Architecture(GCNHead),
    "psp": Architecture(PSPHead, pools=True),
    "aspp": Architecture(ASPPHead, pools=True),
    "nonlocal": Architecture(NonLocalHead, recurrence=1),
}


def make_network(
    model: str, num_classes: int, recurrence: int | None = None, consistency: int = 0, **options: Any
) -> Network:
    """Return a network of the registry.

    Args:
        model: name in MODELS.
        num_classes: number of classes.
        recurrence: number of applications of the attention; None for the default of the model.
        consistency: channels of the features for the category-consistent loss; 0 without this loss.
        **options: backbone, dropout, abn and variant (see `Network`).

    Raises:
        UsageError: the model does not take a recurrence, has no features for the loss, or the backbone can't
            be used (see `TimmNetwork`).
        ValueError: an argument is out of range.
    """
    architecture = MODELS[model]
    if consistency and architecture.recurrence is None:
        taking = _listed(name for name, each in MODELS.items() if each.recurrence is not None)
        raise UsageError(f"--ccl: uses the output of an attention, which --model {taking} have; omit it")
    number = recurrence_of(model, recurrence)
    if number is not None:
        options["recurrence"] = number
    if is_timm(options.get("backbone")):
        network: Network = TimmNetwork(architecture.head, num_classes, **options)
    elif architecture.network is not None:
        network = architecture.network(num_classes, **options)
    else:
        network = Network(architecture.head, num_classes, **options)
    if consistency:
        network.add_consistency(consistency)
    return network


def backbone_name(text: str) -> str:
    """Return the value of --backbone in a text.

    Raises:
        argparse.ArgumentTypeError: there is no such backbone.
    """
    if is_timm(text):
        try:
            check_name(text)
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
    elif text not in DEPTHS:
        known = ", ".join(sorted(DEPTHS))
        raise argparse.ArgumentTypeError(f"{quoted(text)} is unknown; give {known} or timm:NAME")
    return text


def _listed(names: Iterable[str]) -> str:
    """Return names as "a, b and c"."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def recurrence_of(model: str, given: int | None) -> int | None:
    """Return the recurrence of a network: the given one, or the default; None if the model does not take it.

    Raises:
        UsageError: a recurrence is given for a model that does not take it.
    """
    default = MODELS[model].recurrence
    if given is not None and default is None:
        taking = _listed(name for name, each in MODELS.items() if each.recurrence is not None)
        raise UsageError(f"--recurrence {given}: not an option of --model {model}, only of {taking}; omit it")
    return default if given is None else given


def clip_of(model: str, clip: int | None, stride: int | None) -> tuple[int | None, int | None]:
    """Return the number of frames of a clip and their distance; None if the model takes pictures.

    Args:
        model: name in MODELS.
        clip: value of --clip; None for the default.
        stride: value of --clip-stride; None for the default.

    Raises:
        UsageError: one is given for a model that takes pictures.
    """
    default = MODELS[model].clip
    if default is not None:
        return default if clip is None else clip, 1 if stride is None else stride
    for flag, value in (("--clip", clip), ("--clip-stride", stride)):
        if value is not None:
            taking = _listed(name for name, each in MODELS.items() if each.clip is not None)
            raise UsageError(f"{flag} {value}: not an option of --model {model}, only of {taking}; omit it")
    return None, None


def model_flags(
    model: str,
    recurrence: int | None = None,
    clip: int | None = None,
    clip_stride: int | None = None,
    **_: Any,
) -> dict[str, int | None]:
    """Return the values of --recurrence, --clip and --clip-stride, with the defaults of the model.

    Raises:
        UsageError: the model does not take a flag that is given.
    """
    clip, clip_stride = clip_of(model, clip, clip_stride)
    return {"recurrence": recurrence_of(model, recurrence), "clip": clip, "clip_stride": clip_stride}


def check_statistics(model: str, pictures: int, frozen: bool) -> None:
    """Check that every batch norm of a network has more than one value to compute its statistics from.

    Args:
        model: name in MODELS.
        pictures: number of pictures in a forward pass, over all processes.
        frozen: whether the running statistics are used instead.

    Raises:
        UsageError: there is only one picture, and the head averages over whole pictures.
    """
    if MODELS[model].pools and pictures < 2 and not frozen:
        raise UsageError(
            f"--batch-size: --model {model} averages over whole pictures and needs two at a time for the "
            "statistics of its batch norm; give a larger one, or --freeze-bn"
        )


def models_of(state: Mapping[str, Tensor]) -> list[str]:
    """Return the models whose head has exactly the entries of a state dict; some have the same."""
    names = frozenset(name.removeprefix("head.") for name in state if name.startswith("head."))
    return [model for model, each in MODELS.items() if names and _entries(each.head) == names]


@functools.cache
def _entries(head: Callable[..., nn.Module]) -> frozenset[str]:
    """Return the names of the state-dict entries of a head."""
    with torch.device("meta"):
        return frozenset(head(2048, 1).state_dict())

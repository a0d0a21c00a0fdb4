"""A network of the timm library as backbone: its features on the grid of CCNet's own backbone."""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks.base import Network
from networks.batch_norm import convert_batch_norm
from utils.errors import UsageError

#: Prefix of the values of --backbone that name a network of timm.
PREFIX = "timm:"
#: Prefix of the entries of such a backbone in the state dict of a network.
BACKBONE = "backbone."
#: Ratio of the size of an image to that of the features.
STRIDE = 8
#: Arguments to build a network with, the first ones that it takes: dilation instead of stride, or a size of
#: the input that may change.
ARGUMENTS: tuple[dict[str, Any], ...] = (
    {"output_stride": STRIDE},
    {"dynamic_img_size": True},
    {"strict_img_size": False},
    {},
)


class Plan(NamedTuple):
    """The way to get features at stride 8 from a network.

    Attributes:
        arguments: keyword arguments for timm.create_model.
        main: indices of the maps for the main head in the list that the network returns. Several are
            concatenated.
        auxiliary: index of the map for the auxiliary head.
        channels: channels for the auxiliary head and for the main head.
        strides: stride of each map of the list.
        multiple: number that must divide the height and the width of the input.
        channels_first: whether the maps are [N, C, H, W] and not [N, H, W, C].
        mean: mean of the pictures of timm's weights, RGB in 0..255.
        std: their standard deviation.
        unused: names of weights that the features do not depend on.
    """

    arguments: Mapping[str, Any]
    main: tuple[int, ...]
    auxiliary: int
    channels: tuple[int, int]
    strides: tuple[int, ...]
    multiple: int
    channels_first: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    unused: tuple[str, ...] = ()


def is_timm(backbone: object) -> bool:
    """Return whether a value of --backbone names a network of timm."""
    return isinstance(backbone, str) and backbone.startswith(PREFIX)


def import_timm(named: str) -> Any:
    """Return the module timm.

    Args:
        named: flag or value that needs the package, for the message.

    Raises:
        UsageError: timm can't be imported.
    """
    try:
        import timm
    except ImportError as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{named}: timm can't be imported ({reason}); install it with pip install timm"
        ) from error
    return timm


def check_name(backbone: str) -> None:
    """Check that timm has the network of a backbone.

    Args:
        backbone: "timm:NAME".

    Raises:
        UsageError: timm is not installed or has no such network, or the name has a tag of weights.
    """
    timm, name = import_timm(backbone), backbone.removeprefix(PREFIX)
    bare = name.partition(".")[0]
    if timm.is_model(bare) and bare != name:
        raise UsageError(
            f"{backbone}: names weights; give --backbone {PREFIX}{bare}, and {backbone} to --restore-from"
        )
    if not timm.is_model(bare):
        near = difflib.get_close_matches(bare, timm.list_models(), 3, 0.5)
        advice = f"; similar ones are {', '.join(near)}" if near else ""
        raise UsageError(f"{backbone}: timm {timm.__version__} has no such network{advice}")


@functools.cache
def plan_of(backbone: str) -> Plan:
    """Return the plan of a backbone; see `TimmBackbone`.

    The network is built and run without data, which takes a few seconds for some networks.

    Raises:
        UsageError: see `check_name`; also if the network gives no features, or not for images of any size.
    """
    check_name(backbone)
    timm, name = import_timm(backbone), backbone.removeprefix(PREFIX)
    reason: Exception | None = None
    for arguments in ARGUMENTS:
        try:
            with torch.device("meta"):
                return _plan(functools.partial(timm.create_model, name, features_only=True), arguments)
        except Exception as error:  # the networks refuse arguments and sizes in any way
            reason = error
    raise UsageError(
        f"{backbone}: gives no features for images of any size ({_line(reason)}); use another network"
    )


def _plan(create: Callable[..., Any], arguments: dict[str, Any]) -> Plan:
    """Return the plan for a network with some arguments; raise any exception if it does not work."""
    info = create(**arguments).feature_info
    strides = [each["reduction"] for each in info.info]
    last = max(info.out_indices)
    if len(set(strides)) == 1:  # blocks of a plain transformer
        indices, main = [max(0, round(len(strides) * 2 / 3) - 1), last], [last]
    else:
        deep = [index for index in info.out_indices if strides[index] >= STRIDE]
        main = [last] if max(strides) <= STRIDE else deep
        indices = sorted({*main, *[index for index in info.out_indices if index < last][-1:]})
    if len(indices) < 2:
        raise ValueError("there is a single map of features")
    arguments = {**arguments, "out_indices": tuple(indices)}
    network = create(**arguments).eval()
    channels = network.feature_info.channels()
    config = network.pretrained_cfg
    plan = Plan(
        arguments,
        tuple(indices.index(index) for index in main),
        len(indices) - 2,
        (channels[-2], sum(channels[indices.index(index)] for index in main)),
        tuple(strides[index] for index in indices),
        1,
        str(getattr(network, "output_fmt", "NCHW")).endswith("NCHW"),
        tuple(255 * value for value in config["mean"]),
        tuple(255 * value for value in config["std"]),
    )
    every = math.lcm(STRIDE, *plan.strides)
    largest = math.lcm(every, *config["input_size"][1:])  # of windows that are parts of the picture
    reason = None
    for multiple in ([1] if max(plan.strides) == STRIDE else []) + [every, largest]:
        # With multiple 1, every halving of an odd size must round up, as in CCNet's own backbone.
        sizes = [(33, 40)] if multiple == 1 else [(multiple, multiple), (2 * multiple, 3 * multiple)]
        try:
            for size in sizes:
                _check_maps(network, plan, channels, size)
            return plan._replace(multiple=multiple, unused=_unused(network, sizes[0]))
        except Exception as error:
            reason = error
    assert reason is not None
    raise reason


@torch.no_grad()
def _check_maps(network: nn.Module, plan: Plan, channels: Sequence[int], size: tuple[int, int]) -> None:
    """Raise an exception if the maps of an image do not have the sizes of the plan."""
    maps = network(torch.zeros(1, 3, *size))
    for y, number, stride in zip(maps, channels, plan.strides, strict=True):
        found = tuple(y.shape) if plan.channels_first else (y.shape[0], y.shape[3], *y.shape[1:3])
        if found != (1, number, *(math.ceil(side / stride) for side in size)):
            raise ValueError(f"features of shape {list(y.shape)} for images of {size[0]}x{size[1]}")


def _unused(network: nn.Module, size: tuple[int, int]) -> tuple[str, ...]:
    """Return the names of the weights that get no gradient."""
    torch.stack([y.sum() for y in network(torch.zeros(1, 3, *size))]).sum().backward()
    return tuple(name for name, weight in network.named_parameters() if weight.grad is None)


def _line(error: Exception | None) -> str:
    return " ".join(str(error).split())[:150] or type(error).__name__


class TimmBackbone(nn.Module):
    """A network of timm without its classifier, and its features at stride 8.

    The main head gets the deepest map if the network can use dilation instead of stride, or is a plain
    transformer. Otherwise it gets all maps of stride 8 and more, concatenated. The auxiliary head gets the
    map before the deepest one, or that after two thirds of the blocks of a plain transformer. Maps of another
    stride are interpolated.

    The weights are those of timm. Images are brought to the input of these weights with the entries "shift"
    and "scale", before the network pads them with zeros. If a network needs sizes that are multiples of a
    number, zeros are added at the bottom and right, and the features there are removed.

    Args:
        backbone: "timm:NAME".

    Attributes:
        shift: [3], added to the channels B, G, R of the images.
        scale: [3], factors of the channels after that.

    Raises:
        UsageError: see `plan_of`.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, backbone: str):
        super().__init__()
        self.plan = plan_of(backbone)
        name = backbone.removeprefix(PREFIX)
        create = import_timm(backbone).create_model
        self.network = create(name, features_only=True, **self.plan.arguments)
        convert_batch_norm(self.network)
        for unused in self.plan.unused:  # data parallelism waits for the gradients of all others
            self.network.get_parameter(unused).requires_grad_(False)
        self.register_buffer("shift", torch.zeros(3))
        self.register_buffer("scale", 1 / torch.tensor(self.plan.std[::-1]))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features for the auxiliary head and for the main head.

        Args:
            images: [N, 3, h, w], BGR minus mean.

        Returns:
            Two tensors [N, C, H, W], where H is h / 8, rounded up, and W is w / 8, rounded up.
        """
        return self.of_normalized(((images + self.shift.view(3, 1, 1)) * self.scale.view(3, 1, 1)).flip(1))

    def of_normalized(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features for images [N, 3, h, w] that are normalized as the weights of timm need it."""
        plan = self.plan
        height, width = x.shape[2:]
        if plan.multiple > 1:
            tall, wide = ((side + plan.multiple - 1) // plan.multiple for side in (height, width))
            x = F.pad(x, (0, wide * plan.multiple - width, 0, tall * plan.multiple - height))
        size = x.shape[2] // STRIDE, x.shape[3] // STRIDE
        rows, columns = (height + STRIDE - 1) // STRIDE, (width + STRIDE - 1) // STRIDE

        def at_stride(index: int) -> Tensor:
            y = maps[index] if plan.channels_first else maps[index].permute(0, 3, 1, 2)
            if plan.strides[index] != STRIDE:
                y = F.interpolate(y, size, mode="bilinear", align_corners=False)
            return y if plan.multiple <= STRIDE else y[:, :, :rows, :columns]

        maps = self.network(x)
        several = [at_stride(index) for index in plan.main]
        return at_stride(plan.auxiliary), several[0] if len(several) == 1 else torch.cat(several, 1)


class TimmNetwork(Network):
    """A network of timm with a main head and an auxiliary head.

    Arguments are those of `Network`; `backbone` is "timm:NAME". `abn` is the backend of the heads.

    Raises:
        UsageError: see `plan_of`.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        head: Callable[..., nn.Module],
        num_classes: int,
        backbone: str,
        dropout: float = 0.1,
        abn: str = "torch",
        variant: str = "ccnet",
        **options: Any,
    ):
        nn.Module.__init__(self)
        if variant != "ccnet":
            raise ValueError(f"variant must be 'ccnet' for {backbone}, got {variant!r}")
        self.backbone = TimmBackbone(backbone)
        self.channels = self.backbone.plan.channels
        self.add_heads(head, num_classes, dropout, abn, **options)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features for both heads; see `TimmBackbone.forward`."""
        return self.backbone(images)

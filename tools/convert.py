"""Convert weights of other programs to this project's format, and back.

    python -m tools.convert ccnet_r50-d8_769x769_80k_cityscapes.pth ccnet_mmseg.pth
    python -m tools.convert torchvision:resnet101 imagenet.pth
    python -m tools.convert snapshots/CS_scenes_60000.pth for_the_original.pth --to original
    python -m tools.convert snapshots/CS_scenes_60000.pth ccnet.safetensors --to safetensors

SOURCE is a file of torch.save or safetensors. Its format is detected from its content:
  ccnet       checkpoint of this project, of any --model, or of the original code: CCNet, or its ImageNet
              backbone; with --backbone timm:NAME only with args.json or a description
  mmseg       CCNet of mmsegmentation (ResNetV1c, 50 or 101)
  imagenet    ResNet-50 or 101 of torchvision, or of timm (resnet101, resnet101s, resnet101c), as a file
              or by name: torchvision:resnet101, timm:resnet101.a1_in1k
  batch-norm  file written with --to batch-norm; if another program saved it again, its mark is lost and
              --from batch-norm is needed to tell it from ccnet

Formats of --to:
  ccnet       file of torch.save that train.py, evaluate.py and the tools read (default)
  safetensors the same as a file of safetensors
  original    format of the original code: a file that PyTorch 0.4 can read
  batch-norm  the same network with nn.BatchNorm2d, whose weight is |weight| + eps of the activated one

Files of the formats ccnet and safetensors can be used alone. They describe their network: model, backbone,
recurrence, names and colors of the classes, and the recipe of the training run. The values are those of
SOURCE, for example CLASSES and PALETTE of mmsegmentation, or of the args.json next to it.

Both networks are run on the same picture. If their outputs differ, no file is written.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dataset import IMG_MEAN
from dataset.classes import classes_of_checkpoint
from dataset.labels import CITYSCAPES, rows_of_table, table_of_rows
from engine.options import TrainOptions
from networks import ABN, MODELS, CheckpointError, Network, make_network
from networks.convert import (
    EPS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    check_network,
    from_batch_norm,
    imagenet_names,
    may_be_plain,
    mmseg_names,
    model_of,
    to_batch_norm,
    to_our_pictures,
)
from networks.of_run import describe
from networks.pretrained import is_library, library_weights
from networks.resnet import ResNet
from networks.timm_backbone import BACKBONE
from networks.variants import DEPTHS, VARIANTS, blocks_of, variant_of
from networks.weights import (
    ABOUT,
    ACTIVATED,
    BATCH_NORM,
    CLASSIFIER,
    HEADS,
    PLAIN,
    SHIFT,
    batch_norm_of,
    check_numbers,
    mark,
    match_weights,
    metadata_of,
    read_state_dict,
    require_safetensors,
)
from tools.common import Parser, end
from utils import args as flags
from utils.errors import RunError, UsageError
from utils.files import check_output_file, check_writable, replacing, writing

KINDS = ("ccnet", "mmseg", "imagenet", "batch-norm")
TARGETS = ("ccnet", "safetensors", "original", "batch-norm")
#: Formats whose files describe their network.
DESCRIBED = ("ccnet", "safetensors")
#: Maximum difference of an output, relative to its largest value.
TOLERANCE = 1e-4
#: Size of the compared picture: one even and one odd side, to test the rounding of the pooling.
SIZE = (40, 57)
RECURRENCE = 2
OUTPUTS = ("logits", "auxiliary logits")


class Pictures(NamedTuple):
    """Normalization of the pictures of a program; R, G, B in 0..255."""

    mean: Sequence[float]
    std: Sequence[float]


class Source(NamedTuple):
    """Weights of a source, under the names of this project."""

    state: dict[str, Tensor]
    kind: str
    pictures: Pictures | None  # None: those of this project
    metadata: Mapping[str, str] = MappingProxyType({})  # of its file; see networks.weights.mark
    timm: str | None = None  # the backbone, if it is a network of timm


def get_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser("convert", __doc__)
    add = parser.add_argument
    add("source", metavar="SOURCE", help="file, or name of the weights of a library")
    add("output", metavar="OUTPUT", help="file to write")
    add(
        "--from",
        dest="kind",
        choices=KINDS,
        help="format of SOURCE (default: detected from its content)",
    )
    add("--to", choices=TARGETS, default="ccnet", help="format of OUTPUT (default: ccnet)")
    add("--classes", metavar="TABLE", help="class table to describe (default: that of the run of SOURCE)")
    for name, what in (("mean", "mean"), ("std", "standard deviation")):
        add(
            f"--{name}",
            type=triple(name),
            metavar="R,G,B",
            help=f"{what} that normalizes the pictures of SOURCE, in 0..255 (default: that of its library, "
            "or of ImageNet)",
        )
    return parser


def triple(name: str) -> Callable[[str], tuple[float, ...]]:
    """Return a type for argparse that parses three numbers; those of a std are above 0."""
    one = flags.number(float, 0, 255, open_low=name == "std")

    def parse(text: str) -> tuple[float, ...]:
        values = tuple(one(part) for part in text.split(","))
        if len(values) != 3:
            raise argparse.ArgumentTypeError(f"{text!r} is not R,G,B; give three numbers")
        return values

    return parse


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = get_parser().parse_args(arguments)
    if os.path.exists(args.output):
        raise UsageError(f"{args.output}: exists; name another file, or remove it")
    check_writable("OUTPUT", os.path.dirname(args.output) or ".")
    check_output_file("OUTPUT", args.output)
    if args.to == "safetensors":
        require_safetensors(args.output)
    if args.classes is not None and args.to not in DESCRIBED:
        raise UsageError(f"--classes: files of --to {args.to} do not describe their classes; omit it")
    source = read_source(args.source, args.kind, args.mean, args.std)
    state = convert(source)
    check_numbers(f"{args.source}, converted", state)
    variant = variant_of(state)
    backbone = source.timm or backbone_of(state)
    model = name_of_model(args.source, source, state)
    if args.to == "batch-norm" and source.timm:
        raise UsageError(f"--to batch-norm: not supported for --backbone {source.timm}; omit --to")
    if args.to == "original" and (model, variant, backbone) != ("ccnet", "ccnet", "resnet101"):
        raise UsageError(
            f"--to original: {args.source} is {model}, {variant} variant, with {backbone}, but the original "
            "code supports only ccnet with resnet101; omit --to"
        )
    described = about(args.source, source, state, args.classes) if args.to in DESCRIBED else {}
    write(args.output, args.to, to_batch_norm(state) if args.to == "batch-norm" else state, source, described)
    heads = f"{model} with {backbone}" if has_heads(state) else backbone
    megabytes = os.path.getsize(args.output) / 1e6
    print(f"{args.output}: {heads}, variant {variant}, {len(state)} entries, {megabytes:.0f} MB")
    if described:
        table = table_of_rows(args.output, described["labels"]) if "labels" in described else None
        names = (table or CITYSCAPES).names if "labels" in described else ()
        listed = f", and {len(names)} classes: {', '.join(names)}" if names else ""
        number = described["recurrence"]
        kind = described["model"] + ("" if number is None else f", R={number}")
        print(f"it describes its network: {kind}{listed}")


def read_source(
    path: str, kind: str | None, mean: Sequence[float] | None, std: Sequence[float] | None
) -> Source:
    """Read SOURCE and detect its format.

    Raises:
        CheckpointError, UsageError: one line that names the problem.
    """
    library = Pictures(IMAGENET_MEAN, IMAGENET_STD)
    kinds: tuple[str, ...] = ("imagenet",)
    if not is_library(path):
        state = read_state_dict(path)
        kinds = kinds_of(path, state)
    if kind is not None and kind not in kinds:
        raise UsageError(f"--from {kind}: {path} is {kinds[0]}; omit --from")
    kind = kind or kinds[0]
    if is_library(path):
        weights = library_weights(path)
        state, library = weights.state, Pictures(weights.mean, weights.std)
    metadata = metadata_of(state)
    if kind in ("ccnet", "batch-norm"):
        for name, value in (("mean", mean), ("std", std)):
            if value is not None:
                raise UsageError(f"--{name}: {path} uses the pictures of this project; omit --{name}")
        state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
        if any(name.startswith(BACKBONE) for name in state):
            return of_timm(path, mark(state, metadata))
        if not has_heads(state):
            state = {name: value for name, value in state.items() if not name.startswith("fc.")}
        check_network(path, state)
        if VARIANTS[variant_of(state)].shift and SHIFT not in state:
            raise CheckpointError(f"{path}: has no {SHIFT} and is damaged; copy or convert it again")
        return Source(state, kind, None, metadata)
    names = mmseg_names if kind == "mmseg" else imagenet_names
    pictures = Pictures(mean or library.mean, std or library.std)
    return Source(names(path, state), kind, pictures, metadata)


def of_timm(path: str, state: Mapping[str, Tensor]) -> Source:
    """Return the source of a network whose backbone is one of timm.

    Raises:
        CheckpointError, UsageError: see `describe` and `match_weights`.
    """
    found = describe(path, state, {}).description
    with torch.device("meta"):
        model = make_network(
            found.model, cast(int, found.num_classes), found.recurrence, backbone=found.backbone
        )
    match_weights(model, path, complete=True, state=state)
    return Source(dict(state), "ccnet", None, metadata_of(state), found.backbone)


def kinds_of(path: str, state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return the possible formats of a state dict, the most likely one first.

    Raises:
        CheckpointError: unknown format.
    """
    if any(name.startswith(("decode_head.", "backbone.stem.")) for name in state):
        return ("mmseg",)
    if any(name.startswith(BACKBONE) for name in state):
        return ("ccnet",)
    ours = has_heads(state) or SHIFT in state
    if "conv1.0.weight" in state or (variant_of(state) == "torchvision" and not ours):
        return ("imagenet",)
    if "layer1.0.conv1.weight" not in state:
        raise CheckpointError(
            f"{path}: not a known network (its first entry is {next(iter(state))}); give CCNet, "
            "mmsegmentation's CCNet, or a ResNet of torchvision or timm"
        )
    if batch_norm_of(state) == PLAIN:
        return ("batch-norm",)
    if batch_norm_of(state) == ACTIVATED or not may_be_plain(state):
        return ("ccnet",)
    return ("ccnet", "batch-norm")


def convert(source: Source) -> dict[str, Tensor]:
    """Return the weights in the format of this project."""
    state = source.state
    if source.pictures is not None:
        state = to_our_pictures(state, source.pictures.mean, source.pictures.std, IMG_MEAN.tolist())
    return state if source.kind == "ccnet" else from_batch_norm(state)


def name_of_model(path: str, source: Source, state: Mapping[str, Tensor]) -> str:
    """Return the --model of a source: that of the run, where several models have these weights."""
    if not has_heads(state) or source.kind not in ("ccnet", "batch-norm"):
        return model_of(state)
    return describe(path, mark(state, source.metadata), {}).description.model


def about(path: str, source: Source, state: Mapping[str, Tensor], classes: str | None) -> dict[str, Any]:
    """Return the description of a network: the values that a file of its own needs to be used alone.

    Args:
        path: name of the source, for args.json and for messages.
        source: the source.
        state: its weights in the format of this project.
        classes: path of a class table; None for that of the source.

    Returns:
        JSON values: model, backbone, recurrence and num_classes (as the flags), labels (rows of the class
        table), recipe (flags of the training run that determine the weights), and input. The result is empty
        for an ImageNet backbone.

    Raises:
        InputError: the class table is missing or does not fit the network.
    """
    if not has_heads(state):
        return {}
    marked = mark(state, source.metadata)
    # A file of another program does not belong to the args.json next to it.
    found = describe(path, marked, {"classes": classes}, of_run=source.kind in ("ccnet", "batch-norm"))
    number = found.description.num_classes
    described = found.description._asdict()
    del described["classes"]
    if found.description.clip is None:
        del described["clip"], described["clip_stride"]
    labels = found.labels
    if labels is not None and source.kind == "mmseg" and len(labels) != number:
        print(f"{path}: names {len(labels)} classes, but the network has {number}; the names are not kept")
        labels = None
    table = classes_of_checkpoint(path, labels, found.description.classes, number)
    if len((table or CITYSCAPES).classes) == number:
        described["labels"] = rows_of_table(table)
    recipe = {name: found.run[name] for name in TrainOptions.names(lambda f: f.recipe) if name in found.run}
    mean = [round(float(value), 8) for value in IMG_MEAN]
    return {**described, "recipe": recipe, "input": {"channels": "BGR", "range": [0, 255], "mean": mean}}


def write(
    path: str,
    target: str,
    state: Mapping[str, Tensor],
    source: Source,
    described: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write `state`, read it back, and compare it with `source`. Keep the file only if they agree.

    Args:
        path: file to write.
        target: one of TARGETS.
        state: weights to write.
        source: the network that `state` was converted from.
        described: description of the network (see `about`).

    Raises:
        RunError: they differ.
    """
    content = {
        name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in state.items()
    }
    if target == "original":  # PyTorch 0.4 has no bfloat16, and float16 only on GPUs
        content = {name: value.float() for name, value in content.items()}
    plain = target == "batch-norm"
    metadata = {BATCH_NORM: PLAIN if plain else ACTIVATED}
    if described:
        metadata[ABOUT] = json.dumps(described)
    with replacing(path) as temporary:
        with writing(temporary) as file:
            if target == "safetensors":
                # "format" is a convention of the programs that read such files.
                file.write(require_safetensors(path).torch.save(content, {"format": "pt", **metadata}))
            else:
                # Versions of PyTorch that run the original code do not read the zip files of 1.6 and later.
                torch.save(mark(content, metadata), file, _use_new_zipfile_serialization=target != "original")
        kind = "batch-norm" if plain else "ccnet"
        written = Source(read_state_dict(temporary), kind, None, timm=source.timm)
        compare(path, source, written)


def compare(path: str, before: Source, after: Source) -> None:
    """Print the difference between the outputs of two networks for one picture.

    Raises:
        CheckpointError: outputs of `before` are nan or inf.
        RunError: the difference is larger than rounding.
    """
    names = OUTPUTS if has_heads(before.state) else [f"layer{number}" for number in range(1, 5)]
    old_outputs = outputs(before)
    for name, old in zip(names, old_outputs, strict=True):
        if not old.isfinite().all():
            raise CheckpointError(
                f"{path}: not written, because the source network gives nan or inf in its {name}; use a "
                "checkpoint with smaller weights"
            )
    differences = [differs(old, new) for old, new in zip(old_outputs, outputs(after), strict=True)]
    worst = max(differences)
    where = names[differences.index(worst)]
    print(f"largest difference: {worst:.1e} of the largest value, in the {where} of a random picture")
    if not worst <= TOLERANCE:
        raise RunError(
            f"{path}: not written, because its outputs differ by {worst:.1e} of the largest, more than "
            f"{TOLERANCE:g}; check the source for weights beyond the precision of float32"
        )
    if before.pictures is not None and "shift" not in after.state:
        own = outputs(before, own_border=True)
        border = max(differs(old, new) for old, new in zip(own, old_outputs, strict=True))
        print(
            "CCNet pads pictures with its own mean instead of the source's: near the border this changes "
            f"outputs by {border:.1e} of the largest value"
        )


def differs(old: Tensor, new: Tensor) -> float:
    """Return the largest difference relative to the largest old value; infinity if there is a nan."""
    difference = (old - new).abs().max()
    if difference == 0:
        return 0.0
    share = (difference / old.abs().max()).item()
    return math.inf if math.isnan(share) else share


@torch.no_grad()
def outputs(source: Source, own_border: bool = False) -> list[Tensor]:
    """Return the float64 outputs of a network for one picture: both logits, or layer1 to layer4.

    The backbone of a network with plain batch norm is computed with functions, all others by their modules.

    Args:
        source: the weights.
        own_border: whether pictures are padded with the mean of the source, which not every converted network
            can reproduce.
    """
    generator = torch.Generator().manual_seed(0)
    rgb = torch.randint(0, 256, (1, 3, *SIZE), generator=generator).double()
    ours = rgb.flip(1) - torch.tensor(IMG_MEAN, dtype=torch.float64).view(3, 1, 1)
    state = {name: value.double() for name, value in source.state.items()}
    if source.kind == "ccnet":
        return network_outputs(state, ours, source.timm)
    if source.pictures is None:
        if "shift" in state:
            ours = ours + state["shift"].view(3, 1, 1)
        return plain_outputs(state, ours)

    def normalized(pixels: Tensor) -> Tensor:
        mean, std = (torch.tensor(each, dtype=torch.float64).view(3, 1, 1) for each in source.pictures or ())
        return (pixels - mean) / std

    if VARIANTS[variant_of(state)].shift or own_border:
        return plain_outputs(state, normalized(rgb))
    mean = torch.tensor(IMG_MEAN, dtype=torch.float64).flip(0).view(1, 3, 1, 1)
    return plain_outputs(state, normalized(rgb), around=normalized(mean))


def network_outputs(state: Mapping[str, Tensor], images: Tensor, timm: str | None = None) -> list[Tensor]:
    """Return the outputs of a network in the format of this project; see `outputs`."""
    if has_heads(state):
        return network_of(state, timm)(images)
    with torch.device("meta"):  # saves time and memory: the weights are replaced
        model = ResNet(backbone_of(state), variant=variant_of(state))
    model.load_state_dict(state, assign=True)
    model.eval()
    layers: list[Tensor] = []
    for number in range(1, 5):
        getattr(model, f"layer{number}").register_forward_hook(lambda _module, _input, y: layers.append(y))
    model.features(images)
    return layers


def network_of(state: Mapping[str, Tensor], timm: str | None = None) -> Network:
    """Return the network of a state dict in the format of this project, in evaluation mode."""
    model = model_of(state)
    recurrence = None if MODELS[model].recurrence is None else RECURRENCE
    classes = len(state[CLASSIFIER])
    if timm:  # has buffers that are not in the state dict
        network = make_network(model, classes, recurrence, backbone=timm).double()
    else:
        with torch.device("meta"):  # saves time and memory: the weights are replaced
            network = make_network(
                model, classes, recurrence, backbone=backbone_of(state), variant=variant_of(state)
            )
    # `check_network` has found it complete but for SHIFT, which the head does not need.
    network.load_state_dict(state, strict=False, assign=True)
    return network.eval()


def backbone_of(state: Mapping[str, Tensor]) -> str:
    """Return the backbone of a state dict in the format of this project."""
    return next(name for name, depths in DEPTHS.items() if depths == blocks_of(state))


class PlainNorm(nn.Module):
    """Plain batch norm in evaluation mode, with the weights and the activation of an activated one."""

    def __init__(self, norm: ABN):
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x [N, C, ...] and apply the activation."""
        norm = self.norm
        y = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        return F.leaky_relu(y, 0.0 if norm.activation == "relu" else norm.slope)


def with_plain_norm(head: nn.Module) -> nn.Module:
    """Replace the activated batch norms of a head by plain ones, in place, and return the head."""
    for name, module in [*head.named_modules()]:
        if isinstance(module, ABN):
            head.set_submodule(name, PlainNorm(module))
    return head


def plain_outputs(state: Mapping[str, Tensor], images: Tensor, around: Tensor | None = None) -> list[Tensor]:
    """Return the outputs of a network with plain batch norm; see `outputs`.

    Args:
        state: the weights.
        images: [N, 3, h, w], normalized.
        around: [1, 3, 1, 1], padding of the pictures; zeros by default.
    """
    variant = VARIANTS[variant_of(state)]

    def convolve(x: Tensor, name: str, **options: Any) -> Tensor:
        return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), **options)

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (
            state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, weight, bias, eps=EPS)

    margin = variant.kernel // 2
    x = F.pad(images, [margin] * 4)
    if around is not None:
        x = x + around * F.pad(-torch.ones_like(images[:, :1]), [margin] * 4).add(1)
    x = norm(convolve(x, "conv1", stride=2), "bn1").relu()
    for number in range(2, len(variant.stem) + 1):
        x = norm(convolve(x, f"conv{number}", padding=1), f"bn{number}").relu()
    x = F.max_pool2d(x, 3, 2, 1, ceil_mode=variant.ceil_mode)
    layers = []
    for layer, blocks in enumerate(blocks_of(state), 1):
        for block in range(blocks):
            name = f"layer{layer}.{block}"
            stride = 2 if layer == 2 and block == 0 else 1
            dilation = {3: 2, 4: 4}.get(layer, 1)
            if variant.contract_dilation and block == 0:
                dilation = max(1, dilation // 2)
            y = norm(convolve(x, f"{name}.conv1"), f"{name}.bn1").relu()
            y = convolve(y, f"{name}.conv2", stride=stride, padding=dilation, dilation=dilation)
            y = norm(convolve(norm(y, f"{name}.bn2").relu(), f"{name}.conv3"), f"{name}.bn3")
            if block == 0:
                x = norm(convolve(x, f"{name}.downsample.0", stride=stride), f"{name}.downsample.1")
            x = (x + y).relu()
        layers.append(x)
    if not has_heads(state):
        return layers

    network = network_of(state)
    assert network.dsn is not None
    return [with_plain_norm(network.head)(x), with_plain_norm(network.dsn)(layers[2])]


def has_heads(state: Mapping[str, Tensor]) -> bool:
    """Return whether a state dict has the heads of a network, not only its backbone."""
    return any(name.startswith(HEADS) for name in state)


if __name__ == "__main__":
    end(main)

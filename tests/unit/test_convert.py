"""Converted weights against the networks of their programs, and every way out and back in."""

from __future__ import annotations

import argparse
import os
import pickletools
import re
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import fill, fill_library, longest_file
from torch import Tensor, nn
from torch.nn import functional as F

import evaluate
from dataset import IMG_MEAN
from dataset.labels import CITYSCAPES
from networks import ABN, CheckpointError, Seg_Model
from networks.convert import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    from_batch_norm,
    imagenet_names,
    rename,
    to_batch_norm,
    to_our_pictures,
)
from networks.pretrained import read_weights
from networks.resnet import ResNet
from networks.variants import VARIANTS, variant_of
from networks.weights import ACTIVATED, BATCH_NORM, PLAIN, batch_norm_of, load_weights, mark, read_state_dict
from segmenter import Segmenter
from tools import common, convert
from utils.args import exit_status
from utils.errors import RunError

#: Mean and standard deviation of every converted release: R G B in 0..255.
MEAN = torch.tensor([123.675, 116.28, 103.53], dtype=torch.float64).view(3, 1, 1)
STD = torch.tensor([58.395, 57.12, 57.375], dtype=torch.float64).view(3, 1, 1)
OUR_MEAN = torch.tensor(IMG_MEAN, dtype=torch.float64).view(3, 1, 1)
#: Tolerance for rounding to float32, relative to the largest value. A missing eps gives a larger error.
EXACT = 1e-6


def picture(height: int, width: int) -> Tensor:
    """Return a random picture [1, 3, height, width], R G B in 0..255."""
    random = torch.randint(0, 256, (1, 3, height, width), generator=torch.Generator().manual_seed(2))
    return random.double()


def ours(rgb: Tensor) -> Tensor:
    return rgb.flip(1) - OUR_MEAN


def layers_of(model: nn.Module, forward, images: Tensor) -> list[Tensor]:
    layers: list[Tensor] = []
    hooks = [
        getattr(model, f"layer{number}").register_forward_hook(lambda _m, _i, y: layers.append(y))
        for number in range(1, 5)
    ]
    with torch.no_grad():
        forward(images)
    for hook in hooks:
        hook.remove()
    return layers


def network(state: dict[str, Tensor], num_classes: int | None = None) -> ResNet:
    """Return ResNet-50 in float64 with the entries of `state`, with CCNet's heads if it has classes."""
    variant = variant_of(state)
    with torch.device("meta"):
        model = (
            Seg_Model(num_classes, backbone="resnet50", variant=variant)
            if num_classes
            else ResNet("resnet50", variant=variant)
        )
    model.load_state_dict({name: value.double() for name, value in state.items()}, assign=True)
    return model.eval()


def assert_same(outputs: list[Tensor], expected: list[Tensor], share: float = EXACT) -> None:
    assert len(outputs) == len(expected)
    for output, right in zip(outputs, expected, strict=True):
        assert output.shape == right.shape
        assert (output - right).abs().max() <= share * right.abs().max()


def tool(*arguments: object) -> int:
    """Run `python -m tools.convert` in this process; return its exit status."""
    return exit_status(lambda: convert.main([str(argument) for argument in arguments]))


def converted(folder: Path, state: object, *arguments: object) -> dict[str, Tensor]:
    """Return the state dict that the tool converts a state dict to."""
    torch.save(state, folder / "source.pth")
    (folder / "output.pth").unlink(missing_ok=True)
    assert tool(folder / "source.pth", folder / "output.pth", *arguments) == 0
    return read_state_dict(folder / "output.pth")


def unchecked(state: dict[str, Tensor], mean=IMAGENET_MEAN, std=IMAGENET_STD) -> dict[str, Tensor]:
    """Convert the state dict of a library, without the comparison of the networks."""
    return from_batch_norm(to_our_pictures(imagenet_names("source", state), mean, std, IMG_MEAN.tolist()))


class TestImageNet:
    """ResNets of torchvision and timm with output stride 8, dilated as these libraries do it."""

    def test_torchvision(self, tmp_path):
        models = pytest.importorskip("torchvision").models
        library = fill_library(models.resnet50(replace_stride_with_dilation=[False, True, True]))
        state = converted(tmp_path, library.state_dict())
        assert variant_of(state) == "torchvision" and not any(name.startswith("fc.") for name in state)
        rgb, model = picture(56, 41), network(state)
        right = layers_of(library.double(), library, (rgb - MEAN) / STD)
        assert_same(layers_of(model, model.features, ours(rgb)), right)

    @pytest.mark.parametrize("name", ["resnet50", "resnet50c"])
    def test_timm(self, name):
        timm = pytest.importorskip("timm")
        library = fill_library(timm.create_model(name, output_stride=8))
        state = unchecked(library.state_dict())
        assert variant_of(state) == {"resnet50": "torchvision", "resnet50c": "mmseg"}[name]
        rgb, model = picture(40, 56), network(state)
        right = layers_of(library.double(), library.forward_features, (rgb - MEAN) / STD)
        assert_same(layers_of(model, model.features, ours(rgb)), right)

    def test_timm_with_ccnets_own_stem(self, tmp_path):
        """The result is CCNet itself: all blocks of a layer are dilated, padding has the value IMG_MEAN."""
        timm = pytest.importorskip("timm")
        library = fill_library(timm.create_model("resnet50s", output_stride=8))
        state = converted(tmp_path, library.state_dict())
        assert variant_of(state) == "ccnet" and set(state) == set(ResNet("resnet50").state_dict())
        for layer, dilation in ((library.layer3, 2), (library.layer4, 4)):
            layer[0].conv2.dilation = layer[0].conv2.padding = (dilation, dilation)
        library.double()
        rgb, model = picture(97, 65), network(state)  # the same with and without the pool's ceil_mode
        layers = layers_of(model, model.features, ours(rgb))

        theirs = layers_of(library, library.forward_features, (rgb - MEAN) / STD)
        inner = (slice(None), slice(None), slice(6, -6), slice(6, -6))
        assert_same([layers[0][inner]], [theirs[0][inner]])
        difference = (layers[0] - theirs[0]).abs().max() / theirs[0].abs().max()
        assert 1e-5 < difference < 1e-2  # only near the border, and little there

        padded = F.pad(ours(rgb), [1] * 4) + OUR_MEAN
        library.conv1[0].padding = (0, 0)
        assert_same(layers, layers_of(library, library.forward_features, (padded.flip(1) - MEAN) / STD))

    def test_other_pictures_from_safetensors(self, tmp_path):
        timm, safetensors = pytest.importorskip("timm"), pytest.importorskip("safetensors.torch")
        library = fill_library(timm.create_model("resnet50", output_stride=8))
        safetensors.save_file(library.state_dict(), tmp_path / "model.safetensors")
        numbers = ["--mean", "127.5,127,0", "--std", "127.5,128,1"]
        assert tool(tmp_path / "model.safetensors", tmp_path / "output.pth", *numbers) == 0
        mean, std = torch.tensor([127.5, 127, 0]).view(3, 1, 1), torch.tensor([127.5, 128, 1]).view(3, 1, 1)
        rgb, model = picture(33, 41), network(read_state_dict(tmp_path / "output.pth"))
        right = layers_of(library.double(), library.forward_features, (rgb - mean) / std)
        assert_same(layers_of(model, model.features, ours(rgb)), right)


def test_weights_that_ours_cannot_have():
    """Negative batch-norm weights and those below eps are converted exactly, channel by channel."""
    torch.manual_seed(0)
    convolution, norm = nn.Conv2d(3, 8, 3).double(), nn.BatchNorm2d(8).double().eval()
    weights = [2.0, -2.0, 1e-5, -1e-5, 1e-6, -1e-6, 1e-9, -1e-9]
    state = {"dsn.0.weight": convolution.weight, "dsn.0.bias": convolution.bias}
    with torch.no_grad():
        norm.weight.copy_(torch.tensor(weights))
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        state |= {f"dsn.1.{name}": value for name, value in norm.state_dict().items() if value.dim()}
        state = {name: value.detach().clone() for name, value in from_batch_norm(state).items()}
        x = torch.randn(1, 3, 9, 9, dtype=torch.float64)
        expected = norm(convolution(x))
        ours = ABN(8, "identity").double().eval()
        ours.load_state_dict({name[6:]: state[name] for name in state if name.startswith("dsn.1.")})
        output = ours(F.conv2d(x, state["dsn.0.weight"].double(), state["dsn.0.bias"].double()))
    difference = (output - expected).abs().amax((0, 2, 3)) / expected.abs().amax((0, 2, 3))
    assert (difference < EXACT).all()


class Mmseg(nn.Module):
    """The CCNet of mmsegmentation, rebuilt in plain PyTorch from its description, with its names."""

    def __init__(self, classes: int):
        super().__init__()
        stem: list[nn.Module] = []
        for inputs, outputs, stride in ((3, 32, 2), (32, 32, 1), (32, 64, 1)):
            stem += self.unit(inputs, outputs, 3, stride)
        self.backbone = nn.Module()
        self.backbone.stem = nn.Sequential(*stem)
        inputs = 64
        for number, (blocks, planes, stride, first, dilation) in enumerate(
            [(3, 64, 1, 1, 1), (4, 128, 2, 1, 1), (6, 256, 1, 1, 2), (3, 512, 1, 2, 4)], 1
        ):
            layer = nn.Sequential()
            for block in range(blocks):
                layer.append(
                    self.block(inputs, planes, stride, first)
                    if block == 0
                    else self.block(inputs, planes, 1, dilation)
                )
                inputs = 4 * planes
            setattr(self.backbone, f"layer{number}", layer)
        self.decode_head = nn.Module()
        self.decode_head.conv_seg = nn.Conv2d(512, classes, 1)
        self.decode_head.convs = nn.Sequential(self.module(2048, 512), self.module(512, 512))
        self.decode_head.conv_cat = self.module(2560, 512)
        cca = self.decode_head.cca = nn.Module()
        cca.query_conv, cca.key_conv = nn.Conv2d(512, 64, 1), nn.Conv2d(512, 64, 1)
        cca.value_conv, cca.gamma = nn.Conv2d(512, 512, 1), nn.Module()
        cca.gamma.scale = nn.Parameter(torch.tensor(0.6))
        self.auxiliary_head = nn.Module()
        self.auxiliary_head.conv_seg = nn.Conv2d(256, classes, 1)
        self.auxiliary_head.convs = nn.Sequential(self.module(1024, 256))

    @staticmethod
    def unit(inputs, outputs, kernel, stride=1, dilation=1):
        padding = dilation * (kernel // 2)
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    def module(self, inputs, outputs):
        module = nn.Module()
        module.conv, module.bn, _ = self.unit(inputs, outputs, 3)
        return module

    def block(self, inputs, planes, stride, dilation):
        block = nn.Module()
        block.conv1, block.bn1, _ = self.unit(inputs, planes, 1)
        block.conv2, block.bn2, _ = self.unit(planes, planes, 3, stride, dilation)
        block.conv3, block.bn3, _ = self.unit(planes, 4 * planes, 1)
        if inputs != 4 * planes:
            block.downsample = nn.Sequential(*self.unit(inputs, 4 * planes, 1, stride)[:2])
        return block

    @staticmethod
    def attend(cca, x):
        """Compute attention over all pairs of pixels, masked to those in one row or column."""
        _, _, height, width = x.shape
        query, key, value = (part(x).flatten(2) for part in (cca.query_conv, cca.key_conv, cca.value_conv))
        rows = torch.arange(height).repeat_interleave(width)
        columns = torch.arange(width).repeat(height)
        crossing = (rows[:, None] == rows) | (columns[:, None] == columns)
        weights = torch.einsum("nci,ncj->nij", query, key).masked_fill(~crossing, float("-inf")).softmax(2)
        return cca.gamma.scale * torch.einsum("nij,ncj->nci", weights, value).view_as(x) + x

    def forward(self, x):
        def reduce(module, x):
            return F.relu(module.bn(module.conv(x)))

        x = F.max_pool2d(self.backbone.stem(x), 3, 2, 1)
        layers = []
        for number in range(1, 5):
            for block in getattr(self.backbone, f"layer{number}"):
                y = F.relu(block.bn1(block.conv1(x)))
                y = block.bn3(block.conv3(F.relu(block.bn2(block.conv2(y)))))
                x = F.relu(y + (block.downsample(x) if hasattr(block, "downsample") else x))
            layers.append(x)
        head = self.decode_head
        y = reduce(head.convs[0], x)
        for _ in range(2):
            y = self.attend(head.cca, y)
        y = reduce(head.conv_cat, torch.cat([x, reduce(head.convs[1], y)], 1))
        auxiliary = reduce(self.auxiliary_head.convs[0], layers[2])
        return [head.conv_seg(y), self.auxiliary_head.conv_seg(auxiliary)]


@pytest.mark.slow
def test_mmsegmentation(tmp_path):
    theirs = fill_library(Mmseg(7))
    state = converted(tmp_path, {"meta": {"CLASSES": ["road"]}, "state_dict": theirs.state_dict()})
    rgb = picture(56, 41)
    with torch.no_grad():
        right = theirs.double()((rgb - MEAN) / STD)
        assert_same(network(state, 7)(ours(rgb)), right)
        args = argparse.Namespace(
            restore_from=str(tmp_path / "output.pth"), gpu="cpu", classes=None, recurrence=None
        )
        opened = common.open_network(args)
        assert opened.model.variant == VARIANTS["mmseg"] and opened.num_classes == 7
        assert_same(opened.model.double()(ours(rgb)), right[:1])  # without the auxiliary head


@pytest.mark.slow
def test_original_out_and_in_again(tmp_path, monkeypatch):
    """Names, order and bits are kept, in a file that PyTorch 0.4 can read."""
    monkeypatch.setattr(convert, "compare", lambda *_: None)  # of what is the same to the bit, as is tested
    with torch.device("meta"):
        model = Seg_Model(19)
    model.to_empty(device="cpu")
    fill(model)
    names, before = list(model.state_dict()), model.state_dict()
    wrapped = {f"module.{name}": value for name, value in before.items()}
    out = converted(
        tmp_path, {**wrapped, "module.bn1.num_batches_tracked": torch.tensor(3)}, "--to", "original"
    )
    path = tmp_path / "output.pth"
    assert not zipfile.is_zipfile(path)
    with path.open("rb") as file:
        for _ in range(3):  # magic number, protocol, system
            list(pickletools.genops(file))
        used = {argument for opcode, argument, _ in pickletools.genops(file) if opcode.name == "GLOBAL"}
    assert used <= {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch FloatStorage"}
    assert list(out) == names and len(out) == 562
    path.rename(tmp_path / "original.pth")
    assert tool(tmp_path / "original.pth", path) == 0
    again = read_state_dict(path)
    assert zipfile.is_zipfile(path) and list(again) == names
    assert all(
        torch.equal(out[name], before[name]) and torch.equal(again[name], before[name]) for name in names
    )


class PlainNorm(nn.BatchNorm2d):
    """nn.BatchNorm2d, the residual and the activation in place of an activated batch norm."""

    def __init__(self, norm: ABN):
        super().__init__(len(norm.weight))
        self.slope = {"identity": 1.0, "relu": 0.0, "leaky_relu": 0.01}[norm.activation]

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        y = super().forward(x)
        return F.leaky_relu(y if residual is None else y + residual, self.slope)


def plain(model: nn.Module) -> nn.Module:
    """Return `model` with `PlainNorm` in place of every activated batch norm."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, ABN):
                setattr(module, name, PlainNorm(child))
    return model


@pytest.mark.slow
def test_plain_batch_norm_and_back(tmp_path):
    model = Seg_Model(5, backbone="resnet50")
    fill(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["layer1.0.bn1.weight"][:3] = torch.tensor([0.0, 1e-7, -1e-6])
    folded = converted(tmp_path, state, "--to", "batch-norm")
    assert list(folded) == list(state)
    theirs = plain(Seg_Model(5, backbone="resnet50"))
    theirs.load_state_dict(torch.load(tmp_path / "output.pth", weights_only=True))
    images = ours(picture(33, 49))
    with torch.no_grad():
        right = network(state, 5)(images)
        assert_same(theirs.double().eval()(images), right)
        # The mark identifies the kind. Without a mark, as after another program, --from does.
        back = converted(tmp_path, folded)
        assert_same(network(back, 5)(images), right)
    torch.save(dict(folded), tmp_path / "unmarked.pth")
    unmarked = convert.convert(convert.read_source(str(tmp_path / "unmarked.pth"), "batch-norm", None, None))
    assert all(torch.equal(unmarked[name], value) for name, value in back.items())
    assert batch_norm_of(back) == ACTIVATED and batch_norm_of(folded) == PLAIN
    with pytest.raises(CheckpointError, match="convert it back with python -m tools.convert"):
        load_weights(model, "folded.pth", state=folded)
    # Activated weights differ from plain ones, so the test above would find a confusion.
    assert not torch.equal(folded["bn1.weight"], state["bn1.weight"])
    again = to_batch_norm(back)
    for name, value in folded.items():
        torch.testing.assert_close(again[name], value, rtol=1e-6, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("target", convert.TARGETS)
def test_weights_of_16_bits(dtype, target, tmp_path, monkeypatch):
    """Weights of 16 bits are converted exactly, except for the sum with eps."""
    monkeypatch.setattr(convert, "compare", lambda *_: None)
    state = {"layer1.0.bn1.weight": torch.randn(64).to(dtype), "layer1.0.bn1.running_mean": torch.ones(64)}
    content = to_batch_norm(state) if target == "batch-norm" else state
    convert.write(str(tmp_path / "output.pth"), target, content, convert.Source(state, "ccnet", None))
    weight = read_state_dict(tmp_path / "output.pth")["layer1.0.bn1.weight"]
    assert weight.dtype == (dtype if target in ("ccnet", "safetensors") else torch.float32)
    right = state["layer1.0.bn1.weight"].float()
    assert torch.equal(weight.float(), right.abs() + 1e-5 if target == "batch-norm" else right)


def small_state(**changes: Tensor | None) -> dict[str, Tensor]:
    """Return CCNet's ResNet-50 filled with one number, with entries replaced, added, or removed (None)."""
    with torch.device("meta"):
        model = Seg_Model(5, backbone="resnet50")
    state = {**constant(model), **changes}
    return {name: value for name, value in state.items() if value is not None}


def library_state(name: str) -> dict[str, Tensor]:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        return constant(timm.create_model(name))


def constant(model: nn.Module) -> dict[str, Tensor]:
    """Return a state dict of the shapes of the model that takes little space on the disk."""
    number = torch.full([1], 0.01, device="cpu")
    return {
        name: number.reshape([1] * value.dim()).expand(value.shape)
        for name, value in model.state_dict().items()
    }


def backbone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.startswith(("head.", "dsn."))}


def tracked(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `state` with the entries of nn.BatchNorm2d or of inplace_abn."""
    ends = (".running_mean", ".num_batches_tracked")
    return state | {name.replace(*ends): torch.tensor(0) for name in state if name.endswith(ends[0])}


def variant_state(name: str) -> dict[str, Tensor]:
    with torch.device("meta"):
        return constant(Seg_Model(5, backbone="resnet50", variant=name))


def negative_weight() -> dict[str, Tensor]:
    return small_state(**{"bn1.weight": torch.linspace(-1, 1, 64)})


def mmseg_state() -> dict[str, Tensor]:
    with torch.device("meta"):
        return constant(Mmseg(7))


#: A file and the releases that it fits, the assumed one first. 0.01 may be a weight of either batch norm.
FILES = {
    "ccnet": (small_state, ["ccnet", "batch-norm"]),
    "with negative weights": (negative_weight, ["ccnet"]),
    "with negative weights and counts": (lambda: tracked(negative_weight()), ["ccnet", "batch-norm"]),
    "backbone": (lambda: backbone(small_state()), ["ccnet", "batch-norm"]),
    "backbone with fc": (
        lambda: {**backbone(negative_weight()), "fc.weight": torch.zeros(3)},
        ["ccnet"],
    ),
    "marked activated": (lambda: mark(small_state(), {BATCH_NORM: ACTIVATED}), ["ccnet"]),
    "marked plain": (lambda: mark(small_state(), {BATCH_NORM: PLAIN}), ["batch-norm"]),
    "marked plain backbone": (lambda: mark(backbone(small_state()), {BATCH_NORM: PLAIN}), ["batch-norm"]),
    "mmseg, converted": (lambda: variant_state("mmseg"), ["ccnet", "batch-norm"]),
    "torchvision, converted": (lambda: variant_state("torchvision"), ["ccnet", "batch-norm"]),
    "mmseg": (mmseg_state, ["mmseg"]),
    "mmseg's backbone": (
        lambda: {name: value for name, value in mmseg_state().items() if name.startswith("backbone.")},
        ["mmseg"],
    ),
    "torchvision": (lambda: library_state("resnet50"), ["imagenet"]),
    "deep stem": (lambda: library_state("resnet50c"), ["imagenet"]),
    "CCNet's stem": (lambda: library_state("resnet50s"), ["imagenet"]),
}


class TestRefusals:
    """A refusal is one line, and no file is written."""

    def refused(self, capsys, folder, *arguments, status=2):
        before = sorted(path.name for path in folder.iterdir())
        assert tool(*arguments) == status
        assert sorted(path.name for path in folder.iterdir()) == before
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and "Traceback" not in error
        return error

    @pytest.mark.parametrize("name", FILES)
    def test_from_that_contradicts_the_file(self, name, capsys, tmp_path):
        make, kinds = FILES[name]
        torch.save(make(), tmp_path / "source.pth")
        for kind in convert.KINDS:
            if kind in kinds:
                read = convert.read_source(str(tmp_path / "source.pth"), kind, None, None)
                assert read.kind == kind
                continue
            paths = tmp_path / "source.pth", tmp_path / "output.pth"
            error = self.refused(capsys, tmp_path, *paths, "--from", kind)
            assert f"--from {kind}: {paths[0]} is {kinds[0]}; omit --from" in error
        assert convert.read_source(str(tmp_path / "source.pth"), None, None, None).kind == kinds[0]

    def test_two_networks_in_one_file(self, capsys, tmp_path):
        state = mmseg_state()
        torch.save(state | {"layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1)}, tmp_path / "source.pth")
        error = self.refused(capsys, tmp_path, tmp_path / "source.pth", tmp_path / "output.pth")
        assert "two networks" in error

    @pytest.mark.parametrize("name", ["head.bottleneck.3.weight", "bn1.weight", "dsn.0.weight"])
    @pytest.mark.parametrize(
        "value",
        [
            torch.tensor(1.0),
            torch.zeros(0, 512, 1, 1),
            torch.ones(64, dtype=torch.complex64),
            torch.ones(64, dtype=torch.bool),
            torch.empty(64, device="meta"),
        ],
        ids=["no dimensions", "no classes", "complex", "boolean", "meta"],
    )
    def test_entries_that_are_no_weights(self, name, value, capsys, tmp_path):
        torch.save(small_state(**{name: value}), tmp_path / "source.pth")
        error = self.refused(capsys, tmp_path, tmp_path / "source.pth", tmp_path / "output.pth")
        assert f"source.pth: {name} " in error

    @pytest.mark.parametrize("name", ["decode_head.cca.gamma.scale", "auxiliary_head.convs.0.conv.weight"])
    @pytest.mark.parametrize("value", [torch.zeros(0), torch.zeros(2), torch.tensor(1)])
    def test_entries_of_mmsegmentation_that_are_no_weights(self, name, value, capsys, tmp_path):
        torch.save(mmseg_state() | {name: value}, tmp_path / "source.pth")
        error = self.refused(capsys, tmp_path, tmp_path / "source.pth", tmp_path / "output.pth")
        assert "head.cca.gamma" in error or "dsn.0.weight" in error

    def test_weights_beyond_float32(self, capsys, tmp_path):
        """Weights beyond float32 are found in the file, after the conversion, and in the outputs."""
        paths = tmp_path / "source.pth", tmp_path / "output.pth"
        torch.save(library_state("resnet50"), paths[0])
        error = self.refused(capsys, tmp_path, *paths, "--std", "1,1e-41,1e-41")
        assert "source.pth, converted: has nan, inf" in error and "conv1.weight" in error
        state = small_state()
        large = {
            name: torch.full_like(state[name], 3e38) for name in state if re.search(r"bn.\.weight", name)
        }
        torch.save({**state, **large}, paths[0])
        assert "gives nan or inf" in self.refused(capsys, tmp_path, *paths)

    @pytest.mark.parametrize("target", ["ccnet", "batch-norm"])
    def test_full_disk_names_the_output(self, target, capsys, tmp_path, monkeypatch):
        paths = [str(tmp_path / "source.pth"), str(tmp_path / "output.pth")]
        torch.save(small_state(), paths[0])
        monkeypatch.setattr(sys, "argv", ["convert", *paths, "--to", target])
        with longest_file(10**6), pytest.raises(SystemExit) as ended:
            common.end(convert.main)
        assert ended.value.code == 1 and [path.name for path in tmp_path.iterdir()] == ["source.pth"]
        error = capsys.readouterr().err
        assert f"{paths[1]}: can't be written (File too large)" in error and len(error.splitlines()) == 1

    def test_full_disk_in_the_originals_format(self, tmp_path):
        with longest_file(10**6), pytest.raises(OSError, match="File too large") as error:
            convert.write(str(tmp_path / "output.pth"), "original", small_state(), None)
        assert error.value.filename == str(tmp_path / "output.pth") and not list(tmp_path.iterdir())

    def test_output_that_is_no_file(self, capsys, tmp_path):
        torch.save(small_state(), tmp_path / "source.pth")
        os.mkfifo(tmp_path / "fifo")
        for output in (tmp_path / "fifo", "/dev/null", tmp_path):
            assert f"{output}: exists" in self.refused(capsys, tmp_path, tmp_path / "source.pth", output)
        (tmp_path / "file").touch()
        error = self.refused(capsys, tmp_path, tmp_path / "source.pth", tmp_path / "file/output.pth")
        assert "OUTPUT" in error

    @pytest.mark.parametrize(
        "make, words",
        [
            (lambda: {"encoder.weight": torch.zeros(3)}, ["encoder.weight"]),
            (lambda: small_state(**{"layer1.0.se.weight": torch.zeros(3)}), ["layer1.0.se.weight", "lacks"]),
            (lambda: small_state(**{"head.conva.0.weight": None}), ["lacks head.conva.0.weight"]),
            (lambda: library_state("resnet26"), ["2, 2, 2, 2"]),
            (lambda: library_state("resnet34"), ["lacks layer1.0", "bottleneck"]),
            (lambda: library_state("resnet50d"), ["ResNet-D", "resnet101c"]),
            (lambda: library_state("resnext50_32x4d"), ["has shape", "plain resnet50"]),
            (lambda: {"decode_head.conv_seg.weight": torch.zeros(5, 512, 1, 1)}, ["0, 0, 0, 0"]),
        ],
        ids=["names", "unknown", "missing", "depth", "blocks", "resnet-d", "groups", "no backbone"],
    )
    def test_other_networks(self, make, words, capsys, tmp_path):
        torch.save(make(), tmp_path / "source.pth")
        error = self.refused(capsys, tmp_path, tmp_path / "source.pth", tmp_path / "output.pth")
        assert "source.pth" in error and all(word in error for word in words)

    @pytest.mark.parametrize("name", ["source.pth", "source.safetensors"])
    def test_damaged_and_missing(self, name, capsys, tmp_path):
        output = tmp_path / "output.pth"
        assert "no such file" in self.refused(capsys, tmp_path, tmp_path / name, output)
        (tmp_path / name).write_bytes(b"PK\x03\x04 and no more")
        assert "damaged" in self.refused(capsys, tmp_path, tmp_path / name, output)

    def test_output_that_exists(self, capsys, tmp_path):
        torch.save(small_state(), tmp_path / "source.pth")
        (tmp_path / "output.pth").write_text("mine")
        error = self.refused(capsys, tmp_path, tmp_path / "source.pth", tmp_path / "output.pth")
        assert "output.pth: exists; name another file" in error
        assert (tmp_path / "output.pth").read_text() == "mine"

    def test_flags_that_do_not_fit(self, capsys, tmp_path):
        torch.save(small_state(), tmp_path / "source.pth")
        paths = [tmp_path / "source.pth", tmp_path / "output.pth"]
        assert "only ccnet with resnet101" in self.refused(capsys, tmp_path, *paths, "--to", "original")
        assert "--mean" in self.refused(capsys, tmp_path, *paths, "--mean", "1,2,3")
        assert "--from" in self.refused(capsys, tmp_path, "torchvision", paths[1], "--from", "mmseg")

    def test_outputs_that_differ(self, capsys, tmp_path, monkeypatch):
        """A wrong conversion, also one that gives NaN, is found by comparing outputs."""
        paths = [tmp_path / "source.pth", tmp_path / "output.pth"]
        torch.save(small_state(), tmp_path / "source.pth")
        before = convert.Source(small_state(), "ccnet", None)
        nan = torch.full([64], torch.nan)
        with pytest.raises(RunError, match="not written, because its outputs differ by inf"):
            convert.compare("output.pth", before, before._replace(state=small_state(**{"bn1.bias": nan})))
        wrong = torch.linspace(0, 1, 64)
        monkeypatch.setattr(convert, "to_batch_norm", lambda state: {**state, "bn1.weight": wrong})
        assert "not written" in self.refused(capsys, tmp_path, *paths, "--to", "batch-norm", status=1)

    def test_raw_weights_are_not_taken_for_ours(self, tmp_path):
        with torch.device("meta"):
            mmseg = constant(Mmseg(19))
        for number, state in enumerate((library_state("resnet50"), mmseg)):
            torch.save(state, path := tmp_path / f"{number}.pth")
            args = evaluate.get_parser().parse_args(["--data-dir", ".", "--restore-from", str(path)])
            with pytest.raises(CheckpointError, match="python -m tools.convert"):
                evaluate.resolve(args, read_state_dict(path))


class TestByName:
    def test_timm(self, monkeypatch):
        timm = pytest.importorskip("timm")
        create = timm.create_model
        library = fill_library(create("resnet50c"))
        library.pretrained_cfg = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
        monkeypatch.setattr(timm, "create_model", lambda name, pretrained: library)
        state = read_weights("timm:resnet50c", IMG_MEAN.tolist())
        expected = unchecked(library.state_dict(), (127.5, 102, 76.5), (51, 76.5, 102))
        assert set(state) == set(expected)
        for name, value in state.items():
            torch.testing.assert_close(value, expected[name])

    @pytest.mark.parametrize(
        "name, words",
        [
            ("torchvision:resnet18", "resnet101 or resnet50"),
            ("torchvision:resnet50.V9", "IMAGENET1K_V2"),
            ("timm:resnet50d", "resnet50s"),
            ("timm:resnet50.nothing", "resnet50.a1_in1k"),
            ("timm", "resnet50s"),
            ("torchvision:resnet50", "can't be downloaded"),
            ("timm:resnet50", "can't be downloaded"),
        ],
    )
    def test_weights_that_are_unavailable(self, name, words, tmp_path, monkeypatch):
        library = pytest.importorskip(name.partition(":")[0])
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nobody answers
        if library.__name__ == "timm":

            def create_model(*_arguments, **_options):
                raise OSError("no network\nat all")

            monkeypatch.setattr(library, "create_model", create_model)
        with pytest.raises(CheckpointError) as error:
            read_weights(name, IMG_MEAN.tolist())
        assert (
            str(error.value).startswith(name) and words in str(error.value) and "\n" not in str(error.value)
        )

    @pytest.mark.parametrize("library", ["torchvision", "timm"])
    def test_a_library_that_is_missing(self, library, monkeypatch):
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(CheckpointError, match="can't be imported"):
            read_weights(f"{library}:resnet50", IMG_MEAN.tolist())


def test_rename_takes_whole_parts():
    modules = {"a": "x", "a.b": "y", "c.1": "z"}
    names = ["a.w", "a.b.w", "ab.w", "c.1.w", "c.10.w"]
    assert list(rename(dict.fromkeys(names), modules)) == ["x.w", "y.w", "ab.w", "z.w", "c.10.w"]


CLASSES = {
    "mmsegmentation 0.x": {"CLASSES": ("sky", "tree"), "PALETTE": [[1, 2, 3], [4, 5, 6]]},
    "mmsegmentation 1.x": {"dataset_meta": {"classes": ["sky", "tree"], "palette": [[1, 2, 3], [4, 5, 6]]}},
    "no palette": {"CLASSES": ["sky", "tree"]},
    "a palette of tensors": {"CLASSES": ["sky", "tree"], "PALETTE": [[torch.tensor(1), 2, 3], [4, 5, 600]]},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", CLASSES)
def test_classes_of_mmsegmentation_are_kept(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "compare", lambda *_: None)
    (tmp_path / "args.json").write_text('{"num_classes": 3, "recurrence": 5}')  # of another program's run
    for target in ("ccnet", "safetensors"):
        content = {"meta": CLASSES[kind], "state_dict": fill_library(Mmseg(2)).state_dict()}
        converted(tmp_path, content, "--to", target)
        opened = Segmenter.load(tmp_path / "output.pth", device="cpu")
        assert opened.names == ["sky", "tree"] and opened.description.recurrence == 2
        assert "palette" in kind or opened.labels.colors() == [(1, 2, 3), (4, 5, 6)]
        (tmp_path / "output.pth").unlink()


def test_classes_can_be_given_and_have_to_fit(tmp_path, capsys):
    torch.save(fill_library(Mmseg(2)).state_dict(), tmp_path / "source.pth")
    rows = [f"class {k}\t{k}\t{k}\t{k},1,1" for k in range(3)]
    (tmp_path / "a.tsv").write_text("\n".join(["name\tid\ttrain_id\tcolor", *rows]) + "\n")
    for target, words in (("ccnet", "has 3 classes, but the network"), ("original", "omit it")):
        arguments = ["--classes", tmp_path / "a.tsv", "--to", target]
        assert tool(tmp_path / "source.pth", tmp_path / "out.pth", *arguments) == 2
        assert words in capsys.readouterr().err and not (tmp_path / "out.pth").exists()


@pytest.mark.slow
def test_cityscapes_of_mmsegmentation_has_the_official_ids(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "compare", lambda *_: None)
    meta = {"CLASSES": CITYSCAPES.names, "PALETTE": [list(color) for color in CITYSCAPES.colors]}
    converted(tmp_path, {"meta": meta, "state_dict": fill_library(Mmseg(19)).state_dict()})
    assert Segmenter.load(tmp_path / "output.pth", device="cpu").labels.is_cityscapes()

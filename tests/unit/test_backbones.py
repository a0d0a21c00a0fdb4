"""Networks of timm as backbone: features, weights, input, batch norm, and what a checkpoint says."""

from __future__ import annotations

import copy
import functools
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dataset import IMG_MEAN
from engine.training.ema import WeightAverage
from networks import (
    CheckpointError,
    Seg_Model,
    fold_batch_norm,
    load_weights,
    make_network,
    match_weights,
    synchronize,
    train_mode,
)
from networks.batch_norm import convert_batch_norm
from networks.convert import from_batch_norm, imagenet_names, to_our_pictures
from networks.models import MODELS
from networks.of_run import Description, describe
from networks.pretrained import read_weights
from networks.timm_backbone import TimmBackbone, check_name, plan_of
from utils.errors import UsageError

timm = pytest.importorskip("timm")

MEAN = torch.from_numpy(IMG_MEAN).double().view(3, 1, 1)
#: A network with dilation, one with padding, a pyramid, one in [N, H, W, C], and a plain transformer.
NETWORKS = {
    "resnet18": ((256, 512), 1),
    "convnext_atto": ((160, 320), 8),
    "hrnet_w18_small": ((512, 256 + 512 + 1024), 32),
    "swin_tiny_patch4_window7_224": ((384, 192 + 384 + 768), 32),
    "vit_tiny_patch16_224": ((192, 192), 16),
}


@functools.cache
def backbone(name: str) -> TimmBackbone:
    torch.manual_seed(0)
    return TimmBackbone(f"timm:{name}").eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_features_have_the_grid_of_our_own_backbone(name: str) -> None:
    channels, multiple = NETWORKS[name]
    plan = plan_of(f"timm:{name}")
    assert (plan.channels, plan.multiple) == (channels, multiple)
    with torch.device("meta"):
        ours = Seg_Model(1, backbone="resnet50", variant="torchvision")
    for size in ((33, 41), (9, 64)):
        images = torch.zeros(2, 3, *size)
        grid = ours.features(images.to("meta"))[1].shape[2:]
        with torch.no_grad():
            features = backbone(name)(images)
        assert [tuple(each.shape) for each in features] == [(2, number, *grid) for number in channels]


def fill(network: nn.Module) -> None:
    """Fill a network with random weights of a sensible size, some of the batch norm negative."""
    generator = torch.Generator().manual_seed(0)
    for name, value in network.state_dict().items():
        random = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        if name.endswith("running_var"):
            value.copy_(random.abs() * 0.3 + 0.5)
        else:
            value.copy_(random * ((2 / value[0].numel()) ** 0.5 if value.dim() > 1 else 0.5))


def saved(path: Path, name: str) -> nn.Module:
    """Write a file with weights of timm; return the network."""
    torch.manual_seed(1)
    library = timm.create_model(name).eval()
    for entry, value in library.state_dict().items():
        if "running" in entry or value.dim() == 1:
            value.add_(torch.rand(value.shape) * 0.1)
    torch.save(library.state_dict(), path)
    return library


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NETWORKS if "hrnet" not in name])
def test_features_of_a_picture_are_those_of_timm(name: str, tmp_path: Path) -> None:
    """The picture of this project against the normalized one, with timm's weights from a file."""
    library = saved(tmp_path / "w.pth", name)
    state = read_weights(str(tmp_path / "w.pth"), IMG_MEAN.tolist(), f"timm:{name}")
    network = make_network("fcn", 3, backbone=f"timm:{name}")
    report = load_weights(network, "w.pth", state=state)
    assert not report.left_over and all(entry.startswith(("head.", "dsn.")) for entry in report.new)
    network.double().eval()
    rgb = torch.randint(0, 256, (1, 3, 64, 96), generator=torch.Generator().manual_seed(0)).double()
    mean, std = (
        torch.tensor(library.pretrained_cfg[key], dtype=torch.float64).view(3, 1, 1)
        for key in ("mean", "std")
    )
    plan = plan_of(f"timm:{name}")
    features: Any = timm.create_model(name, features_only=True, **plan.arguments)
    ours = {
        entry.removeprefix("backbone.network."): value
        for entry, value in state.items()
        if ".network." in entry
    }
    assert not features.load_state_dict(ours, strict=False).unexpected_keys
    with torch.no_grad():
        maps = features.double().eval()((rgb / 255 - mean) / std)
        found = network.features(rgb.flip(1) - MEAN)
    if not plan.channels_first:
        maps = [each.permute(0, 3, 1, 2) for each in maps]
    maps = [
        F.interpolate(each, size=(8, 12), mode="bilinear") if each.shape[2] != 8 else each for each in maps
    ]
    expected = torch.cat([maps[index] for index in plan.main], 1)
    torch.testing.assert_close(found[1], expected, rtol=0, atol=1e-6 * expected.abs().max().item())
    # The file's numbers, under timm's own names.
    first = next(entry for entry, value in library.state_dict().items() if value.dim() == 4)
    values = [value for value in state.values() if value.shape == library.state_dict()[first].shape]
    assert any(torch.equal(value, library.state_dict()[first]) for value in values)


@pytest.mark.slow
def test_resnet50_equals_our_own(tmp_path: Path) -> None:
    """The variant of torchvision has the architecture of timm's resnet50; borders included."""
    library = saved(tmp_path / "w.pth", "resnet50")
    config: Any = library.pretrained_cfg
    mean, std = (tuple(255 * value for value in config[key]) for key in ("mean", "std"))
    own = Seg_Model(3, backbone="resnet50", variant="torchvision")
    state = to_our_pictures(imagenet_names("w", library.state_dict()), mean, std, IMG_MEAN.tolist())
    load_weights(own, "w", state=from_batch_norm(state))
    other = make_network("ccnet", 3, backbone="timm:resnet50")
    state = read_weights(str(tmp_path / "w.pth"), IMG_MEAN.tolist(), "timm:resnet50")
    load_weights(other, "w", state=state)
    images = torch.randint(0, 256, (1, 3, 33, 46)).double() - MEAN
    with torch.no_grad():
        expected, found = (each.double().eval().features(images) for each in (own, other))
    for one, two in zip(expected, found, strict=True):
        torch.testing.assert_close(two, one, rtol=0, atol=1e-5 * one.abs().max().item())


def test_weights_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    create = timm.create_model
    asked = []

    def local(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        asked.append((name, pretrained))
        torch.manual_seed(3)
        network = create(name.partition(".")[0], **options)
        network.pretrained_cfg = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.5)}
        return network

    plan_of("timm:resnet18")
    monkeypatch.setattr(timm, "create_model", local)
    for source, name in (("timm:resnet18.a1_in1k", "resnet18.a1_in1k"), ("timm", "resnet18")):
        state = read_weights(source, IMG_MEAN.tolist(), "timm:resnet18")
        assert asked.pop() == (name, True)
        images = torch.randint(0, 256, (1, 3, 5, 4)).float()
        found = (images.flip(1) - MEAN.float() + state["backbone.shift"].view(3, 1, 1)) * state[
            "backbone.scale"
        ].view(3, 1, 1)
        expected = (images / 255 - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor(
            [0.2, 0.25, 0.5]
        ).view(3, 1, 1)
        torch.testing.assert_close(found.flip(1), expected, rtol=1e-4, atol=1e-5)
    for source, words in (
        ("timm:resnet34", "does not fit --backbone timm:resnet18"),
        ("torchvision", "does not fit --backbone timm:resnet18"),
        ("timm:resnet18.nothing", "timm has no such weights; use one of .*resnet18.a1_in1k"),
    ):
        with pytest.raises(CheckpointError, match=f"^{source}: {words}"):
            read_weights(source, IMG_MEAN.tolist(), "timm:resnet18")


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    state = timm.create_model("mobilenetv3_small_050").state_dict()
    torch.save({name: value for name, value in state.items() if name != "conv_stem.weight"}, path)
    with pytest.raises(CheckpointError, match="lacks 1 entries of --backbone timm:.*conv_stem.weight; give"):
        read_weights(str(path), IMG_MEAN.tolist(), "timm:mobilenetv3_small_050")
    torch.save({**state, "conv_stem.weight": torch.zeros(4, 3, 3, 3)}, path)
    with pytest.raises(CheckpointError, match="does not fit --backbone timm:.*conv_stem.weight"):
        read_weights(str(path), IMG_MEAN.tolist(), "timm:mobilenetv3_small_050")
    # A checkpoint of this project is taken as it is.
    network = make_network("fcn", 3, backbone="timm:mobilenetv3_small_050")
    torch.save(network.state_dict(), path)
    read = read_weights(str(path), IMG_MEAN.tolist(), "timm:mobilenetv3_small_050")
    assert read.keys() == network.state_dict().keys()
    assert not match_weights(network, path, complete=True, state=read)[0].new
    with pytest.raises(CheckpointError, match="check --backbone"):
        match_weights(make_network("fcn", 3, backbone="timm:resnet18"), path)


def test_the_checkpoint_needs_a_name(tmp_path: Path) -> None:
    path = str(tmp_path / "CS_scenes_9.pth")
    with torch.device("meta"):
        state = dict(make_network("nonlocal", 5, backbone="timm:mobilenetv3_small_050").state_dict())
        own = dict(make_network("fcn", 5, backbone="resnet50").state_dict())
    assert all(value.is_floating_point() for value in state.values())  # as EMA and loading need it
    name = "timm:mobilenetv3_small_050"
    for given in ({}, {"backbone": "resnet50"}):
        with pytest.raises(CheckpointError, match="nothing says which .*; give --backbone timm:NAME"):
            describe(path, state, given)
    assert describe(path, state, {"backbone": name}).description == Description("nonlocal", name, 1, 5, None)
    (tmp_path / "args.json").write_text(f'{{"backbone": "{name}", "recurrence": 2}}')
    assert describe(path, state, {}).description == Description("nonlocal", name, 2, 5, None)
    with pytest.raises(UsageError, match=f"--backbone {name}: the weights .* have backbone resnet50"):
        describe(str(tmp_path / "other" / "a.pth"), own, {"backbone": name})


@pytest.mark.parametrize(
    "name, words",
    [
        ("resnet1", "timm [0-9.]+ has no such network; similar ones are .*resnet18"),
        ("resnet18.a1_in1k", "names weights; give --backbone timm:resnet18,"),
        ("hiera_tiny_224", "gives no features for images of any size"),
    ],
)
def test_names_that_do_not_work(name: str, words: str) -> None:
    with pytest.raises(UsageError, match=f"^timm:{name}: {words}"):
        plan_of(f"timm:{name}")


def test_without_timm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import train

    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match=r"^timm:resnet18: timm can't be imported .*pip install timm"):
        check_name("timm:resnet18")
    with pytest.raises(SystemExit) as ended:
        train.get_parser().parse_args(["--data-dir", ".", "--backbone", "timm:resnet18"])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and "pip install timm" in line
    with pytest.raises(SystemExit):
        train.get_parser().parse_args(["--data-dir", ".", "--backbone", "resnet18"])
    assert "'resnet18' is unknown; give resnet101, resnet50 or timm:NAME" in capsys.readouterr().err


@pytest.mark.parametrize("model", MODELS)
def test_every_model_takes_it_and_folds(model: str) -> None:
    torch.manual_seed(0)
    network = make_network(model, 3, backbone="timm:mobilenetv3_small_050")
    fill(network)
    network.double().eval()
    images = torch.randn(1, 3, 33, 41, dtype=torch.float64)
    with torch.no_grad():
        logits, auxiliary = network(images)
        (folded,) = fold_batch_norm(network)(images)
    assert logits.shape == auxiliary.shape == (1, 3, 5, 6)
    torch.testing.assert_close(folded, logits, rtol=1e-6, atol=1e-9)
    average = WeightAverage(network, 0.5)
    average.update(1)
    assert average.state_dict().keys() == network.state_dict().keys()


class Threads:
    """Threads as the processes that share statistics."""

    group = None

    def __init__(self, size: int):
        self.size = size
        self._barrier = threading.Barrier(size, timeout=60)
        self._terms: list[Tensor] = []

    def all_reduce(self, tensor: Tensor) -> None:
        self._barrier.wait()
        self._terms.append(tensor)
        self._barrier.wait()
        total = torch.stack(list(self._terms)).sum(0)
        self._barrier.wait()
        tensor.copy_(total)
        if self._barrier.wait() == 0:
            self._terms.clear()
        self._barrier.wait()


def in_threads(functions: list[Callable[[], None]]) -> None:
    errors: list[BaseException] = []

    def guarded(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_batch_norm_shares_its_statistics() -> None:
    """Two parts of a batch give the features, gradients and running statistics of the whole batch."""
    torch.manual_seed(0)
    activated = timm.layers.BatchNormAct2d(4, act_layer="silu", inplace=False)
    whole = nn.Sequential(nn.Conv2d(3, 4, 3), activated, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).double()
    fill(whole)
    reference = copy.deepcopy(whole).train()
    convert_batch_norm(whole)
    assert not any(name.endswith("num_batches_tracked") for name in whole.state_dict())
    images = torch.randn(3, 3, 6, 5, dtype=torch.float64)
    expected = reference(images)
    expected.square().sum().backward()
    parts, copies = images.split([1, 2]), [copy.deepcopy(whole).train() for _ in range(2)]
    group, results = Threads(2), {}

    def run(index: int) -> None:
        results[index] = copies[index](parts[index])
        results[index].square().sum().backward()

    for each in copies:
        synchronize(each, group)
    in_threads([functools.partial(run, index) for index in range(2)])
    torch.testing.assert_close(torch.cat([results[0], results[1]]), expected)
    for name, weight in reference.named_parameters():
        total = sum(each.get_parameter(name).grad for each in copies)
        torch.testing.assert_close(total, weight.grad)
    for name in ("1.running_mean", "1.running_var", "3.running_var"):
        torch.testing.assert_close(copies[1].state_dict()[name], reference.state_dict()[name])
    # Without the group they differ; frozen ones are those of the running statistics.
    synchronize(copies[0], None)
    assert not torch.allclose(copies[0](parts[0]), results[0])
    train_mode(copies[0], keep_statistics=True)
    torch.testing.assert_close(copies[0](parts[0]), copy.deepcopy(copies[0]).eval()(parts[0]))


def test_batch_norm_of_another_kind_is_refused() -> None:
    class Other(nn.BatchNorm2d):
        pass

    network = nn.Sequential(Other(3))
    convert_batch_norm(network)
    network(torch.randn(2, 3, 4, 4))
    with pytest.raises(UsageError, match="its Other layers can't share statistics"):
        synchronize(network, Threads(2))
    synchronize(network, None)

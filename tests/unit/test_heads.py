"""The heads against independent definitions: those of libraries, and float64 formulas."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_network import Narrow, registered
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import fused
from networks import ABN, MODELS, ChannelDropout, Network, Seg_Model, fold_batch_norm, make_network
from networks.attention import has_attention, picture_attention
from networks.heads import ASPPHead, FCNHead, GCNHead, NonLocalHead, PSPHead, RCCAHead, non_local
from networks.heads.gcn import GlobalConvolution
from networks.heads.non_local import NonLocalAttention
from networks.heads.psp import PyramidPooling, average_grid
from networks.models import check_statistics, recurrence_of
from utils.errors import UsageError

OTHERS = [name for name in MODELS if name != "ccnet"]
#: Channels of input and head, and number of classes, of the small heads below.
IN, CHANNELS, CLASSES = 24, 16, 5


def filled(module: nn.Module, seed: int = 0) -> Any:
    """Fill a module with random float64 weights of a sensible size; return it in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    module.double()
    for name, value in module.state_dict().items():
        random = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        if name.endswith("running_var"):
            value.copy_(random.abs() * 0.3 + 0.5)
        elif value.dim() > 1:
            value.copy_(random * (2 / value[0].numel()) ** 0.5)
        else:
            value.copy_(random * 0.5)
    return module.eval()


def features(height: int = 9, width: int = 13, number: int = 2, channels: int = IN) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(number, channels, height, width, generator=generator, dtype=torch.float64)


def copy_layers(ours: nn.Module, theirs: nn.Module) -> None:
    """Copy convolutions and batch norms to a module of a library that has the same ones, in the same order.

    Plain batch norm gets |weight| + eps for its weight.
    """
    kinds = (nn.Conv2d, nn.BatchNorm2d, ABN)
    one, other = ([m for m in module.modules() if isinstance(m, kinds)] for module in (ours, theirs))
    for source, target in zip(one, other, strict=True):
        state = {name: value.clone() for name, value in source.state_dict().items()}
        if isinstance(source, ABN):
            assert isinstance(target, nn.BatchNorm2d)
            state["weight"] = state["weight"].abs() + source.eps
            state["num_batches_tracked"] = torch.tensor(0)
        target.load_state_dict(state)


def assert_same(ours: nn.Module, theirs: nn.Module, x: Tensor, training: bool) -> None:
    """Check that outputs, gradients of the input, and running statistics agree."""
    results = []
    for module in (ours, theirs):
        module.double().train(training)
        for layer in module.modules():
            if isinstance(layer, nn.modules.dropout._DropoutNd):
                layer.p = 0.0
        y = x.clone().requires_grad_()
        out = module(y)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        (grad,) = torch.autograd.grad((out * weight).sum(), y)
        means = [value for name, value in module.state_dict().items() if name.endswith("running_mean")]
        results.append([out, grad, *means])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("training", [False, True])
def test_fcn_is_torchvision_s(training: bool) -> None:
    library = pytest.importorskip("torchvision.models.segmentation.fcn")
    ours = filled(FCNHead(64, CLASSES, channels=16, activation="relu"))
    theirs = library.FCNHead(64, CLASSES).double()  # a quarter of the channels inside
    copy_layers(ours, theirs)
    assert_same(ours, theirs, features(channels=64), training)


@pytest.mark.parametrize("training", [False, True])
def test_aspp_is_torchvision_s(training: bool) -> None:
    """The image branch comes first here, as in the original's file, and last in torchvision."""
    library = pytest.importorskip("torchvision.models.segmentation.deeplabv3")
    ours = filled(ASPPHead(IN, CLASSES, CHANNELS, activation="relu"))
    inner = CHANNELS // 2
    theirs = library.ASPP(IN, (12, 24, 36), inner).double()
    theirs.project = nn.Sequential()
    for number, branch in enumerate([*ours.aspp.branches, ours.aspp.image]):
        copy_layers(branch, theirs.convs[number])
    x = features(41, 50)
    ours.train(training)
    right = theirs.train(training)(x)
    right = torch.cat([right[:, -inner:], right[:, :-inner]], 1)
    torch.testing.assert_close(ours.aspp(x), right, rtol=1e-10, atol=1e-10)
    ours.eval()
    head = ours.bottleneck
    right = F.conv2d(head[1](F.conv2d(ours.aspp(x), head[0].weight)), head[3].weight, head[3].bias)
    torch.testing.assert_close(ours(x), right)
    assert [layer[0].dilation for layer in ours.aspp.branches] == [(1, 1), (12, 12), (24, 24), (36, 36)]


@pytest.mark.parametrize("size", [(9, 13), (97, 97), (6, 5), (1, 2), (129, 257)])
def test_psp_is_that_of_segmentation_models(size: tuple[int, int]) -> None:
    library = pytest.importorskip("segmentation_models_pytorch.decoders.pspnet.decoder")
    ours = filled(PyramidPooling(IN, IN // 4, (1, 2, 3, 6), "torch", "relu"))
    theirs = library.PSPModule(IN, (1, 2, 3, 6), use_norm="identity").double().eval()
    copy_layers(fold_batch_norm(ours), theirs)  # theirs has no batch norm for a grid of one
    x = features(*size)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)
    head = filled(PSPHead(IN, CLASSES, CHANNELS))
    y = F.conv2d(head.psp(x), head.bottleneck[0].weight, padding=1)
    y = F.conv2d(head.bottleneck[1](y), head.bottleneck[3].weight, head.bottleneck[3].bias)
    torch.testing.assert_close(head(x), y)


def test_the_grids_are_those_of_adaptive_pooling() -> None:
    for size, (height, width) in itertools.product((1, 2, 3, 6), [(1, 1), (2, 7), (5, 6), (9, 13), (97, 33)]):
        x = features(height, width).requires_grad_()
        ours, theirs = average_grid(x, size), F.adaptive_avg_pool2d(x, size)
        torch.testing.assert_close(ours, theirs)
        weight = torch.randn_like(ours)
        one, other = (torch.autograd.grad((y * weight).sum(), x)[0] for y in (ours, theirs))
        torch.testing.assert_close(one, other)
    low = features(97, 97).bfloat16()
    torch.testing.assert_close(
        average_grid(low, 6).double(), F.adaptive_avg_pool2d(low.double(), 6), rtol=2**-7, atol=1e-3
    )
    large = torch.full((1, 1, 300, 300), 600.0, dtype=torch.float16)  # their sum is beyond float16
    assert (average_grid(large, 2) == 600).all()


def test_the_global_convolution_is_one_of_k_x_k() -> None:
    module = filled(GlobalConvolution(6, 3, 5))
    kernel = torch.zeros(6, 6, 5, 5, dtype=torch.float64)
    column, row = (layer.weight for layer in module.height_width)  # [3, 6, 5, 1] and [6, 3, 1, 5]
    kernel += torch.einsum("miy,omx->oiyx", column[..., 0], row[:, :, 0])
    row, column = (layer.weight for layer in module.width_height)
    kernel += torch.einsum("mix,omy->oiyx", row[:, :, 0], column[..., 0])
    for size in ((9, 13), (3, 2), (1, 1)):  # also smaller than the kernel
        x = features(*size, channels=6)
        torch.testing.assert_close(module(x), F.conv2d(x, kernel, padding=2))


def attention_matrices(module: NonLocalAttention, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the output of non-local attention, and its matrices [N, L, L], as matrix products."""
    state, matrices = module.state_dict(), []
    for _ in range(module.recurrence):
        query, key, value = (
            torch.einsum("oc,nchw->nohw", state[f"{name}_conv.weight"][..., 0, 0], x).flatten(2)
            + state[f"{name}_conv.bias"][:, None]
            for name in ("query", "key", "value")
        )
        scores = torch.einsum("ncl,ncm->nlm", query, key)
        weight = (scores - scores.amax(2, keepdim=True)).exp()
        matrices.append(weight / weight.sum(2, keepdim=True))
        x = x + state["gamma"] * torch.einsum("nlm,ncm->ncl", matrices[-1], value).view(x.shape)
    return x, matrices


@pytest.mark.parametrize("recurrence", [0, 1, 2])
def test_non_local_attention_is_a_softmax_over_all_positions(recurrence: int) -> None:
    module = filled(NonLocalAttention(CHANNELS, recurrence))
    x = features(7, 10, channels=CHANNELS).requires_grad_()
    right, _ = attention_matrices(module, x)
    found = module(x)
    torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-12)
    weight = torch.randn_like(x)
    one, other = (torch.autograd.grad((y * weight).sum(), x)[0] for y in (found, right))
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    # Each pixel sees all others, in contrast to one application of criss-cross attention.
    if recurrence:
        changed = x.detach().clone()
        changed[0, :, 6, 9] += 1
        assert ((module(changed) - found)[0].abs().amax(0) > 0).all()


@pytest.mark.parametrize("block", [3, 1024])
def test_non_local_maps_are_rows_of_the_products(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(non_local, "BLOCK", block)
    module = filled(NonLocalAttention(CHANNELS, 3))
    x = features(4, 5, number=1, channels=CHANNELS)
    maps = module.maps(x, [(2, 3), (0, 0)])
    assert maps.shape == (3, 2, 4, 5)
    product = torch.eye(20, dtype=torch.float64)
    for matrix, found in zip(attention_matrices(module, x)[1], maps, strict=True):
        product = matrix[0] @ product
        # Recurrence r multiplies from the left: A_r ... A_1.
        torch.testing.assert_close(found.view(2, 20), product[[2 * 5 + 3, 0]], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(maps.sum((2, 3)), torch.ones(3, 2, dtype=torch.float64))
    module.recurrence = 0
    assert module.maps(x, [(0, 0)]).shape == (0, 1, 4, 5)


@pytest.mark.parametrize("arguments", [(7, 1), (16, -1)])
def test_impossible_attentions(arguments: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least 8"):
        NonLocalAttention(*arguments)


@pytest.mark.parametrize("head, module", [(GCNHead, "gcn"), (NonLocalHead, "attention"), (RCCAHead, "cca")])
def test_the_frame_is_that_of_rcca(head: Callable[..., nn.Module], module: str) -> None:
    """All layers but the context module have the names, sizes and initial values of the RCCA head."""
    heads: list[Any] = []
    for kind in (RCCAHead, head):
        torch.manual_seed(3)
        heads.append(kind(IN, CLASSES, channels=CHANNELS))
    rcca, other = (dict(each.named_parameters()) for each in heads)
    for name in ("conva.0.weight", "conva.1.weight"):
        assert torch.equal(rcca[name], other[name])
    names = [[*dict(each.named_children())] for each in heads]
    assert names[1] == [module if name == "cca" else name for name in names[0]]
    if head is NonLocalHead:  # the same number of random values: everything is equal
        assert all(map(torch.equal, rcca.values(), other.values()))
    x, own = features(), filled(heads[1])

    def layer(y: Tensor, part: nn.Sequential) -> Tensor:
        return part[1](F.conv2d(y, part[0].weight, padding=1))

    y = torch.cat([x, layer(getattr(own, module)(layer(x, own.conva)), own.convb)], 1)
    right = F.conv2d(layer(y, own.bottleneck), own.bottleneck[3].weight, own.bottleneck[3].bias)
    torch.testing.assert_close(own(x), right)


#: Parameters of the modules before the last layers, at 2048 channels, and multiply-adds of the convolutions
#: and products of a head per pixel, at 97 x 97 and 19 classes.
REDUCE = 9 * 2048 * 512
CLASSIFY = 512 * 19
RCCA = REDUCE + 2 * 512 + 512 * 640 + 640 + 1 + 9 * 512 * 512 + 2 * 512
BY_HAND = {
    "ccnet3d": (  # one frame: R = 3 over row, column and frames; the plain form multiplies each whole axis
        RCCA,
        REDUCE + 3 * (512 * 640 + (97 + 97 + 1) * 576) + 9 * 512 * 512 + 9 * 2560 * 512 + CLASSIFY,
    ),
    "fcn": (0, REDUCE + CLASSIFY),
    "gcn": (
        REDUCE + 2 * 512 + 4 * 15 * 512 * 64 + 9 * 512 * 512 + 2 * 512,
        REDUCE + 4 * 15 * 512 * 64 + 9 * 512 * 512 + 9 * 2560 * 512 + CLASSIFY,
    ),
    "psp": (4 * (2048 * 512 + 2 * 512), 9 * 4096 * 512 + CLASSIFY),
    "aspp": (
        2 * 2048 * 256 + 3 * 9 * 2048 * 256 + 5 * 2 * 256,
        2048 * 256 + 3 * 9 * 2048 * 256 + 1280 * 512 + CLASSIFY,
    ),
    "nonlocal": (
        RCCA,
        REDUCE + 512 * 640 + 97 * 97 * 576 + 9 * 512 * 512 + 9 * 2560 * 512 + CLASSIFY,
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_parameters_and_flops_are_those_by_hand(name: str) -> None:
    with torch.device("meta"):
        model = make_network(name, 19).eval()
        children = dict(model.head.named_children())
        del children["bottleneck"]
        before = [p.numel() for child in children.values() for p in child.parameters()]
        x = torch.empty(1, 2048, 97, 97)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.head(x)
    parameters, products = BY_HAND[name]
    assert sum(before) == parameters
    flops = counter.get_total_flops()
    pixels = 97 * 97
    small = {  # products of the grids of psp with their averages, and the image branch of aspp
        "psp": sum(2 * 2048 * size * (97 * 97 + size * 97) for size in (2, 3, 6))
        + 2 * 2048 * 512 * (1 + 4 + 9 + 36),
        "aspp": 2 * 2048 * 256,
    }
    assert flops == 2 * pixels * products + small.get(name, 0)
    backbone = sum(p.numel() for n, p in model.named_parameters() if not n.startswith(("head.", "dsn.")))
    assert backbone == 71_287_911 - 23_934_100 - 4_729_875
    assert sum(p.numel() for p in model.dsn.parameters()) == 4_729_875


@pytest.fixture(scope="module", autouse=True)
def small_backbone():
    with registered():
        yield


def narrow(name: str, **options: Any) -> Network:
    """Return a network of the registry with an eighth of the channels, and gammas and scales above 0."""
    torch.manual_seed(1)
    model = Narrow(MODELS[name].head, CLASSES, **options)
    for entry, value in model.state_dict().items():
        if entry.endswith(("gamma", "bn3.weight")):
            value.fill_(0.7)
    return model


@pytest.mark.parametrize("name", OTHERS)
def test_folded_networks_give_the_same(name: str) -> None:
    model = filled(narrow(name))
    images = torch.randn(2, 3, 33, 41, dtype=torch.float64)
    folded = fold_batch_norm(model)
    with torch.no_grad():
        right, found = model(images)[0], folded(images)
    assert len(found) == 1 and (found[0] - right).abs().max() < 1e-11 * right.abs().max()
    assert not any(isinstance(module, ABN) for module in folded.modules())


@pytest.mark.parametrize("name", OTHERS)
def test_training_in_channels_last_and_with_recomputation(name: str) -> None:
    """Both leave loss and gradients as they are: the one up to rounding, the other to the bit."""
    results = []
    for fusion, channels_last, recompute in (
        ("off", False, False),
        ("auto", True, False),
        ("auto", True, True),
    ):
        with fused.using(fusion):
            model = narrow(name, dropout=0.0).train()
            layout = torch.channels_last if channels_last else torch.contiguous_format
            model.to(memory_format=layout)
            model.recompute = recompute and fused.active(torch.device("cpu"))
            images = torch.randn(2, 3, 33, 41, generator=torch.Generator().manual_seed(2))
            outputs = model(images.contiguous(memory_format=layout))
            assert [output.shape for output in outputs] == [(2, CLASSES, 5, 6)] * 2
            sum(output.square().mean() for output in outputs).backward()
            assert all(parameter.grad is not None for parameter in model.parameters())
            results.append([*outputs, *(parameter.grad for parameter in model.parameters())])
    plain, fast, recomputed = results
    scale = max(value.abs().max().item() for value in plain)
    for one, other in zip(plain, fast, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3 * scale)
    assert all(map(torch.equal, fast, recomputed))


@pytest.mark.parametrize("name", OTHERS)
def test_autocast_and_low_precision(name: str) -> None:
    model = narrow(name).eval()
    images = torch.randn(1, 3, 33, 41)
    with torch.no_grad():
        right = model(images)[0]
        with torch.autocast("cpu", torch.bfloat16):
            low = model(images)[0]
        assert low.dtype == torch.bfloat16 and (low - right).abs().max() < 0.05 * right.abs().max()
        assert copy.deepcopy(model).bfloat16()(images.bfloat16())[0].dtype == torch.bfloat16


@pytest.mark.parametrize("name", OTHERS)
def test_variants_and_dropout(name: str) -> None:
    model = narrow(name, variant="mmseg", dropout=0.3)
    layers = [module for module in model.modules() if isinstance(module, ChannelDropout)]
    assert [(layer.channels, layer.p) for layer in layers] == [(64, 0.3), (64, 0.3)]
    assert {module.activation for module in model.head.modules() if isinstance(module, ABN)} == {"relu"}


def test_attention_of_a_picture() -> None:
    for name in OTHERS:
        model = narrow(name).eval()
        assert has_attention(model) == (name in ("nonlocal", "ccnet3d"))
    image = torch.randn(1, 3, 33, 41)
    model = narrow("nonlocal", recurrence=2).eval()
    taken: list[Tensor] = []
    model.head.attention.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    with torch.no_grad():
        model(image)
    maps = picture_attention(model, image, [(32, 20)])
    torch.testing.assert_close(maps, model.head.attention.maps(taken[0], [(4, 2)]))
    assert maps.shape == (2, 1, 5, 6)
    assert not has_attention(narrow("nonlocal", recurrence=0))


def test_registry() -> None:
    assert type(make_network("ccnet", 3, backbone="resnet50")) is Seg_Model
    with pytest.raises(UsageError, match="--recurrence 1: not an option of --model aspp"):
        make_network("aspp", 3, 1)
    assert [recurrence_of(name, None) for name in ("ccnet", "nonlocal", "psp")] == [2, 1, None]
    assert recurrence_of("nonlocal", 0) == 0
    for wrong in ({"num_classes": 0}, {"num_classes": 3, "backbone": "vgg"}):
        with pytest.raises(ValueError):
            make_network("psp", **wrong)


@pytest.mark.parametrize("name", OTHERS)
def test_which_heads_need_two_pictures(name: str) -> None:
    """The check before a run is right: a single picture fails in training where it says so, only there."""
    model = narrow(name).train()
    images = torch.randn(1, 3, 33, 41)
    check_statistics(name, 2, frozen=False)
    check_statistics(name, 1, frozen=True)
    if name in ("psp", "aspp"):
        with pytest.raises(UsageError, match=f"--batch-size: --model {name} averages"):
            check_statistics(name, 1, frozen=False)
        with pytest.raises(ValueError, match="more than (one|1) value per channel"):
            model(images)
    else:
        check_statistics(name, 1, frozen=False)
        model(images)

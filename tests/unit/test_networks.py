"""The network against an independent functional implementation, and loading of checkpoints."""

from __future__ import annotations

import contextlib
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fill
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fused
from loss import CriterionDSN
from networks import ABN, CheckpointError, Seg_Model, load_weights, synchronize
from networks.recomputation import recomputation
from networks.variants import DEPTHS

DATA = Path(__file__).parents[1] / "data"


def keys(name: str) -> dict[str, list[int]]:
    return json.loads((DATA / f"{name}.json").read_text())


class Specification:
    """CCNet without dropout as functions of a state dict, written without modules of the project.

    In training mode the running statistics that a step leaves are collected in `statistics`.
    """

    def __init__(self, state: dict[str, torch.Tensor], depth: str, training: bool = False):
        self.state = state
        self.depth = depth
        self.training = training
        self.statistics: dict[str, torch.Tensor] = {}

    def conv(self, x, name, **options):
        return F.conv2d(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"), **options)

    def norm(self, x, name):
        weight, bias, mean, var = (
            self.state[f"{name}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")
        )
        if self.training:
            count = x.numel() // x.shape[1]
            old_mean, old_var = mean, var
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
            self.statistics[f"{name}.running_mean"] = (0.9 * old_mean + 0.1 * mean).detach()
            self.statistics[f"{name}.running_var"] = (
                0.9 * old_var + 0.1 * var * count / (count - 1)
            ).detach()
        weight, bias, mean, var = (value.view(1, -1, 1, 1) for value in (weight, bias, mean, var))
        return (weight.abs() + 1e-5) * (x - mean) / (var + 1e-5).sqrt() + bias

    def block(self, x, name, stride, dilation):
        y = self.norm(self.conv(x, f"{name}.conv1"), f"{name}.bn1").relu()
        y = self.conv(y, f"{name}.conv2", stride=stride, padding=dilation, dilation=dilation)
        y = self.norm(y, f"{name}.bn2").relu()
        y = self.norm(self.conv(y, f"{name}.conv3"), f"{name}.bn3")
        if f"{name}.downsample.0.weight" in self.state:
            x = self.norm(self.conv(x, f"{name}.downsample.0", stride=stride), f"{name}.downsample.1")
        return (y + x).relu()

    def attention(self, x, name="head.cca"):
        query, key, value = (self.conv(x, f"{name}.{part}_conv") for part in ("query", "key", "value"))
        _, _, height, width = x.shape
        row = torch.einsum("nchw,nchv->nhwv", query, key)
        column = torch.einsum("nchw,ncgw->nhwg", query, key)
        itself = torch.eye(height, dtype=torch.bool).view(1, height, 1, height)
        weight = torch.cat([row, column.masked_fill(itself, float("-inf"))], 3).softmax(3)
        out = torch.einsum("nhwv,nchv->nchw", weight[..., :width], value)
        out = out + torch.einsum("nhwg,ncgw->nchw", weight[..., width:], value)
        return self.state[f"{name}.gamma"] * out + x

    def __call__(self, x, recurrence):
        for number, stride in ((1, 2), (2, 1), (3, 1)):
            x = self.norm(self.conv(x, f"conv{number}", stride=stride, padding=1), f"bn{number}").relu()
        x = F.max_pool2d(x, 3, 2, 1, ceil_mode=True)
        layers = []
        for layer, (blocks, dilation) in enumerate(zip(DEPTHS[self.depth], (1, 1, 2, 4), strict=True), 1):
            for block in range(blocks):
                stride = 2 if layer == 2 and block == 0 else 1
                x = self.block(x, f"layer{layer}.{block}", stride, dilation)
            layers.append(x)

        def reduce(x, name):
            return F.leaky_relu(self.norm(self.conv(x, f"{name}.0", padding=1), f"{name}.1"), 0.01)

        y = reduce(x, "head.conva")
        for _ in range(recurrence):
            y = self.attention(y)
        y = torch.cat([x, reduce(y, "head.convb")], 1)
        return [
            self.conv(reduce(y, "head.bottleneck"), "head.bottleneck.3"),
            self.conv(reduce(layers[2], "dsn"), "dsn.3"),
        ]


def test_state_dict_is_the_originals():
    state = Seg_Model(19).state_dict()
    assert {name: list(value.shape) for name, value in state.items()} == keys("state_dict_keys")
    assert list(state) == list(keys("state_dict_keys"))
    parameters = dict(Seg_Model(19).named_parameters())
    assert (len(state), sum(p.numel() for p in parameters.values())) == (562, 71_287_911)


@pytest.mark.parametrize("depth", ["resnet50", "resnet101"])
def test_logits_follow_the_definition(depth):
    model = Seg_Model(7, backbone=depth)
    fill(model)
    model.double().eval()
    images = torch.randn(1, 3, 65, 89, dtype=torch.float64) * 50
    for recurrence in (0, 1, 2):
        model.head.cca.recurrence = recurrence
        with torch.no_grad():
            outputs, expected = model(images), Specification(model.state_dict(), depth)(images, recurrence)
        for output, right in zip(outputs, expected, strict=True):
            torch.testing.assert_close(output, right, rtol=1e-9, atol=1e-9)
    assert outputs[0].shape == (1, 7, 9, 12)


def test_training_step_follows_the_definition():
    """Loss, gradients and running statistics of one step agree in float64."""
    model = Seg_Model(7, backbone="resnet50", dropout=0)
    fill(model)
    model.double().train()
    images, labels = torch.randn(2, 3, 49, 65, dtype=torch.float64) * 50, torch.randint(0, 7, (2, 49, 65))
    labels[:, :9] = 255
    start = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for name, _ in model.named_parameters():
        start[name].requires_grad_()
    specification = Specification(start, "resnet50", training=True)
    logits = [
        F.interpolate(output, size=(49, 65), mode="bilinear", align_corners=True)
        for output in specification(images, 2)
    ]
    losses = [F.cross_entropy(output, labels, ignore_index=255) for output in logits]
    expected = losses[0] + 0.4 * losses[1]
    expected.backward()
    loss = CriterionDSN()(model(images), labels)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    largest = max(start[name].grad.norm() for name, _ in model.named_parameters())
    for name, parameter in model.named_parameters():
        # atol is for biases whose gradient is zero up to rounding, because a norm or softmax follows.
        torch.testing.assert_close(parameter.grad, start[name].grad, rtol=1e-7, atol=1e-12 * largest.item())
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, specification.statistics[name], rtol=1e-9, atol=1e-12)


def test_sizes_round_up_as_ceil_mode_does():
    model = Seg_Model(3, backbone="resnet50").to("meta").eval()
    for size, features in (((1024, 2048), (129, 257)), ((769, 769), (97, 97)), ((512, 713), (65, 90))):
        assert model(torch.empty(1, 3, *size, device="meta"))[0].shape[2:] == features


def test_loss_comes_from_the_criterion():
    criterion = CriterionDSN()
    model = Seg_Model(5, criterion, backbone="resnet50").eval()
    images, labels = torch.randn(1, 3, 33, 41), torch.randint(0, 5, (1, 33, 41))
    outputs = model(images)
    assert isinstance(outputs, list) and len(outputs) == 2
    torch.testing.assert_close(model(images, labels), criterion(outputs, labels))


def test_memory_format_and_dtype():
    model = Seg_Model(4, backbone="resnet50").eval()
    images = torch.randn(2, 3, 33, 33)
    expected = model(images)[0]
    model.to(memory_format=torch.channels_last)
    output = model(images.to(memory_format=torch.channels_last))[0]
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert model.bfloat16()(images.bfloat16())[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "arguments",
    [{"num_classes": 0}, {"recurrence": -1}, {"backbone": "vgg"}, {"abn": "other"}, {"variant": "other"}],
)
def test_wrong_arguments(arguments):
    with pytest.raises(ValueError):
        Seg_Model(**{"num_classes": 19, **arguments})


class TestABN:
    @pytest.fixture(autouse=True, params=["auto", "off"])
    def mode(self, request):
        """Run each test with the fused operators, if they are built, and without them."""
        with fused.using(request.param):
            yield request.param

    def filled(self, activation="leaky_relu"):
        norm = ABN(6, activation).double()
        with torch.no_grad():
            norm.weight.copy_(torch.tensor([-1.5, -0.2, 0.0, 1e-7, 0.3, 2.0]))
            norm.bias.copy_(torch.linspace(-1, 1, 6))
        return norm

    def formula(self, norm, x, mean, var):
        shape = (1, -1, 1, 1)
        y = (norm.weight.abs() + 1e-5).view(shape) * (x - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt()
        y = y + norm.bias.view(shape)
        slope = {"leaky_relu": 0.01, "relu": 0.0, "identity": 1.0}[norm.activation]
        return torch.where(y > 0, y, slope * y)

    @pytest.mark.parametrize("activation", ["leaky_relu", "relu", "identity"])
    def test_formula_in_both_modes(self, activation):
        norm, x = self.filled(activation), torch.randn(3, 6, 5, 4, dtype=torch.float64) * 3 + 1
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        torch.testing.assert_close(norm(x), self.formula(norm, x, mean, var))
        # The running variance is unbiased and has momentum 0.1.
        torch.testing.assert_close(norm.running_mean, 0.1 * mean)
        torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * x.var((0, 2, 3), correction=1))
        norm.eval()
        torch.testing.assert_close(norm(x), self.formula(norm, x, norm.running_mean, norm.running_var))

    def test_gradient_of_weight_takes_its_sign_and_zero_as_positive(self):
        norm, x = self.filled("identity"), torch.randn(3, 6, 5, 4, dtype=torch.float64)
        grad = torch.randn_like(x)
        norm(x).backward(grad)
        normalized = F.batch_norm(x, None, None, training=True, eps=1e-5)
        sign = torch.tensor([-1.0, -1, 1, 1, 1, 1])
        torch.testing.assert_close(norm.weight.grad, sign * (grad * normalized).sum((0, 2, 3)))

    def test_gradcheck(self):
        norm = self.filled()
        x = torch.randn(2, 6, 3, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(norm, (x,))

    def test_batches_tracked_is_optional(self):
        norm = ABN(4)
        norm.load_state_dict({**norm.state_dict(), "num_batches_tracked": torch.tensor(7)})
        assert "num_batches_tracked" not in norm.state_dict()

    @pytest.mark.slow
    @pytest.mark.parametrize("split", [(2, 2), (1, 3), (1, 1, 2)])
    def test_synchronized_over_parts_equals_the_whole(self, split, mode, tmp_path):
        """Processes with any shares of the batch get the statistics and gradients of the whole batch."""
        import torch.multiprocessing

        x, grad = (
            torch.randn(4, 6, 3, 5, dtype=torch.float64) * 2 + 1,
            torch.randn(4, 6, 3, 5, dtype=torch.float64),
        )
        torch.save((x, grad, split), tmp_path / "input.pt")
        torch.multiprocessing.spawn(
            synchronized_part, (str(tmp_path), self.filled().state_dict(), "cpu", mode), len(split)
        )
        parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(len(split))]
        norm = self.filled()
        x.requires_grad_()
        y = norm(x)
        y.backward(grad)
        torch.testing.assert_close(torch.cat([part["y"] for part in parts]), y.detach())
        torch.testing.assert_close(torch.cat([part["x.grad"] for part in parts]), x.grad)
        for name in ("weight", "bias"):
            total = sum(part[f"{name}.grad"] for part in parts)
            torch.testing.assert_close(total, getattr(norm, name).grad)
        for part in parts:
            torch.testing.assert_close(part["mean"], norm.running_mean)
            torch.testing.assert_close(part["var"], norm.running_var)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_synchronized_on_a_gpu_equals_the_whole(self, tmp_path):
        """Two processes that share a GPU over gloo run the kernels of nn.SyncBatchNorm."""
        import torch.multiprocessing

        x, grad = torch.randn(4, 6, 3, 5) * 2 + 1, torch.randn(4, 6, 3, 5)
        torch.save((x, grad, (2, 2)), tmp_path / "input.pt")
        state = self.filled().float().state_dict()
        torch.multiprocessing.spawn(synchronized_part, (str(tmp_path), state, "cuda", "off"), 2)
        parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
        norm = self.filled().float()
        x.requires_grad_()
        y = norm(x)
        y.backward(grad)
        close = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(torch.cat([part["y"] for part in parts]), y.detach(), **close)
        torch.testing.assert_close(torch.cat([part["x.grad"] for part in parts]), x.grad, **close)
        torch.testing.assert_close(sum(part["weight.grad"] for part in parts), norm.weight.grad, **close)
        torch.testing.assert_close(parts[0]["var"], norm.running_var, **close)

    @pytest.mark.parametrize("activation", ["leaky_relu", "relu", "identity"])
    def test_residual_is_added_before_the_activation(self, activation):
        norm, x = self.filled(activation), torch.randn(3, 6, 5, 4, dtype=torch.float64) * 3 + 1
        residual, grad = torch.randn_like(x).requires_grad_(), torch.randn_like(x)
        x.requires_grad_()
        norm(x, residual).backward(grad)
        found = [x.grad, residual.grad, norm.weight.grad, norm.bias.grad]
        x.grad = residual.grad = norm.weight.grad = norm.bias.grad = None
        plain = self.filled("identity")
        slope = {"leaky_relu": 0.01, "relu": 0.0, "identity": 1.0}[activation]
        z = plain(x) + residual
        torch.where(z > 0, z, slope * z).backward(grad)
        for one, other in zip(
            found, [x.grad, residual.grad, plain.weight.grad, plain.bias.grad], strict=True
        ):
            torch.testing.assert_close(one, other)

    def test_inplace_backend_agrees(self):
        pytest.importorskip("inplace_abn", reason="the inplace-abn package is not installed")
        for activation in ("leaky_relu", "relu", "identity"):
            ours, theirs = ABN(6, activation), ABN(6, activation, backend="inplace")
            state = {name: value.float() for name, value in self.filled().state_dict().items()}
            state["weight"][2:4] = 0.5  # in-place backward divides by the weight
            ours.load_state_dict(state)
            theirs.load_state_dict(state)
            x, grad = torch.randn(3, 6, 5, 4), torch.randn(3, 6, 5, 4)
            results = []
            for norm in (ours, theirs):
                results.append([])
                for residual in (None, torch.linspace(-1, 1, x.numel()).view_as(x)):
                    norm.train().zero_grad()
                    start = x.clone().requires_grad_()
                    y = norm(start * 1.0, residual)
                    value = y.detach().clone()
                    y.backward(grad)
                    gradients = [start.grad, norm.weight.grad, norm.bias.grad]
                    results[-1] += [value, *gradients, norm.running_var.clone()]
                    results[-1].append(norm.eval()(x.clone(), residual).detach())
            for one, other in zip(*results, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not fused.active(torch.device("cpu")), reason="the fused operators are not built")
class TestFusedLayer:
    """The layer uses the fused operators, except where they would be wrong."""

    x = torch.randn(2, 6, 4, 3, generator=torch.Generator().manual_seed(5))

    def results(self, compute) -> list[torch.Tensor]:
        found = []
        for mode in ("auto", "off"):
            torch.manual_seed(0)
            with fused.using(mode):
                found.append(compute(ABN(6)))
        return found

    def test_they_are_used(self, monkeypatch):
        monkeypatch.setattr(ABN, "_forward_torch", None)
        ABN(6)(self.x)

    @pytest.mark.parametrize("transform", ["jvp", "grad", "vmap"])
    def test_transforms(self, transform):
        def compute(norm: ABN) -> torch.Tensor:
            norm.eval()
            if transform == "jvp":
                return torch.func.jvp(norm, (self.x,), (self.x * 2 + 1,))[1]
            if transform == "grad":
                return torch.func.grad(lambda x: norm(x).square().sum())(self.x)
            return torch.func.vmap(norm)(self.x[:, None])

        torch.testing.assert_close(*self.results(compute))

    def test_forward_mode(self):
        def compute(norm: ABN) -> torch.Tensor:
            with forward_ad.dual_level():
                return forward_ad.unpack_dual(norm(forward_ad.make_dual(self.x, self.x.square()))).tangent

        torch.testing.assert_close(*self.results(compute))

    def test_traced_networks_can_be_saved(self, tmp_path: Path):
        torch.jit.trace(ABN(6).eval(), self.x).save(str(tmp_path / "norm.pt"))

    def test_compiled_layers_are_not_fused(self, monkeypatch):
        monkeypatch.setattr(ABN, "_forward_fused", None)
        torch.compile(ABN(6), backend="eager", fullgraph=True)(self.x)

    def test_residuals_of_another_shape_or_dtype(self):
        for residual in (torch.ones(1, 6, 1, 1), torch.ones(2, 6, 4, 3, dtype=torch.float64)):
            torch.testing.assert_close(*self.results(lambda norm, r=residual: norm(self.x, r)))

    def test_a_recorded_backward_pass_is_refused(self):
        x = self.x.clone().requires_grad_()
        with pytest.raises(RuntimeError, match=r"create_graph=True.*fused\.use"):
            torch.autograd.grad(ABN(6)(x).square().sum(), x, create_graph=True)
        with fused.using("off"):
            torch.autograd.grad(ABN(6)(x).square().sum(), x, create_graph=True)


needs_fused = pytest.mark.skipif(
    not fused.active(torch.device("cpu")), reason="the fused operators are not built"
)


@needs_fused
def test_recomputation_frees_outputs_and_changes_no_bit():
    results, freed = [], []
    for enabled in (False, True):
        model = Seg_Model(5, backbone="resnet50", dropout=0)
        fill(model, 3)
        model.recompute = enabled
        inputs: list[weakref.ref] = []
        for layer in (model.conv2, model.layer2[0].conv3):
            layer.register_forward_pre_hook(
                lambda _, args, inputs=inputs: inputs.append(weakref.ref(args[0]))
            )
        outputs = model.train()(torch.randn(2, 3, 33, 49, generator=torch.Generator().manual_seed(1)))
        freed.append([reference() is None for reference in inputs])
        sum(output.square().mean() for output in outputs).backward()
        results.append([parameter.grad for parameter in model.parameters()])
    assert freed == [[False, False], [True, True]]
    assert all(map(torch.equal, *results))


@needs_fused
def test_recomputation_within_activation_checkpointing():
    """The forward pass that a checkpoint repeats runs outside of the recomputation."""
    gradients = []
    for enabled, checkpointed in ((False, False), (True, True)):
        model = Seg_Model(5, backbone="resnet50", dropout=0)
        fill(model, 3)
        model.recompute = enabled
        if checkpointed:
            layer = model.layer3
            forward = layer.forward
            layer.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=False)
        outputs = model.train()(torch.randn(2, 3, 33, 49, generator=torch.Generator().manual_seed(1)))
        sum(output.square().mean() for output in outputs).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(map(torch.equal, *gradients))


@needs_fused
def test_recomputation_keeps_an_output_that_is_changed_in_place():
    x = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    layer = torch.nn.Conv2d(4, 3, 1)
    gradients = []
    for context in (contextlib.nullcontext(), recomputation()):
        with context:
            out = layer(ABN(4)(1 * x).mul_(3))
        gradients.append(torch.autograd.grad(out.square().sum(), [x, layer.weight]))
    assert all(map(torch.equal, *gradients))


@needs_fused
@pytest.mark.parametrize("changed", ["input", "weight", "residual", "weight of the next layer"])
@pytest.mark.parametrize("context", [contextlib.nullcontext, recomputation])
def test_a_change_in_place_before_the_backward_pass_is_an_error(changed: str, context: Callable[[], Any]):
    """Recomputation notices what PyTorch notices."""
    x = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    norm, layer = ABN(4, "relu"), torch.nn.Conv2d(4, 3, 1)
    inner, residual = 1 * x, 2 * x
    with context():
        out = layer(norm(inner, residual))
    if changed == "residual" and context is contextlib.nullcontext:
        pytest.skip("without recomputation, the residual is not kept")
    tensors = {"input": inner, "weight": norm.weight, "residual": residual}
    with torch.no_grad():
        tensors.get(changed, layer.weight).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an in-?place operation"):
        out.sum().backward()


def synchronized_part(
    rank: int, folder: str, state: dict[str, torch.Tensor], device: str, mode: str = "auto"
) -> None:
    """Run one process of the tests above."""
    from types import SimpleNamespace

    import torch.distributed as dist

    fused.use(mode)

    x, grad, split = torch.load(f"{folder}/input.pt", weights_only=True)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=len(split))
    group = SimpleNamespace(size=len(split), group=dist.group.WORLD, all_reduce=dist.all_reduce)
    norm = ABN(6).to(device, x.dtype)
    norm.load_state_dict(state)
    synchronize(norm, group)
    part = x.split(split)[rank].to(device, copy=True).requires_grad_()
    y = norm(part)
    y.backward(grad.split(split)[rank].to(device))
    result = {"y": y.detach(), "x.grad": part.grad, "mean": norm.running_mean, "var": norm.running_var}
    result |= {"weight.grad": norm.weight.grad, "bias.grad": norm.bias.grad}
    torch.save({name: value.cpu() for name, value in result.items()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def model() -> Seg_Model:
    return Seg_Model(5, backbone="resnet50")


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    other = Seg_Model(5, backbone="resnet50")
    fill(other, 3)
    return other.state_dict()


class TestCheckpoints:
    def save(self, tmp_path, content):
        torch.save(content, tmp_path / "weights.pth")
        return tmp_path / "weights.pth"

    def test_whole_checkpoint_in_every_wrapping(self, model, state, tmp_path):
        tracked = {**state, "bn1.num_batches_tracked": torch.tensor(3)}
        for content in (
            state,
            {"model": tracked},
            {"state_dict": {f"module.{name}": value for name, value in tracked.items()}},
        ):
            for value in model.state_dict().values():
                value.zero_()
            report = load_weights(model, self.save(tmp_path, content), complete=True)
            assert (len(report.loaded), report.new, report.left_over) == (len(state), [], [])
            assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())

    def test_imagenet_backbone(self, tmp_path):
        model = Seg_Model(19)
        imagenet = {name: torch.full(shape, 0.25) for name, shape in keys("imagenet_keys").items()}
        report = load_weights(model, self.save(tmp_path, imagenet))
        assert (len(report.loaded), len(report.new), len(report.left_over)) == (530, 32, 2)
        assert "530 entries loaded, 32 new (head.*, dsn.*), 2 left over (fc.*)" in str(report)
        assert (model.conv1.weight == 0.25).all()

    def test_other_classes_need_the_flag(self, model, state, tmp_path):
        other = {**state, "head.bottleneck.3.weight": torch.zeros(9, 512, 1, 1)}
        path = self.save(tmp_path, other)
        with pytest.raises(CheckpointError, match="--not-restore-last"):
            load_weights(model, path)
        classifier = model.head.bottleneck[3].weight.clone()
        report = load_weights(model, path, fresh_classifiers=True)
        assert torch.equal(model.head.bottleneck[3].weight, classifier) and len(report.new) == 4

    @pytest.mark.parametrize(
        "wrong", ["nothing", "pickle", "text", "missing", "shape", "truncated", "tensor"]
    )
    def test_what_does_not_fit_is_refused_and_changes_nothing(self, wrong, model, state, tmp_path):
        contents = {
            "nothing": {"encoder.weight": torch.zeros(3)},
            "missing": {name: value for name, value in state.items() if not name.startswith("layer3.5")},
            "shape": {**state, "conv1.weight": torch.zeros(64, 3, 7, 7)},
            "tensor": torch.zeros(3),
            "pickle": Path("/"),
        }
        path = self.save(tmp_path, contents.get(wrong, state))
        if wrong == "text":
            path.write_text("not a checkpoint")
        if wrong == "truncated":
            path.write_bytes(path.read_bytes()[:100000])
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(CheckpointError, match="weights.pth") as error:
            load_weights(model, path)
        assert "\n" not in str(error.value)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_deeper_network_is_refused_both_ways(self, model, state, tmp_path):
        deep = Seg_Model(5)
        with pytest.raises(CheckpointError, match="--backbone"):
            load_weights(deep, self.save(tmp_path, state))
        with pytest.raises(CheckpointError, match="--backbone"):
            load_weights(model, self.save(tmp_path, deep.state_dict()))

    def test_backbone_alone_is_not_enough_for_evaluation(self, model, state, tmp_path):
        backbone = {name: value for name, value in state.items() if not name.startswith(("head", "dsn"))}
        with pytest.raises(CheckpointError, match="complete checkpoint"):
            load_weights(model, self.save(tmp_path, backbone), complete=True)

"""The activated batch norm against float64, and against networks.abn and torch.nn.functional."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused
from fused import NormOptions, activated_batch_norm, norm, norm_reference
from networks.abn import ABN

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
ACTIVATIONS = ("identity", "relu", "leaky_relu")
#: What the names of results mean: those of `results_of`.
NAMES = ("y", "grad_x", "grad_weight", "grad_bias", "running_mean", "running_var", "grad_residual")
# [N, C, ...]: whole vectors and parts of them, one channel, one pixel, pixels in 0 to 3 dimensions, several
# strips of channels, planes of several pieces.
SHAPES = [
    (2, 32, 9, 7),
    (3, 19, 5, 5),
    (2, 1, 6, 7),
    (7, 5, 1, 1),
    (40, 17),
    (2, 16, 33),
    (2, 3, 2, 3, 5),
    (2, 1030, 3, 3),
    (1, 2, 200, 170),
    (1, 24, 50, 40),
]


@dataclass
class Backend:
    """The operators of one device, with the signatures of torch.ops.fused."""

    name: str
    operators: Any
    device: str = "cpu"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """Let fused.norm use the operators of each backend in turn."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    if request.param not in fused.DEVICE_TYPES:
        pytest.skip(f"fused._C is not built for {request.param}")
    backend = Backend(request.param, torch.ops.fused, request.param)
    monkeypatch.setattr(norm, "OPERATORS", backend.operators)
    return backend


@dataclass
class Sample:
    """Operands of an activated batch norm and the gradient of its output."""

    x: Tensor
    grad: Tensor
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    residual: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if value is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> Sample:
        return replace(self, **{name: function(value) for name, value in self.tensors().items()})

    def to(self, *arguments: Any) -> Sample:
        return self.map(lambda tensor: tensor.to(*arguments))


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1) if tensor.dim() > 1 else tensor


def sample(
    shape: tuple[int, ...],
    dtype: torch.dtype = F64,
    residual: bool = False,
    layout: str = "contiguous",
    mean: float = 1.0,
) -> Sample:
    """Return maps of `dtype`, and vectors of float32 or float64; some weights are negative, and one is 0."""
    generator = torch.Generator().manual_seed(sum(shape))
    wide = norm.computing_dtype(dtype)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=F64)

    channels = shape[1]
    weight = normal(channels)
    weight[1:2] = 0
    result = Sample(
        x=(2 * normal(*shape) + mean).to(dtype),
        grad=normal(*shape).to(dtype),
        weight=weight.to(wide),
        bias=normal(channels).to(wide),
        running_mean=normal(channels).to(wide),
        running_var=(normal(channels).abs() + 0.5).to(wide),
        residual=normal(*shape).to(dtype) if residual else None,
    )
    return result.map(channels_last) if layout == "channels_last" else result


Function = Callable[[Sample, NormOptions], Tensor]


def ours(s: Sample, options: NormOptions) -> Tensor:
    return activated_batch_norm(s.x, s.weight, s.bias, s.running_mean, s.running_var, options, s.residual)


def formula(s: Sample, options: NormOptions) -> Tensor:
    """Compute the layer in a few lines, with statistics in two passes."""
    axes, shape = [0, *range(2, s.x.dim())], [1, -1] + [1] * (s.x.dim() - 2)
    mean, var = s.running_mean, s.running_var
    if options.training:
        mean, var = s.x.mean(axes), s.x.var(axes, correction=0)
        with torch.no_grad():
            s.running_mean.lerp_(mean, options.momentum)
            s.running_var.lerp_(s.x.var(axes, correction=1), options.momentum)
    magnitude = torch.where(s.weight >= 0, s.weight, -s.weight) + options.eps
    z = magnitude.view(shape) * (s.x - mean.view(shape)) / (var.view(shape) + options.eps).sqrt()
    z = z + s.bias.view(shape) + (0 if s.residual is None else s.residual)
    factor = {"identity": 1.0, "relu": 0.0, "leaky_relu": options.slope}[options.activation]
    return torch.where(z > 0, z, factor * z)


def modules(s: Sample, options: NormOptions) -> Tensor:
    """Compute the layer as the networks do without the fused operators."""
    activation = options.activation if s.residual is None else "identity"
    module = ABN(s.x.shape[1], activation, eps=options.eps, momentum=options.momentum)
    module.train(options.training)
    del module.weight, module.bias
    module.weight, module.bias = s.weight, s.bias  # type: ignore[assignment]
    module.running_mean, module.running_var = s.running_mean, s.running_var
    y = module(s.x)
    if s.residual is None or options.activation == "identity":
        return y if s.residual is None else y + s.residual
    y = y + s.residual
    return F.relu(y) if options.activation == "relu" else F.leaky_relu(y, options.slope)


def results_of(function: Function, s: Sample, options: NormOptions) -> list[Tensor]:
    """Return the output, the gradients and the running statistics, as in NAMES."""
    s = s.map(lambda tensor: tensor.detach().clone())
    leaves = [s.x, s.weight, s.bias] + ([] if s.residual is None else [s.residual])
    for leaf in leaves:
        leaf.requires_grad_()
    y = function(s, options)
    grads = torch.autograd.grad(y, leaves, s.grad)
    return [y.detach(), *grads[:3], s.running_mean, s.running_var, *grads[3:]]


def largest(tensor: Tensor) -> float:
    return float(tensor.double().abs().max()) if tensor.numel() else 0.0


def check_close(results: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for name, one, other in zip(NAMES, results, expected, strict=False):
        assert one.shape == other.shape, name
        error = largest(one.double() - other.double())
        assert error <= tolerance * max(largest(other), 1e-3), f"{name}: error {error:.2e}"
    assert len(results) == len(expected)


def away_from_the_kink(s: Sample, options: NormOptions) -> Sample:
    """Set the gradient to 0 where rounding may decide the sign of the argument of the activation."""
    z = formula(s.to(F64), options._replace(activation="identity"))
    return replace(s, grad=s.grad * (z.abs() > 0.05))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_formula_in_float64(
    backend: Backend,
    activation: str,
    residual: bool,
    training: bool,
    shape: tuple[int, ...],
    layout: str,
) -> None:
    s = sample(shape, F64, residual, layout)
    options = NormOptions(training, 0.2, 1e-3, activation, 0.3)
    expected = results_of(formula, s, options)
    check_close(results_of(ours, s.to(backend.device), options), expected, 1e-12)
    check_close(results_of(reference, s, options), expected, 1e-12)
    if activation != "leaky_relu" or residual:  # ABN has a constant slope
        check_close(results_of(modules, s, options), expected, 1e-12)


def reference(s: Sample, options: NormOptions) -> Tensor:
    return norm_reference.activated_batch_norm(
        s.x, s.weight, s.bias, s.running_mean, s.running_var, options, s.residual
    )


def check_as_exact_as_modules(backend: Backend, s: Sample, options: NormOptions) -> None:
    """Check that the error is at most twice that of the modules in the same dtype, plus one rounding.

    For the gradients of weight and bias, whose terms cancel, the rounding is that of the terms, of about 1
    each, with errors of either sign.
    """
    terms = (s.x.numel() / s.x.shape[1]) ** 0.5
    s = away_from_the_kink(s, options)
    exact = results_of(formula, s.to(F64), options)
    theirs = results_of(modules, s, options)
    results = results_of(ours, s.to(backend.device), options)
    for name, one, other, truth, like in zip(
        NAMES, results, theirs, exact, [s.x, s.x, s.weight, s.bias, s.weight, s.weight, s.x], strict=False
    ):
        assert one.dtype == like.dtype, name
        magnitude = max(largest(truth), terms if name in ("grad_weight", "grad_bias") else 0)
        bound = 2 * largest(other.to(F64) - truth) + torch.finfo(one.dtype).eps * magnitude
        error = largest(one.cpu().to(F64) - truth)
        assert error <= bound, f"{name}: error {error:.2e}, bound {bound:.2e}"


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_as_exact_as_the_modules(
    backend: Backend,
    dtype: torch.dtype,
    activation: str,
    residual: bool,
    training: bool,
    shape: tuple[int, ...],
    layout: str,
) -> None:
    options = NormOptions(training, activation=activation)
    check_as_exact_as_modules(backend, sample(shape, dtype, residual, layout), options)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("mean", [2e4, -2e4])
def test_a_mean_far_from_zero(backend: Backend, mean: float, layout: str) -> None:
    """The mean is ten thousand times the standard deviation."""
    s = sample((2, 19, 40, 31), F32, False, layout, mean)
    options = NormOptions(True, momentum=1.0, activation="identity")
    check_as_exact_as_modules(backend, s, options)
    results = results_of(ours, s.to(backend.device), options)
    torch.testing.assert_close(results[5].cpu(), s.x.double().var((0, 2, 3)).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_conversions(backend: Backend, dtype: torch.dtype) -> None:
    """Every number of 16 bits is multiplied, and rounded as PyTorch does."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(-1, 1).to(backend.device)
    zero, one = torch.zeros(1, device=backend.device), torch.ones(1, device=backend.device)
    for scale in (1.0, 1 / 3, 3.0, 1e-4, 7e3):
        y = backend.operators.batch_norm_apply(
            x, torch.stack([zero, scale * one]), one, zero, None, 0.0, 0, 0.0
        )
        expected = (x.float() * torch.tensor(scale)).to(dtype)
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.nan_to_num(1.0), expected.nan_to_num(1.0))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16], ids=str)
def test_sums(backend: Backend, dtype: torch.dtype, layout: str) -> None:
    for shape in SHAPES:
        x = sample(shape, dtype, layout=layout).x
        axes = [0, *range(2, x.dim())]
        wide = x.double()
        expected = [wide.sum(axes), wide.square().sum(axes), wide.new_tensor([x.numel() / shape[1]])]
        sums = backend.operators.batch_norm_sums(x.to(backend.device)).cpu()
        assert sums.dtype == F64
        torch.testing.assert_close(sums, torch.cat(expected), rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_same_bits_for_any_number_of_threads_and_again(
    backend: Backend, dtype: torch.dtype, residual: bool, layout: str
) -> None:
    threads = torch.get_num_threads()
    try:
        for shape in [(1, 2, 200, 170), (2, 1030, 9, 9), (1, 24, 50, 40), (2, 19, 65, 65)]:
            s = sample(shape, dtype, residual, layout).to(backend.device)
            options = NormOptions(True, activation="leaky_relu")
            results = []
            for count in (1, 2, 3, 3):
                torch.set_num_threads(count)
                results.append(results_of(ours, s, options))
            for others in results[1:]:
                for name, one, other in zip(NAMES, results[0], others, strict=False):
                    assert torch.equal(one, other), name
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16], ids=str)
def test_output_again_from_the_statistics(
    backend: Backend, dtype: torch.dtype, residual: bool, layout: str
) -> None:
    s = sample((2, 19, 9, 7), dtype, residual, layout).to(backend.device)
    for training in (True, False):
        options = NormOptions(training)
        y, statistics = norm.activated_batch_norm_with_statistics(
            s.x, s.weight, s.bias, s.running_mean, s.running_var, options, s.residual
        )
        assert torch.equal(norm.normalize(s.x, statistics, s.weight, s.bias, options, s.residual), y)


def near_zero(dtype: torch.dtype, channels: int) -> tuple[Sample, Tensor]:
    """Return operands whose z is 0 but for rounding, and their statistics.

    x takes one value in most pixels of a channel, and the bias is the rounded product that z has to cancel.
    """
    s = sample((3, channels, 5, 5), dtype)
    wide = s.weight.dtype
    generator = torch.Generator().manual_seed(0)
    s.weight[1] = 0.5
    value = (1 + torch.rand(channels, generator=generator, dtype=F64)).to(dtype).view(1, -1, 1, 1)
    s.x = torch.where(torch.rand(s.x.shape, generator=generator) < 0.8, value, s.x)
    statistics = torch.rand(2, channels, generator=generator, dtype=F64).to(wide)
    statistics[0, ::2] = value.flatten()[::2]  # there, z is exactly 0
    s.bias = -(value.to(wide).flatten() - statistics[0]) * ((s.weight.abs() + 1e-5) * statistics[1])
    return s, statistics


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("activation", [1, 2])
@pytest.mark.parametrize("channels", [64, 1030])
@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16], ids=str)
def test_the_mask_is_the_sign_of_the_output(
    backend: Backend, dtype: torch.dtype, channels: int, activation: int, layout: str
) -> None:
    """The backward pass computes z again from x; rounding must not turn its sign."""
    s, statistics = near_zero(dtype, channels)
    s, statistics = (
        (s.map(channels_last) if layout == "channels_last" else s).to(backend.device),
        statistics.to(backend.device),
    )
    operators, options = backend.operators, (1e-5, activation, 0.25)
    z = operators.batch_norm_apply(s.x, statistics, s.weight, s.bias, None, 1e-5, 0, 0.0)
    assert z.abs().median() < 1e-3
    y = operators.batch_norm_apply(s.x, statistics, s.weight, s.bias, None, *options)
    assert torch.equal(y > 0, z > 0)
    torch.testing.assert_close(y, torch.where(z > 0, z, z * (0.0 if activation == 1 else 0.25)))
    vectors = (statistics, s.weight, s.bias)
    _, _, masked = operators.batch_norm_backward_sums(s.grad, s.x, None, *vectors, *options, True)
    assert torch.equal(masked, torch.where(y > 0, s.grad, s.grad * (0.0 if activation == 1 else 0.25)))
    for one, other in zip(
        operators.batch_norm_backward_sums(s.grad, s.x, None, *vectors, *options, True),
        operators.batch_norm_backward_sums(s.grad, s.x, y, *vectors, *options, True),
        strict=True,
    ):
        assert torch.equal(one, other)
    sums, count = torch.ones_like(statistics), torch.ones(1, dtype=F64, device=backend.device)
    for each in ((sums, count), (None, None)):
        assert torch.equal(
            operators.batch_norm_backward_input(s.grad, s.x, None, *vectors, *each, *options, False),
            operators.batch_norm_backward_input(s.grad, s.x, y, *vectors, *each, *options, False),
        )


def test_weight_zero_counts_as_positive(backend: Backend) -> None:
    s = sample((2, 6, 5, 4)).to(backend.device)
    s.weight = torch.tensor([-1.5, -0.0, 0.0, 1e-7, -1e-7, 2.0], dtype=F64, device=backend.device)
    options = NormOptions(True, activation="identity")
    normalized = F.batch_norm(s.x, None, None, training=True, eps=1e-5)
    sign = torch.tensor([-1.0, 1, 1, 1, -1, 1], device=backend.device)
    expected = sign * (s.grad * normalized).sum((0, 2, 3))
    torch.testing.assert_close(results_of(ours, s, options)[2], expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@pytest.mark.parametrize("place", ["x", "grad", "residual", "weight", "bias"])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_finite_in_the_modules_is_so_here(
    backend: Backend, value: float, place: str, activation: str, residual: bool, training: bool
) -> None:
    if place == "residual" and not residual:
        pytest.skip("there is no residual")
    if place == "weight" and value == value:
        pytest.skip("the modules multiply the mean with the infinite weight, which gives NaN")
    for dtype in (F32, BF16):
        s = sample((2, 5, 9, 7), dtype, residual)
        tensor = getattr(s, place)
        index = (2,) if tensor.dim() == 1 else (1, 2, 3, 4)
        tensor[index] = value
        options = NormOptions(training, activation=activation)
        expected = results_of(modules, s, options)
        for name, one, other in zip(
            NAMES, results_of(ours, s.to(backend.device), options), expected, strict=False
        ):
            assert torch.equal(one.cpu().isfinite(), other.isfinite()), name
            if name == "y":
                assert torch.equal(one.cpu().isnan(), other.isnan())


def strided(kind: str, dtype: torch.dtype = F64) -> Tensor:
    """Return a map [2, 6, 5, 4] that is not dense in one of the two layouts, or is in an unusual way."""
    x = torch.randn(4, 12, 10, 8, generator=torch.Generator().manual_seed(0), dtype=dtype)
    if kind == "rows":
        return x[:2, :6, ::2, ::2]
    if kind == "channels":
        return channels_last(x[:2, :, :5, :4])[:, :6]
    if kind == "transposed":
        return x[:2, :6, :4, :5].contiguous().transpose(2, 3)
    if kind == "expanded":
        return x[:2, :6, :1, :1].expand(2, 6, 5, 4)
    return x[:2, :6, :5, :4].contiguous().flip(0)[::1]


@pytest.mark.parametrize("kind", ["rows", "channels", "transposed", "expanded", "flipped"])
def test_any_strides(backend: Backend, kind: str) -> None:
    options = NormOptions(True, activation="relu")
    expected = results_of(formula, dense := strided_sample(kind).map(Tensor.contiguous), options)
    assert dense.x.is_contiguous()
    s = strided_sample(kind).to(backend.device)
    leaves = [s.x.requires_grad_(), s.weight.requires_grad_(), s.bias.requires_grad_()]
    y = ours(s, options)
    check_close([y.detach(), *torch.autograd.grad(y, leaves, s.grad)], expected[:4], 1e-12)


def strided_sample(kind: str) -> Sample:
    s = sample((2, 6, 5, 4), residual=True)
    map_, other = strided(kind), strided("rows")
    return replace(s, x=map_, grad=other.flip(0), residual=None)


@pytest.mark.parametrize("shape", [(2, 6, 5, 4), (2, 6, 5), (2, 6, 2, 3, 4), (3, 6)], ids=str)
def test_the_output_has_the_layout_of_x(backend: Backend, shape: tuple[int, ...]) -> None:
    if backend.name == "cuda":
        pytest.skip("there all maps are channels_last")
    for layout in ("contiguous", "channels_last"):
        s = sample(shape, F32, False, layout)
        s.residual = sample(shape, F32, True, "channels_last").residual
        y = ours(s, NormOptions(True))
        assert y.stride() == s.x.stride() == torch.empty_like(s.x).stride()
        s.x.requires_grad_()
        (grad_x,) = torch.autograd.grad(ours(s, NormOptions(True)).sum(), s.x)
        assert grad_x.stride() == s.x.stride()


def test_empty_batch_and_single_values(backend: Backend) -> None:
    for shape in ((0, 6, 5, 4), (0, 6)):
        s = sample(shape, F32).to(backend.device)
        for training in (True, False):
            results = results_of(ours, s, NormOptions(training))
            expected = results_of(modules, s.to("cpu"), NormOptions(training))
            for name, one, other in zip(NAMES, results, expected, strict=False):
                assert torch.equal(one.cpu(), other), name
    s = sample((1, 6, 1, 1), F32).to(backend.device)
    for function in (ours, modules):
        with pytest.raises(ValueError, match="more than (one|1) value per channel"):
            results_of(function, s, NormOptions(True))
        results_of(function, s, NormOptions(False))


def test_gradients_only_where_needed(backend: Backend) -> None:
    """Every choice of inputs that need gradients gives the same gradients as all of them together."""
    for training in (True, False):
        for activation in ("identity", "relu"):
            for with_residual in (True, False):
                s = sample((2, 19, 5, 3), F32, with_residual).to(backend.device)
                options = NormOptions(training, activation=activation)
                _, *grads, _, _ = (results := results_of(ours, s, options))[:6]
                everything = [*grads, *results[6:]]
                for chosen in range(1, 2 ** len(everything)):
                    again = s.map(lambda tensor: tensor.detach().clone())
                    leaves = [again.x, again.weight, again.bias, again.residual][: len(everything)]
                    needed = [leaf for i, leaf in enumerate(leaves) if chosen >> i & 1]
                    for leaf in needed:
                        leaf.requires_grad_()
                    found = torch.autograd.grad(ours(again, options), needed, s.grad)
                    expected = [grad for i, grad in enumerate(everything) if chosen >> i & 1]
                    for one, other in zip(found, expected, strict=True):
                        assert torch.equal(one, other)


def test_vectors_of_other_dtypes(backend: Backend) -> None:
    """A network in bfloat16 has all its vectors in bfloat16; they are converted, and their gradients back."""
    s = sample((2, 19, 5, 3), BF16)
    options = NormOptions(True, activation="relu")
    names = ("weight", "bias", "running_mean", "running_var")
    low = replace(s, **{name: getattr(s, name).to(BF16) for name in names})
    high = replace(s, **{name: getattr(low, name).float() for name in names})
    expected = results_of(ours, high.to(backend.device), options)
    for name, one, other in zip(
        NAMES, results_of(ours, low.to(backend.device), options), expected, strict=False
    ):
        assert one.dtype == BF16 and torch.equal(one, other.to(BF16)), name


def test_without_running_statistics(backend: Backend) -> None:
    s = sample((2, 19, 5, 3), F32).to(backend.device)
    expected = ours(s, NormOptions(True))
    assert torch.equal(activated_batch_norm(s.x, s.weight, s.bias, None, None, NormOptions(True)), expected)
    with pytest.raises(ValueError, match="needs running statistics"):
        activated_batch_norm(s.x, s.weight, s.bias, None, None, NormOptions(False))


def test_autocast_changes_nothing(backend: Backend) -> None:
    for dtype in (F32, BF16):
        s = sample((2, 19, 5, 3), dtype, True).to(backend.device)
        expected = results_of(ours, s, NormOptions(True))
        with torch.autocast(backend.device, BF16):
            results = results_of(ours, s, NormOptions(True))
        for one, other in zip(results, expected, strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(backend: Backend, activation: str, training: bool) -> None:
    s = sample((2, 3, 3, 2), F64, True).to(backend.device)
    s.weight[1] = 0.7

    def function(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        options = NormOptions(training, 0.1, 1e-3, activation, 0.2)
        vectors = (s.running_mean.clone(), s.running_var.clone())
        return activated_batch_norm(x, weight, bias, *vectors, options, residual)

    leaves = [t.requires_grad_() for t in (s.x, s.weight, s.bias, s.residual)]
    assert torch.autograd.gradcheck(function, leaves)


def test_a_second_derivative_is_an_error(backend: Backend) -> None:
    s = sample((2, 3, 3, 2)).to(backend.device)
    s.x.requires_grad_()
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(ours(s, NormOptions(True)).square().sum(), s.x, create_graph=True)


# Several processes


@dataclass
class Processes:
    """Threads that add their tensors like processes do."""

    size: int
    calls: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=60)
        self.parts: list[Tensor] = [torch.empty(0)] * self.size
        self.calls = [0] * self.size

    def all_reduce(self, rank: int, tensor: Tensor) -> None:
        self.calls[rank] += 1
        self.parts[rank] = tensor.clone()
        self.barrier.wait()
        total = torch.stack(self.parts).sum(0)
        self.barrier.wait()
        tensor.copy_(total)

    def run(self, function: Callable[[int], list[Tensor]]) -> list[list[Tensor]]:
        results: list[Any] = [None] * self.size

        def each(rank: int) -> None:
            try:
                results[rank] = function(rank)
            except BaseException as error:
                results[rank] = error
                self.barrier.abort()

        threads = [threading.Thread(target=each, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results


@pytest.mark.parametrize("function", [ours, reference])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(
    "shapes", [[(3, 4)], [(3, 4), (5, 2)], [(3, 4), (1, 1), (7, 5)], [(3, 4), (0, 4)]], ids=str
)
def test_processes_share_their_statistics(
    backend: Backend, function: Function, shapes: list[tuple[int, int]], residual: bool
) -> None:
    """Parts of different sizes give the results of all pixels together; without pixels, too."""
    counts = [height * width for height, width in shapes]
    whole = sample((1, 19, sum(counts)), F64, residual)
    options = NormOptions(True, activation="relu")
    expected = results_of(formula, whole, options)
    processes = Processes(len(shapes))

    def part(rank: int) -> list[Tensor]:
        begin = sum(counts[:rank])

        def cut(tensor: Tensor) -> Tensor:
            if tensor.dim() == 1:
                return tensor
            return tensor[:, :, begin : begin + counts[rank]].unflatten(2, shapes[rank])

        shared = options._replace(all_reduce=lambda tensor: processes.all_reduce(rank, tensor))
        return results_of(function, whole.map(cut).to(backend.device), shared)

    parts = processes.run(part)
    assert processes.calls == [2] * len(shapes)
    results = []
    for name, *tensors in zip(NAMES, *parts, strict=False):
        if name in ("grad_weight", "grad_bias"):
            results.append(torch.stack(tensors).sum(0))
        elif name.startswith("running"):
            assert all(torch.equal(tensor, tensors[0]) for tensor in tensors)
            results.append(tensors[0])
        else:
            results.append(torch.cat([tensor.flatten(2) for tensor in tensors], 2))
    check_close([result.cpu() for result in results], expected, 1e-12)


def test_constants_need_no_sum_over_processes(backend: Backend) -> None:
    def refuse(tensor: Tensor) -> None:
        raise AssertionError("all_reduce in evaluation mode")

    results_of(ours, sample((2, 3, 5, 4)).to(backend.device), NormOptions(False, all_reduce=refuse))


# Compilation and errors


@pytest.mark.parametrize("kind", ["contiguous", "channels_last", "rows", "channels"])
def test_opcheck(backend: Backend, kind: str) -> None:
    if backend.name not in fused.DEVICE_TYPES:
        pytest.skip("not an operator of PyTorch")
    s = sample((2, 6, 5, 4), F32, True, kind if kind == "channels_last" else "contiguous")
    if kind in ("rows", "channels"):
        s.x = strided(kind, F32)
    s = s.to(backend.device)
    operators = torch.ops.fused
    sums = operators.batch_norm_sums(s.x)
    count = sums[-1:].clone()
    options = (1e-5, 2, 0.01)
    statistics = operators.batch_norm_statistics(sums, None, None, 1e-5, 0.1, F32)
    vectors = (statistics, s.weight, s.bias)
    pair = statistics.clone()
    y = operators.batch_norm_apply(s.x, *vectors, s.residual, *options)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (operators.batch_norm_sums, (s.x,)),
        (operators.batch_norm_statistics, (sums, s.running_mean, s.running_var, 1e-5, 0.1, F32)),
        (operators.batch_norm_statistics, (sums, None, None, 1e-5, 0.1, F64)),
        (operators.batch_norm_apply, (s.x, *vectors, s.residual, *options)),
        (operators.batch_norm_apply, (s.x, *vectors, None, *options)),
        (operators.batch_norm_backward_sums, (s.grad, s.x, y, *vectors, *options, True)),
        (operators.batch_norm_backward_sums, (s.grad, s.x, None, *vectors, *options, False)),
        (operators.batch_norm_backward_input, (s.grad, s.x, None, *vectors, pair, count, *options, False)),
        (operators.batch_norm_backward_input, (s.grad, s.x, y, *vectors, None, None, *options, True)),
    ]
    for operator, arguments in calls:
        torch.library.opcheck(operator.default, arguments)


class Block(nn.Module):
    """A convolution and two norms, the second with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.weight = nn.Parameter(torch.linspace(-1, 1, 8))
        self.bias = nn.Parameter(torch.linspace(1, -1, 8))
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        options = NormOptions(self.training, activation="relu")
        vectors = (self.weight, self.bias, self.mean, self.var)
        x = self.conv(x)
        return activated_batch_norm(x, *vectors, options, activated_batch_norm(x, *vectors, options))


@pytest.mark.slow
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_compile(backend: Backend, memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    blocks = [Block().to(backend.device), Block().to(backend.device)]
    blocks[1].load_state_dict(blocks[0].state_dict())
    x = torch.randn(2, 3, 9, 8, device=backend.device).to(memory_format=memory_format)
    torch._dynamo.reset()
    for training in (True, False):
        results = []
        for block, run in (
            (blocks[0], blocks[0]),
            (blocks[1], torch.compile(blocks[1], fullgraph=True, backend="aot_eager")),
        ):
            block.train(training)
            start = x.clone().requires_grad_()
            y = run(start)
            y.square().sum().backward()
            results.append([y, start.grad, *(p.grad for p in block.parameters()), *block.buffers()])
            block.zero_grad()
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
            assert one.stride() == other.stride()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(6)}, "x must have at least 2 dimensions, got shape \\[6\\]"),
        (
            {"x": torch.zeros(2, 6, 5, 4, dtype=torch.int32)},
            "needs float32, float64, float16 or bfloat16 tensors",
        ),
        (
            {"weight": torch.zeros(5)},
            "weight must have one element for each of the 6 channels of x, got shape",
        ),
        ({"bias": torch.zeros(6, 1)}, "bias must have one element for each of the 6 channels"),
        ({"bias": torch.zeros(6, dtype=torch.int64)}, "needs float32"),
        ({"running_mean": torch.zeros(7)}, "running_mean must have one element for each of the 6 channels"),
        ({"running_var": torch.zeros(1)}, "running_var must have one element for each of the 6 channels"),
        ({"residual": torch.zeros(2, 6, 4, 5)}, "x and residual must have the same shape"),
        (
            {"residual": torch.zeros(2, 6, 5, 4, dtype=F64)},
            "x and residual must have the same dtype, got Float and Double",
        ),
    ],
    ids=str,
)
def test_wrong_operands(backend: Backend, change: dict[str, Tensor], message: str) -> None:
    change = {name: tensor.to(backend.device) for name, tensor in change.items()}
    s = replace(sample((2, 6, 5, 4), F32).to(backend.device), **change)
    with pytest.raises(RuntimeError, match=message):
        ours(s, NormOptions(True))


def test_wrong_options(backend: Backend) -> None:
    s = sample((2, 6, 5, 4)).to(backend.device)
    with pytest.raises(ValueError, match="activation must be one of identity, relu, leaky_relu, got 'gelu'"):
        ours(s, NormOptions(True, activation="gelu"))
    with pytest.raises(RuntimeError, match="slope must not be negative, got -1"):
        ours(s, NormOptions(True, slope=-1.0))

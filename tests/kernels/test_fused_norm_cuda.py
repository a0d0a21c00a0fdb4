"""The CUDA kernels of the activated batch norm, in the emulator, against float64."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from emulator import COMPILER, SCHEDULES, build
from emulator.fused_norm import ACTIVATIONS, FUSED, MapSizes, NormEmulator, Parameters, precision
from torch import Tensor

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
DTYPES = (F32, F64, F16, BF16)
EPS, SLOPE, MOMENTUM = 1e-3, 0.25, 0.125
NAMES = ("y", "grad_weight", "grad_bias", "grad_residual", "grad_x")

pytestmark = pytest.mark.build


@pytest.fixture(scope="module")
def kernels() -> NormEmulator:
    if COMPILER is None:
        pytest.skip("no C++ compiler here for the emulator")
    return NormEmulator(build(csrc=FUSED))


@dataclass
class Case:
    """A map, the gradient of the output, and what the norm is applied with."""

    x: Tensor  # [N,C,P,1]
    grad: Tensor
    residual: Tensor | None
    weight: Tensor  # [C] of precision(x.dtype)
    bias: Tensor
    activation: str
    frozen: Tensor | None = None  # statistics [2,C] that are constants

    def parameters(self, statistics: Tensor) -> Parameters:
        return Parameters(statistics, self.weight, self.bias, EPS, self.activation, SLOPE)


def sample(
    shape: tuple[int, int, int],  # N, C, P
    dtype: torch.dtype,
    activation: str = "identity",
    residual: bool = False,
    frozen: bool = False,
    mean: float = 0.5,
) -> Case:
    n, channels, pixels = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=F64)

    wide = precision(dtype)
    x, grad, added = ((normal(n, channels, pixels, 1) + offset).to(dtype) for offset in (mean, 0, 0))
    weight, bias = normal(channels).to(wide), normal(channels).to(wide)
    weight[channels // 2] = 0
    constants = torch.stack([normal(channels), normal(channels).exp()]).to(wide) if frozen else None
    return Case(x, grad, added if residual else None, weight, bias, activation, constants)


def run(kernels: NormEmulator, case: Case, masked: bool = False, **settings: int) -> list[Tensor]:
    """Run forward and backward as the operator does.

    masked: the first half of the backward writes the gradient of z, which the second half reads. With a
        residual, it always does.

    Returns:
        The tensors of NAMES, the second sum of the backward, the sums and the statistics. Without a masked
        map, the gradient of the residual is empty.
    """
    x, grad = case.x, case.grad
    sums = kernels.sums(x, **settings)
    statistics = kernels.statistics(
        sums,
        None,
        x.dtype,
        eps=EPS,
        schedule=settings.get("schedule", 0),
    )
    parameters = case.parameters(statistics if case.frozen is None else case.frozen)
    y = kernels.apply(x, parameters, case.residual, **settings)
    kept = y if case.residual is not None else None  # otherwise the sign of y is recomputed
    masked = masked or case.residual is not None
    totals, grad_weight, map_ = kernels.backward_sums(grad, x, kept, parameters, masked, **settings)
    if map_ is not None:
        grad, kept = map_, None
    known = (totals, sums[-1].item()) if case.frozen is None else None
    grad_x = kernels.backward_input(grad, x, kept, parameters, known, masked, **settings)
    return [
        y,
        grad_weight,
        totals[0],
        map_ if map_ is not None else torch.empty(0),
        grad_x,
        totals[1],
        sums,
        statistics,
    ]


def activate(z: Tensor, activation: str) -> Tensor:
    return {"identity": z, "relu": F.relu(z), "leaky_relu": F.leaky_relu(z, SLOPE)}[activation]


def plain(case: Case, dtype: torch.dtype, y: Tensor) -> list[Tensor]:
    """Compute the tensors of NAMES in plain PyTorch, with maps of a dtype.

    y: an output whose sign is the mask of the activation in the backward. The sign of a number near zero
        depends on its rounding, and the gradient on the sign.
    """
    wide = precision(dtype)
    x = case.x.to(dtype).requires_grad_()
    weight, bias = (t.to(wide).requires_grad_() for t in (case.weight, case.bias))
    residual = torch.zeros_like(x) if case.residual is None else case.residual.to(dtype)
    residual.requires_grad_()
    scale = torch.where(weight < 0, -weight, weight) + EPS  # abs(weight) with the derivative 1 at 0
    if case.frozen is None:
        z = torch.batch_norm(x, scale, bias, None, None, True, 0.0, EPS, False)
    else:
        mean, inverse = (t[:, None, None] for t in case.frozen.to(wide))
        z = ((x.to(wide) - mean) * inverse * scale[:, None, None] + bias[:, None, None]).to(dtype)
    z = z + residual
    factor = {"identity": 1.0, "relu": 0.0, "leaky_relu": SLOPE}[case.activation]
    grad = torch.where(y > 0, 1.0, factor).to(dtype) * case.grad.to(dtype)
    grads = torch.autograd.grad(z, (weight, bias, residual, x), grad)
    return [activate(z, case.activation).detach(), *grads]


def check(results: list[Tensor], case: Case) -> None:
    """Check that errors are at most twice those of plain PyTorch in the dtype, plus one rounding.

    The rounding is that of the sum of the absolute terms, where terms may cancel. In float64, the error is at
    most 1e-12 of it.

    Args:
        results: those of `run`.
    """
    dtype, y = case.x.dtype, results[0]
    exact, theirs = plain(case, F64, y), plain(case, dtype, y)
    statistics = results[7] if case.frozen is None else case.frozen
    mean, inverse, scale, bias = (
        t.to(F64)[:, None, None] for t in (*statistics, (case.weight.abs() + EPS) * statistics[1], case.bias)
    )
    normalized, grad = (case.x.to(F64) - mean) * inverse, exact[3]
    terms = {
        "y": (normalized / inverse * scale).abs() + bias.abs(),
        "grad_weight": (grad * normalized).abs().sum((0, 2, 3)),
        "grad_bias": grad.abs().sum((0, 2, 3)),
        "grad_residual": torch.zeros(()),
        "grad_x": (scale * grad).abs(),
    }
    for name, ours, other, truth in zip(NAMES, results, theirs, exact, strict=False):
        if ours.numel() == 0:
            continue
        assert ours.dtype == other.dtype and ours.shape == truth.shape, name
        magnitude = torch.maximum(truth.abs().max(), terms[name].max())
        error = (ours.to(F64) - truth).abs().max()
        if dtype == F64:
            bound = 1e-12 * magnitude
        else:
            bound = 2 * (other.to(F64) - truth).abs().max() + torch.finfo(ours.dtype).eps * magnitude
        assert error <= bound, f"{name}: error {error:.2e}, bound {bound:.2e}"
    check_sums(results[6], case.x)


def check_sums(sums: Tensor, x: Tensor) -> None:
    """Check the variance and the mean that the sums of x give."""
    channels, wide = x.shape[1], x.to(F64)
    count = wide.numel() / channels
    assert sums[-1] == count
    mean = sums[:channels] / count
    variance = sums[channels:-1] / count - mean**2
    deviations = wide - wide.mean((0, 2, 3), keepdim=True)
    truth = (deviations**2).mean((0, 2, 3))
    # The sums themselves are in float64, with squares as large as those of the mean.
    tolerance = 1e-12 if x.dtype == F64 else 8 * torch.finfo(F32).eps
    rounding = 1e-15 * (wide**2).mean((0, 2, 3))
    assert ((variance - truth).abs() <= tolerance * truth + 4 * rounding).all(), variance / truth - 1
    spread = truth.sqrt() + 1e-3 * torch.finfo(x.dtype).tiny
    assert ((mean - wide.mean((0, 2, 3))).abs() <= tolerance * spread + rounding.sqrt() * 1e-7).all()


# N, C, P: whole runs and tails of channels, one and several tiles of them, one and several parts of the rows.
SHAPES = [
    (1, 1, 1),
    (2, 1, 33),
    (3, 1, 2000),
    (3, 3, 7),
    (2, 3, 700),
    (1, 8, 1),
    (2, 8, 291),
    (2, 24, 33),
    (3, 64, 291),
    (2, 66, 97),
    (1, 520, 33),
    (2, 520, 7),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_as_exact_as_pytorch(
    kernels: NormEmulator, activation: str, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    for residual, masked in ((False, False), (False, True), (True, True)):
        case = sample(shape, dtype, activation, residual)
        check(run(kernels, case, masked), case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_constant_statistics(kernels: NormEmulator, activation: str, dtype: torch.dtype) -> None:
    for shape, residual in (((2, 24, 33), False), ((2, 3, 7), True)):
        case = sample(shape, dtype, activation, residual, frozen=True)
        check(run(kernels, case), case)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_pixels_for_each_thread(kernels: NormEmulator, dtype: torch.dtype) -> None:
    """Large maps have 528 blocks, whose threads have more pixels than they load at once."""
    case = sample((1, 16 // dtype.itemsize, 600_000), dtype, "leaky_relu")
    check(run(kernels, case), case)


@pytest.mark.parametrize("shape", [(2, 3, 700), (3, 64, 291), (1, 520, 33)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_in_any_order_of_threads(
    kernels: NormEmulator, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    for residual in (False, True):
        case = sample(shape, dtype, "leaky_relu", residual)
        first = run(kernels, case)
        for schedule in SCHEDULES[1:]:
            others = run(kernels, case, schedule=schedule)
            for number, (one, other) in enumerate(zip(first, others, strict=True)):
                assert torch.equal(one, other), (number, schedule)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_addresses_that_are_no_multiple_of_16(kernels: NormEmulator, dtype: torch.dtype) -> None:
    case = sample((3, 64, 97), dtype, "relu", residual=True)
    check(run(kernels, case, offset=1), case)


@pytest.mark.parametrize("mean", [1e3, -3e4])
@pytest.mark.parametrize("shape", [(2, 3, 700), (3, 64, 291)], ids=str)
def test_a_mean_far_from_zero(kernels: NormEmulator, shape: tuple[int, int, int], mean: float) -> None:
    """The squares of x are 10^6 to 10^9 times the variance, more than float32 numbers tell apart."""
    case = sample(shape, F32, "relu", mean=mean)
    check(run(kernels, case), case)


def test_a_first_pixel_far_from_the_others(kernels: NormEmulator) -> None:
    """Each thread sums the distances from its first pixel, here an outlier of 1000 standard deviations."""
    case = sample((2, 8, 291), F32)
    case.x[-1, :, -40:] += 1000
    check(run(kernels, case), case)


@pytest.mark.parametrize("dtype", (F32, F64), ids=str)
@pytest.mark.parametrize("channels", [1, 3, 300])
def test_statistics(kernels: NormEmulator, channels: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(50, channels, generator=generator, dtype=F64) * 3 + 2
    x[:, 0] = 7.0
    sums = torch.cat([x.sum(0), (x * x).sum(0), torch.tensor([50.0], dtype=F64)])
    sums[channels] -= 0.5  # a variance below zero, as rounding may give
    before = [torch.randn(channels, generator=generator).to(dtype) for _ in range(2)]
    running = (before[0].clone(), before[1].clone())
    ours = kernels.statistics(sums, running, dtype, eps=EPS, momentum=MOMENTUM)
    variance, mean = torch.var_mean(x, 0, correction=0)
    tolerance = 2 * torch.finfo(dtype).eps if dtype == F32 else 1e-12
    expected = torch.stack([mean, (variance + EPS).rsqrt()]).to(dtype)
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=0.0)
    for new, old, value in zip(running, before, (mean, x.var(0)), strict=True):
        expected = (1 - MOMENTUM) * old.to(F64) + MOMENTUM * value
        torch.testing.assert_close(new, expected.to(dtype), rtol=tolerance, atol=1e-7)
    assert torch.equal(ours, kernels.statistics(sums, None, dtype, eps=EPS, momentum=MOMENTUM))


def of_numbers(values: Iterable[float], dtype: torch.dtype) -> Tensor:
    """Return a map [1,8,n,1] that is the same in all channels."""
    return torch.tensor(list(values), dtype=dtype).expand(1, 8, -1)[..., None]


def unit(activation: str, scale: float = 1.0) -> Parameters:
    """Return parameters with which z is scale * x, in float32."""
    ones, zeros = torch.ones(8), torch.zeros(8)
    return Parameters(torch.stack([zeros, ones]), scale * ones, zeros, 0.0, activation, SLOPE)


@pytest.mark.parametrize("dtype", (F32, F16, BF16), ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_zero_infinity_and_nan(kernels: NormEmulator, activation: str, dtype: torch.dtype) -> None:
    x = of_numbers([0.0, -0.0, 2.0, -2.0, torch.inf, -torch.inf, torch.nan], dtype)
    y = kernels.apply(x, unit(activation), None)
    torch.testing.assert_close(y, activate(x, activation), rtol=0, atol=0, equal_nan=True)
    # The derivative at zero is that of PyTorch: 0 for relu, slope for leaky_relu.
    x, grad = x[:, :, :6], of_numbers([1, 2, 3, 4, 5, 6], dtype)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(activate(leaf, activation), leaf, grad)
    for known in (None, y[:, :, :6]):
        _, _, masked = kernels.backward_sums(grad, x, known, unit(activation), True)
        assert masked is not None and torch.equal(masked, expected)
        grad_x = kernels.backward_input(grad, x, known, unit(activation), None, False)
        assert torch.equal(grad_x, expected)


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_outputs_that_round_to_zero(kernels: NormEmulator, activation: str) -> None:
    """The mask is the sign of y. In float16, y is 0 for z = 2^-26, and so is the derivative of relu."""
    x, grad = of_numbers([2.0**-24, 2.0**-23, 3 * 2.0**-24], F16), of_numbers([4, 8, 12], F16)
    parameters = unit(activation, scale=0.25)
    y = kernels.apply(x, parameters, None)
    assert y[0, 0].flatten().tolist() == [0, 0, 2.0**-24]
    low = 0 if activation == "relu" else SLOPE
    for known in (None, y):
        _, _, masked = kernels.backward_sums(grad, x, known, parameters, True)
        assert masked is not None
        assert masked[0, 0].flatten().tolist() == [4 * low, 8 * low, 12]


@pytest.mark.parametrize("shape", [(2, 3, 700), (3, 64, 291)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_recomputed_sign_is_that_of_y(
    kernels: NormEmulator, activation: str, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    case = sample(shape, dtype, activation)
    case.bias.zero_()  # many z near zero
    sums = kernels.sums(case.x)
    parameters = case.parameters(kernels.statistics(sums, None, dtype))
    y = kernels.apply(case.x, parameters, None)
    one, other = (kernels.backward_sums(case.grad, case.x, known, parameters, True) for known in (y, None))
    for a, b in zip(one, other, strict=True):
        assert a is not None and b is not None and torch.equal(a, b)
    sums_of_all = (one[0], sums[-1].item())
    first, second = (
        kernels.backward_input(case.grad, case.x, known, parameters, sums_of_all, False)
        for known in (y, None)
    )
    assert torch.equal(first, second)


def test_sums_of_all_processes(kernels: NormEmulator) -> None:
    """Two processes with a part of the batch each get what one process with all of it gets."""
    whole = sample((3, 24, 33), F32, "relu")
    parts = [replace(whole, x=whole.x[half], grad=whole.grad[half]) for half in (slice(1), slice(1, 3))]
    y, grad_weight, grad_bias, _, grad_x, *_ = run(kernels, whole)
    sums = torch.stack([kernels.sums(part.x) for part in parts]).sum(0)
    parameters = whole.parameters(kernels.statistics(sums, None, F32, eps=EPS))
    outs = [kernels.apply(part.x, parameters, None) for part in parts]
    totals, weights, _ = zip(
        *(kernels.backward_sums(part.grad, part.x, None, parameters, False) for part in parts), strict=True
    )
    known = (torch.stack(totals).sum(0), sums[-1].item())
    grads = [kernels.backward_input(part.grad, part.x, None, parameters, known, False) for part in parts]
    for ours, expected in (
        (torch.cat(outs), y),
        (torch.stack(weights).sum(0), grad_weight),
        (known[0][0], grad_bias),
        (torch.cat(grads), grad_x),
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_constant_statistics_do_not_read_x(kernels: NormEmulator) -> None:
    case = sample((2, 8, 33), BF16, frozen=True)
    assert case.frozen is not None
    x = torch.full_like(case.x, torch.nan)
    grad_x = kernels.backward_input(case.grad, x, None, case.parameters(case.frozen), None, False)
    assert grad_x.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 8, 5), (2, 0, 5), (2, 8, 0)], ids=str)
def test_empty_maps(kernels: NormEmulator, shape: tuple[int, int, int]) -> None:
    n, channels, pixels = shape
    empty = torch.empty(n, channels, pixels, 1)
    sums = kernels.sums(empty)
    assert not sums[:-1].any() and sums[-1] == n * pixels
    assert kernels.statistics(sums, None, F32).shape == (2, channels)
    parameters = Parameters(torch.ones(2, channels), torch.ones(channels), torch.zeros(channels))
    assert kernels.apply(empty, parameters, None).shape == empty.shape
    totals, grad_weight, _ = kernels.backward_sums(empty, empty, None, parameters, True)
    assert not totals.any() and not grad_weight.any()
    known: Any = (totals, 1.0)
    assert kernels.backward_input(empty, empty, None, parameters, known, False).shape == empty.shape


@pytest.mark.parametrize("channels, lanes", [(1, 1), (8, 8), (512, 32)])
def test_a_thread_has_few_pixels_of_any_map(kernels: NormEmulator, channels: int, lanes: int) -> None:
    """At most 128, so that the error of its sums stays small. The workspace tells the number of parts."""
    pixels = 2**34
    size = kernels.workspace_bytes(F32, MapSizes(1, channels, pixels, True))
    parts = size // (16 * channels)
    assert parts * (256 // lanes) * 128 >= pixels

"""The fused kernels against float64.

The CPU kernels run as they are. The CUDA kernels run on a GPU where there is one, and everywhere in the
emulator (tests/kernels/emulator), which compiles the same .cu files and runs their threads in many orders.
"""

from collections.abc import Callable
from ctypes import byref
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from emulator import (
    COMPILER,
    DTYPES,
    SCHEDULES,
    SHARED_MEMORY,
    Backward,
    Device,
    Emulator,
    Forward,
    Sizes,
    axes_of,
    build,
)
from torch import Tensor

from cc_attention import ops, reference

#: Number of orders in which the channels are summed for the error of plain PyTorch.
ORDERS = 8
F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16


@dataclass
class Backend:
    """The kernels of one device: those for tensor cores (with tf32 for float32) or the general ones."""

    name: str
    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor, ...]]
    device: str = "cpu"


@pytest.fixture(scope="session")
def emulator() -> Emulator:
    if COMPILER is None:
        pytest.skip("no C++ compiler here for the emulator")
    return Emulator(build())


def on_device(device: str) -> Backend:
    operators = torch.ops.cc_attention

    def forward(*operands: Tensor, tf32: bool = False, **_: int) -> tuple[Tensor, Tensor]:
        out, normalizer, _sum = operators.criss_cross_attention(*operands, tf32=tf32)
        return out, normalizer.squeeze(-2)  # of the single head

    def backward(
        query: Tensor, key: Tensor, value: Tensor, out: Tensor, normalizer: Tensor, grad: Tensor, **kw: int
    ) -> tuple[Tensor, ...]:
        saved = (query, key, value, out, normalizer.unsqueeze(-2))
        return operators.criss_cross_attention_backward(grad, *saved, tf32=kw.get("tf32", False))[:3]

    return Backend(device, forward, backward, device)


@pytest.fixture(
    params=[
        "cpu",
        pytest.param("emulator", marks=pytest.mark.build),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param == "emulator":
        emulated = request.getfixturevalue("emulator")
        return Backend("emulator", emulated.forward, emulated.backward)
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    if request.param not in ops.DEVICE_TYPES:
        pytest.skip(f"cc_attention._C is not built for {request.param}")
    return on_device(request.param)


def sample(
    shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", spread: float = 1.0, offset: float = 0.0
) -> list[Tensor]:
    """Return query, key, value and the gradient of out, for shape (N, c, C, H, W).

    spread: standard deviation of the scores.
    offset: added to the query and taken from the key, so that all scores lie far below zero.
    """
    n, c, channels, h, w = shape
    generator = torch.Generator().manual_seed(sum(shape))
    scale = (spread**2 / c) ** 0.25
    return [
        (factor * torch.randn(n, k, h, w, generator=generator, dtype=F64) + mean).to(device, dtype)
        for k, factor, mean in ((c, scale, offset), (c, scale, -offset), (channels, 1, 0), (channels, 1, 0))
    ]


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute the attention in plain PyTorch, in the dtype of the operands throughout."""
    return reference.ca_map(F.softmax(reference.ca_weight(query, key), dim=1), value)


def results_of(function: Callable[..., Tensor], operands: list[Tensor]) -> list[Tensor]:
    """Return out and the three gradients."""
    *inputs, grad = operands
    inputs = [t.detach().requires_grad_() for t in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def plain_errors(operands: list[Tensor], exact: list[Tensor]) -> list[Tensor]:
    """Return the largest error of plain PyTorch, over several orders of the channels, for out and gradients.

    One order alone is a matter of luck, and of the processor, whose library sums in an order of its own: on
    small maps the error of a gradient differs by up to three times.
    """
    query, key, value, grad = operands
    generator = torch.Generator().manual_seed(0)
    errors = []
    for number in range(ORDERS):
        few, many = (
            torch.randperm(t.shape[1], generator=generator) if number else torch.arange(t.shape[1])
            for t in (query, value)
        )
        back, forth = few.argsort().to(query.device), many.argsort().to(query.device)
        shuffled = [
            t[:, order.to(t.device)] for t, order in zip(operands, (few, few, many, many), strict=True)
        ]
        out, *grads = results_of(plain, shuffled)
        results = [out[:, forth], grads[0][:, back], grads[1][:, back], grads[2][:, forth]]
        errors.append([(t.to(F64) - truth).abs().max() for t, truth in zip(results, exact, strict=True)])
    return [torch.stack(several).max() for several in zip(*errors, strict=True)]


def run(backend: Backend, operands: list[Tensor], **settings: int) -> tuple[list[Tensor], Tensor]:
    """Run the kernels; return out and the three gradients, and the normalizer."""
    out, normalizer = backend.forward(*operands[:3], **settings)
    return [out, *backend.backward(*operands[:3], out, normalizer, operands[3], **settings)], normalizer


def check(
    results: list[Tensor],
    normalizer: Tensor,
    operands: list[Tensor],
    like: torch.dtype | None = None,
    peaked: bool = False,
) -> None:
    """Check that the error against float64 is at most twice `plain_errors` of the dtype, plus one rounding.

    like: another dtype than the operands' whose precision is meant.
    peaked: the softmax is nearly one-hot, and in the gradients of query and key almost everything cancels.
        There the rounding is that of their largest terms: PyTorch sums the same products twice, whose errors
        cancel too; the kernels subtract a sum of other products, those of the result and its gradient.
    """
    dtype = operands[0].dtype
    wide = [t.to(F64) for t in operands]
    query, key, value, grad = wide
    exact = results_of(reference.criss_cross_attention, wide)
    theirs = plain_errors([t.to(like or dtype) for t in operands], exact) if value.numel() else [query] * 4
    single = value.shape[2] * value.shape[3] == 1  # a pixel that sees only itself: all of it cancels
    for name, ours, other, truth in zip(
        ["out", "grad_query", "grad_key", "grad_value"], results, theirs, exact, strict=True
    ):
        assert ours.dtype == dtype and ours.shape == truth.shape
        if truth.numel() == 0:
            continue
        magnitude = truth.abs().max()
        if (peaked or single) and name in ("grad_query", "grad_key"):
            grad_weight = reference.ca_weight(grad, value).abs().max()
            magnitude = magnitude + grad_weight * (key if name == "grad_query" else query).abs().max()
        rounding = torch.finfo(like or dtype).eps * magnitude
        if dtype == F64:  # there the truth is rounded as well: about once a summand
            rounding *= query.shape[1] + sum(value.shape[1:])
        bound = 2 * other + rounding
        error = (ours.to(F64) - truth).abs().max()
        assert error <= bound, f"{name}: error {error:.2e}, bound {bound:.2e}"
    if normalizer.numel():
        scores = reference.ca_weight(query, key)
        tolerance = torch.finfo(like or (F64 if dtype == F64 else F32)).eps * max(
            1, scores.abs().max().item()
        )
        assert normalizer.dtype == (F64 if dtype == F64 else F32)
        top, total = normalizer.to(F64).unbind(-1)
        error = (top + total.log() - torch.logsumexp(scores, dim=1)).abs().max()
        assert error <= 4 * tolerance, f"normalizer: error {error:.2e}, bound {4 * tolerance:.2e}"


# (N, c, C, H, W). For the tensor cores: every width of their kernels, tails of keys and channels, more than
# one chunk of either channels, lines of several blocks of keys and of queries.
ALIGNED = [
    (2, 8, 16, 5, 7),
    (1, 64, 136, 20, 33),
    (1, 72, 40, 66, 97),
    (1, 8, 8, 130, 12),
    (1, 16, 72, 3, 150),
    (1, 8, 8, 257, 2),
    (5, 16, 72, 1, 9),
    (5, 16, 72, 9, 1),
    (5, 8, 8, 1, 1),
]
# Shapes that only the general kernels accept.
ODD = [
    (2, 3, 5, 4, 7),
    (1, 64, 512, 13, 11),
    (5, 1, 1, 1, 1),
    (2, 5, 9, 1, 33),
    (2, 5, 9, 33, 1),
    (1, 16, 40, 130, 5),
    (1, 7, 600, 6, 17),
    (1, 4, 8, 2, 1030),
    (0, 4, 4, 3, 3),
]


@pytest.mark.parametrize("shape", ALIGNED + ODD, ids=str)
@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16], ids=str)
def test_as_exact_as_pytorch(backend: Backend, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    operands = sample(shape, dtype, backend.device)
    results, normalizer = run(backend, operands)
    check(results, normalizer, operands)


@pytest.mark.parametrize("shape", [(2, 8, 16, 5, 7), (1, 64, 136, 20, 33), (2, 5, 9, 33, 1)], ids=str)
@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16], ids=str)
def test_large_scores(backend: Backend, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """CCNet does not scale its scores, so queries and keys of unit variance give scores as large as these."""
    operands = sample(shape, dtype, backend.device, spread=8.0)
    results, normalizer = run(backend, operands)
    check(results, normalizer, operands, peaked=True)


@pytest.mark.parametrize("shape", [(2, 8, 16, 5, 7), (1, 8, 16, 3, 150), (2, 5, 9, 33, 1)], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_scores_far_below_zero(backend: Backend, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """The padding of a line has a score of 0, whose exponential must not overflow the sums."""
    operands = sample(shape, dtype, backend.device, offset=6.0)
    assert reference.ca_weight(*operands[:2]).max() < -100
    results, normalizer = run(backend, operands)
    check(results, normalizer, operands, peaked=True)


@pytest.mark.parametrize("shape", ALIGNED, ids=str)
def test_tf32(backend: Backend, shape: tuple[int, ...]) -> None:
    """tf32 has ten bits of mantissa like float16, so it has to be as exact as PyTorch in float16."""
    if backend.name == "cpu":
        pytest.skip("tf32 is of tensor cores")
    operands = sample(shape, F32, backend.device)
    results, normalizer = run(backend, operands, tf32=True)
    check(results, normalizer, operands, like=F16)
    exact, _ = run(backend, operands)
    if backend.name == "emulator" and operands[0].shape[1] > 1:
        assert not torch.equal(results[0], exact[0])  # that is, other kernels served


@pytest.mark.parametrize("tensor_cores", [True, False])
@pytest.mark.parametrize("shape", [(2, 8, 16, 5, 7), (1, 64, 72, 18, 33), (1, 8, 40, 3, 150)], ids=str)
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.build
def test_same_bits_in_any_order_of_threads(
    emulator: Emulator, dtype: torch.dtype, shape: tuple[int, ...], tensor_cores: bool
) -> None:
    settings = {"tf32": tensor_cores, "capability": 90 if tensor_cores else 75}
    operands = sample(shape, dtype)
    backend = Backend("emulator", emulator.forward, emulator.backward)
    results, normalizer = run(backend, operands, **settings)
    for schedule in SCHEDULES[1:]:
        others, other_normalizer = run(backend, operands, schedule=schedule, **settings)
        for name, one, other in zip(
            ["out", "grad_query", "grad_key", "grad_value", "normalizer"],
            [*results, normalizer],
            [*others, other_normalizer],
            strict=True,
        ):
            assert torch.equal(one, other), f"{name} differs under schedule {schedule}"


# Scores of -inf, +inf and NaN


def masked(kind: str, shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Return operands like `sample`, but with scores of -inf, +inf, NaN, or large ones.

    Queries are positive, so that a key of -inf in its first channel gives scores of -inf.
    """
    query, key, value, grad = sample(shape, F64)
    query = query.abs() + 0.5
    n, _, _, h, w = shape
    chosen = torch.zeros(n, h, w, dtype=torch.bool)
    generator = torch.Generator().manual_seed(1)
    if kind == "row":
        chosen[0, h // 2] = True
    elif kind == "column":
        chosen[0, :, w // 2] = True
    elif kind == "all":
        chosen[0] = True
    else:
        chosen = torch.rand(n, h, w, generator=generator) < (0.85 if kind == "most" else 0.15)
    if kind in ("overflow", "equal and large", "near the largest"):
        # Only one channel is used, with numbers that bfloat16 represents exactly.
        high, low, each = {
            "overflow": (0.0, -(2.0**100), 2.0**100),  # scores of 0 and -inf in float32
            "equal and large": (1.71875 * 2.0**50, 2.0**49, 1.6875 * 2.0**40),
            "near the largest": (2.0**100, -(2.0**100), 1.75 * 2.0**27),  # their distance is beyond float32
        }[kind]
        chosen = torch.rand(n, h, w, generator=generator) < 0.5
        key = torch.zeros_like(key)
        key[:, 0] = torch.where(chosen, low, high)
        query = torch.zeros_like(query)
        query[:, 0] = each
    elif kind == "infinite values":
        value[:, 0][chosen] = torch.inf
    elif kind == "infinite gradients":
        grad[:, -1][chosen] = -torch.inf
    else:
        key[:, 0][chosen] = {"+inf": torch.inf, "nan": torch.nan}.get(kind, -torch.inf)
    return [t.to(device, dtype) for t in (query, key, value, grad)]


def largest(tensor: Tensor) -> float:
    finite = tensor.double()[tensor.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def check_where_finite(results: list[Tensor], operands: list[Tensor], tolerance: float) -> None:
    """Check that results are finite where the reference's are, and close to them there."""
    query, key, value, grad = operands
    expected = results_of(reference.criss_cross_attention, operands)
    # The gradients of query and key are sums whose terms may cancel almost completely.
    products = largest(reference.ca_weight(grad.double(), value.double()))
    scales = (0.0, products * largest(key), products * largest(query), 0.0)
    for name, ours, truth, scale in zip(
        ["out", "grad_query", "grad_key", "grad_value"], results, expected, scales, strict=True
    ):
        assert torch.equal(ours.isfinite(), truth.isfinite()), name
        where = truth.isfinite()
        error = largest(ours.double()[where] - truth.double()[where])
        assert error <= tolerance * max(1.0, scale, largest(truth)), f"{name}: error {error:.2e}"


KINDS = ("row", "column", "all", "some", "most", "+inf", "nan", "infinite values", "infinite gradients")
LARGE = ("overflow", "equal and large", "near the largest")
MASKED = [
    (1, 8, 8, 1, 9),
    (1, 8, 8, 9, 1),
    (2, 8, 16, 5, 7),
    (1, 16, 8, 3, 37),
    (1, 8, 24, 35, 2),
    (2, 3, 5, 4, 3),
]


@pytest.mark.parametrize("shape", MASKED, ids=str)
@pytest.mark.parametrize("kind", KINDS + LARGE)
def test_what_is_finite_in_the_reference_is_so_here(
    backend: Backend, kind: str, shape: tuple[int, ...]
) -> None:
    tolerances = {F32: 1e-4, F64: 1e-10, F16: 1e-2, BF16: 6e-2}
    for dtype in (F32, BF16) if kind in LARGE else tolerances:
        operands = masked(kind, shape, dtype, backend.device)
        exact, _ = run(backend, operands, **({"capability": 75} if backend.name == "emulator" else {}))
        check_where_finite(exact, operands, tolerances[dtype])
        if backend.name != "cpu" and dtype != F64:
            others, _ = run(backend, operands, tf32=True)
            check_where_finite(others, operands, max(tolerances[dtype], 1e-2))


def test_equal_scores_beyond_the_precision_of_their_sum() -> None:
    """Equal scores have weights of 1 / L however large they are. A sum of logarithms would lose L."""
    for dtype, size in ((F32, 2.0**60), (F64, 2.0**200), (BF16, 2.0**60)):
        query, value = torch.full((1, 1, 3, 5), size, dtype=dtype), torch.ones(1, 1, 3, 5, dtype=dtype)
        query.requires_grad_(), value.requires_grad_()
        out = ops.criss_cross_attention(query, query.detach(), value)
        out.sum().backward()
        torch.testing.assert_close(out, torch.ones_like(out))
        torch.testing.assert_close(value.grad, torch.ones_like(value))


def primitives(emulator: Emulator | None, name: str, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Return the result of ca_weight or ca_map and its two gradients."""
    if emulator is None:
        leaves = [t.clone().requires_grad_() for t in inputs]
        out = getattr(ops, name)(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    first, second = inputs
    calls = {
        "ca_weight": (("score", first, second), ("gather", grad, second), ("scatter", grad, first)),
        "ca_map": (("gather", first, second), ("score", grad, second), ("scatter", first, grad)),
    }[name]
    return [emulator.primitive(*call) for call in calls]


@pytest.mark.parametrize("shape", [(1, 3, 4, 1, 9), (1, 3, 4, 9, 1), (2, 8, 5, 5, 19)], ids=str)
@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16], ids=str)
@pytest.mark.parametrize("name", ["ca_weight", "ca_map"])
@pytest.mark.build
def test_primitives_of_inf_and_nan(
    emulator: Emulator, name: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """A weight of 0 times inf is NaN, as in the reference."""
    n, c, channels, h, w = shape
    generator = torch.Generator().manual_seed(0)

    def spoiled(number: int, part: float) -> Tensor:
        tensor = torch.randn(n, number, h, w, generator=generator, dtype=F64)
        for bad in (torch.inf, -torch.inf, torch.nan, 0.0):
            tensor[torch.rand(tensor.shape, generator=generator) < part] = bad
        return tensor.to(dtype)

    for part in (0.01, 0.1):
        weight = spoiled(h + w - 1, part)
        inputs = (
            [spoiled(c, part), spoiled(c, part)] if name == "ca_weight" else [weight, spoiled(channels, part)]
        )
        grad = spoiled(h + w - 1 if name == "ca_weight" else channels, part)
        leaves = [t.clone().requires_grad_() for t in inputs]
        out = getattr(reference, name)(*leaves)
        expected = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
        for library in (None, emulator):
            for ours, truth in zip(primitives(library, name, inputs, grad), expected, strict=True):
                torch.testing.assert_close(
                    ours, truth, rtol=0.05, atol=0.1 if dtype in (F16, BF16) else 1e-4, equal_nan=True
                )


# Heads, other axes, scale, pitches and residual


@dataclass
class Problem:
    """Arguments of the kernels beyond feature maps, and where they run.

    shape: (N, c, C, T, H, W), or without T; c and C are channels of a head.
    gaps: as in Emulator.forward; gaps of 16 bytes keep the maps aligned for tensor cores.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    axes: str = "HW"
    heads: int = 2
    scale: float = 0.7
    gamma: float | None = -1.3
    gaps: int = 8
    tensor_cores: bool = True
    untested: bool = False
    shared_memory: int = SHARED_MEMORY

    @property
    def arguments(self) -> dict[str, Any]:
        names = ("axes", "heads", "scale", "gaps", "untested", "shared_memory")
        settings = {name: getattr(self, name) for name in names}
        return settings | {"capability": 90 if self.tensor_cores else 75, "tf32": self.tensor_cores}

    def sample(self) -> list[Tensor]:
        """Return query, key, value, residual and the gradient of the result."""
        n, c, channels, *axes = self.shape
        generator = torch.Generator().manual_seed(sum(self.shape))
        few, many = self.heads * c, self.heads * channels
        return [
            torch.randn(n, k, *axes, generator=generator, dtype=F64).to(self.dtype)
            for k in (few, few, many, many, many)
        ]


def brute_force(
    query: Tensor, key: Tensor, value: Tensor, problem: Problem, masked: Tensor | None = None
) -> Tensor:
    """Compute the attention from the scores of all pairs of pixels.

    masked: [N,T,H,W], where all scores with the key are -inf.
    """
    sizes = (1, *query.shape[2:])[-3:]
    places = torch.cartesian_prod(*(torch.arange(size) for size in sizes))  # [pixels, 3]
    differ = places[:, None] != places
    along = differ[..., ["THW".index(axis) for axis in problem.axes]].any(-1)
    seen = ~differ.any(-1) | (along & (differ.sum(-1) == 1))
    q, k, v = (t.unflatten(1, (problem.heads, -1)).flatten(3) for t in (query, key, value))
    scores = problem.scale * torch.einsum("nhcp,nhcq->nhpq", q, k)
    if masked is not None:
        scores = scores + torch.where(masked.reshape(len(masked), 1, 1, -1), -torch.inf, 0.0)
    weight = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1).masked_fill(~seen, 0)
    return torch.einsum("nhpq,nhcq->nhcp", weight, v).reshape(value.shape)


def solve(emulator: Emulator, problem: Problem, operands: list[Tensor], **settings: int) -> dict[str, Tensor]:
    """Run the kernels; return out, the sum and the gradients by name."""
    query, key, value, residual, grad = operands
    gamma = None if problem.gamma is None else torch.tensor(problem.gamma, dtype=F64)
    with_residual: dict[str, Any] = {} if gamma is None else {"residual": residual, "gamma": gamma}
    arguments: dict[str, Any] = problem.arguments | settings
    out, normalizer, *sums = emulator.forward(query, key, value, **with_residual, **arguments)
    assert emulator.tensor_cores == problem.tensor_cores
    grads = emulator.backward(query, key, value, out, normalizer, grad, gamma=gamma, **arguments)
    assert emulator.tensor_cores == problem.tensor_cores
    names = ("out", *["sum"] * len(sums), "grad_query", "grad_key", "grad_value", "grad_gamma")
    return dict(zip(names, (out, *sums, *grads), strict=False)) | {"normalizer": normalizer}


def expected(problem: Problem, operands: list[Tensor], masked: Tensor | None = None) -> dict[str, Tensor]:
    """Return the results of `solve` but the normalizer, in float64."""
    query, key, value, residual, grad = (t.to(F64) for t in operands)
    inputs = [t.requires_grad_() for t in (query, key, value)]
    out = brute_force(query, key, value, problem, masked)
    results = {"out": out.detach()}
    result = out
    if problem.gamma is not None:
        gamma = torch.tensor(problem.gamma, dtype=F64, requires_grad=True)
        inputs.append(gamma)
        result = residual + gamma * out
        results["sum"] = result.detach()
    names = ("grad_query", "grad_key", "grad_value", "grad_gamma")
    return results | dict(zip(names, torch.autograd.grad(result, inputs, grad), strict=False))


def check_problem(problem: Problem, results: dict[str, Tensor], operands: list[Tensor]) -> None:
    """Check the results against brute force, up to a few roundings of the dtype."""
    precision = {F64: 1e-12, F32: 2e-6, F16: 2e-3, BF16: 1.6e-2}
    tolerance = precision[F16 if problem.tensor_cores and problem.dtype == F32 else problem.dtype]
    truth = expected(problem, operands)
    assert results.keys() == {*truth, "normalizer"}
    for name, exact in truth.items():
        assert results[name].shape == exact.shape
        magnitude = exact.abs().max()
        if name == "grad_gamma":  # a sum over all elements
            magnitude = (operands[-1].to(F64) * truth["out"]).norm()
        error = (results[name].to(F64) - exact).abs().max()
        assert error <= 4 * tolerance * magnitude, f"{name}: error {error:.2e} of {magnitude:.2e}"


def on_path(tensor_cores: bool, dtype: torch.dtype, **changes: Any) -> Problem:
    """Return a problem in three dimensions, whose sizes and pitches are odd unless it is for tensor cores."""
    if tensor_cores:
        problem = Problem((2, 8, 72, 3, 4, 5), dtype)
    else:
        problem = Problem((2, 3, 5, 3, 4, 5), dtype, gaps=3, tensor_cores=False)
    return replace(problem, **changes)


PATHS = [(True, F32), (True, F16), (True, BF16), (False, F32), (False, F64), (False, F16), (False, BF16)]


@pytest.mark.parametrize("axes", ["T", "H", "W", "TH", "TW", "HW", "THW"])
@pytest.mark.parametrize("tensor_cores, dtype", PATHS, ids=str)
@pytest.mark.build
def test_any_axes(emulator: Emulator, tensor_cores: bool, dtype: torch.dtype, axes: str) -> None:
    problem = on_path(tensor_cores, dtype, axes=axes)
    operands = problem.sample()
    check_problem(problem, solve(emulator, problem, operands), operands)


@pytest.mark.parametrize("gamma", [None, 0.0])
@pytest.mark.parametrize("tensor_cores, dtype", PATHS, ids=str)
@pytest.mark.build
def test_without_residual_and_with_gamma_of_zero(
    emulator: Emulator, tensor_cores: bool, dtype: torch.dtype, gamma: float | None
) -> None:
    problem = on_path(tensor_cores, dtype, axes="THW", heads=3, scale=-1.5, gamma=gamma)
    operands = problem.sample()
    results = solve(emulator, problem, operands)
    check_problem(problem, results, operands)
    if gamma == 0:
        assert torch.equal(results["sum"], operands[3])
        assert all(not results[f"grad_{name}"].any() for name in ("query", "key", "value"))


# Lines of several blocks of queries or keys, long sums, more channels than a launch has, and, of general
# kernels, more numbers than one block adds up for gamma.
LONG = [
    Problem((1, 8, 72, 3, 70), BF16),
    Problem((1, 16, 40, 3, 130), F16),
    Problem((1, 8, 8, 2, 150), BF16, axes="W"),
    Problem((1, 8, 8, 150, 2), BF16, axes="H", gamma=None),
    Problem((1, 8, 8, 2, 257), BF16),
    Problem((1, 8, 8, 130, 2), F32),
    Problem((1, 8, 8, 130, 2), F32, shared_memory=99 * 1024),
    Problem((1, 8, 72, 3, 70), BF16, shared_memory=48_000),
    Problem((1, 8, 72, 2, 257), BF16, heads=1, untested=True, shared_memory=99 * 1024),
    Problem((1, 8, 8, 2, 200), F32, untested=True, shared_memory=99 * 1024),
    Problem((1, 8, 8, 272, 2), F32, gamma=None, untested=True, shared_memory=99 * 1024),
    Problem((1, 8, 16, 18, 2, 2), BF16, axes="TW"),
    Problem((1, 8, 8, 3, 150), BF16, gaps=1, tensor_cores=False),
    Problem((1, 3, 520, 2, 9), F32, gaps=1, tensor_cores=False),
    Problem((1, 133, 5, 2, 140), F32, gaps=1, tensor_cores=False),
    Problem((1, 1, 1, 16, 130), F32, gaps=1, tensor_cores=False),
    Problem((1, 1, 1, 16, 130), F64, gaps=1, tensor_cores=False),
]


@pytest.mark.parametrize("problem", LONG, ids=str)
@pytest.mark.build
def test_long_lines_of_heads(emulator: Emulator, problem: Problem) -> None:
    operands = problem.sample()
    check_problem(problem, solve(emulator, problem, operands), operands)


@pytest.mark.parametrize("tensor_cores, dtype", PATHS, ids=str)
@pytest.mark.build
def test_same_bits_of_heads_in_any_order_of_threads(
    emulator: Emulator, tensor_cores: bool, dtype: torch.dtype
) -> None:
    problem = on_path(tensor_cores, dtype, axes="THW")
    operands = problem.sample()
    results = solve(emulator, problem, operands)
    for schedule in SCHEDULES[1:]:
        others = solve(emulator, problem, operands, schedule=schedule)
        for name, result in results.items():
            assert torch.equal(result, others[name]), f"{name} differs under schedule {schedule}"


@pytest.mark.parametrize(
    "changes",
    [{"gaps": 4}, {"heads": 4, "shape": (1, 4, 16, 3, 4)}, {"heads": 4, "shape": (1, 8, 4, 3, 4)}],
    ids=str,
)
@pytest.mark.build
def test_heads_that_are_not_aligned(emulator: Emulator, changes: dict[str, Any]) -> None:
    """The general kernels serve them."""
    problem = replace(Problem((1, 8, 16, 3, 4), BF16, tensor_cores=False), **changes)
    operands = problem.sample()
    results = solve(emulator, problem, operands, capability=90)
    check_problem(problem, results, operands)


# Pictures, videos and frames; one image; lines of other lengths, with other tiles, in the two passes; several
# chunks of channels; blocks of each kernel; one stage in the ring of the backward.
IN_ORDER = [
    Problem((3, 8, 72, 4, 5), BF16),
    Problem((1, 8, 8, 3, 3), F16, gamma=None, heads=1, gaps=0),
    Problem((2, 8, 16, 3, 4, 5), BF16, axes="THW"),
    Problem((2, 8, 16, 3, 4, 5), F16, axes="TW"),
    Problem((2, 8, 16, 3, 4, 5), BF16, axes="TH", gamma=None),
    Problem((2, 72, 16, 2, 17), BF16, heads=1),
    Problem((2, 8, 136, 65, 68), BF16, heads=1, gamma=None, shared_memory=64_000),
    Problem((1, 8, 8, 113, 114), F16, heads=1),
]


def in_turns(schedule: int) -> dict[str, int]:
    """Return settings of the emulator in which few blocks run at a time."""
    return {"schedule": schedule, "resident": (3, 2, 4, 5, 2, 1)[schedule % 6]}


@pytest.mark.parametrize("problem", IN_ORDER, ids=str)
@pytest.mark.build
def test_image_order(emulator: Emulator, problem: Problem) -> None:
    """Two passes in one launch give the bits of two launches, whichever blocks run at a time."""
    operands = problem.sample()
    truth = solve(emulator, problem, operands)
    query, key, value, residual, _ = operands
    gamma = None if problem.gamma is None else torch.tensor(problem.gamma, dtype=F64)
    tried: dict[str, Any] = problem.arguments | {"untested": True}
    if gamma is not None:
        tried |= {"residual": residual, "gamma": gamma}
    emulator.forward(query, key, value, **tried)
    assert emulator.workspace_size > 0  # the counters
    for schedule in SCHEDULES[:: 1 if query.numel() < 10_000 else 3]:
        results = solve(emulator, problem, operands, untested=True, **in_turns(schedule))
        for name, exact in truth.items():
            assert torch.equal(results[name], exact), f"{name} under schedule {schedule}"


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(40, 16, 64, 97, 97), (3, 64, 512, 60, 33), (300, 8, 8, 5, 3)], ids=str)
def test_image_order_on_cuda(shape: tuple[int, ...]) -> None:
    """More blocks than a GPU runs at a time."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("no GPU with tensor cores here")
    backend, operands = on_device("cuda"), sample(shape, BF16, "cuda")
    results, normalizer = run(backend, operands)
    with ops.untested_kernels():
        for _ in range(5):
            others, normalizer_too = run(backend, operands)
            for result, other in zip([*results, normalizer], [*others, normalizer_too], strict=True):
                assert torch.equal(result, other)


@pytest.mark.parametrize(
    "problem",
    [
        Problem((1, 8, 8, 3, 70), BF16),  # another kernel for each pass
        Problem((1, 8, 8, 3, 150), BF16),
        Problem((1, 8, 8, 3, 4), F32),
        Problem((1, 8, 8, 3, 4), BF16, axes="W"),
        Problem((1, 8, 8, 3, 4), BF16, gaps=1, tensor_cores=False),
    ],
    ids=str,
)
@pytest.mark.build
def test_calls_without_image_order(emulator: Emulator, problem: Problem) -> None:
    operands = problem.sample()
    query, key, value, *_ = operands
    arguments: dict[str, Any] = problem.arguments | {"untested": True}
    emulator.forward(query, key, value, **arguments)
    assert emulator.workspace_size == 0
    check_problem(problem, solve(emulator, problem, operands, untested=True), operands)


#: Parts of the keys whose scores are -inf.
MASKED_PARTS = ("some", "most", "frame", "row", "all")


def check_masked(
    problem: Problem,
    part: str,
    solve: Callable[[Problem, list[Tensor]], dict[str, Tensor]],
    tolerance: float,
) -> None:
    """Check that passes without a finite score have no weight, and that pixels without one have NaN.

    This is what PyTorch does.

    Args:
        problem: problem without a residual.
        part: one of MASKED_PARTS.
        solve: function that runs the kernels.
        tolerance: largest difference of finite results.
    """
    query, key, *others = problem.sample()
    query = query.abs()
    chosen = torch.zeros(query.shape[0], *query.shape[2:], dtype=torch.bool)
    if part in ("some", "most"):
        random = torch.rand(chosen.shape, generator=torch.Generator().manual_seed(1))
        chosen = random < (0.2 if part == "some" else 0.8)
    elif part == "frame":
        chosen[0, 1] = True
    else:
        chosen[0, ..., slice(None) if part == "all" else 2, :] = True
    first_of_heads = slice(None, None, key.shape[1] // problem.heads)
    key[:, first_of_heads].masked_fill_(chosen[:, None], 0)
    truth = expected(problem, [query, key, *others], chosen)
    key[:, first_of_heads].masked_fill_(chosen[:, None], -torch.inf)
    results = solve(problem, [query, key, *others])
    for name, exact in truth.items():
        result = results[name].to(F64)
        if name == "grad_query":  # 0 * -inf is NaN
            result[:, first_of_heads] = exact[:, first_of_heads]
        finite = exact.isfinite()
        assert torch.equal(result.isfinite(), finite), name
        error = (result[finite] - exact[finite]).abs()
        assert not error.numel() or error.max() <= tolerance, name


@pytest.mark.parametrize("axes", ["W", "TH", "THW"])
@pytest.mark.parametrize("part", MASKED_PARTS)
@pytest.mark.parametrize("tensor_cores, dtype", [(True, BF16), (False, F32)], ids=str)
@pytest.mark.build
def test_masked_lines_of_any_axes(
    emulator: Emulator, tensor_cores: bool, dtype: torch.dtype, part: str, axes: str
) -> None:
    problem = on_path(tensor_cores, dtype, axes=axes, scale=0.5, gamma=None)
    check_masked(problem, part, partial(solve, emulator), 0.1 if dtype == BF16 else 1e-5)


@pytest.mark.parametrize("name", ["forward", "backward"])
@pytest.mark.build
def test_more_lines_than_a_grid_has(emulator: Emulator, name: str) -> None:
    """The number of lines must not wrap around to that of a smaller grid."""
    arguments = (Forward if name == "forward" else Backward)()
    arguments.dtype, arguments.axes = DTYPES.index(BF16), axes_of("HW")
    arguments.sizes = Sizes(2**32 + 1, 1, 8, 8, 1, 1, 1)
    device = Device(90, SHARED_MEMORY, True, False)
    with pytest.raises(RuntimeError, match="no launch failed"):
        emulator.call(f"emulated_{name}", byref(arguments), byref(device))


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.build
def test_gradient_of_gamma_of_an_empty_batch(emulator: Emulator, dtype: torch.dtype) -> None:
    problem = on_path(False, dtype, shape=(0, 3, 5, 2, 3))
    operands = problem.sample()
    assert solve(emulator, problem, operands)["grad_gamma"] == 0

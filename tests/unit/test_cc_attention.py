"""Criss-cross attention: the reference against loops, compiled operators against the reference."""

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import cc_attention
from cc_attention import CrissCrossAttention, RecurrentCrissCrossAttention, ops, reference

PACKAGE = Path(cc_attention.__file__).parent
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# N, c, C, H, W
SHAPES = [
    (2, 3, 5, 4, 7),
    (1, 1, 1, 1, 1),
    (2, 2, 3, 1, 6),
    (2, 2, 3, 6, 1),
    (1, 5, 7, 2, 2),
    (2, 9, 11, 19, 33),
    (1, 4, 6, 33, 16),
    (0, 2, 3, 4, 5),
    (1, 0, 3, 4, 5),
    (1, 3, 0, 4, 5),
]
TINY = [s for s in SHAPES if math.prod(s[3:]) < 30]
#: Number of pictures where errors are compared. The largest error of a few elements varies too much.
MANY = 32


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    return request.param


@pytest.fixture
def compiled(device: str) -> str:
    """Return the device; skip the test if the compiled operators do not support it."""
    if device not in ops.DEVICE_TYPES:
        pytest.skip(f"cc_attention._C is not built for {device}: python setup.py build_ext --inplace")
    return device


def sample(shape: tuple[int, ...], device: str = "cpu", dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return a random query [N,c,H,W], key [N,c,H,W], value [N,C,H,W] and weight [N,L,H,W]."""
    n, c, channels, h, w = shape
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(n, k, h, w, generator=generator, dtype=torch.float64).to(device, dtype)
        for k in (c, c, channels, h + w - 1)
    ]


def positions(y: int, x: int, h: int, w: int) -> list[tuple[int, int]]:
    return [(y, u) for u in range(w)] + [(v, x) for v in range(h) if v != y]


def loop_weight(query: Tensor, key: Tensor) -> Tensor:
    n, c, h, w = query.shape
    out = query.new_zeros(n, h + w - 1, h, w)
    for b in range(n):
        for y in range(h):
            for x in range(w):
                for entry, (v, u) in enumerate(positions(y, x, h, w)):
                    for k in range(c):
                        out[b, entry, y, x] += query[b, k, y, x] * key[b, k, v, u]
    return out


def loop_map(weight: Tensor, value: Tensor) -> Tensor:
    n, c, h, w = value.shape
    out = torch.zeros_like(value)
    for b in range(n):
        for y in range(h):
            for x in range(w):
                for entry, (v, u) in enumerate(positions(y, x, h, w)):
                    for k in range(c):
                        out[b, k, y, x] += weight[b, entry, y, x] * value[b, k, v, u]
    return out


# The reference


@pytest.mark.parametrize("shape", TINY, ids=str)
def test_reference_is_the_definition(shape: tuple[int, ...]) -> None:
    query, key, value, weight = sample(shape)
    torch.testing.assert_close(reference.ca_weight(query, key), loop_weight(query, key))
    torch.testing.assert_close(reference.ca_map(weight, value), loop_map(weight, value))
    attention = loop_map(torch.softmax(loop_weight(query, key), dim=1), value)
    torch.testing.assert_close(reference.criss_cross_attention(query, key, value), attention)


def test_a_pixel_counts_itself_once() -> None:
    """With equal scores the result is the mean over the H + W - 1 pixels of row and column."""
    value = torch.arange(12.0).reshape(1, 1, 3, 4)
    zeros = torch.zeros(1, 2, 3, 4)
    for function in (reference.criss_cross_attention, ops.criss_cross_attention):
        out = function(zeros, zeros, value)
        assert out[0, 0, 1, 2].item() == pytest.approx((4 + 5 + 6 + 7 + 2 + 10) / 6)


@pytest.mark.parametrize("shape", [(2, 1, 2, 3, 2), (1, 2, 2, 1, 3), (1, 2, 2, 3, 1)], ids=str)
def test_reference_gradients(shape: tuple[int, ...]) -> None:
    query, key, value, weight = (t.requires_grad_() for t in sample(shape))
    assert torch.autograd.gradcheck(reference.ca_weight, (query, key))
    assert torch.autograd.gradcheck(reference.ca_map, (weight, value))
    assert torch.autograd.gradcheck(reference.criss_cross_attention, (query, key, value))
    if shape[0] == 1:
        assert torch.autograd.gradgradcheck(reference.criss_cross_attention, (query, key, value))


# The compiled operators


def contiguous(tensor: Tensor) -> Tensor:
    return tensor


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def strided(tensor: Tensor) -> Tensor:
    """Return the same numbers as a slice of the transpose of a larger tensor."""
    n, c, h, w = tensor.shape
    larger = tensor.new_full((n, c, w + 2, h + 1), math.nan)
    view = larger[:, :, 1:-1, 1:].transpose(2, 3)
    view.copy_(tensor)
    return view


def forward_and_gradients(
    function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor
) -> list[Tensor]:
    inputs = [t.detach().requires_grad_() for t in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


@pytest.mark.parametrize("layout", [contiguous, channels_last, strided])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["ca_weight", "ca_map", "criss_cross_attention"])
def test_compiled_is_as_exact_as_pytorch(
    compiled: str, name: str, dtype: torch.dtype, layout: Callable[[Tensor], Tensor]
) -> None:
    """The error against float64 is at most twice that of PyTorch in the same dtype, plus one rounding."""
    for shape in SHAPES:
        if shape in TINY:
            shape = (shape[0] * MANY, *shape[1:])
        query, key, value, weight = (layout(t) for t in sample(shape, compiled, dtype))
        inputs = {
            "ca_weight": [query, key],
            "ca_map": [weight, value],
            "criss_cross_attention": [query, key, value],
        }[name]
        grad = layout(weight if name == "ca_weight" else value)
        results = forward_and_gradients(getattr(ops, name), inputs, grad)
        plain = forward_and_gradients(getattr(reference, name), inputs, grad)
        exact = forward_and_gradients(
            getattr(reference, name), [t.to(torch.float64) for t in inputs], grad.to(torch.float64)
        )
        for what, ours, theirs, truth in zip(
            ["output", "first gradient", "second gradient", "third gradient"],
            results,
            plain,
            exact,
            strict=False,
        ):
            assert ours.dtype == dtype and ours.shape == truth.shape
            if truth.numel() == 0:
                continue
            rounding = torch.finfo(dtype).eps * truth.abs().max()
            if dtype == torch.float64:  # there the truth is rounded as well: about once a summand
                rounding *= max(shape[1], shape[2], shape[3] + shape[4])
            bound = 2 * (theirs - truth).abs().max() + rounding
            assert (ours - truth).abs().max() <= bound, (shape, what)


@pytest.mark.parametrize("shape", [(2, 2, 3, 3, 2), (1, 2, 2, 1, 3), (1, 2, 2, 3, 1)], ids=str)
def test_compiled_gradients(compiled: str, shape: tuple[int, ...]) -> None:
    query, key, value, weight = (t.requires_grad_() for t in sample(shape, compiled))
    assert torch.autograd.gradcheck(ops.ca_weight, (query, key))
    assert torch.autograd.gradcheck(ops.ca_map, (weight, value))
    assert torch.autograd.gradcheck(ops.criss_cross_attention, (query, key, value))


@pytest.mark.parametrize("shape", [(2, 3, 5, 4, 6), (1, 2, 3, 1, 4), (0, 2, 3, 4, 5)], ids=str)
def test_opcheck(compiled: str, shape: tuple[int, ...]) -> None:
    query, key, value, weight = sample(shape, compiled, torch.float32)
    out, normalizer, _ = torch.ops.cc_attention.criss_cross_attention(query, key, value)
    for name, arguments in {
        "criss_cross_attention": (query, key, value),
        "criss_cross_attention_backward": (value, query, key, value, out, normalizer),
        "ca_weight": (query, key),
        "ca_weight_backward": (weight, query, key),
        "ca_map": (weight, value),
        "ca_map_backward": (value, weight, value),
    }.items():
        op = getattr(torch.ops.cc_attention, name).default
        torch.library.opcheck(op, arguments)
        if not name.endswith("backward"):
            torch.library.opcheck(op, tuple(channels_last(t).requires_grad_() for t in arguments))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(device: str, dynamic: bool, autocast: bool) -> None:
    torch.compiler.reset()
    module = CrissCrossAttention(16).to(device)
    torch.nn.init.ones_(module.gamma)
    traced = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for h, w in [(5, 6), (7, 4)]:
        x = torch.randn(2, 16, h, w, device=device)
        gradients = []
        for function in (module, traced):
            module.zero_grad()
            with torch.autocast(device, torch.bfloat16, enabled=autocast):
                out = function(x)
            out.float().square().sum().backward()
            gradients.append([out.detach(), *(p.grad for p in module.parameters())])
        torch.testing.assert_close(
            *gradients, rtol=2e-2 if autocast else 1e-5, atol=2e-2 if autocast else 1e-5
        )


def test_same_bits_every_time_and_for_any_number_of_threads(compiled: str) -> None:
    query, key, value, weight = sample((2, 9, 40, 19, 33), compiled, torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 1, 2, 5):
            torch.set_num_threads(threads)
            results.append(
                [
                    *forward_and_gradients(ops.criss_cross_attention, [query, key, value], value),
                    *forward_and_gradients(ops.ca_weight, [query, key], weight),
                    *forward_and_gradients(ops.ca_map, [weight, value], value),
                ]
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_no_tensor_of_the_size_of_the_weights_is_kept(compiled: str) -> None:
    inputs = [t.requires_grad_() for t in sample((2, 3, 5, 4, 7), compiled, torch.float32)[:3]]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = ops.criss_cross_attention(*inputs)
    shapes = sorted(tuple(t.shape) for t in saved)
    assert shapes == sorted([*(tuple(t.shape) for t in inputs), tuple(out.shape), (2, 4, 7, 1, 2)])


def test_results_are_channels_last(compiled: str) -> None:
    inputs = sample((2, 3, 5, 4, 7), compiled, torch.float32)[:3]
    results = forward_and_gradients(ops.criss_cross_attention, inputs, inputs[2])
    # Gradients of contiguous inputs are converted back.
    assert results[0].is_contiguous(memory_format=torch.channels_last)
    others = forward_and_gradients(
        ops.criss_cross_attention, [channels_last(t) for t in inputs], channels_last(inputs[2])
    )
    for one, other in zip(results, others, strict=True):
        assert torch.equal(one, other) and other.is_contiguous(memory_format=torch.channels_last)


def test_export(device: str) -> None:
    module = CrissCrossAttention(16).to(device)
    torch.nn.init.ones_(module.gamma)
    x = torch.randn(2, 16, 5, 6, device=device)
    height, width = torch.export.Dim("height", min=2, max=512), torch.export.Dim("width", min=2, max=512)
    program = torch.export.export(module, (x,), dynamic_shapes={"x": {2: height, 3: width}})
    larger = torch.randn(2, 16, 9, 4, device=device)
    for pictures in (x, larger):
        torch.testing.assert_close(program.module()(pictures), module(pictures))


@pytest.mark.gpu
def test_cuda_graph() -> None:
    if not torch.cuda.is_available() or "cuda" not in ops.DEVICE_TYPES:
        pytest.skip("needs a GPU and cc_attention._C built for it")
    inputs = [channels_last(t) for t in sample((2, 16, 24, 19, 33), "cuda", torch.bfloat16)[:3]]
    forward_and_gradients(ops.criss_cross_attention, inputs, inputs[2])  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_and_gradients(ops.criss_cross_attention, inputs, inputs[2])
    for tensor in inputs:
        tensor.copy_(tensor.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    expected = forward_and_gradients(ops.criss_cross_attention, inputs, inputs[2])
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.gpu
def test_runs_on_the_current_stream() -> None:
    if not torch.cuda.is_available() or "cuda" not in ops.DEVICE_TYPES:
        pytest.skip("needs a GPU and cc_attention._C built for it")
    query, key, _, _ = sample((2, 9, 11, 19, 33), "cuda", torch.float32)
    expected = ops.ca_weight(query, key)
    late = torch.zeros_like(query)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # a launch on another stream would now read zeros
        late.copy_(query)
        result = ops.ca_weight(late, key)
    stream.synchronize()
    assert torch.equal(result, expected)


def test_double_backward_is_refused(compiled: str) -> None:
    query, key, value, weight = (t.requires_grad_() for t in sample((1, 2, 3, 3, 4), compiled))
    for function, inputs in (
        (ops.criss_cross_attention, (query, key, value)),
        (ops.ca_weight, (query, key)),
        (ops.ca_map, (weight, value)),
    ):
        (gradient,) = torch.autograd.grad(function(*inputs).square().sum(), inputs[0], create_graph=True)
        with pytest.raises(RuntimeError, match="double backward is not supported"):
            gradient.sum().backward()


# Errors: the same from the compiled operators, from the reference and while tracing


def wrong_arguments() -> dict[str, tuple[str, tuple[Tensor, ...], str]]:
    a = torch.zeros
    return {
        "fused": (
            "criss_cross_attention",
            (a(1, 2, 3, 4), a(1, 2, 3, 4), a(1, 5, 3, 6)),
            r"criss_cross_attention: value and query must agree .*\[1, 5, 3, 6\] and \[1, 2, 3, 4\]",
        ),
        "fused channels": (
            "criss_cross_attention",
            (a(1, 2, 3, 4), a(1, 3, 3, 4), a(1, 5, 3, 4)),
            r"criss_cross_attention: key must have 2 channels \(those of query\)",
        ),
        "dimensions": ("ca_weight", (a(2, 3, 4), a(2, 3, 4)), r"ca_weight: query must have 4 .*\[2, 3, 4\]"),
        "dimensions of the fused operator": (
            "criss_cross_attention",
            (a(2, 3, 4), a(2, 3, 4), a(5, 3, 4)),
            r"criss_cross_attention: value must have 4 .*\[5, 3, 4\]",
        ),
        "dimensions of one": (
            "criss_cross_attention",
            (a(1, 2, 3, 4), a(1, 2, 1, 3, 4), a(1, 5, 3, 4)),
            r"criss_cross_attention: key must have 4 .*\[1, 2, 1, 3, 4\]",
        ),
        "dimensions of weights": (
            "ca_map",
            (a(1, 6, 1, 3, 4), a(1, 5, 1, 3, 4)),
            r"ca_map: weight must have 4 .*\[1, 6, 1, 3, 4\]",
        ),
        "no rows": (
            "ca_weight",
            (a(1, 2, 0, 4), a(1, 2, 0, 4)),
            r"ca_weight: query must have at least one row",
        ),
        "height": (
            "ca_weight",
            (a(1, 2, 3, 4), a(1, 2, 5, 4)),
            r"ca_weight: query and key must agree .*\[1, 2, 3, 4\] and \[1, 2, 5, 4\]",
        ),
        "batch": ("ca_map", (a(1, 6, 3, 4), a(2, 5, 3, 4)), r"ca_map: weight and value must agree in batch"),
        "channels": ("ca_weight", (a(1, 2, 3, 4), a(1, 3, 3, 4)), r"ca_weight: key must have 2 channels"),
        "positions": (
            "ca_map",
            (a(1, 7, 3, 4), a(1, 5, 3, 4)),
            r"ca_map: weight must have 6 channels \(H \+ W - 1",
        ),
        "dtype": ("ca_map", (a(1, 6, 3, 4), a(1, 5, 3, 4).half()), r"ca_map: .* same dtype, got"),
        "integers": (
            "ca_map",
            (a(1, 6, 3, 4).int(), a(1, 5, 3, 4).int()),
            r"ca_map: .*(float32|floating point)",
        ),
    }


@pytest.mark.parametrize("case", wrong_arguments())
def test_errors(case: str) -> None:
    name, arguments, message = wrong_arguments()[case]
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, name)(*arguments)
    with pytest.raises(RuntimeError, match=message):
        getattr(reference, name)(*arguments)
    with FakeTensorMode() as mode, pytest.raises(RuntimeError, match=message):
        getattr(ops, name)(*(mode.from_tensor(t) for t in arguments))
    torch.compiler.reset()
    with pytest.raises(RuntimeError, match=message):
        torch.compile(getattr(ops, name), backend="eager")(*arguments)


def test_errors_of_the_backward_operators(compiled: str) -> None:
    query, key, value, weight = sample((1, 2, 5, 3, 4), compiled)
    with pytest.raises(RuntimeError, match="ca_weight_backward: grad must have 6 channels"):
        torch.ops.cc_attention.ca_weight_backward(value, query, key)
    with pytest.raises(RuntimeError, match="ca_map_backward: grad must have 5 channels"):
        torch.ops.cc_attention.ca_map_backward(query, weight, value)
    out, normalizer, _ = torch.ops.cc_attention.criss_cross_attention(query, key, value)
    backward = torch.ops.cc_attention.criss_cross_attention_backward
    with pytest.raises(RuntimeError, match="criss_cross_attention_backward: grad must have 5 channels"):
        backward(query, query, key, value, out, normalizer)
    with pytest.raises(RuntimeError, match="criss_cross_attention_backward: normalizer must be the one"):
        backward(value, query, key, value, out, normalizer[:, 1:])


def test_different_devices_are_refused() -> None:
    query = torch.zeros(1, 2, 3, 4)
    for module in (ops, reference):
        with pytest.raises(
            RuntimeError, match="ca_weight: query and key must be on the same device|[Ee]xpected all"
        ):
            module.ca_weight(query, query.to("meta"))


def test_mixed_dtypes_are_refused_outside_autocast() -> None:
    query = torch.zeros(1, 2, 3, 4)
    for module in (ops, reference):
        with pytest.raises(
            RuntimeError, match="criss_cross_attention: value and query must have the same dtype"
        ):
            module.criss_cross_attention(query.bfloat16(), query.bfloat16(), query)


# Precision and autocast


@pytest.mark.parametrize("module", [ops, reference])
def test_large_half_precision_scores_do_not_overflow(device: str, module: object) -> None:
    """CCNet does not scale its scores, and 64 channels of 40 * 40 exceed float16."""
    large = torch.full((1, 64, 3, 4), 40.0, device=device, dtype=torch.float16)
    value = torch.ones(1, 2, 3, 4, device=device, dtype=torch.float16)
    assert torch.equal(module.criss_cross_attention(large, large, value), value)
    with torch.autocast(device, torch.float16 if device == "cuda" else torch.bfloat16):
        assert module.ca_weight(large, large).max().item() == 64 * 40 * 40


@pytest.mark.parametrize("module", [ops, reference])
def test_autocast(device: str, module: object) -> None:
    """ca_weight and ca_map run in float32, the fused operator in the dtype of the region, as in PyTorch."""
    query, key, value, weight = sample((2, 3, 5, 4, 7), device, torch.float32)
    expected = reference.criss_cross_attention(*(t.bfloat16() for t in (query, key, value)))
    with torch.autocast(device, torch.bfloat16):
        assert module.ca_weight(query.bfloat16(), key).dtype == torch.float32
        assert module.ca_map(weight.bfloat16(), value.bfloat16()).dtype == torch.float32
        out = module.criss_cross_attention(query.bfloat16(), key, value)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)
        assert module.criss_cross_attention(*(t.double() for t in (query, key, value))).dtype == torch.float64


def settings_of_tf32() -> dict[str, tuple[Callable[[], None], bool]]:
    matmul, every = torch.backends.cuda.matmul, torch.backends

    def inherited(generic: str, own: str) -> None:
        every.fp32_precision, matmul.fp32_precision = generic, own

    return {
        "the default": (lambda: None, False),
        "allow_tf32": (lambda: setattr(matmul, "allow_tf32", True), True),
        "not allow_tf32": (lambda: setattr(matmul, "allow_tf32", False), False),
        "high": (lambda: torch.set_float32_matmul_precision("high"), True),
        "highest": (lambda: torch.set_float32_matmul_precision("highest"), False),
        "tf32": (lambda: setattr(matmul, "fp32_precision", "tf32"), True),
        "ieee": (lambda: setattr(matmul, "fp32_precision", "ieee"), False),
        "tf32 for all": (lambda: inherited("tf32", "none"), True),
        "tf32 for all but products": (lambda: inherited("tf32", "ieee"), False),
        "ieee for all": (lambda: inherited("ieee", "none"), False),
        "tf32 for products": (lambda: inherited("ieee", "tf32"), True),
    }


@pytest.fixture
def restored_precision() -> Iterator[None]:
    before = torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision = before


class Calls(TorchDispatchMode):
    """Records whether calls of the fused operator ask for tf32."""

    def __init__(self) -> None:
        super().__init__()
        self.tf32: list[bool] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.cc_attention.criss_cross_attention.default:
            self.tf32.append(len(args) > 8 and args[8])  # PyTorch leaves out defaults at the end
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", settings_of_tf32())
def test_tf32_is_what_pytorch_is_set_to(
    name: str, monkeypatch: pytest.MonkeyPatch, restored_precision: None
) -> None:
    """Both interfaces of PyTorch are followed. The older one can't be read once the newer one was set."""
    if not ops.DEVICE_TYPES:
        pytest.skip("the compiled operators are not built")
    monkeypatch.setattr(
        ops, "DEVICE_TYPES", frozenset({"cuda"})
    )  # for tensors without data: no GPU is needed
    change, expected = settings_of_tf32()[name]
    change()
    with FakeTensorMode(), Calls() as calls:
        query = torch.empty(1, 2, 3, 4, device="cuda")
        ops.criss_cross_attention(query, query, query)
    assert calls.tf32 == [expected]


def test_torch_compile_follows_the_setting_of_tf32(restored_precision: None) -> None:
    torch.compiler.reset()
    traced = torch.compile(lambda x: x + ops._tf32_allowed(), fullgraph=True, backend="eager")
    for precision in ("ieee", "tf32", "ieee"):
        torch.backends.cuda.matmul.fp32_precision = precision
        assert traced(torch.zeros(())).item() == (precision == "tf32")


def test_autocast_of_the_operator_itself(compiled: str) -> None:
    inputs = sample((2, 3, 5, 4, 7), compiled, torch.float32)[:3]
    with torch.autocast(compiled, torch.bfloat16):
        out, normalizer, _ = torch.ops.cc_attention.criss_cross_attention(*inputs)
        assert (out.dtype, normalizer.dtype) == (torch.bfloat16, torch.float32)
        assert torch.equal(out, ops.criss_cross_attention(*inputs))


# The module


def test_module_has_the_originals_state_dict() -> None:
    shapes = {name: tuple(t.shape) for name, t in CrissCrossAttention(512).state_dict().items()}
    assert shapes == {
        "gamma": (1,),
        "query_conv.weight": (64, 512, 1, 1),
        "query_conv.bias": (64,),
        "key_conv.weight": (64, 512, 1, 1),
        "key_conv.bias": (64,),
        "value_conv.weight": (512, 512, 1, 1),
        "value_conv.bias": (512,),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_new_module_is_the_identity(
    device: str, dtype: torch.dtype, layout: Callable[[Tensor], Tensor]
) -> None:
    x = layout(torch.randn(2, 17, 5, 6, device=device, dtype=dtype))
    assert torch.equal(CrissCrossAttention(17).to(device, dtype)(x), x)


def test_module_is_the_formula(device: str) -> None:
    module = CrissCrossAttention(16).to(device)
    torch.nn.init.constant_(module.gamma, 0.7)
    x = torch.randn(2, 16, 5, 6, device=device)
    attention = reference.criss_cross_attention(
        module.query_conv(x), module.key_conv(x), module.value_conv(x)
    )
    torch.testing.assert_close(module(x), 0.7 * attention + x)
    module(x).square().sum().backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0
        for p in module.parameters()
        if p is not module.key_conv.bias
    )


@pytest.mark.parametrize("shape", [(16, 5, 6), (1, 16, 2, 5, 6), (1, 15, 5, 6), (5, 6)], ids=str)
@pytest.mark.parametrize("kind", [CrissCrossAttention, RecurrentCrissCrossAttention])
def test_a_module_refuses_other_shapes_by_its_name(
    kind: type[CrissCrossAttention], shape: tuple[int, ...]
) -> None:
    module, x = kind(16), torch.zeros(shape)
    message = re.escape(f"{kind.__name__}: x must be [N, 16, H, W], got shape {list(shape)}")
    with pytest.raises(RuntimeError, match=message):
        module(x)
    with pytest.raises(RuntimeError, match=message):
        module.to("meta")(x.to("meta"))
    torch.compiler.reset()
    with pytest.raises(RuntimeError, match=message):
        torch.compile(kind(16), backend="eager")(x)


def test_module_needs_eight_channels() -> None:
    with pytest.raises(ValueError, match="in_dim >= 8"):
        CrissCrossAttention(7)


@pytest.mark.parametrize("recurrence", [0, 1, 2, 3])
def test_recurrence(recurrence: int) -> None:
    module = RecurrentCrissCrossAttention(8, recurrence)
    torch.nn.init.ones_(module.gamma)
    once = CrissCrossAttention(8)
    once.load_state_dict(module.state_dict())
    x = torch.randn(1, 8, 5, 6)
    expected = x
    for _ in range(recurrence):
        expected = once(expected)
    assert torch.equal(module(x), expected)


def test_recurrence_is_not_negative() -> None:
    with pytest.raises(ValueError, match="recurrence must be 0 or more, got -1"):
        RecurrentCrissCrossAttention(8, -1)


def test_two_passes_see_the_whole_picture() -> None:
    for recurrence in (1, 2):
        module = RecurrentCrissCrossAttention(8, recurrence)
        torch.nn.init.ones_(module.gamma)
        x = torch.randn(1, 8, 5, 6, requires_grad=True)
        module(x)[0, :, 1, 2].sum().backward()
        seen = x.grad[0].abs().sum(dim=0) > 0
        assert seen.sum() == (10 if recurrence == 1 else 30)


# Devices and libraries


def test_other_devices_use_the_reference() -> None:
    query, key, value, weight = (t.to("meta") for t in sample((2, 3, 5, 4, 7)))
    assert ops.ca_weight(query, key).shape == (2, 10, 4, 7)
    assert ops.ca_map(weight, value).shape == (2, 5, 4, 7)
    assert ops.criss_cross_attention(query, key, value).shape == (2, 5, 4, 7)


def test_a_gpu_without_cuda_kernels_uses_the_reference_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ops, "DEVICE_TYPES", frozenset({"cpu"}))
    ops._warn_no_cuda.cache_clear()
    on_gpu = SimpleNamespace(device=torch.device("cuda"))  # what is looked at of a tensor; needs no GPU
    with pytest.warns(UserWarning, match="no CUDA kernels") as record:
        assert not ops._compiled_for(on_gpu) and not ops._compiled_for(on_gpu)
    assert len(record) == 1

"""The operators under torch.func, forward-mode differentiation, torch.fx and torch.onnx.

Derivatives are compared with the reference in float64, to 1e-12 of their largest value.
"""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    functionalize,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from cc_attention import (
    RecurrentCrissCrossAttention,
    attention_maps,
    ca_map,
    ca_weight,
    criss_cross_attention,
    ops,
    reference,
)
from networks import Seg_Model

NAMES = ("criss_cross_attention", "ca_weight", "ca_map")
#: (N, c, C, H, W)
SHAPE, LINES = (2, 2, 3, 4, 5), ((1, 2, 3, 1, 4), (2, 1, 2, 4, 1))
DUAL = "a forward-mode derivative of the gradient .* is not supported"

compiled = pytest.mark.skipif(not ops.DEVICE_TYPES, reason="the compiled operators are not built")
named = pytest.mark.parametrize("name", NAMES)


def operands(name: str, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> tuple[Tensor, ...]:
    n, c, channels, h, w = shape
    generator = torch.Generator().manual_seed(seed)
    query, key, value, weight = (
        torch.randn(n, k, h, w, generator=generator, dtype=torch.float64) for k in (c, c, channels, h + w - 1)
    )
    return {
        "criss_cross_attention": (query, key, value),
        "ca_weight": (query, key),
        "ca_map": (weight, value),
    }[name]


def loss(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *inputs: function(*inputs).square().sum()


def agree(ours: Any, theirs: Any, tolerance: float = 1e-12) -> None:
    ours, theirs = ([t.detach() for t in tree_leaves(each)] for each in (ours, theirs))
    assert len(ours) == len(theirs) > 0
    scale = max([1.0, *(float(t.abs().max()) for t in theirs if t.numel())])
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        if other.numel():
            assert float((one - other).abs().max()) <= tolerance * scale


def same(name: str, run: Callable[..., Any], *arguments: Any) -> None:
    """Check that run(the operator, ...) gives what run(the reference, ...) gives."""
    agree(run(getattr(ops, name), *arguments), run(getattr(reference, name), *arguments))


# vmap


@named
def test_vmap_over_any_axis_of_any_operands(name: str) -> None:
    single = operands(name)
    for dims in itertools.product((None, 0, 1, 4, -1), repeat=len(single)):
        if any(dim is not None for dim in dims):
            batched = [
                t if dim is None else torch.stack([t, t * 0.5, -t], dim)
                for t, dim in zip(single, dims, strict=True)
            ]
            same(name, lambda function, *t, dims=dims: vmap(function, dims, out_dims=2)(*t), *batched)


@named
@pytest.mark.parametrize("shape", [SHAPE, *LINES, (0, 2, 3, 4, 5)], ids=str)
def test_nested_vmap(name: str, shape: tuple[int, ...]) -> None:
    several = [
        torch.stack([torch.stack([t, 2 * t]), torch.stack([-t, t + 1])]) for t in operands(name, shape)
    ]
    same(name, lambda function, *t: vmap(vmap(function, in_dims=1), randomness="same")(*t), *several)
    empty = [t.new_empty(0, *t.shape) for t in several]
    same(name, lambda function, *t: vmap(vmap(vmap(function)))(*t), *empty)


@named
def test_vmap_leaves_what_it_closes_over(name: str) -> None:
    fixed = operands(name)
    same(name, lambda function: vmap(lambda x: x * function(*fixed).sum())(torch.ones(3)))


@named
def test_errors_within_vmap_show_the_shapes_of_a_sample(name: str) -> None:
    single = operands(name)
    with pytest.raises(
        RuntimeError, match=rf"{name}: \w+ must have 4(?: or 5)? dimensions, got shape \[\d, 4, 5\]"
    ):
        vmap(getattr(ops, name))(*single)
    wrong = [t[None, ..., 1:] if number else t[None] for number, t in enumerate(single)]
    with pytest.raises(
        RuntimeError, match=rf"{name}: .*must agree in batch, height and width.*\[2, \d, 4, 5\]"
    ):
        vmap(getattr(ops, name))(*wrong)


# Reverse mode


@named
@pytest.mark.parametrize("shape", [SHAPE, *LINES], ids=str)
def test_gradients_by_torch_func(name: str, shape: tuple[int, ...]) -> None:
    inputs = operands(name, shape)
    all_of_them = tuple(range(len(inputs)))
    same(name, lambda function: grad(loss(function), all_of_them)(*inputs))
    same(name, lambda function: vjp(function, *inputs)[1](function(*inputs)))
    same(name, lambda function: jacrev(function, all_of_them)(*inputs))
    same(name, lambda function: grad(loss(function), 1)(*inputs))


@named
def test_gradients_with_vmap(name: str) -> None:
    several = [torch.stack([t, 2 * t, -t], 1) for t in operands(name)]
    every = tuple(range(len(several)))
    same(name, lambda function: vmap(grad(loss(function), every), in_dims=1)(*several))
    same(name, lambda function: grad(loss(vmap(function, in_dims=1)), every)(*several))
    same(name, lambda function: vmap(jacrev(function, every), in_dims=1)(*several))
    same(name, lambda function: functionalize(vmap(grad(loss(function), every), in_dims=1))(*several))
    same(name, lambda function: functionalize(function)(*(t[:, 0] for t in several)))

    def backward(function: Callable[..., Tensor]) -> list[Tensor | None]:
        leaves = [t.clone().requires_grad_() for t in several]
        vmap(function, in_dims=1)(*leaves).square().sum().backward()
        return [t.grad for t in leaves]

    same(name, backward)


@named
def test_batched_gradients(name: str) -> None:
    """Gradients are batched as in torch.autograd.functional.jacobian(vectorize=True)."""
    inputs = operands(name)
    grads = torch.randn(5, *getattr(reference, name)(*inputs).shape, dtype=torch.float64)

    def run(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in inputs]
        return torch.autograd.grad(function(*leaves), leaves, grads, is_grads_batched=True)

    same(name, run)


# Forward mode


@named
@pytest.mark.parametrize("shape", [SHAPE, *LINES], ids=str)
def test_forward_mode(name: str, shape: tuple[int, ...]) -> None:
    inputs, tangents = operands(name, shape), operands(name, shape, seed=1)
    same(name, lambda function: jvp(function, inputs, tangents))
    same(name, lambda function: jacfwd(function, tuple(range(len(inputs))))(*inputs))
    for number in range(len(inputs)):  # the others have no tangents

        def of_one(function: Callable[..., Tensor], number: int = number) -> Any:
            def others_fixed(x: Tensor) -> Tensor:
                return function(*inputs[:number], x, *inputs[number + 1 :])

            return jvp(others_fixed, inputs[number : number + 1], tangents[number : number + 1])

        same(name, of_one)


@named
@pytest.mark.filterwarnings("ignore::UserWarning")  # of make_fx, which linearize uses
def test_forward_mode_with_other_transforms(name: str) -> None:
    inputs, tangents = operands(name), operands(name, seed=1)
    several = [torch.stack([t, 2 * t, -t]) for t in inputs]
    every = tuple(range(len(inputs)))
    same(name, lambda function: vmap(lambda *x: jvp(function, x, tangents))(*several))
    same(name, lambda function: jvp(vmap(function), tuple(several), tuple(several)))
    same(name, lambda function: linearize(function, *inputs)[1](*tangents))
    # All combinations of two derivatives, the inner one in forward mode.
    small = operands(name, (1, 1, 2, 2, 3))
    expected = hessian(loss(getattr(reference, name)), every)(*small)
    agree(jacfwd(jacfwd(loss(getattr(ops, name)), every), every)(*small), expected)
    agree(jacrev(jacfwd(loss(getattr(ops, name)), every), every)(*small), expected)


@named
def test_dual_tensors(name: str) -> None:
    inputs, tangents = operands(name), operands(name, seed=1)
    expected = jvp(getattr(reference, name), inputs, tangents)
    of_tangent = grad(lambda x: jvp(getattr(reference, name), (x, *inputs[1:]), tangents)[1].sum())(inputs[0])
    for inference in (False, True):
        with torch.set_grad_enabled(not inference), forward_ad.dual_level():
            leaves = [t.clone().requires_grad_(not inference) for t in inputs]
            duals = [forward_ad.make_dual(t, tangent) for t, tangent in zip(leaves, tangents, strict=True)]
            agree(tuple(forward_ad.unpack_dual(getattr(ops, name)(*duals))), expected)
            if ops.DEVICE_TYPES and not inference:  # PyTorch can't, through its own softmax
                tangent = forward_ad.unpack_dual(getattr(ops, name)(*duals)).tangent
                agree(torch.autograd.grad(tangent.sum(), leaves[0])[0], of_tangent)


@named
def test_gradcheck_of_both_modes(name: str) -> None:
    inputs = [
        t.contiguous(memory_format=torch.channels_last).requires_grad_()
        for t in operands(name, (1, 2, 2, 2, 3))
    ]
    assert torch.autograd.gradcheck(
        getattr(ops, name),
        inputs,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )


@named
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_tangents_have_the_dtype_of_the_result(name: str, dtype: torch.dtype) -> None:
    inputs = tuple(t.to(dtype) for t in operands(name))
    tangents = tuple(t.to(dtype) for t in operands(name, seed=1))
    ours, theirs = (jvp(getattr(module, name), inputs, tangents) for module in (ops, reference))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0.1 if dtype == torch.bfloat16 else 0.02)


# Errors for what is not supported


@compiled
@named
def test_derivatives_of_the_gradient_are_refused_by_name(name: str) -> None:
    function, inputs = loss(getattr(ops, name)), operands(name)
    several = torch.stack([inputs[0], -inputs[0]])
    inner = lambda x: grad(function)(x, *inputs[1:]).sum()  # noqa: E731
    for twice in (lambda: grad(inner)(inputs[0]), lambda: vmap(grad(inner))(several)):
        with pytest.raises(RuntimeError, match=f"^{name}: double backward is not supported"):
            twice()
    for forward_over_reverse in (
        lambda: hessian(function)(*inputs),
        lambda: jvp(inner, inputs[:1], inputs[:1]),
        lambda: vmap(lambda x: jvp(inner, (x,), (x,)))(several),
    ):
        with pytest.raises(RuntimeError, match=f"^{name}: {DUAL}"):
            forward_over_reverse()
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t.clone().requires_grad_(), t) for t in inputs]
        with pytest.raises(RuntimeError, match=f"^{name}: {DUAL}"):
            torch.autograd.grad(function(*duals), duals)


# Modules


@pytest.fixture
def module() -> RecurrentCrissCrossAttention:
    torch.manual_seed(0)
    made = RecurrentCrissCrossAttention(8).double()
    nn.init.constant_(made.gamma, 0.5)
    return made


def pictures(n: int = 3) -> Tensor:
    return torch.randn(n, 8, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def sample_loss(module: nn.Module, weights: dict[str, Tensor], picture: Tensor) -> Tensor:
    return functional_call(module, weights, (picture[None],)).square().sum()


def detached(module: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in module.named_parameters()}


def test_per_sample_gradients_of_a_module(module: RecurrentCrissCrossAttention) -> None:
    x = pictures()
    ours = vmap(grad(lambda weights, picture: sample_loss(module, weights, picture)), (None, 0))(
        detached(module), x
    )
    for number, picture in enumerate(x):
        expected = torch.autograd.grad(module(picture[None]).square().sum(), list(module.parameters()))
        agree([ours[name][number] for name, _ in module.named_parameters()], list(expected))


def test_ensemble_of_modules(module: RecurrentCrissCrossAttention) -> None:
    other = copy.deepcopy(module)
    for weight in other.parameters():
        nn.init.normal_(weight)
    x = pictures()
    weights, buffers = stack_module_state([module, other])
    ours = vmap(lambda w, b, z: functional_call(module, (w, b), (z,)), (0, 0, None))(weights, buffers, x)
    agree(ours, torch.stack([module(x), other(x)]))
    ours.square().sum().backward()
    module(x).square().sum().backward()
    agree(
        [weights[name].grad[0] for name, _ in module.named_parameters()],
        [weight.grad for weight in module.parameters()],
    )


def test_a_module_s_weights_under_transforms_of_its_input(module: RecurrentCrissCrossAttention) -> None:
    """Gradients reach the weights through the output of vjp and through a tangent."""
    x = pictures()
    out, pull = vjp(module, x)
    out.square().sum().backward()
    expected = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
    agree([weight.grad for weight in module.parameters()], list(expected))
    agree(pull(torch.ones_like(x))[0], grad(lambda x: module(x).sum())(x))

    step = 1e-6
    tangent = jvp(module, (x,), (x,))[1]
    difference = (module(x + step * x) - module(x - step * x)) / (2 * step)
    agree(tangent, difference, tolerance=1e-8)
    by_tangent = torch.autograd.grad(tangent.sum(), module.query_conv.weight)[0]
    by_difference = torch.autograd.grad(difference.sum(), module.query_conv.weight)[0]
    agree(by_tangent, by_difference, tolerance=1e-7)


@compiled
def test_transforms_within_torch_compile(module: RecurrentCrissCrossAttention) -> None:
    torch.compiler.reset()
    x, weights = pictures(), detached(module)
    gradients = vmap(grad(lambda w, picture: sample_loss(module, w, picture)), (None, 0))

    def tangent(x: Tensor) -> Tensor:
        return jvp(module, (x,), (2 * x,))[1]

    for function, arguments in ((gradients, (weights, x)), (tangent, (x,))):
        traced = torch.compile(function, backend="aot_eager", fullgraph=True)
        agree(traced(*arguments), function(*arguments))


def test_autocast_within_transforms(module: RecurrentCrissCrossAttention) -> None:
    module, x = module.float(), pictures().float()
    weights = detached(module)
    with torch.autocast("cpu", torch.bfloat16):
        one_by_one = torch.cat([module(picture[None]) for picture in x])
        torch.testing.assert_close(vmap(lambda p: module(p[None])[0])(x), one_by_one, rtol=0.02, atol=0.02)
        # A hook makes the module call its three layers, as within a transform.
        with module.key_conv.register_forward_hook(lambda *_: None):
            for recurrence, tolerance in ((1, 1e-6), (2, 2**-8)):  # gradients between the two are bfloat16
                module.recurrence = recurrence
                ours = grad(lambda w: functional_call(module, w, (x,)).square().sum())(weights)
                expected = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
                agree(list(ours.values()), list(expected), tolerance=tolerance)
        for name in NAMES:
            inputs = tuple(t.float() for t in operands(name))
            ours, theirs = (jvp(getattr(each, name), inputs, inputs) for each in (ops, reference))
            for one, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(one, other, rtol=0.02, atol=0.05)  # the same dtype, too


def test_compiled_autograd() -> None:
    module, x = RecurrentCrissCrossAttention(8), pictures().float()
    nn.init.ones_(module.gamma)
    expected = torch.autograd.grad(module(x).square().sum(), module.query_conv.weight)[0]
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        module(x).square().sum().backward()
    torch.testing.assert_close(module.query_conv.weight.grad, expected)


def test_attention_maps_under_transforms(module: RecurrentCrissCrossAttention) -> None:
    pixels, x, tangent, step = [(0, 0), (2, 3)], pictures(1), pictures(2)[1:], 1e-6

    def maps(x: Tensor) -> Tensor:
        return attention_maps(module, x, pixels)

    assert not maps(x).requires_grad
    difference = (maps(x + step * tangent) - maps(x - step * tangent)) / (2 * step)
    agree(jvp(maps, (x,), (tangent,))[1], difference, tolerance=1e-9)
    with forward_ad.dual_level():
        agree(forward_ad.unpack_dual(maps(forward_ad.make_dual(x, tangent))).tangent, difference, 1e-9)
    mixed = torch.randn_like(difference)
    along = (grad(lambda x: (maps(x) * mixed).sum())(x) * tangent).sum()
    agree(along, (difference * mixed).sum(), tolerance=1e-8)
    several = pictures()
    agree(vmap(lambda picture: maps(picture[None]))(several), torch.stack([maps(p[None]) for p in several]))


# torch.fx


class Own(nn.Module):
    """A user's network that calls each of the functions."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Conv2d(4, 9, 1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x).split([2, 2, 5], 1)
        weight = ca_weight(query, key).softmax(1)
        return criss_cross_attention(query, key, value) + 2 * ca_map(weight, value)


def test_fx_traces_a_network_of_one_s_own() -> None:
    network = Own()
    traced = torch.fx.symbolic_trace(network)
    again = pickle.loads(pickle.dumps(traced))
    for size in ((2, 4, 3, 6), (1, 4, 7, 1)):
        x = torch.randn(size)
        assert torch.equal(traced(x), network(x)) and torch.equal(again(x), network(x))
    called = {node.target for node in traced.graph.nodes if node.op == "call_function"}
    assert {ca_weight, ca_map, criss_cross_attention} <= called


def test_fx_traces_the_whole_network() -> None:
    network = Seg_Model(3, backbone="resnet50").eval()
    traced = torch.fx.symbolic_trace(network)
    with torch.no_grad():
        for size in ((1, 3, 33, 41), (2, 3, 49, 25)):
            image = torch.randn(size)
            for ours, expected in zip(traced(image), network(image), strict=True):
                assert torch.equal(ours, expected)


def test_a_traced_module_still_checks_its_input() -> None:
    traced = torch.fx.symbolic_trace(RecurrentCrissCrossAttention(8))
    with pytest.raises(RuntimeError, match=r"^RecurrentCrissCrossAttention: x must be \[N, 8, H, W\]"):
        traced(torch.randn(1, 9, 4, 5))


# torch.onnx and torch.export


@pytest.mark.parametrize("through_a_program", [False, True])
@pytest.mark.parametrize("network", ["own", "head"])
@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_onnx_of_a_network_of_one_s_own(tmp_path: Path, network: str, through_a_program: bool) -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    attention = RecurrentCrissCrossAttention(4 * 2)
    nn.init.constant_(attention.gamma, 0.5)
    model = (Own() if network == "own" else nn.Sequential(nn.Conv2d(4, 8, 1), attention)).eval()
    example, path = torch.randn(2, 4, 4, 5), tmp_path / "network.onnx"
    sizes = ({axis: torch.export.Dim.DYNAMIC for axis in (0, 2, 3)},)
    if through_a_program:
        program = torch.export.export(model, (example,), dynamic_shapes=sizes)
        torch.onnx.export(program, (), path, dynamo=True, verbose=False)
    else:
        torch.onnx.export(model, (example,), path, dynamo=True, verbose=False, dynamic_shapes=sizes)
    assert {node.domain for node in onnx.load(path).graph.node} == {""}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in ((2, 4, 4, 5), (1, 4, 7, 9), (3, 4, 1, 6), (1, 4, 6, 1)):
        x = torch.randn(size)
        (ours,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(ours), model(x), rtol=1e-4, atol=1e-5)


@compiled
@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_keep_the_operator(strict: bool) -> None:
    sizes = ({axis: torch.export.Dim.DYNAMIC for axis in (0, 2, 3)},)
    network = Own()
    program = torch.export.export(network, (torch.randn(2, 4, 4, 5),), dynamic_shapes=sizes, strict=strict)
    for each in (program, program.run_decompositions()):
        called = {str(node.target) for node in each.graph.nodes}
        assert {f"cc_attention.{name}.default" for name in NAMES} <= called
        x = torch.randn(1, 4, 7, 3)
        torch.testing.assert_close(each.module()(x), network(x))


# FLOPs


@compiled
@pytest.mark.parametrize("shape", [(2, 3, 11, 5, 7), (1, 2, 4, 1, 6), (1, 2, 4, 4, 1)], ids=str)
def test_flops_are_those_of_brute_force(shape: tuple[int, ...]) -> None:
    n, c, channels, h, w = shape
    seen = n * sum(
        len({(y, u) for u in range(w)} | {(v, x) for v in range(h)}) for y in range(h) for x in range(w)
    )
    for name, forward, backward in (
        ("criss_cross_attention", 2 * seen * (c + channels), 2 * seen * (3 * c + 2 * channels)),
        ("ca_weight", 2 * seen * c, 4 * seen * c),
        ("ca_map", 2 * seen * channels, 4 * seen * channels),
    ):
        inputs = [t.requires_grad_() for t in operands(name, shape)]
        with FlopCounterMode(display=False) as counter:
            out = getattr(ops, name)(*inputs)
        assert counter.get_total_flops() == forward, name
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        assert counter.get_total_flops() == backward, name
        with FlopCounterMode(display=False) as counter:
            vmap(getattr(ops, name))(*(torch.stack([t, t, t]) for t in inputs))
        assert counter.get_total_flops() == 3 * forward, name

"""Heads, scale, axes, videos, residual and parts of larger maps, against full attention with a mask."""

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cc_attention import (
    CrissCrossAttention,
    CrissCrossAttention3d,
    RecurrentCrissCrossAttention3d,
    attention_maps,
    criss_cross_attention,
    ops,
    reference,
)

OPERATORS = torch.ops.cc_attention


class Case(NamedTuple):
    """A shape and options of the operator."""

    batch: int
    channels: tuple[int, int]  # c and C of all heads together
    size: tuple[int, ...]
    heads: int = 1
    scale: float = 1.0
    axes: tuple[int, ...] | None = None
    residual: bool = False

    def maps(self, dtype: torch.dtype = torch.float64, device: str = "cpu") -> list[Tensor]:
        """Return query, key, value and, if there is a residual, the residual and gamma."""
        generator = torch.Generator().manual_seed(1)
        c, channels = self.channels
        shapes = [(self.batch, k, *self.size) for k in (c, c, channels, channels)[: 3 + self.residual]]
        maps = [torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in shapes]
        wide = torch.promote_types(dtype, torch.float32)
        return maps + [torch.tensor([0.7], dtype=wide, device=device)] * self.residual

    def call(self, function: Callable[..., Tensor], *maps: Tensor) -> Tensor:
        """Call an attention on query, key, value and, if there is a residual, the residual and gamma."""
        more = dict(zip(("residual", "gamma"), maps[3:], strict=False))
        return function(*maps[:3], heads=self.heads, scale=self.scale, axes=self.axes, **more)


CASES = [
    Case(2, (3, 5), (4, 7), residual=True),
    Case(1, (6, 9), (5, 3), heads=3, scale=0.5),
    Case(2, (8, 12), (4, 6), heads=4, scale=-1.5, residual=True),
    Case(1, (4, 6), (5, 6), heads=2, axes=(0,)),
    Case(2, (4, 6), (5, 6), heads=2, axes=(1,), residual=True),
    Case(1, (3, 4), (1, 1), heads=1, residual=True),
    Case(2, (3, 5), (3, 4, 5)),
    Case(1, (4, 6), (4, 3, 2), heads=2, scale=0.3, residual=True),
    Case(1, (2, 3), (1, 4, 5)),
    Case(1, (2, 3), (6, 1, 1), residual=True),
    Case(2, (2, 3), (3, 4, 5), axes=(0,)),
    Case(1, (2, 4), (3, 4, 5), heads=2, axes=(0, 2), residual=True),
    Case(1, (2, 3), (3, 4, 5), axes=(1, 2)),
    Case(1, (2, 3), (3, 4, 5), axes=(0, 1)),
    Case(0, (2, 4), (3, 4, 5), heads=2, residual=True),
    Case(1, (2, 0), (3, 4), residual=True),
    Case(1, (0, 2), (3, 4), heads=2, scale=2.0),
    Case(1, (70, 140), (3, 21), heads=1, residual=True),
    Case(1, (16, 134), (19, 3), heads=2, scale=0.25, residual=True),
]
compiled = pytest.mark.skipif("cpu" not in ops.DEVICE_TYPES, reason="the compiled operators are not built")
on_gpu = pytest.mark.gpu
DEVICES = [pytest.param("cpu", marks=compiled), pytest.param("cuda", marks=on_gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return a device whose kernels are used."""
    if request.param not in ops.DEVICE_TYPES:
        pytest.skip(f"the operators are not built for {request.param}")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    monkeypatch.setattr(ops, "WHOLE_DEVICE_TYPES", {request.param})
    return request.param


def attends(size: Sequence[int], axes: Sequence[int]) -> Tensor:
    """Return which pixel attends to which: bool [pixels, pixels]."""
    pixels = list(itertools.product(*map(range, size)))
    return torch.tensor(
        [
            [all(a == b or axis in axes for axis, (a, b) in enumerate(zip(p, q, strict=True)))
             and sum(a != b for a, b in zip(p, q, strict=True)) <= 1
             for q in pixels]
            for p in pixels
        ]
    )  # fmt: skip


def full_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    heads: int = 1,
    scale: float = 1.0,
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    axes: Sequence[int] | None = None,
) -> Tensor:
    """Compute attention between all pixels, with a mask."""
    size = value.shape[2:]
    split = [t.flatten(2).unflatten(1, (heads, t.shape[1] // heads)) for t in (query, key, value)]
    scores = scale * torch.einsum("nhcp,nhcq->nhpq", *split[:2])
    mask = attends(size, range(len(size)) if axes is None else axes).to(scores.device)
    weight = scores.masked_fill(~mask, -math.inf).softmax(-1)
    out = torch.einsum("nhpq,nhcq->nhcp", weight, split[2]).reshape(value.shape)
    return out if residual is None or gamma is None else residual + gamma * out


def gradient_of(out: Tensor) -> Tensor:
    """Return a gradient of the result of an attention."""
    grad = torch.linspace(-1, 2, max(out.numel(), 1), dtype=torch.float64)[: out.numel()]
    return grad.reshape(out.shape).to(out)


def with_gradients(case: Case, function: Callable[..., Tensor], maps: list[Tensor]) -> list[Tensor]:
    """Return the result and the gradients of all maps."""
    leaves = [t.detach().clone().requires_grad_() for t in maps]
    out = case.call(function, *leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient_of(out))]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_masked_full_attention(case: Case) -> None:
    maps = case.maps()
    expected = with_gradients(case, full_attention, maps)
    torch.testing.assert_close(
        with_gradients(case, reference.criss_cross_attention, maps), expected, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_in_float64(case: Case, device: str) -> None:
    maps = case.maps(device=device)
    expected = with_gradients(case, full_attention, maps)
    results = with_gradients(case, criss_cross_attention, maps)
    torch.testing.assert_close(results, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_round_like_the_reference(case: Case, dtype: torch.dtype, device: str) -> None:
    """No error exceeds twice the largest one of the reference, and a few roundings of the results.

    The gradients of query and key are sums of differences: a product of grad and value, minus the sum of
    grad * out over the channels of a head. Where the difference is small, the rounding of that sum counts,
    times the largest key or query. The gradient of gamma is a sum over the attention as it is kept, rounded
    to the dtype.
    """
    maps = case.maps(dtype, device)
    exact_maps = [t.double() for t in maps]
    exact = with_gradients(case, full_attention, exact_maps)
    plain = with_gradients(case, reference.criss_cross_attention, maps)
    ours = with_gradients(case, criss_cross_attention, maps)
    attention = case._replace(residual=False).call(full_attention, *exact_maps[:3])
    of_gamma = (gradient_of(attention) * attention).abs().sum()  # the terms of the sum
    subtracted = (gradient_of(attention) * attention).unflatten(1, (case.heads, -1)).sum(2) * case.scale
    eps, wide = (torch.finfo(kind).eps for kind in (dtype, torch.promote_types(dtype, torch.float32)))
    for number, (result, other, true) in enumerate(zip(ours, plain, exact, strict=True)):
        assert result.dtype == other.dtype and result.shape == true.shape
        if true.numel():
            error, allowed = ((each.double() - true).abs().max() for each in (result, other))
            rounding = eps * (4 * true.abs().max() if number < 5 else of_gamma)
            if number in (1, 2):
                rounding += wide * subtracted.abs().max() * exact_maps[2 - number].abs().max()
            assert error <= 2 * allowed + rounding


@pytest.mark.parametrize("case", CASES, ids=str)
def test_composition_where_the_kernels_are_untested(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "WHOLE_DEVICE_TYPES", set())
    maps = case.maps()
    torch.testing.assert_close(
        with_gradients(case, criss_cross_attention, maps), with_gradients(case, full_attention, maps)
    )


def test_a_pixel_counts_itself_once_in_a_video(device: str) -> None:
    """With equal scores the result is the mean over the T + H + W - 2 pixels of the three lines."""
    value = torch.randn(1, 2, 3, 4, 5, dtype=torch.float64, device=device)
    zeros = torch.zeros_like(value)
    out = criss_cross_attention(zeros, zeros, value)[0, :, 1, 2, 3]
    lines = value[0, :, :, 2, 3].sum(1) + value[0, :, 1, :, 3].sum(1) + value[0, :, 1, 2, :].sum(1)
    torch.testing.assert_close(out, (lines - 2 * value[0, :, 1, 2, 3]) / 10)


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1)], ids=str)
def test_masks(axes: tuple[int, ...], device: str) -> None:
    """A pixel gets NaN if the scores of all its positions are -inf, and a masked line has no weight."""
    generator = torch.Generator().manual_seed(3)
    query = torch.ones(1, 1, 4, 5, dtype=torch.float64, device=device)
    key, value = (torch.randn(1, 1, 4, 5, generator=generator).double().to(device) for _ in range(2))
    key[..., 1, :] = key[..., 3] = -math.inf
    out = criss_cross_attention(query, key, value, axes=axes)
    expected = full_attention(query, key, value, axes=axes)
    assert expected.isnan().any() and not expected.isnan().all()
    torch.testing.assert_close(out, expected, equal_nan=True)


@pytest.mark.parametrize("case", [case for case in CASES if case.residual], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_without_gradients(case: Case, dtype: torch.dtype, device: str) -> None:
    """Without gradients, the sum takes the place of the attention."""
    maps = case.maps(dtype, device)
    expected = case.call(criss_cross_attention, *(t.clone().requires_grad_() for t in maps))
    before = [t.clone() for t in maps]
    assert torch.equal(case.call(criss_cross_attention, *maps), expected)
    assert all(map(torch.equal, maps, before))


class TestPartsOfLargerMaps:
    """Views of some channels of a map in channels_last."""

    SIZES: tuple[tuple[int, ...], ...] = ((5, 6), (3, 4, 5), (1, 7), (7, 1), (1, 1))

    @staticmethod
    def joint(size: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
        layout = torch.channels_last if len(size) == 2 else torch.channels_last_3d
        return torch.randn(2, 24, *size, dtype=torch.float64).to(device, dtype).to(memory_format=layout)

    @pytest.mark.parametrize("size", SIZES, ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_same_bits_as_copies(self, size: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
        joint = self.joint(size, dtype, device)
        joint[:, 20:] = math.nan  # the channels in between are not read
        case = Case(2, (4, 12), size, heads=2, residual=True)
        parts = [joint[:, :4], joint[:, 4:8], joint[:, 8:20]]
        residual, gamma = torch.randn_like(joint)[:, 3:15], torch.tensor([0.5], device=device)
        results = []
        for copy in (False, True):
            maps = [t.clone() if copy else t.detach() for t in (*parts, residual)]
            leaves = [t.requires_grad_() for t in (*maps, gamma.clone())]
            out = case.call(criss_cross_attention, *leaves)
            results.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
        assert all(map(torch.equal, *results))

    def test_nothing_is_copied(self, device: str) -> None:
        joint = self.joint((5, 6), torch.float32, device)
        leaves = [t.detach().requires_grad_() for t in (joint[:, :4], joint[:, 4:8], joint[:, 8:20])]
        grad = torch.randn_like(joint)[:, 8:20]
        with torch.profiler.profile() as profile:
            torch.autograd.grad(criss_cross_attention(*leaves), leaves, grad)
        names = {event.name for event in profile.events()}
        assert "cc_attention::criss_cross_attention_backward" in names
        assert not names & {"aten::clone", "aten::copy_"}

    def test_the_gradient_of_a_joint_projection_is_one_map(self, device: str) -> None:
        joint = self.joint((5, 6), torch.float32, device)
        parts = joint[:, :20].split([4, 4, 12], 1)
        out, normalizer, _ = OPERATORS.criss_cross_attention(*parts)
        backward = OPERATORS.criss_cross_attention_backward
        separate = backward(out, *parts, out, normalizer)
        together = backward(out, *parts, out, normalizer, joint=True)
        assert torch.equal(together[0], torch.cat(separate[:3], 1))
        assert [t.shape for t in together[1:]] == [(0,)] * 3

    def test_other_strides_are_copied(self, device: str) -> None:
        whole = torch.randn(2, 6, 8, 10, device=device)
        odd = [whole[:, :, ::2], whole[:, :, :4], whole.mT[..., :8:2].mT, whole[:, ::2, :4].flip(1)]
        for view in odd:
            copy = view.clone()
            assert torch.equal(
                criss_cross_attention(view, view, view), criss_cross_attention(copy, copy, copy)
            )


SMALL = [case for case in CASES if case.batch and math.prod(case.size) <= 60 and min(case.channels) > 0]
SOME = [SMALL[2], SMALL[7], SMALL[4]]


@pytest.mark.parametrize("case", SOME, ids=str)
def test_gradcheck(case: Case, device: str) -> None:
    maps = [t.requires_grad_() for t in case.maps(device=device)]
    function = partial(case.call, criss_cross_attention)
    assert torch.autograd.gradcheck(function, maps, fast_mode=True, check_forward_ad=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case: Case, device: str) -> None:
    maps = [t.requires_grad_() for t in case.maps(torch.float32, device)]
    residual, gamma = maps[3:] or (None, None)
    dim = len(case.size) + 2
    options = (case.heads, case.scale, ops._axes_mask(case.axes, dim))
    torch.library.opcheck(OPERATORS.criss_cross_attention, (*maps[:3], residual, gamma, *options))
    unkept = [None if t is None else t.detach() for t in (*maps[:3], residual, gamma)]
    torch.library.opcheck(OPERATORS.criss_cross_attention, (*unkept, *options, False, False))
    plain = [t.detach() for t in maps]
    out, normalizer, _ = OPERATORS.criss_cross_attention(*plain[:3], None, None, *options)
    gamma = None if gamma is None else plain[4]
    for joint in (False, True):
        torch.library.opcheck(
            OPERATORS.criss_cross_attention_backward,
            (plain[2], *plain[:3], out, normalizer, gamma, *options, joint),
        )


@pytest.mark.parametrize("case", SOME, ids=str)
def test_torch_func(case: Case, device: str) -> None:
    """Transforms of torch.func give the results of the reference."""
    maps = case.maps(device=device)
    numbers = tuple(range(len(maps)))

    def value_of(function: Callable[..., Tensor], *maps: Tensor) -> Tensor:
        return case.call(function, *maps).sin().sum()

    transforms: list[Callable[[Any], Any]] = [
        lambda f: torch.func.grad(partial(value_of, f), numbers)(*maps),
        lambda f: torch.func.jvp(partial(case.call, f), tuple(maps), tuple(t.cos() for t in maps)),
        lambda f: torch.vmap(partial(case.call, f))(*(torch.stack([t, 2 * t]) for t in maps)),
        lambda f: torch.vmap(partial(case.call, f), (1, None, 0, *[None] * (len(maps) - 3)))(
            torch.stack([maps[0], maps[1]], 1), maps[1], torch.stack([maps[2], -maps[2]]), *maps[3:]
        ),
        lambda f: torch.vmap(torch.func.grad(partial(value_of, f), numbers))(
            *(torch.stack([t, 2 * t, -t]) for t in maps)
        ),
        lambda f: torch.func.grad(lambda *a: torch.vmap(partial(value_of, f))(*a).sum(), numbers)(
            *(torch.stack([t, 2 * t]) for t in maps)
        ),
    ]
    for transform in transforms:
        ours, theirs = transform(criss_cross_attention), transform(reference.criss_cross_attention)
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", SOME, ids=str)
def test_compile(case: Case, device: str) -> None:
    torch.compiler.reset()
    maps = case.maps(torch.float32, device)
    function = torch.compile(partial(case.call, criss_cross_attention), fullgraph=True, backend="aot_eager")
    leaves = [t.requires_grad_() for t in maps]
    results = []
    for each in (function, partial(case.call, criss_cross_attention)):
        out = each(*leaves)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    torch.testing.assert_close(*results)


def test_autocast_casts_all_maps(device: str) -> None:
    case = CASES[2]
    maps = case.maps(torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        out = case.call(criss_cross_attention, *maps)
        plain = case.call(reference.criss_cross_attention, *maps)
    assert out.dtype == plain.dtype == torch.bfloat16
    halves = [t.to(torch.bfloat16) for t in maps[:4]]
    assert torch.equal(out, case.call(criss_cross_attention, *halves, maps[4]))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_flops_are_those_of_the_definition(case: Case, device: str) -> None:
    """A score and a weighted value cost 2 operations a channel, with the positions counted one by one."""
    maps = [t.requires_grad_() for t in case.maps(torch.float32, device)]
    axes = range(len(case.size)) if case.axes is None else case.axes
    pairs = case.batch * int(attends(case.size, axes).sum())
    c, channels = case.channels
    with FlopCounterMode(display=False) as counter:
        out = case.call(criss_cross_attention, *maps)
    assert counter.get_total_flops() == 2 * pairs * (c + channels)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * pairs * (3 * c + 2 * channels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"heads": 4}, r"channels of query must be divisible by heads=4, got shape \[1, 6, 4, 5\]"),
        ({"heads": 6}, r"channels of value must be divisible by heads=6, got shape \[1, 9, 4, 5\]"),
        ({"residual": torch.ones(1, 9, 4, 5)}, "residual and gamma must be given together"),
        ({"gamma": torch.ones(1)}, "residual and gamma must be given together"),
        (
            {"residual": torch.ones(1, 9, 4, 5), "gamma": torch.ones(2)},
            r"gamma must have one element.*got shape \[2\]",
        ),
        ({"residual": torch.ones(1, 8, 4, 5), "gamma": torch.ones(1)}, "residual must have 9 channels"),
        (
            {"residual": torch.ones(1, 9, 4, 6), "gamma": torch.ones(1)},
            "must agree in batch, height and width",
        ),
        (
            {"residual": torch.ones(1, 9, 4, 5, dtype=torch.float64), "gamma": torch.ones(1)},
            "must have the same dtype",
        ),
        ({"axes": ()}, r"axes must be different numbers from 0 to 1 .*got \(\)"),
        ({"axes": (0, 0)}, "axes must be different numbers"),
        ({"axes": (2,)}, "axes must be different numbers"),
        ({"axes": (-1,)}, "axes must be different numbers"),
    ],
    ids=str,
)
@pytest.mark.parametrize("function", [criss_cross_attention, reference.criss_cross_attention])
def test_wrong_options(function: Callable[..., Tensor], change: dict[str, Any], message: str) -> None:
    query, value = torch.ones(1, 6, 4, 5), torch.ones(1, 9, 4, 5)
    with pytest.raises((RuntimeError, ValueError), match=f"criss_cross_attention: .*{message}"):
        function(query, query, value, **change)


@pytest.mark.parametrize("function", [criss_cross_attention, reference.criss_cross_attention])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": torch.ones(())}, "scale must be a number; multiply query"),
        ({"residual": torch.ones(1, 4, 2, 3), "gamma": 0.5}, "gamma must be a tensor .*got float"),
        ({"axes": 1}, "axes must be a list or tuple of numbers, got 1"),
    ],
    ids=str,
)
def test_options_of_other_types(
    function: Callable[..., Tensor], change: dict[str, Any], message: str
) -> None:
    value = torch.ones(1, 4, 2, 3)
    with pytest.raises(TypeError, match=f"criss_cross_attention: {message}"):
        function(value, value, value, **change)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("change", [{"shape": (2, 1, 3, 4)}, {"dtype": torch.float64}], ids=str)
def test_a_residual_is_not_broadcast_or_cast(
    whole: bool, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not whole:
        monkeypatch.setattr(ops, "WHOLE_DEVICE_TYPES", set())
    value, gamma = torch.ones(2, 4, 3, 4), torch.ones(1)
    residual = torch.ones(change.get("shape", value.shape), dtype=change.get("dtype"))

    def call(residual: Tensor) -> Tensor:
        return criss_cross_attention(value, value, value, residual=residual, gamma=gamma)

    for function, given in ((call, residual), (torch.vmap(call), residual.expand(3, *residual.shape))):
        with pytest.raises(RuntimeError, match="residual must have"):
            function(given)


@pytest.mark.parametrize("function", [criss_cross_attention, reference.criss_cross_attention])
def test_wrong_videos(function: Callable[..., Tensor]) -> None:
    video = torch.ones(1, 2, 3, 4, 5)
    with pytest.raises(RuntimeError, match="query must have 4 or 5 dimensions, like the others, got"):
        function(video[:, :, 0], video, video)
    with pytest.raises(RuntimeError, match="must agree in batch, frames, height and width"):
        function(video, video, video[:, :, :2])
    with pytest.raises(RuntimeError, match="at least one row and one column and frame"):
        function(video[:, :, :0], video[:, :, :0], video[:, :, :0])
    with pytest.raises(RuntimeError, match="4 or 5 dimensions, got"):
        function(video[None], video[None], video[None])


class TestTensorCores:
    """Maps that tensor cores can't read are padded or copied; a shape that they can't serve is named once."""

    @pytest.fixture
    def as_on_tensor_cores(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Treat the CPU like a GPU with tensor cores, and check what its kernels get."""
        monkeypatch.setattr(ops, "_has_tensor_cores", lambda value: True)
        if "cpu" not in ops.DEVICE_TYPES:
            pytest.skip("the compiled operators are not built")

    @pytest.mark.parametrize("channels", [(12, 20), (16, 20), (5, 3), (8, 16)])
    @pytest.mark.parametrize("heads", [1, 2])
    @pytest.mark.parametrize("size", [(5, 6), (2, 3, 4)])
    @pytest.mark.parametrize("residual", [False, True])
    def test_added_channels(
        self,
        as_on_tensor_cores: None,
        monkeypatch: pytest.MonkeyPatch,
        channels: tuple[int, int],
        heads: int,
        size: tuple[int, ...],
        residual: bool,
    ) -> None:
        few, many = (heads * count for count in channels)
        generator = torch.Generator().manual_seed(1)
        maps = [torch.randn(2, count, *size, generator=generator) for count in (few, few, many, many)]
        leaves = [t.bfloat16().requires_grad_() for t in maps[: 4 if residual else 3]]
        options = {"residual": leaves[3], "gamma": torch.tensor([0.7])} if residual else {}
        taken, aligned = [], ops.aligned
        monkeypatch.setattr(ops, "aligned", lambda *args: taken.append(aligned(*args)) or taken[-1])
        result = criss_cross_attention(*leaves[:3], heads=heads, scale=0.5, **options)
        assert [t.shape[1] // heads % 8 for t in taken] == [0] * len(leaves)
        layout = torch.channels_last if len(size) == 2 else torch.channels_last_3d
        assert result.shape == maps[2].shape and result.is_contiguous(memory_format=layout)

        exact = [t.detach().double().requires_grad_() for t in leaves]
        options = {"residual": exact[3], "gamma": torch.tensor([0.7])} if residual else {}
        truth = reference.criss_cross_attention(*exact[:3], heads=heads, scale=0.5, **options)
        torch.testing.assert_close(result.double(), truth, rtol=0.02, atol=0.02)
        grad = torch.randn(result.shape, generator=generator).bfloat16()
        gradients = torch.autograd.grad(result, leaves, grad)
        for ours, theirs in zip(gradients, torch.autograd.grad(truth, exact, grad.double()), strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=0.05, atol=0.05)

    def test_wrong_channels_stay_an_error(self, as_on_tensor_cores: None) -> None:
        query, key, value = (torch.zeros(1, count, 3, 4, dtype=torch.bfloat16) for count in (12, 13, 20))
        with pytest.raises(RuntimeError, match="key must have 12 channels"):
            criss_cross_attention(query, key, value)

    def test_in_autocast_and_transforms(self, as_on_tensor_cores: None) -> None:
        generator = torch.Generator().manual_seed(0)
        maps = (torch.randn(2, count, 3, 4, generator=generator) for count in (12, 12, 20))
        query, key, value = (t.bfloat16().float() for t in maps)
        expected = reference.criss_cross_attention(query, key, value)
        with torch.autocast("cpu", torch.bfloat16):
            result = criss_cross_attention(query, key, value)
        assert result.dtype == torch.bfloat16
        torch.testing.assert_close(result.float(), expected, rtol=0.02, atol=0.02)
        half = [t.bfloat16() for t in (query, key, value)]
        mapped = torch.vmap(criss_cross_attention)(*(t[:, None] for t in half))
        torch.testing.assert_close(mapped[:, 0].float(), expected, rtol=0.02, atol=0.02)
        compiled = torch.compile(criss_cross_attention, fullgraph=True, backend="aot_eager")(*half)
        assert torch.equal(compiled, criss_cross_attention(*half))

    def test_slices(self) -> None:
        joint = torch.randn(1, 9, 9, 104).bfloat16().permute(0, 3, 1, 2)
        assert ops.aligned(joint[:, 8:16], 1, 8).data_ptr() == joint[:, 8:16].data_ptr()
        odd = torch.randn(1, 9, 9, 100).bfloat16().permute(0, 3, 1, 2)
        for part in (joint[:, 4:12], odd[:, 8:16]):
            copy = ops.aligned(part, 1, 8)
            assert torch.equal(copy, part) and copy.is_contiguous(memory_format=torch.channels_last)
            assert copy.data_ptr() % 16 == 0

    def test_a_module_joins_aligned_channels_only(
        self, as_on_tensor_cores: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ops, "WHOLE_DEVICE_TYPES", {"cpu"})
        maps = {count: torch.zeros(1, count, 3, 4, dtype=torch.bfloat16) for count in (64, 96, 72)}
        assert {count: ops.joins(x) for count, x in maps.items()} == {64: True, 96: False, 72: False}
        assert ops.joins(maps[72].double())

    @pytest.mark.parametrize(
        ("size", "cause"),
        [
            ((97, 272), None),
            ((273, 97), "a line has more than 272 pixels"),
            ((9, 300, 9), "a line has more than 272 pixels"),
            ((300, 9, 9), None),  # no attention along the frames
        ],
    )
    def test_cause(self, size: tuple[int, ...], cause: str | None) -> None:
        value = torch.empty(1, 512, *size, dtype=torch.bfloat16, device="meta")
        assert ops.slow_cause(value, 6, False) == cause
        assert ops.slow_cause(value.float(), 6, False) is None
        assert ops.slow_cause(value.float(), 6, True) == cause

    def test_one_warning(self) -> None:
        value = torch.empty(1, 512, 5, 300, dtype=torch.bfloat16, device="meta")
        ops._warn_slow.cache_clear()
        with pytest.warns(UserWarning, match=r"272 pixels \(value \[1, 512, 5, 300\], torch.bfloat16\)"):
            ops._check_speed(value, 6, False)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ops._check_speed(value, 6, False)


# The modules


def filled(module: torch.nn.Module) -> torch.nn.Module:
    """Return the module in float64, with random weights."""
    generator = torch.Generator().manual_seed(2)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 3
    return module


def test_a_video_of_one_frame_is_a_picture() -> None:
    video, picture = filled(CrissCrossAttention3d(16)), filled(CrissCrossAttention(16))
    x = torch.randn(2, 16, 1, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(video(x)[:, :, 0], picture(x[:, :, 0]))
    # The same names; the weights of the convolutions have one dimension more.
    assert list(video.state_dict()) == list(picture.state_dict())


def test_the_video_module_is_its_formula() -> None:
    module = filled(CrissCrossAttention3d(16))
    x = torch.randn(1, 16, 3, 4, 5, dtype=torch.float64)
    maps = (module.query_conv(x), module.key_conv(x), module.value_conv(x))
    torch.testing.assert_close(module(x), x + module.gamma * full_attention(*maps))


def test_three_recurrences_reach_every_pixel_of_a_video() -> None:
    x = torch.randn(1, 16, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    reached = []
    for recurrence in (1, 2, 3):
        module = filled(RecurrentCrissCrossAttention3d(16, recurrence))
        (grad,) = torch.autograd.grad(module(x)[0, :, 1, 2, 3].sum(), x)
        reached.append(int((grad.abs().sum(1) > 0).sum()))
    # One line along each axis; then all that differ in at most two coordinates; then all.
    assert reached == [3 + 4 + 5 - 2, 60 - 2 * 3 * 4, 60]


def test_maps_of_a_video_are_rows_of_the_product_of_the_recurrences() -> None:
    module = filled(RecurrentCrissCrossAttention3d(16, 2))
    x = torch.randn(1, 16, 2, 3, 4, dtype=torch.float64)
    pixels = [(0, 1, 2), (1, 2, 3)]
    maps = attention_maps(module, x, pixels)
    mask, y, product = attends(x.shape[2:], range(3)), x, torch.eye(24, dtype=torch.float64)
    for recurrence in range(2):
        scores = module.query_conv(y)[0].flatten(1).T @ module.key_conv(y)[0].flatten(1)
        product = scores.masked_fill(~mask, -math.inf).softmax(-1) @ product
        rows = torch.stack([product[12 * t + 4 * row + column] for t, row, column in pixels])
        torch.testing.assert_close(maps[recurrence].flatten(1), rows)
        y = module.attend(y)


def test_maps_refuse_a_picture_for_a_video() -> None:
    module = CrissCrossAttention3d(16)
    with pytest.raises(
        ValueError, match=r"x must be one video \[1, 16, T, H, W\], got shape \[1, 16, 4, 5\]"
    ):
        attention_maps(module, torch.ones(1, 16, 4, 5), [(0, 0, 0)])
    with pytest.raises(ValueError, match=r"pixel \(2, 0, 0\) is outside of 2 frames, 4 rows and 5 columns"):
        attention_maps(module, torch.ones(1, 16, 2, 4, 5), [(2, 0, 0)])
    with pytest.raises(ValueError, match=r"pixel \(1, 0\) is outside"):
        attention_maps(module, torch.ones(1, 16, 2, 4, 5), [(1, 0)])


@compiled
@pytest.mark.parametrize("kind", [CrissCrossAttention, CrissCrossAttention3d])
@pytest.mark.parametrize("precision", [torch.float64, torch.bfloat16], ids=str)
def test_one_projection_is_three(kind: type[torch.nn.Module], precision: torch.dtype) -> None:
    """A hook makes the module call its three layers one by one."""
    x = torch.randn(2, 16, *(3, 4, 5)[: kind.dim - 2]).double()
    results = []
    for separate in (False, True):
        module = filled(kind(16))
        if separate:
            module.key_conv.register_forward_hook(lambda *_: None)
        if precision == torch.bfloat16:
            module.float()
        leaf = x.to(module.gamma.dtype).requires_grad_()
        with torch.autocast("cpu", precision, enabled=precision == torch.bfloat16):
            out = module(leaf)
        out.float().sin().sum().backward()
        results.append([out.detach(), leaf.grad, *(parameter.grad for parameter in module.parameters())])
        assert out.dtype == precision
    tolerance = {"rtol": 0, "atol": 0.03} if precision == torch.bfloat16 else {}
    torch.testing.assert_close(*results, **tolerance)


def replace_by_bias_free(module: CrissCrossAttention) -> None:
    module.query_conv = torch.nn.Conv2d(16, 2, 1, bias=False)


def replace_by_more_channels(module: CrissCrossAttention) -> None:
    module.query_conv, module.key_conv = torch.nn.Conv2d(16, 4, 1), torch.nn.Conv2d(16, 4, 1)


def replace_by_larger_kernels(module: CrissCrossAttention) -> None:
    module.key_conv = torch.nn.Conv2d(16, 2, 3, padding=1)


def wrap_forward(module: CrissCrossAttention) -> None:
    forward = module.value_conv.forward
    module.value_conv.forward = lambda x: 2 * forward(x)


@pytest.mark.parametrize(
    "change", [replace_by_bias_free, replace_by_more_channels, replace_by_larger_kernels, wrap_forward]
)
def test_replaced_layers_are_used(change: Callable[[CrissCrossAttention], None]) -> None:
    module = CrissCrossAttention(16)
    change(module)
    filled(module)
    x = torch.randn(1, 16, 4, 5, dtype=torch.float64)
    maps = (module.query_conv(x), module.key_conv(x), module.value_conv(x))
    torch.testing.assert_close(module(x), x + module.gamma * full_attention(*maps))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_weights_of_another_type_in_an_autocast_region(dtype: torch.dtype) -> None:
    module = CrissCrossAttention(16).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(torch.ones(1, 16, 4, 5, dtype=dtype)).dtype == torch.bfloat16


@compiled
def test_the_projection_is_not_copied() -> None:
    module = filled(CrissCrossAttention(16)).float().to(memory_format=torch.channels_last)
    x = torch.randn(2, 16, 4, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    out = module(x)
    grad = torch.randn_like(out)
    with torch.profiler.profile(record_shapes=True) as profile:
        torch.autograd.grad(out, [x, module.query_conv.weight], grad)
    copies = [e for e in profile.events() if e.name in ("aten::cat", "aten::copy_", "aten::clone")]
    weights = [20, 16, 1, 1]
    assert all(event.input_shapes[0] == weights for event in copies)
    # The gradients of the projection and of the residual.
    assert [e.input_shapes[0] for e in profile.events() if e.name == "aten::add"] == [[2, 16, 4, 5]]


def test_a_module_is_not_promoted_by_autocast() -> None:
    module = CrissCrossAttention(16)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(torch.ones(1, 16, 4, 5)).dtype == torch.bfloat16

"""The contenders of benchmarks/attention.py, and the inputs on which they are compared.

Operators take query and key [N, c, *spatial] and value [N, C, *spatial], and the options `heads` and `axes`
of `cc_attention.criss_cross_attention`. Spatial axes are (H, W), or (T, H, W) for videos. Modules put three
1x1 convolutions before an operator and a residual after it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from cc_attention import (
    CrissCrossAttention,
    CrissCrossAttention3d,
    RecurrentCrissCrossAttention,
    RecurrentCrissCrossAttention3d,
    criss_cross_attention,
    reference,
)

Function = Callable[..., Tensor]  # a module, or an operator whose options are given
Axes = Sequence[int] | None
Shape = tuple[int, ...]  # N, H, W or N, T, H, W

LAYOUTS = ("contiguous", "channels_last")
DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
#: Applications of the module by level; the operator is not a module.
LEVELS = {"operator": 0, "module": 1, "R=2": 2}


@dataclass(frozen=True)
class Case:
    """Inputs on which contenders are compared.

    The inputs of an operator have the precision of the case. Those of a module have it too, while the weights
    have float32, and autocast regions of the precision surround the module.
    """

    shape: Shape
    channels: tuple[int, int]  # c, C
    precision: str  # a key of DTYPES
    device: str
    level: str = "operator"  # a key of LEVELS
    heads: int = 1
    axes: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """Return the shape, and what is special."""
        words = ["x".join(map(str, self.shape))]
        if self.level != "operator":
            words.append(self.level)
        if self.heads > 1:
            words.append(f"heads={self.heads}")
        if self.axes is not None:
            words.append(f"axes={','.join(map(str, self.axes))}")
        return " ".join(words)

    @property
    def dtype(self) -> torch.dtype:
        """Return the data type of the inputs."""
        return DTYPES[self.precision]

    @property
    def used_axes(self) -> tuple[int, ...]:
        """Return the spatial axes attended along."""
        return used_axes(self.axes, len(self.shape) + 1)

    def apply_precision(self) -> None:
        """Set the precision of matrix products for the process."""
        torch.set_float32_matmul_precision("high" if self.precision == "tf32" else "highest")

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Return the context in which a contender runs."""
        if self.level == "operator" or self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device, self.dtype)

    def inputs(self, layout: str) -> list[Tensor]:
        """Return random inputs, which require gradients, and a gradient of the result.

        The inputs are query, key and value of an operator, or the map of a module. Scores have variance 1:
        errors of much larger ones would be dominated by the rounding of bfloat16.
        """
        c, channels = self.channels
        sizes = [(c, c**-0.25), (c, c**-0.25)] if self.level == "operator" else []
        n, *spatial = self.shape
        last = torch.channels_last if len(spatial) == 2 else torch.channels_last_3d
        tensors = [
            torch.empty(
                (n, k, *spatial),
                dtype=self.dtype,
                device=self.device,
                memory_format=last if layout == "channels_last" else torch.contiguous_format,
            ).normal_(std=std)
            for k, std in (*sizes, (channels, 1.0), (channels, 1.0))
        ]
        return [*(t.requires_grad_() for t in tensors[:-1]), tensors[-1]]

    def input_sets(self, layout: str) -> list[list[Tensor]]:
        """Return several sets of inputs, so that none is found in a cache again.

        On a GPU they exceed the L2 cache four times. On the CPU two are enough, because the contenders run
        alternately.
        """
        count = 2
        if self.device == "cuda":
            channels = self.channels[1] + (2 * self.channels[0] if self.level == "operator" else 0)
            one = math.prod(self.shape) * channels * self.dtype.itemsize
            cache = torch.cuda.get_device_properties(0).L2_cache_size
            count = min(max(4 * cache // one + 1, count), 32)
        return [self.inputs(layout) for _ in range(count)]

    def weights(self) -> dict[str, Tensor]:
        """Return random weights that a module of any contender can load; an operator has none.

        Scores have variance 1, as those of `inputs`. gamma is not 0, the value of a new module: all gradients
        but that of the residual would vanish.
        """
        if self.level == "operator":
            return {}
        c, channels = self.channels
        module = ComposedModule(self, criss_cross_attention)
        with torch.no_grad():
            for layer, std in ((module.query_conv, c**-0.25), (module.key_conv, c**-0.25)):
                layer.weight.normal_(std=std * channels**-0.5)
            module.gamma.fill_(1)
        return module.state_dict()


# Operators


def used_axes(axes: Axes, dim: int) -> tuple[int, ...]:
    """Return the spatial axes attended along; the pixels of the last one include the pixel itself."""
    return reference.used_axes("attention", axes, dim)


def _composed(
    axes: tuple[int, ...], score: Callable[[int], Tensor], weighted: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """Compute criss-cross attention from products along single axes.

    A pixel is excluded with -inf from its own line along all axes but the last one.

    Args:
        axes: spatial axes attended along.
        score: returns the products of queries and keys along an axis of size n, with the other spatial axes
            before it: [N, *others, n (query), n (key)].
        weighted: returns the sums [N, C, *spatial] of values along an axis for such weights.
    """
    scores = [score(axis) for axis in axes]
    scores = [
        (s if axis == axes[-1] else s + _diagonal(s)).movedim(-2, axis + 1)
        for axis, s in zip(axes, scores, strict=True)
    ]
    weight = F.softmax(torch.cat(scores, dim=-1), dim=-1)  # [N, *spatial, all positions]
    # Slices, because torch.compile of PyTorch 2.15 computes a wrong gradient of value for `split`.
    ends = list(itertools.accumulate(s.shape[-1] for s in scores))
    parts = [weight[..., start:end] for start, end in zip([0, *ends], ends, strict=False)]
    sums = [weighted(axis, part.movedim(axis + 1, -2)) for axis, part in zip(axes, parts, strict=True)]
    return sum(sums[1:], sums[0])


def _diagonal(score: Tensor) -> Tensor:
    """Return [n, n] with -inf on the diagonal."""
    return torch.diag(torch.full(score.shape[-1:], -torch.inf, device=score.device, dtype=score.dtype))


def bmm_attention(query: Tensor, key: Tensor, value: Tensor, heads: int = 1, axes: Axes = None) -> Tensor:
    """Compute criss-cross attention as batched matrix products over copied lines.

    Source: the pure PyTorch branch of CCNet (arXiv 1811.11721), here also for heads, videos and axes.
    """
    query, key, value = (reference.fold_heads(x, heads) for x in (query, key, value))

    def lines(x: Tensor, axis: int) -> Tensor:  # [N, k, *spatial] -> [N, *others, k, n]
        return x.movedim((1, axis + 2), (-2, -1))

    def copied(x: Tensor, axis: int) -> Tensor:  # [N * others, k, n]
        return lines(x, axis).flatten(0, -3)

    def score(axis: int) -> Tensor:
        product = torch.bmm(copied(query, axis).transpose(1, 2), copied(key, axis))
        return product.unflatten(0, lines(query, axis).shape[:-2])

    def weighted(axis: int, weight: Tensor) -> Tensor:
        product = torch.bmm(copied(value, axis), weight.flatten(0, -3).transpose(1, 2))
        return product.unflatten(0, weight.shape[:-2]).movedim((-2, -1), (1, axis + 2))

    return reference.unfold_heads(_composed(used_axes(axes, query.dim()), score, weighted), heads)


def einsum_attention(query: Tensor, key: Tensor, value: Tensor, heads: int = 1, axes: Axes = None) -> Tensor:
    """Compute criss-cross attention as two contractions for each axis.

    Source: mmcv's CrissCrossAttention, here also for heads, videos and axes.
    """
    pixel = "tyx"[5 - query.dim() :]
    query, key, value = (reference.fold_heads(x, heads) for x in (query, key, value))

    def letters(axis: int) -> tuple[str, str]:  # the pixel seen, which is k on the axis; others, pixel and k
        at = pixel[axis]
        return pixel.replace(at, "k"), pixel.replace(at, "") + at + "k"

    def score(axis: int) -> Tensor:
        seen, both = letters(axis)
        return torch.einsum(f"nc{pixel},nc{seen}->n{both}", query, key)

    def weighted(axis: int, weight: Tensor) -> Tensor:
        seen, both = letters(axis)
        return torch.einsum(f"nc{seen},n{both}->nc{pixel}", value, weight)

    return reference.unfold_heads(_composed(used_axes(axes, query.dim()), score, weighted), heads)


def view_attention(query: Tensor, key: Tensor, value: Tensor, heads: int = 1, axes: Axes = None) -> Tensor:
    """Compute criss-cross attention as products of views, for one image in channels_last without copies."""
    used = used_axes(axes, query.dim())
    # [N, *spatial, k]
    query, key, value = (reference.fold_heads(x, heads).movedim(1, -1) for x in (query, key, value))

    def score(axis: int) -> Tensor:
        return query.movedim(axis + 1, -2) @ key.movedim(axis + 1, -2).mT

    def weighted(axis: int, weight: Tensor) -> Tensor:
        return (weight @ value.movedim(axis + 1, -2)).movedim(-2, axis + 1).movedim(-1, 1)

    return reference.unfold_heads(_composed(used, score, weighted), heads)


def _tokens(x: Tensor, heads: int) -> Tensor:
    """Return x [N, heads * k, *spatial] as [N, heads, pixels, k], in channels_last without a copy."""
    return x.flatten(2).unflatten(1, (heads, -1)).mT


def _full(attention: Function, query: Tensor, key: Tensor, value: Tensor, heads: int, width: int) -> Tensor:
    """Apply an attention of tokens, without scaling as in CCNet.

    Args:
        attention: computes [N, heads, pixels, C / heads] from three maps of tokens.
        query: [N, c, *spatial].
        key: [N, c, *spatial].
        value: [N, C, *spatial].
        heads: heads of all three.
        width: 0 to leave the heads. Otherwise, with heads = 1, the channels of value are split into heads of
            width * c channels, which share query and key, padded with zeros to that many channels.
    """
    spatial, c = query.shape[2:], query.shape[1]
    split = value.shape[1] // (width * c) if width else heads
    padding = (0, width * c - c) if width else (0, 0)
    query, key = (F.pad(_tokens(x, heads), padding).expand(-1, split, -1, -1) for x in (query, key))
    out = attention(query, key, _tokens(value, split))
    return out.transpose(1, 2).flatten(2).mT.unflatten(2, spatial)


def non_local(
    query: Tensor, key: Tensor, value: Tensor, heads: int = 1, axes: Axes = None, width: int = 0
) -> Tensor:
    """Compute full attention, in which each pixel attends to all along all axes; `_full` explains `width`."""
    return _full(partial(F.scaled_dot_product_attention, scale=1.0), query, key, value, heads, width)


def exact_non_local(query: Tensor, key: Tensor, value: Tensor, heads: int = 1, axes: Axes = None) -> Tensor:
    """Compute `non_local` step by step, as its reference."""
    query, key, heads_of_value = (reference.fold_heads(x, heads).flatten(2) for x in (query, key, value))
    weight = F.softmax(query.mT @ key, dim=2)  # [N * heads, pixel, pixel seen]
    return reference.unfold_heads(heads_of_value @ weight.mT, heads).reshape(value.shape)


@functools.cache
def criss_cross_mask(spatial: tuple[int, ...], axes: tuple[int, ...], device: str) -> BlockMask:
    """Return the mask of the pixels that share a line along one of the axes."""
    steps = [math.prod(spatial[axis + 1 :]) for axis in range(len(spatial))]

    def attends(batch: Tensor, head: Tensor, pixel: Tensor, seen: Tensor) -> Tensor:
        same = [
            pixel // step % size == seen // step % size for step, size in zip(steps, spatial, strict=True)
        ]
        on_line = [
            functools.reduce(torch.logical_and, [s for other, s in enumerate(same) if other != axis])
            for axis in axes
        ]
        return functools.reduce(torch.logical_or, on_line)

    pixels = math.prod(spatial)
    return create_block_mask(attends, None, None, pixels, pixels, device=device)


@functools.cache
def _compiled_flex() -> Function:
    return torch.compile(flex_attention, dynamic=False)


def flex(
    query: Tensor, key: Tensor, value: Tensor, heads: int = 1, axes: Axes = None, width: int = 0
) -> Tensor:
    """Compute criss-cross attention by PyTorch's FlexAttention with a mask; `_full` explains `width`."""
    mask = criss_cross_mask(tuple(query.shape[2:]), used_axes(axes, query.dim()), str(query.device))
    attention = partial(_compiled_flex(), block_mask=mask, scale=1.0)
    return _full(attention, query, key, value, heads, width)


def _in_one_head(operator: Function) -> Function:
    """Return an operator that ignores `heads`."""
    return lambda *maps, heads, axes: operator(*maps, axes=axes)


# Modules


def plain_residual(x: Tensor, gamma: Tensor, attention: Tensor) -> Tensor:
    """Add the residual as CCNet and mmcv do."""
    return gamma * attention + x


def addcmul_residual(x: Tensor, gamma: Tensor, attention: Tensor) -> Tensor:
    """Add the residual in one pass over memory."""
    return torch.addcmul(x, gamma.to(attention.dtype), attention)


class ComposedModule(nn.Module):
    """Three 1x1 convolutions, an operator and a residual, applied once or repeatedly.

    With `bmm_attention` it is the attention of CCNet in pure PyTorch, with `einsum_attention` that of mmcv.
    Parameters are named as in `CrissCrossAttention`.

    Args:
        case: channels, spatial axes, device and number of applications.
        operator: the attention of query, key and value.
        residual: adds x and gamma * attention.
    """

    def __init__(self, case: Case, operator: Function, residual: Function = plain_residual):
        super().__init__()
        c, channels = case.channels
        convolution: type[nn.Conv2d] | type[nn.Conv3d] = nn.Conv2d if len(case.shape) == 3 else nn.Conv3d
        self.query_conv = convolution(channels, c, 1, device=case.device)
        self.key_conv = convolution(channels, c, 1, device=case.device)
        self.value_conv = convolution(channels, channels, 1, device=case.device)
        self.gamma = nn.Parameter(torch.zeros(1, device=case.device))
        self.operator, self.residual = operator, residual
        self.applications = LEVELS[case.level]

    def forward(self, x: Tensor) -> Tensor:
        """Apply the attention to x [N, C, *spatial]."""
        for _ in range(self.applications):
            out = self.operator(self.query_conv(x), self.key_conv(x), self.value_conv(x))
            x = self.residual(x, self.gamma, out)
        return x


def _our_module(case: Case) -> nn.Module:
    """Return the module of cc_attention for a case."""
    channels, video = case.channels[1], len(case.shape) == 4
    with torch.device(case.device):
        if case.level == "module":
            return (CrissCrossAttention3d if video else CrissCrossAttention)(channels)
        recurrent = RecurrentCrissCrossAttention3d if video else RecurrentCrissCrossAttention
        return recurrent(channels, LEVELS[case.level])


# The contenders


def _everywhere(case: Case) -> bool:
    return True


@dataclass(frozen=True)
class Formulation:
    """An implementation, and what it computes."""

    family: str
    operator: Function
    exact: Function = reference.criss_cross_attention
    module: Callable[[Case], nn.Module] | None = None  # by default a ComposedModule of the operator
    applies: Callable[[Case], bool] = _everywhere

    def function(self, case: Case, weights: dict[str, Tensor]) -> Function:
        """Return the function to measure: the operator with the options of a case, or a module."""
        return self._function(case, weights, self.operator, self.module)

    def exact_function(self, case: Case, weights: dict[str, Tensor]) -> Function:
        """Return the reference of `function`, for float64."""
        function = self._function(case, weights, self.exact, None)
        return function.double() if isinstance(function, nn.Module) else function

    @staticmethod
    def _function(
        case: Case,
        weights: dict[str, Tensor],
        operator: Function,
        make: Callable[[Case], nn.Module] | None,
    ) -> Function:
        def with_options(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return operator(query, key, value, heads=case.heads, axes=case.axes)

        if case.level == "operator":
            return with_options
        module = make(case) if make else ComposedModule(case, operator)
        module.load_state_dict(weights)
        return module


def _one_head(case: Case) -> bool:
    return case.heads == 1


#: Formulations by name. The heads of the split forms have as many channels as the key, or twice as many.
FORMULATIONS: dict[str, Formulation] = {
    "ours": Formulation("ours", criss_cross_attention, module=_our_module),
    "before": Formulation(
        "before",
        criss_cross_attention,
        module=lambda case: ComposedModule(case, criss_cross_attention, addcmul_residual),
        applies=lambda case: case.level != "operator",
    ),
    "heads=1": Formulation(
        "heads=1",
        _in_one_head(criss_cross_attention),
        _in_one_head(reference.criss_cross_attention),
        applies=lambda case: case.heads > 1,
    ),
    "bmm": Formulation("pure PyTorch", bmm_attention),
    "einsum": Formulation("pure PyTorch", einsum_attention),
    "views": Formulation("views", view_attention),
    "flex": Formulation("FlexAttention", flex),
    "flex split": Formulation("FlexAttention", partial(flex, width=1), applies=_one_head),
    "non-local": Formulation("non-local", non_local, exact_non_local),
    "non-local split": Formulation(
        "non-local", partial(non_local, width=1), exact_non_local, applies=_one_head
    ),
    "non-local split wide": Formulation(
        "non-local",
        partial(non_local, width=2),
        exact_non_local,
        applies=lambda case: _one_head(case) and case.device == "cuda",
    ),
}
#: Choices of --contenders, and their formulations.
CHOICES = {
    "ours": ["ours", "before", "heads=1"],
    "bmm": ["bmm"],
    "einsum": ["einsum"],
    "views": ["views"],
    "bmm-compiled": ["bmm"],
    "einsum-compiled": ["einsum"],
    "flex": ["flex", "flex split"],
    "non-local": ["non-local", "non-local split", "non-local split wide"],
}


@dataclass(frozen=True)
class Contender:
    """A formulation with a memory format of the inputs."""

    formulation: str
    layout: str
    compiled: bool

    @property
    def kind(self) -> str:
        """Return the formulation, and whether it is compiled."""
        return f"{self.formulation} compiled" if self.compiled else self.formulation

    @property
    def name(self) -> str:
        """Return the kind and the memory format."""
        return f"{self.kind}, {self.layout}"

    @property
    def family(self) -> str:
        """Return the family of the formulation."""
        return FORMULATIONS[self.formulation].family

    @property
    def compiles(self) -> bool:
        """Return whether anything is compiled when the contender runs."""
        return self.compiled or self.family == "FlexAttention"

    def applies(self, case: Case) -> bool:
        """Return whether the contender can be the best of its family in a case."""
        slow = self.compiled and self.layout == "contiguous" and case.device == "cpu"
        return FORMULATIONS[self.formulation].applies(case) and not slow

    def function(self, case: Case, weights: dict[str, Tensor]) -> Function:
        """Return the function to measure, with `weights` if it is a module.

        Raises:
            RuntimeError: the contender can't be measured on the device.
        """
        if self.family == "FlexAttention" and case.device == "cpu":
            raise RuntimeError("measured on a GPU only: FlexAttention has no gradients on a CPU")
        function = FORMULATIONS[self.formulation].function(case, weights)
        return torch.compile(function, fullgraph=True, dynamic=False) if self.compiled else function

    def exact_function(self, case: Case, weights: dict[str, Tensor]) -> Function:
        """Return the reference of `function`, for float64."""
        return FORMULATIONS[self.formulation].exact_function(case, weights)


def make_contenders(names: Sequence[str]) -> list[Contender]:
    """Return the contenders for choices of --contenders.

    Those on tokens run only in channels_last, where tokens are views.
    """
    return [
        Contender(formulation, layout, name.endswith("-compiled"))
        for name in names
        for formulation in CHOICES[name]
        for layout in (LAYOUTS[1:] if name in ("flex", "non-local") else LAYOUTS)
    ]

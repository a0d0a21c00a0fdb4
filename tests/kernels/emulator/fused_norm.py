"""Call the emulated CUDA kernels of the activated batch norm like the operators of fused/csrc/norm_ops.cpp.

kernels = NormEmulator(build(csrc=FUSED))
sums = kernels.sums(x, schedule=2)
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_double, c_int, c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from . import DTYPES, ROOT, Emulator, Operand, check

FUSED = ROOT / "fused/csrc"
ACTIVATIONS = ("identity", "relu", "leaky_relu")  # enum Activation


class MapSizes(ctypes.Structure):
    _fields_ = [("N", c_int64), ("C", c_int64), ("P", c_int64), ("channels_last", ctypes.c_bool)]


class Norm(ctypes.Structure):
    _fields_ = [
        ("dtype", c_int),
        ("sizes", MapSizes),
        ("statistics", c_void_p),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("eps", c_double),
        ("activation", c_int),
        ("slope", c_double),
    ]


def pointers(*names: str) -> list[tuple[str, type]]:
    return [(name, c_void_p) for name in names]


class NormSums(ctypes.Structure):
    _fields_ = [("dtype", c_int), ("sizes", MapSizes), *pointers("x", "sums", "workspace")]


class NormStatistics(ctypes.Structure):
    _fields_ = [
        ("dtype", c_int),
        ("C", c_int64),
        ("sums", c_void_p),
        ("eps", c_double),
        ("momentum", c_double),
        *pointers("running_mean", "running_variance", "statistics"),
    ]


class NormApply(ctypes.Structure):
    _fields_ = [("norm", Norm), *pointers("x", "residual", "y")]


class NormBackwardSums(ctypes.Structure):
    _fields_ = [
        ("norm", Norm),
        *pointers("x", "y", "grad", "masked", "sums", "grad_weight", "workspace"),
    ]


class NormBackwardInput(ctypes.Structure):
    _fields_ = [
        ("norm", Norm),
        *pointers("x", "y", "grad"),
        ("masked", ctypes.c_bool),
        *pointers("sums", "count", "grad_x"),
    ]


class Parameters(NamedTuple):
    """Parameters of the norm; vectors have the precision S of the statistics."""

    statistics: Tensor  # [2,C]
    weight: Tensor  # [C]
    bias: Tensor  # [C]
    eps: float = 1e-5
    activation: str = "identity"
    slope: float = 0.01


def precision(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype S of statistics and sums for maps of a dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sizes_of(x: Tensor) -> MapSizes:
    return MapSizes(x.shape[0], x.shape[1], x.shape[2] * x.shape[3], True)


class NormEmulator(Emulator):
    """The functions of norm.h in a library from build(csrc=FUSED).

    Maps are [N,C,H,W] of any layout, and come back so (channels_last). Settings are those of Emulator, and
    offset: elements by which the addresses of all maps miss a multiple of 16 bytes.
    """

    def workspace_bytes(self, dtype: torch.dtype, sizes: MapSizes) -> int:
        function = self.library.emulated_norm_workspace
        function.restype = c_int64
        return function(DTYPES.index(dtype), byref(sizes))

    def workspace(self, x: Tensor) -> Operand:
        return Operand((self.workspace_bytes(x.dtype, sizes_of(x)),), torch.uint8)

    def run(
        self, name: str, arguments: ctypes.Structure, operands: dict[str, Operand], **settings: int
    ) -> None:
        for operand_name, operand in operands.items():
            setattr(arguments, operand_name, operand.pointer)
        self.call(f"emulated_{name}", byref(arguments), **settings)
        check(operands)

    def run_norm(
        self,
        name: str,
        arguments: NormApply | NormBackwardSums | NormBackwardInput,
        x: Tensor,
        parameters: Parameters,
        operands: dict[str, Operand],
        **settings: int,
    ) -> None:
        vectors = {
            field: Operand(getattr(parameters, field), precision(x.dtype))
            for field in ("statistics", "weight", "bias")
        }
        arguments.norm = Norm(
            DTYPES.index(x.dtype),
            sizes_of(x),
            *(vector.pointer for vector in vectors.values()),
            parameters.eps,
            ACTIVATIONS.index(parameters.activation),
            parameters.slope,
        )
        self.run(name, arguments, operands, **settings)
        check(vectors)

    def sums(self, x: Tensor, offset: int = 0, **settings: int) -> Tensor:
        """Run norm_sums_cuda; return the sums [2C+1]."""
        operands = {
            "x": map_operand(x, offset),
            "sums": Operand((2 * x.shape[1] + 1,), torch.float64),
            "workspace": self.workspace(x),
        }
        self.run("norm_sums", NormSums(DTYPES.index(x.dtype), sizes_of(x)), operands, **settings)
        return operands["sums"].tensor

    def statistics(
        self,
        sums: Tensor,  # [2C+1]
        running: tuple[Tensor, Tensor] | None,  # [C] each; updated
        dtype: torch.dtype,  # of the maps
        eps: float = 1e-5,
        momentum: float = 0.1,
        **settings: int,
    ) -> Tensor:
        """Run norm_statistics_cuda; return the statistics [2,C]."""
        channels, wide = sums.numel() // 2, precision(dtype)
        operands = {"sums": Operand(sums, torch.float64), "statistics": Operand((2, channels), wide)}
        if running:
            for name, tensor in zip(("running_mean", "running_variance"), running, strict=True):
                operands[name] = Operand(tensor, wide)
                operands[name].before = None  # an output too
        arguments = NormStatistics(DTYPES.index(dtype), channels, None, eps, momentum)
        self.run("norm_statistics", arguments, operands, **settings)
        if running:
            running[0].copy_(operands["running_mean"].tensor)
            running[1].copy_(operands["running_variance"].tensor)
        return operands["statistics"].tensor

    def apply(
        self, x: Tensor, parameters: Parameters, residual: Tensor | None, offset: int = 0, **settings: int
    ) -> Tensor:
        """Run norm_apply_cuda; return y."""
        operands = {"x": map_operand(x, offset), "y": empty_operand(x, offset)}
        if residual is not None:
            operands["residual"] = map_operand(residual, offset)
        self.run_norm("norm_apply", NormApply(), x, parameters, operands, **settings)
        return map_of(operands["y"])

    def backward_sums(
        self,
        grad: Tensor,
        x: Tensor,
        y: Tensor | None,
        parameters: Parameters,
        masked: bool,
        offset: int = 0,
        **settings: int,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Run norm_backward_sums_cuda; return the sums [2,C], the gradient of weight [C], the masked map."""
        wide = precision(x.dtype)
        operands = {
            "x": map_operand(x, offset),
            "grad": map_operand(grad, offset),
            "sums": Operand((2, x.shape[1]), wide),
            "grad_weight": Operand((x.shape[1],), wide),
            "workspace": self.workspace(x),
        }
        if y is not None:
            operands["y"] = map_operand(y, offset)
        if masked:
            operands["masked"] = empty_operand(x, offset)
        self.run_norm("norm_backward_sums", NormBackwardSums(), x, parameters, operands, **settings)
        result = map_of(operands["masked"]) if masked else None
        return operands["sums"].tensor, operands["grad_weight"].tensor, result

    def backward_input(
        self,
        grad: Tensor,
        x: Tensor,
        y: Tensor | None,
        parameters: Parameters,
        sums: tuple[Tensor, float] | None,  # [2,C] and the number of pixels
        masked: bool,
        offset: int = 0,
        **settings: int,
    ) -> Tensor:
        """Run norm_backward_input_cuda; return the gradient of x."""
        operands = {
            "x": map_operand(x, offset),
            "grad": map_operand(grad, offset),
            "grad_x": empty_operand(x, offset),
        }
        if y is not None:
            operands["y"] = map_operand(y, offset)
        if sums is not None:
            operands["sums"] = Operand(sums[0], precision(x.dtype))
            operands["count"] = Operand(torch.tensor([sums[1]]), torch.float64)
        arguments = NormBackwardInput(masked=masked)
        self.run_norm("norm_backward_input", arguments, x, parameters, operands, **settings)
        return map_of(operands["grad_x"])


def map_operand(feature_map: Tensor, offset: int) -> Operand:
    return Operand(feature_map.permute(0, 2, 3, 1), feature_map.dtype, offset)


def empty_operand(like: Tensor, offset: int) -> Operand:
    n, channels, height, width = like.shape
    return Operand((n, height, width, channels), like.dtype, offset)


def map_of(operand: Operand) -> Tensor:
    return operand.tensor.permute(0, 3, 1, 2)

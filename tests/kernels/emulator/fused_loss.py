"""Call the functions of fused/csrc/loss.h for the GPU in the emulator, with tensors.

kernels = LossKernels(build(csrc=FUSED))
totals, grad = kernels.segmentation_loss(logits, target, 255)
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_bool, c_int64, c_void_p

import torch
from torch import Tensor

from emulator import ROOT, Emulator, Operand, check

FUSED = ROOT / "fused/csrc"


class LossSizes(ctypes.Structure):
    _fields_ = [(name, c_int64) for name in ("N", "C", "H", "W", "h", "w")]


class Logits(ctypes.Structure):
    _fields_ = [("wide", c_bool), ("sizes", LossSizes), ("logits", c_void_p)]


class SegmentationLoss(ctypes.Structure):
    _fields_ = [
        ("input", Logits),
        ("target", c_void_p),
        ("ignored", c_int64),
        *((name, c_void_p) for name in ("class_weights", "threshold", "totals", "grad", "workspace")),
    ]


class CoarseProbability(ctypes.Structure):
    _fields_ = [
        ("input", Logits),
        ("target", c_void_p),
        ("ignored", c_int64),
        ("rows", c_int64),
        ("columns", c_int64),
        ("probability", c_void_p),
    ]


class UpsampledClasses(ctypes.Structure):
    _fields_ = [("input", Logits), ("classes", c_void_p)]


class LossKernels(Emulator):
    """The functions of loss.h for the GPU in a library from build().

    Logits are [N,C,H,W] of float32 or float64. Errors and settings are those of Emulator.
    """

    def segmentation_loss(
        self,
        logits: Tensor,  # [N,C,H,W]
        target: Tensor,  # int64 [N,h,w]
        ignored: int,
        class_weights: Tensor | None = None,  # [C]
        threshold: Tensor | None = None,  # [1]
        needs_grad: bool = True,
        **settings: int,
    ) -> tuple[Tensor, Tensor]:
        """Run segmentation_loss_cuda; return totals [2], and gradient [N,C,H,W] or an empty tensor."""
        dtype, sizes = logits.dtype, sizes_of(logits, *target.shape[1:])
        operands = {"logits": Operand(logits, dtype), "target": Operand(target, torch.int64)}
        for name, optional in (("class_weights", class_weights), ("threshold", threshold)):
            if optional is not None:
                operands[name] = Operand(optional, dtype)
        operands["totals"] = Operand((2,), dtype)
        if needs_grad:
            operands["grad"] = Operand(tuple(logits.shape), dtype)
        workspace_bytes = self.library.emulated_loss_workspace
        workspace_bytes.restype = c_int64
        count = workspace_bytes(c_bool(dtype == torch.float64), byref(sizes))
        operands["workspace"] = Operand((count,), torch.uint8)
        arguments = SegmentationLoss(to_logits(operands, sizes), ignored=ignored)
        self.run("emulated_segmentation_loss", arguments, operands, **settings)
        return operands["totals"].tensor, operands["grad"].tensor if needs_grad else logits.new_empty(0)

    def coarse_probability(
        self,
        logits: Tensor,  # [N,C,H,W]
        target: Tensor,  # int64 [N,h,w]
        ignored: int,
        rows: int,
        columns: int,
        **settings: int,
    ) -> Tensor:
        """Run coarse_probability_cuda; return the probabilities [N,rows,columns]."""
        dtype, sizes = logits.dtype, sizes_of(logits, *target.shape[1:])
        operands = {
            "logits": Operand(logits, dtype),
            "target": Operand(target, torch.int64),
            "probability": Operand((sizes.N, rows, columns), dtype),
        }
        arguments = CoarseProbability(to_logits(operands, sizes), ignored=ignored, rows=rows, columns=columns)
        self.run("emulated_coarse_probability", arguments, operands, **settings)
        return operands["probability"].tensor

    def upsampled_classes(
        self,
        logits: Tensor,  # [N,C,H,W]
        height: int,
        width: int,
        **settings: int,
    ) -> Tensor:
        """Run upsampled_classes_cuda; return the classes, uint8 [N,height,width]."""
        sizes = sizes_of(logits, height, width)
        operands = {
            "logits": Operand(logits, logits.dtype),
            "classes": Operand((sizes.N, height, width), torch.uint8),
        }
        arguments = UpsampledClasses(to_logits(operands, sizes))
        self.run("emulated_upsampled_classes", arguments, operands, **settings)
        return operands["classes"].tensor

    def run(
        self,
        name: str,
        arguments: SegmentationLoss | CoarseProbability | UpsampledClasses,
        operands: dict[str, Operand],
        **settings: int,
    ) -> None:
        """Call a function with pointers to the operands, and check what it wrote to."""
        for operand_name, operand in operands.items():
            if operand_name != "logits":
                setattr(arguments, operand_name, operand.pointer)
        self.call(name, byref(arguments), **settings)
        check(operands)


def sizes_of(logits: Tensor, height: int, width: int) -> LossSizes:
    return LossSizes(*logits.shape, height, width)


def to_logits(operands: dict[str, Operand], sizes: LossSizes) -> Logits:
    logits = operands["logits"]
    return Logits(logits.tensor.dtype == torch.float64, sizes, logits.pointer)

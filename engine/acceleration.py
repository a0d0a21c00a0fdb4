"""Precision, memory format and implementation of a network (--amp, --channels-last, --compile, ...)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

import fused
from utils.errors import UsageError

Result = TypeVar("Result")

#: Autocast type of each precision.
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
#: Value of --amp that chooses bf16 if the device has fast products of it, and float32 otherwise.
AUTO = "auto"
#: File with the flags of the processor, on Linux.
CPU_INFO = Path("/proc/cpuinfo")
#: Flags of processors with products of bfloat16: x86-64 and 64-bit ARM.
PRODUCTS = {"avx512_bf16", "amx_bf16", "bf16"}
#: Compute capability of the first NVIDIA GPUs with products of bfloat16.
AMPERE = (8, 0)


def autocast(device: torch.device, amp: str | None) -> torch.autocast:
    """Return the context in which a network computes in precision `amp`; None is that of its weights."""
    return torch.autocast(device.type, PRECISIONS.get(amp or ""), enabled=amp is not None)


def has_fast_bf16(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 faster than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= AMPERE
    try:
        words = CPU_INFO.read_text(encoding="utf-8", errors="replace").split()
    except OSError:  # not Linux
        return False
    return not PRODUCTS.isdisjoint(words)


def choose_precision(amp: str | None, device: torch.device) -> tuple[str | None, str | None]:
    """Return the precision for a value of --amp, and a line about the choice of "auto".

    Raises:
        UsageError: the value is unknown, or the device does not support it.
    """
    if amp not in (None, AUTO, *PRECISIONS):
        raise UsageError(f"--amp {amp}: is not one of {', '.join((AUTO, *sorted(PRECISIONS)))}")
    if amp == "fp16" and device.type == "cpu":
        raise UsageError("--amp fp16: requires a GPU; use --amp bf16")
    if amp != AUTO:
        return amp, None
    if has_fast_bf16(device):
        return "bf16", f"--amp auto: bf16, which this {_name(device)} multiplies fast"
    return None, f"--amp auto: float32, because this {_name(device)} has no fast products of bf16"


def use_fused(mode: str, device: torch.device) -> str | None:
    """Use fused operators in this process, as --fused says.

    Returns:
        A line, if they are not built and would be used by default.

    Raises:
        UsageError: fused operators are requested, and there are none for the device.
    """
    built = device.type in fused.DEVICE_TYPES
    if mode == "on" and not built:
        raise UsageError(
            f"--fused on: there are no fused operators for this {_name(device)}; build them with python "
            "setup.py build_ext --inplace, or omit the flag"
        )
    fused.use(mode)
    if mode == "auto" and device.type in fused.TESTED and not built:
        return "the fused operators are not built: python setup.py build_ext --inplace makes steps faster"
    return None


def resolve_fused(mode: str, device: torch.device) -> str:
    """Return what a value of --fused means on `device`: "on" or "off"."""
    with fused.using(mode):
        return "on" if fused.active(device) else "off"


class Speed(NamedTuple):
    """The precision and the implementation of a network in evaluation mode.

    Attributes:
        amp: precision, from `choose_precision`.
        channels_last: whether to store tensors as [N, h, w, C].
        compile: whether to compile the network with torch.compile.
        cuda_graph: whether to record its kernels as CUDA graphs.
        fused: mode of the fused operators (`fused.use`).
    """

    amp: str | None = None
    channels_last: bool = False
    compile: bool = False
    cuda_graph: bool = False
    fused: str = "auto"


def accelerate(
    model: nn.Module, device: torch.device, speed: Speed
) -> Callable[[Tensor], Tensor | Sequence[Tensor]]:
    """Return a function that computes a network in evaluation mode.

    Args:
        model: the network, on `device`. Its weights are converted to channels_last in place, if requested.
        device: device of the network.
        speed: precision and implementation.

    Raises:
        UsageError: CUDA graphs are requested on a CPU.
    """
    if speed.cuda_graph and device.type != "cuda":
        raise UsageError("--cuda-graph: requires a GPU; omit it")
    layout = torch.channels_last if speed.channels_last else torch.contiguous_format
    if speed.channels_last:
        model.to(memory_format=layout)  # type: ignore[call-overload]
    network: Any = torch.compile(model) if speed.compile else model

    def run(images: Tensor) -> Tensor | Sequence[Tensor]:
        with autocast(device, speed.amp):
            return network(images)

    compute = _Graphs(run) if speed.cuda_graph else run
    return lambda images: compute(images.contiguous(memory_format=layout))


class _Graphs:
    """Run a function of images as CUDA graphs, one for each size of its input.

    A graph launches all kernels at once, so that the host does not limit the speed of small inputs.

    Args:
        function: network in evaluation mode; returns a tensor or a sequence of tensors.
    """

    #: Graphs to keep: each holds the activations of its size. Further sizes run without a graph.
    MOST = 4

    def __init__(self, function: Callable[[Tensor], Tensor | Sequence[Tensor]]):
        self.function = function
        self._recorded: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Tensor, Sequence[Tensor]]] = {}

    def __call__(self, images: Tensor) -> Sequence[Tensor]:
        """Return the outputs for images [N, 3, h, w], in memory of their own."""
        if images.shape not in self._recorded:
            if len(self._recorded) == self.MOST:
                return _as_sequence(self.function(images))
            inputs = images.clone()
            graph, outputs = record(lambda: _as_sequence(self.function(inputs)), images.device)
            self._recorded[images.shape] = graph, inputs, outputs
        graph, inputs, outputs = self._recorded[images.shape]
        inputs.copy_(images)
        graph.replay()
        return [output.clone() for output in outputs]


def record(function: Callable[[], Result], device: torch.device) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Record the kernels of a function as a CUDA graph.

    Args:
        function: function that computes tensors from tensors at fixed addresses. It is called a few times.
        device: the GPU.

    Returns:
        The graph, and the result of `function`, which each replay overwrites.
    """
    # Libraries choose their kernels and allocate their workspaces in the first runs.
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads may use the GPU meanwhile: they wait for predictions, or pin the memory of batches.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = function()
    return graph, result


def _as_sequence(outputs: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else outputs


def _name(device: torch.device) -> str:
    return "GPU" if device.type == "cuda" else "processor"

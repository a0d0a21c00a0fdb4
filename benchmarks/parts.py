"""Time of the parts of a training step or a prediction: convolutions, normalization, loss and so on.

torch.profiler records the operators. On a CPU, the time of an operator is its own, without that of the
operators it calls. On a GPU, it is the time of the kernels that the operator starts.

The part of an operator is that of the outermost operator around it that is known here. A range around the
criterion (`LOSS`) marks the operators that compute the loss. Autograd gives an operator and its backward the
same sequence number, by which the backward of the loss is found.
"""

from __future__ import annotations

import functools
import os
import re
import statistics
import time
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from utils import timing

FORWARD = "convolution, forward"
DATA = "convolution, gradient of data"
WEIGHTS = "convolution, gradient of weights"
#: Kernels of the backward of a convolution whose names do not say which gradient they compute.
GRADIENTS = "convolution, other gradient kernels"
NORMALIZATION = "normalization"
ELEMENTWISE = "elementwise"
LOSS = "upsampling and loss"
ATTENTION = "attention"
OPTIMIZER = "optimizer"
OTHER = "other"
#: On a CPU, the time between the operators: Python. On a GPU, the time in which no kernel runs.
IDLE = "idle"
PARTS = (
    FORWARD, DATA, WEIGHTS, GRADIENTS, NORMALIZATION, ELEMENTWISE, LOSS, ATTENTION, OPTIMIZER, OTHER, IDLE,
)  # fmt: skip
#: Name of the range of a whole run.
RUN = "whole run"
#: Number of runs that are profiled.
RUNS = 3
#: Prefix of the names of the backward nodes of autograd.
NODE = "autograd::engine::evaluate_function: "
#: Names of operators and ranges by part; the first pattern that fits the beginning of a name decides.
OPERATORS = {
    GRADIENTS: r"aten::\w*convolution\w*_backward",
    FORWARD: r"aten::\w*convolution",
    NORMALIZATION: r"(aten|fused)::\w*batch_norm",
    ATTENTION: r"cc_attention::|aten::(einsum|bmm|baddbmm|matmul|_?softmax)",
    LOSS: rf"{LOSS}|fused::(segmentation_loss|coarse_probability|upsampled_classes)|"
    r"aten::(upsample_|cross_entropy|nll_loss|_?log_softmax|lerp|index_select|argmax|max$)",
    OPTIMIZER: r"Optimizer\.|aten::(_foreach_|_fused_|_amp_|linalg_vector_norm)",
    ELEMENTWISE: r"aten::_?(relu|threshold|leaky_relu|clamp|add|addcmul|sub|mul|div|neg|abs|where|eq|ne|ge|"
    r"to|to_copy|copy|clone|contiguous|fill|masked_fill|zero|zeros|ones)(_min|_like)?(_backward)?_?$",
}
#: Names of backward nodes by part, for the time of a node outside of the operators it calls.
NODES = {
    GRADIENTS: r"ConvolutionBackward",
    NORMALIZATION: r"BatchNorm",
    LOSS: r"Upsample|LogSoftmax|NllLoss",
    ATTENTION: r"Attention|Bmm|Softmax",
    ELEMENTWISE: r"(Relu|Threshold|Add|Sub|Mul|Div|Neg|Where|Addcmul|ToCopy|Clone|Copy)\w*Backward",
}
#: Names of the kernels of a convolution's backward.
KERNELS = {DATA: r"dgrad|(bwd|backward)_?data", WEIGHTS: r"wgrad|(bwd|backward)_?(filter|weight)"}


class Event(Protocol):
    """The attributes of torch.autograd.profiler_util.FunctionEvent that are read here."""

    name: str
    thread: int
    cpu_parent: Any  # the event around this one, or None
    sequence_nr: int
    self_cpu_time_total: float  # microseconds
    kernels: Sequence[Any]  # with the attributes name and duration, in microseconds


@functools.cache
def _find(name: str, table: str) -> str | None:
    """Return the part of an operator, of a backward node or of a kernel by its name, or None."""
    if table == "operator":
        return next((part for part, pattern in OPERATORS.items() if re.match(pattern, name)), None)
    patterns = NODES if table == "node" else KERNELS
    return next((part for part, pattern in patterns.items() if re.search(pattern, name, re.IGNORECASE)), None)


def part_of(event: Event, loss_numbers: Collection[int] = ()) -> str:
    """Return the part of an event.

    Args:
        event: an operator, a range or a backward node.
        loss_numbers: sequence numbers of the operators that compute the loss.
    """
    around = [event]
    while around[-1].cpu_parent is not None:
        around.append(around[-1].cpu_parent)
    for one in reversed(around):
        if one.name.startswith(NODE):
            if one.sequence_nr in loss_numbers:
                return LOSS
        elif part := _find(one.name, "operator"):
            return part
    for one in around:
        if one.name.startswith(NODE) and (part := _find(one.name, "node")):
            return part
    return IDLE if event.name == RUN else OTHER


def microseconds(events: Iterable[Event], device: str) -> dict[str, float]:
    """Sum the time of events by part.

    Args:
        events: the events of a profile.
        device: "cpu" for the time of the operators themselves, "cuda" for that of their kernels.

    Returns:
        Microseconds of each part of PARTS. On CUDA, IDLE is 0.
    """
    events = list(events)
    # A sequence number of the loss is one of its forward operators, which are not below a backward node.
    numbers = {event.sequence_nr for event in events if event.sequence_nr >= 0 and part_of(event) == LOSS}
    threads = {event.thread for event in events if event.name == RUN}
    sums = dict.fromkeys(PARTS, 0.0)
    for event in events:
        if device == "cpu":
            if event.thread in threads:
                sums[part_of(event, numbers)] += event.self_cpu_time_total
            continue
        for kernel in event.kernels:
            if kernel.name == event.name:  # the copy of a range on the time line of the GPU
                continue
            part = part_of(event, numbers)
            if part == GRADIENTS:
                part = _find(kernel.name, "kernel") or GRADIENTS
            sums[OTHER if part == IDLE else part] += kernel.duration
    return sums


class GradientTimer(TorchDispatchMode):
    """Compute the two gradients of each convolution one after the other, and add up the seconds of each.

    For the CPU, where one operator computes both.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds = {DATA: 0.0, WEIGHTS: 0.0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Call the operator `func`."""
        if func is not torch.ops.aten.convolution_backward.default:
            return func(*args, **(kwargs or {}))
        *others, (data, weight, bias) = args
        marks = [time.perf_counter()]
        grad_data, _, _ = func(*others, [data, False, False])
        marks.append(time.perf_counter())
        _, grad_weight, grad_bias = func(*others, [False, weight, bias])
        marks.append(time.perf_counter())
        self.seconds[DATA] += marks[1] - marks[0]
        self.seconds[WEIGHTS] += marks[2] - marks[1]
        return grad_data, grad_weight, grad_bias


def profile(run: timing.Run, device: torch.device) -> dict[str, Any]:
    """Profile a run that was called before.

    On a CPU, one operator computes both gradients of a convolution. Its time is divided in the ratio of a
    separate run that computes them one after the other.

    Returns:
        seconds: median of runs without the profiler; profiled: mean of runs with it; parts: seconds of each
        part that occurs. On a CPU, their sum is about `profiled`. On a GPU, it is `seconds`.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # only fatal errors: a machine without a GPU is none
    seconds = statistics.median(timing.samples(run, device.type, RUNS))
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize(device)
    for count in (1, RUNS):  # the first profile of a process takes longer
        with torch.profiler.profile(activities=activities) as found:
            begin = time.perf_counter()
            for _ in range(count):
                with record_function(RUN):
                    run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            profiled = (time.perf_counter() - begin) / count
    sums = microseconds(found.events() or [], device.type)  # type: ignore[arg-type]
    parts = {part: value / 1e6 / RUNS for part, value in sums.items()}
    if device.type == "cuda":
        # The profiler slows down the host, so that idle time is that of the runs without it.
        parts[IDLE] = max(0.0, seconds - sum(parts.values()))
    elif parts[GRADIENTS]:
        with GradientTimer() as timer:
            run()
        both = sum(timer.seconds.values())
        for part, value in timer.seconds.items():
            parts[part] = parts[GRADIENTS] * value / both
        parts[GRADIENTS] = 0.0
    return {
        "seconds": seconds,
        "profiled": profiled,
        "parts": {part: value for part, value in parts.items() if value},
    }

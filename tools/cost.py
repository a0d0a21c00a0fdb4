"""Cost of a network by part: counted with tensors without data, or measured on a device."""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

import fused
from engine.acceleration import autocast
from engine.training.optimizer import make_optimizer
from loss import CriterionDSN, CriterionOhemDSN
from networks import Network, make_network
from networks.models import recurrence_of
from networks.recomputation import recomputation
from utils.progress import Progress
from utils.timing import mark, seconds

STEM, BACKBONE, LOSS, OPTIMIZER = "stem", "backbone", "loss", "optimizer"
FORWARD, BACKWARD = "forward", "backward"
MIB, GIB = 2**20, 2**30


def parts_of(model: Network) -> list[str]:
    """Return the parts of a network between the stem and the loss, in the order in which they run.

    A network of timm is one part. An attention that is applied zero times is none: it returns its input.
    """
    layers = [name for name, _ in model.named_children() if name == BACKBONE or name.startswith("layer")]
    head = [
        f"head.{name}" for name, part in model.head.named_children() if getattr(part, "recurrence", None) != 0
    ]
    return [*layers, *head, "dsn"]


# FLOPs


def convolution_with_bias_flops(x: Any, weight: Any, bias: Any, *rest: Any, out_shape: Any, **_: Any) -> int:
    """Count the FLOPs of a convolution as the paper does: a bias counts as one more input channel."""
    transposed = rest[3]
    flops = conv_flop_count(x, weight, out_shape, transposed)
    return flops + (2 * out_shape[0] * out_shape[1] * out_shape[2] * out_shape[3] if bias is not None else 0)


def paper_criss_cross_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Count the FLOPs of the attention as the paper does: with H + W + 1 positions, two too many.

    The paper has no count in 3-D; the positions there are the true T + H + W - 2.
    """
    n, c, *size = query
    positions = sum(size) + (1 if len(size) == 2 else -2)
    return 2 * n * math.prod(size) * positions * (c + value[1])


def paper_formulas() -> dict[Any, Any]:
    """Return FLOP formulas for the operators that the paper counts differently."""
    return {
        torch.ops.aten.convolution: convolution_with_bias_flops,
        torch.ops.cc_attention.criss_cross_attention: paper_criss_cross_flops,
    }


# Meters


class Passage:
    """Read a meter at each boundary between parts of the network, forward and backward.

    Operations between two parts belong to the later one, for example the concatenation to head.bottleneck.

    Args:
        model: the network.
        read: function that returns the reading of the meter.
    """

    def __init__(self, model: Network, read: Callable[[], Any]):
        self.read = read
        self.spans: list[tuple[str, str, Any, Any]] = []  # phase, part, readings before and after
        self._last: Any = None
        self._part = LOSS
        first, *_ = parts = parts_of(model)
        self._hooks = []
        if first != BACKBONE:
            stem_end = model.get_submodule(first)
            self._hooks.append(
                stem_end.register_forward_pre_hook(lambda _, inputs: self._left(STEM, inputs[0]))
            )
        for name in parts:
            self._hooks.append(
                model.get_submodule(name).register_forward_hook(
                    lambda _, __, output, name=name: self._left(name, output)
                )
            )

    def start(self) -> None:
        """Begin a run."""
        self.spans.clear()
        self._last = self.read()

    def _left(self, part: str, output: Tensor | tuple[Tensor, ...]) -> None:
        self._close(FORWARD, part)
        output = output[-1] if isinstance(output, tuple) else output  # of a backbone: for the main head
        if output.requires_grad:
            output.register_hook(lambda _: self._entered_backward(part))

    def _entered_backward(self, part: str) -> None:
        self._close(BACKWARD, self._part)
        self._part = part

    def end_of_forward(self) -> None:
        """End the forward pass, including the loss."""
        self._close(FORWARD, LOSS)
        self._part = LOSS

    def end_of_backward(self) -> None:
        """End the backward pass."""
        self._close(BACKWARD, self._part)

    def end_of_step(self) -> None:
        """End the step of the optimizer."""
        self._close(FORWARD, OPTIMIZER)

    def _close(self, phase: str, part: str) -> None:
        now = self.read()
        self.spans.append((phase, part, self._last, now))
        self._last = now

    def remove(self) -> None:
        """Remove the hooks from the network."""
        for hook in self._hooks:
            hook.remove()


class Alive(TorchDispatchMode):
    """Count the bytes of live tensors (`now`), and their maximum since `peak` was last set.

    The mode sees every operation below autograd, and thus also tensors that autograd keeps and frees.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}
        for tensor in (*model.parameters(), *model.buffers()):
            self._add(tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, key).atexit = False

    def _remove(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


class Kept:
    """Count the bytes that autograd keeps for the backward pass, without weights and statistics."""

    def __init__(self, model: nn.Module):
        self.bytes = 0
        self._seen = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}

    def pack(self, tensor: Tensor) -> Tensor:
        """Count a saved tensor, each storage once. Return the tensor."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self.bytes += storage.nbytes()
        return tensor


# Runs on tensors without data


class Cost(NamedTuple):
    """Cost of a part of the network."""

    flops_forward: int
    flops_backward: int
    memory: int  # bytes kept for the backward pass; in prediction, peak of the tensors without the weights


class Simulation(NamedTuple):
    """Result of `simulate`; memory in bytes."""

    parts: dict[str, Cost]
    peak: int  # maximum size of the tensors that are alive at the same time
    weights: int
    gradients: int
    optimizer: int  # momentum


class Setting(NamedTuple):
    """Network, precision and input of a run."""

    backbone: str = "resnet101"
    num_classes: int = 19
    recurrence: int | None = None  # None: the default of the model, if it takes one
    amp: str | None = None
    channels_last: bool = False
    ohem: bool = False
    train: bool = False
    batch: int = 1
    size: tuple[int, int] = (769, 769)
    variant: str = "ccnet"
    fused: bool = False
    recompute: bool = False
    model: str = "ccnet"
    clip: int = 1

    def words(self) -> str:
        """Describe the setting in one line."""
        kind = "a training step" if self.train else "prediction"
        extras = f"{', OHEM' * self.ohem}{', channels_last' * self.channels_last}"
        extras += f"{', fused operators' * self.fused}{', recomputation' * self.recompute}"
        extras += f", clips of {self.clip} frames" * (self.clip > 1)
        number = recurrence_of(self.model, self.recurrence)
        network = f"{self.model} {self.backbone}" + ("" if number is None else f", R={number}")
        return (
            f"{kind} of {network}, {self.num_classes} classes, batch "
            f"{self.batch} of {self.size[0]}x{self.size[1]}, {self.amp or 'float32'}{extras}"
        )


def criterion_of(setting: Setting) -> CriterionDSN:
    """Return the loss of a setting."""
    return CriterionOhemDSN() if setting.ohem else CriterionDSN()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Return an optimizer as in train.py."""
    return make_optimizer("sgd", model, 1e-2, 0.9, 1e-4, in_one_kernel=False)


def autocast_of(setting: Setting, device: str) -> torch.autocast:
    """Return the autocast context of a setting."""
    return autocast(torch.device(device), setting.amp)


def fused_of(setting: Setting) -> contextlib.AbstractContextManager[None]:
    """Return a context in which the fused operators are used, or not, as in the setting."""
    return fused.using("on" if setting.fused else "off")


def set_layout(model: nn.Module, channels_last: bool) -> None:
    """Set the memory format, like Module.to(memory_format), which does not support tensors without data."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight = nn.Parameter(module.weight.detach().contiguous(memory_format=layout))


@functools.lru_cache(maxsize=4)
def network_without_data(
    model: str, backbone: str, num_classes: int, recurrence: int | None, channels_last: bool, variant: str
) -> tuple[FakeTensorMode, Network]:
    """Return a network of tensors without data, and the mode to which they belong."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.device("meta"):  # constructors may need values, which tensors of the mode never have
        network = make_network(model, num_classes, recurrence, backbone=backbone, variant=variant)
    with mode:
        network.to_empty(device="cpu")
        set_layout(network, channels_last)
    return mode, network


def simulate(
    setting: Setting,
    passes: int = 1,
    formulas: Mapping[Any, Any] | None = None,
) -> Simulation:
    """Run a prediction, or a training step as in train.py, on tensors without data.

    Args:
        setting: network, precision and input.
        passes: number of forward and backward passes of a step, as with --grad-accum of train.py.
        formulas: FLOP formulas of operators, which replace the default ones.
    """
    mode, model = network_without_data(
        setting.model,
        setting.backbone,
        setting.num_classes,
        setting.recurrence,
        setting.channels_last,
        setting.variant,
    )
    model.train(setting.train)
    model.recompute = False  # this function does it, in order to count
    counter = FlopCounterMode(display=False, custom_mapping=dict(formulas or {}))
    with fused_of(setting), mode, Alive(model) as alive, contextlib.ExitStack() as stack:
        weights = alive.now
        optimizer = optimizer_of(model)
        if setting.train:
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad()
        momentum = alive.now - weights
        layout = torch.channels_last if setting.channels_last else torch.contiguous_format
        images = torch.empty(setting.batch, 3 * setting.clip, *setting.size).to(memory_format=layout)
        labels = torch.zeros(setting.batch, *setting.size, dtype=torch.long)
        kept = Kept(model)

        def saving(pack: Callable[[Tensor], Tensor]) -> contextlib.AbstractContextManager[None]:
            if setting.recompute:
                return recomputation(pack)
            return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)

        def read() -> tuple[int, int, int]:
            peak, alive.peak = alive.peak, alive.now
            peaks.append(peak)
            return counter.get_total_flops(), kept.bytes, peak

        peaks: list[int] = []
        passage = Passage(model, read)
        stack.callback(passage.remove)
        stack.enter_context(counter)
        for number in range(passes):
            passage.start()
            with torch.set_grad_enabled(setting.train):
                with saving(kept.pack if number == 0 else lambda tensor: tensor):
                    with autocast_of(setting, "cpu"):
                        outputs = model(images)
                    if setting.train:
                        loss = criterion_of(setting)(outputs, labels)
                passage.end_of_forward()
                if setting.train:
                    loss.backward()
                    passage.end_of_backward()
                    del loss
                del outputs
            if number == 0:
                spans = list(passage.spans)
        gradients = sum(p.grad.untyped_storage().nbytes() for p in model.parameters() if p.grad is not None)
        optimizer.zero_grad()
    flops = {(phase, part): after[0] - before[0] for phase, part, before, after in spans}
    parts = {}
    for phase, part, before, after in spans:
        if phase == FORWARD and (setting.train or part != LOSS):
            memory = after[1] - before[1] if setting.train else after[2] - weights
            parts[part] = Cost(flops[FORWARD, part], flops.get((BACKWARD, part), 0), memory)
    return Simulation(parts, max(peaks), weights, gradients, momentum)


# Runs on a device


class Times(NamedTuple):
    """Result of `measure`."""

    seconds: dict[tuple[str, str], float]  # by phase and part
    peak: int | None  # peak memory of the device in bytes; None on the CPU


def measure(setting: Setting, model: Network, device: torch.device, rounds: int) -> Times:
    """Return the median times over `rounds` runs, after one run to warm up."""
    layout = torch.channels_last if setting.channels_last else torch.contiguous_format
    torch.backends.cudnn.benchmark = True
    model.to(device).to(memory_format=layout).train(setting.train)
    model.recompute = setting.recompute
    criterion = criterion_of(setting)
    optimizer = optimizer_of(model)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(setting.batch, 3 * setting.clip, *setting.size, generator=generator)
    images = images.to(device, memory_format=layout)
    labels = torch.randint(setting.num_classes, (setting.batch, *setting.size), generator=generator).to(
        device
    )
    passage = Passage(model, lambda: mark(device.type))
    progress = Progress(rounds + 1, "run")
    runs = []

    def run() -> None:
        optimizer.zero_grad()
        passage.start()
        with torch.set_grad_enabled(setting.train):
            with autocast_of(setting, device.type):
                outputs = model(images)
            if setting.train:
                loss = criterion(outputs, labels)
                passage.end_of_forward()
                loss.backward()
                passage.end_of_backward()
                optimizer.step()
                passage.end_of_step()

    current = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    try:
        with current, fused_of(setting):
            for number in range(rounds + 1):
                run()
                times = {(phase, part): seconds(begin, end) for phase, part, begin, end in passage.spans}
                if number > 0:
                    runs.append(times)
                progress.show(number + 1)
    finally:
        passage.remove()
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Times({key: statistics.median(times[key] for times in runs) for key in runs[0]}, peak)


def parameters_of(model: Network) -> dict[str, int]:
    """Return the number of parameters of each part."""
    parts = parts_of(model)
    counts = {name: sum(p.numel() for p in model.get_submodule(name).parameters()) for name in parts}
    total = sum(p.numel() for p in model.parameters())
    stem = total - sum(counts.values())
    return {STEM: stem, **counts} if stem else counts

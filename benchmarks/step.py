"""Measure a training step of train.py and a prediction: times, their parts and peak memory.

    python -m benchmarks.step [--device cuda] [--backbone resnet50] [--batch-size 2] [--input-size 257,257]
        [--settings float32 bf16+channels_last ...] [--measure step prediction parts memory] [--compile]
        [--fused on off] [--variant mmseg --peer-site DIR] [--out FILE.json] [--plot FILE.png]

- step: engine.training.step.Stepper: forward pass, loss of both heads, backward pass, check of the
  gradients, update.
- prediction: from a picture of --picture pixels to the class of each pixel. "as trained" is the network with
  separate batch norm and auxiliary head. --tile adds the prediction by tiles.
- parts: time of the parts of a step and of a prediction (benchmarks/parts.py), in the settings of --profile.
- memory: peak of two steps, each contender in a process of its own. On a CPU, it is the resident memory
  above that of the process with the network and a batch, so it includes gradients and momentum; that of the
  first step alone, before there is momentum, is given too. On a GPU, it is all memory that PyTorch has
  allocated for tensors during the second step.

There are two kinds of peers. mmsegmentation's CCNet is the same network as ours in the variant mmseg.
benchmarks/get_peers.sh installs it into a folder, which --peer-site names. Its network and ours start with
the same weights. It is measured only if both give the same logits and the same loss; otherwise, the exit
status is 1. torchvision's FCN and DeepLabV3, with the same backbone, are measured for scale, in the
prediction only.

Contenders take turns. The ratio is the time of the first contender of a group divided by the time of this
one.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

import cc_attention.module
import fused
from benchmarks import bars, parts, peers
from benchmarks.attention_peers import bmm_attention
from dataset.labels import NUM_CLASSES
from engine.acceleration import Speed, accelerate, autocast
from engine.data.transfer import Batch
from engine.inference import predict_classes
from engine.runtime.distributed import World
from engine.training.optimizer import make_optimizer
from engine.training.step import Criterion, StepOptions, Stepper, Total, updates_at_once, waits_late
from fused import MODES
from loss import CriterionDSN
from networks import Seg_Model, fold_batch_norm
from networks.variants import DEPTHS, VARIANTS
from tools.common import end
from utils import args as flags
from utils import timing
from utils.environment import ROOT, commit, machine
from utils.errors import UsageError
from utils.files import check_output_file, write_file


class Setting(NamedTuple):
    """The flags of train.py and evaluate.py that choose the precision and the implementation."""

    amp: str | None
    channels_last: bool
    compiled: bool = False
    fused: str = "auto"
    recompute: bool = False
    cuda_graph: bool = False

    @property
    def layout(self) -> torch.memory_format:
        """Memory format of weights and pictures."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


SETTINGS = {
    "float32": Setting(None, False),
    "float32, channels_last": Setting(None, True),
    "bf16": Setting("bf16", False),
    "bf16, channels_last": Setting("bf16", True),
    "fp16": Setting("fp16", False),
    "fp16, channels_last": Setting("fp16", True),
}
#: Values of --measure, in the order of their measurement.
GROUPS = ("step", "prediction", "parts", "memory")
#: First word of the names of mmsegmentation's contenders.
MMSEG = "mmsegmentation"

#: Prepares a contender: builds its network and returns the run to measure.
Make = Callable[[], timing.Run]
Network = Callable[[Tensor], Tensor | Sequence[Tensor]]


class RangedCriterion:
    """A loss whose operators a profiler finds in the range `parts.LOSS`."""

    def __init__(self, criterion: Criterion):
        self.criterion = criterion

    @property
    def head_weights(self) -> Sequence[float]:
        """Weight of the loss of each head."""
        return self.criterion.head_weights

    def totals(self, outputs: Sequence[Tensor], target: Tensor) -> Sequence[Total]:
        """Return the totals of the criterion."""
        with record_function(parts.LOSS):
            return self.criterion.totals(outputs, target)


# The contenders


def settings_of(args: argparse.Namespace, training: bool) -> dict[str, Setting]:
    """Return the settings to measure by name: those of --settings, and each with the further flags."""
    found = {}
    for name in args.settings:
        for mode in args.fused:
            suffix = {"auto": "", "on": ", fused", "off": ", unfused"}[mode]
            plain = SETTINGS[name]._replace(fused=mode)
            found[f"{name}{suffix}"] = plain
            if args.recompute and training and mode != "off":
                found[f"{name}{suffix}, recomputed"] = plain._replace(recompute=True)
            if args.cuda_graph and plain.amp != "fp16":
                found[f"{name}{suffix}, graph"] = plain._replace(cuda_graph=True)
        if args.compile:
            found[f"{name}, compiled"] = SETTINGS[name]._replace(compiled=True)
    return found


def in_mode(mode: str, run: timing.Run) -> timing.Run:
    """Return `run` with a mode of the fused operators."""

    def changed() -> object:
        with fused.using(mode):
            return run()

    return changed


@functools.cache
def copied_network(site: str, backbone: str) -> Seg_Model:
    """Return our network with the weights of mmsegmentation's, on the CPU."""
    return peers.MMSegmentation(site, backbone, torch.device("cpu")).copied()


def make_network(args: argparse.Namespace, device: torch.device) -> Seg_Model:
    """Return a network with the weights of the peer, or with random weights."""
    if args.peer_site:
        return copy.deepcopy(copied_network(args.peer_site, args.backbone)).to(device)
    torch.manual_seed(0)
    model = Seg_Model(NUM_CLASSES, backbone=args.backbone, variant=args.variant)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.fill_(0.2)  # scales of residuals start at 0, and products with zeros are faster
        model.head.cca.gamma.fill_(peers.GAMMA)
    return model.to(device)


def make_batch(args: argparse.Namespace, device: torch.device, setting: Setting) -> Batch:
    """Return a batch of random pictures and labels."""
    height, width = args.input_size
    images = torch.randn(args.batch_size, 3, height, width, device=device) * 50
    labels = torch.randint(0, NUM_CLASSES, (args.batch_size, height, width), device=device)
    return Batch(images.contiguous(memory_format=setting.layout), labels, [])


def optimizer_of(model: torch.nn.Module, in_one_kernel: bool) -> torch.optim.Optimizer:
    """Return the optimizer of train.py."""
    return make_optimizer("sgd", model, 1e-4, 0.9, 1e-4, in_one_kernel)


def our_step(args: argparse.Namespace, device: torch.device, setting: Setting) -> timing.Run:
    """Return the training step of train.py."""
    model = make_network(args, device).train()
    model.to(memory_format=setting.layout)  # type: ignore[call-overload]
    model.recompute = setting.recompute
    criterion = RangedCriterion(CriterionDSN().to(device))
    network: Any = torch.compile(model) if setting.compiled else model
    with fused.using(setting.fused):
        optimizer = optimizer_of(model, updates_at_once(device, setting.channels_last))
        options = StepOptions(setting.amp, late=waits_late(device, setting.amp), graph=setting.cuda_graph)
    stepper = Stepper(network, criterion, optimizer, World(0, 1, device), options)
    batch = make_batch(args, device, setting)
    numbers = iter(range(1, 10**9))
    return in_mode(setting.fused, lambda: stepper.step(next(numbers), batch))


def peer_step(args: argparse.Namespace, device: torch.device, setting: Setting) -> timing.Run:
    """Return a training step of mmsegmentation: its network and loss, and the same update as ours."""
    peer = peers.MMSegmentation(args.peer_site, args.backbone, device)
    peer.network.to(memory_format=setting.layout)
    optimizer = optimizer_of(peer.network, in_one_kernel=False)
    scaler = torch.amp.GradScaler(device.type, enabled=setting.amp == "fp16")
    batch = make_batch(args, device, setting)
    samples = peer.labelled(batch.labels)

    def step() -> None:
        optimizer.zero_grad()
        with autocast(device, setting.amp):
            loss = peer.loss(batch.images, samples)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def steps(args: argparse.Namespace, device: torch.device) -> dict[str, Make]:
    """Return the contenders of the training step."""
    makes: dict[str, Make] = {}
    for name, setting in settings_of(args, training=True).items():
        makes[name] = partial(our_step, args, device, setting)
    if args.peer_site:
        for name in args.settings:
            makes[f"{MMSEG}, {name}"] = partial(peer_step, args, device, SETTINGS[name])
    return makes


def our_network(args: argparse.Namespace, device: torch.device, setting: Setting) -> Network:
    """Return the network for predictions, with folded batch norm and without the auxiliary head."""
    folded = fold_batch_norm(make_network(args, device).eval())
    speed = Speed(setting.amp, setting.channels_last, setting.compiled, setting.cuda_graph)
    return accelerate(folded, device, speed)


def peer_network(args: argparse.Namespace, device: torch.device, setting: Setting) -> Network:
    """Return mmsegmentation's network for predictions, whose logits have the size of the picture."""
    peer = peers.MMSegmentation(args.peer_site, args.backbone, device)
    peer.network.eval().to(memory_format=setting.layout)

    def run(images: Tensor) -> Tensor:
        with autocast(device, setting.amp):
            return peer.logits(images.contiguous(memory_format=setting.layout))

    return run


def networks(args: argparse.Namespace, device: torch.device) -> dict[str, Callable[[], Network]]:
    """Return a function for each network of the prediction, which builds it."""
    builders: dict[str, Callable[[], Network]] = {
        "as trained, float32": lambda: make_network(args, device).eval(),
    }
    for name, setting in settings_of(args, training=False).items():
        builders[name] = partial(our_network, args, device, setting)
    if args.peer_site:
        for name in args.settings:
            builders[f"{MMSEG}, {name}"] = partial(peer_network, args, device, SETTINGS[name])
    try:
        others = peers.torchvision(args.backbone, device)
    except ImportError:
        others = {}
    return builders | {f"torchvision's {name}, float32": build for name, build in others.items()}


def predictions(
    args: argparse.Namespace, device: torch.device, tile: tuple[int, int] | None = None
) -> dict[str, Make]:
    """Return the contenders of the prediction; with `tile`, only our networks."""
    torch.manual_seed(1)
    image = torch.randn(1, 3, *args.picture, device=device) * 50

    def make(build: Callable[[], Network], mode: str) -> timing.Run:
        network = build()

        @torch.inference_mode()
        def run() -> Tensor:
            return predict_classes(network, image, [1.0], False, tile, NUM_CLASSES, args.tile_batch)

        return in_mode(mode, run)

    builders, settings = networks(args, device), settings_of(args, training=False)
    names = settings if tile else builders
    # Peers, and the network as it was trained, use PyTorch's own operators.
    modes = {name: settings[name].fused if name in settings else "off" for name in names}
    return {name: partial(make, builders[name], modes[name]) for name in names}


# Measuring


def measure_times(makes: Mapping[str, Make], device: torch.device, rounds: int) -> dict[str, Any]:
    """Measure contenders in turns, print a table, and return the results."""
    runs, failures = {}, {}
    for name, make in makes.items():
        try:
            runs[name] = make()
        except Exception as error:  # for example out of memory; the others continue
            failures[name] = timing.reason(error)
    times, others = timing.interleaved(runs, device.type, rounds)
    failures |= others
    first = next(iter(makes))
    result: dict[str, Any] = {}
    for name in makes:
        if name in failures:
            result[name] = {"error": failures[name]}
            print(f"  {name:42}  {failures[name]}", flush=True)
            continue
        median = statistics.median(times[name])
        result[name] = {"seconds": timing.quartiles(times[name])}
        shown = ""
        if first in times:
            result[name]["ratio"] = statistics.median(times[first]) / median
            shown = f"{result[name]['ratio']:5.2f} x"
        print(f"  {name:42}  {median:8.4f} s  {shown}", flush=True)
    return result


def measure_parts(makes: Mapping[str, Make], device: torch.device) -> dict[str, Any]:
    """Profile contenders, print a table, and return the results."""
    result: dict[str, Any] = {}
    for name, make in makes.items():
        try:
            run = make()
            run()
            result[name] = parts.profile(run, device)
        except Exception as error:  # the others continue
            result[name] = {"error": timing.reason(error)}
            print(f"  {name}: {result[name]['error']}", flush=True)
    profiles = {name: one for name, one in result.items() if "parts" in one}
    if not profiles:
        return result
    widths = {name: max(20, len(name) + 2) for name in profiles}

    def line(heading: str, cells: Mapping[str, str]) -> None:
        print(f"  {heading:36}" + "".join(f"{cells[name]:>{widths[name]}}" for name in profiles), flush=True)

    sums = {name: sum(one["parts"].values()) for name, one in profiles.items()}
    line("", {name: name for name in profiles})
    for part in parts.PARTS:
        seconds = {name: one["parts"].get(part, 0.0) for name, one in profiles.items()}
        if any(seconds.values()):
            line(part, {n: f"{1e3 * s:.1f} ms {100 * s / sums[n]:5.1f} %" for n, s in seconds.items()})
    line("sum", {name: f"{1e3 * seconds:.1f} ms {100:5.1f} %" for name, seconds in sums.items()})
    line("without profiler", {name: f"{1e3 * one['seconds']:.1f} ms{'':8}" for name, one in profiles.items()})
    return result


class Peaks(NamedTuple):
    """Peak memory in bytes (see the docstring of the module)."""

    later: int
    first: int | None  # None on a GPU, where cuDNN tries algorithms in the first run


def peaks(run: timing.Run, device: torch.device) -> Peaks:
    """Return the peak memory of the first and of later runs, for a new process."""
    if device.type == "cuda":
        run()  # cuDNN tries its algorithms, some with a large workspace
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return Peaks(torch.cuda.max_memory_allocated(device), None)
    timing.reset_resident_peak()
    before = timing.resident()
    run()
    first = timing.resident_peak() - before
    run()
    return Peaks(timing.resident_peak() - before, first)


def measure_memory(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Measure the peak memory of training steps, each in a process of its own, and return the results."""
    result: dict[str, Any] = {}
    if args.device == "cuda":
        torch.cuda.empty_cache()  # leave the memory to the processes
    for name in names:
        if args.device == "cpu" and name.endswith("compiled"):
            result[name] = {"error": "can't be measured: the memory of the compiler is in the same process"}
            continue
        command = [sys.executable, "-m", "benchmarks.step", "--peak-of", name, "--device", args.device]
        command += ["--backbone", args.backbone, "--variant", args.variant, "--attention", args.attention]
        command += ["--batch-size", str(args.batch_size), "--input-size", "{},{}".format(*args.input_size)]
        if name.startswith(MMSEG):
            command += ["--peer-site", os.path.abspath(args.peer_site)]
        command += ["--fused", *args.fused]
        for flag in ("compile", "recompute", "cuda_graph"):
            command += [f"--{flag.replace('_', '-')}"] * getattr(args, flag)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        lines = (done.stderr if done.returncode else done.stdout).split("\n")
        last = next((line for line in reversed(lines) if line.strip()), f"exit status {done.returncode}")
        if done.returncode:
            result[name], shown = {"error": last[:200]}, last[:200]
        else:
            found = Peaks(*json.loads(last))
            result[name], shown = {"bytes": found.later}, f"{found.later / 1e6:8.0f} MB"
            if found.first is not None:
                result[name]["first_bytes"] = found.first
                shown += f", first step {found.first / 1e6:.0f} MB"
        print(f"  {name:42}  {shown}", flush=True)
    return result


def check_peer(args: argparse.Namespace) -> dict[str, Any]:
    """Return version and differences of mmsegmentation, or why it is skipped.

    The comparison is on the CPU: the convolutions of a GPU round to TF32. If the peer is skipped,
    `args.peer_site` becomes None.
    """
    if not args.peer_site:
        return {"skipped": "no --peer-site"}
    try:
        peer = peers.MMSegmentation(args.peer_site, args.backbone, torch.device("cpu"))
        torch.manual_seed(1)
        images, labels = torch.randn(2, 3, 65, 97) * 50, torch.randint(0, NUM_CLASSES, (2, 65, 97))
        found = peers.differences(peer, images, labels)
    except ImportError as error:
        args.peer_site = None
        return {"skipped": str(error)}
    result = {"version": peer.version, "differences": found}
    if not max(found.values()) <= peers.TOLERANCE:
        args.peer_site = None
        result["skipped"] = f"wrong: differs from ours by {found}"
    return result


def check_torchvision() -> dict[str, Any]:
    """Return the version of torchvision, or why it is skipped."""
    try:
        peers.torchvision("resnet50", torch.device("cpu"))
    except ImportError as error:
        return {"skipped": timing.reason(error)}
    return {"version": metadata.version("torchvision")}


# The command


def setting_argument(text: str) -> str:
    """Parse a setting such as bf16+channels_last."""
    name = text.replace("+", ", ")
    if name not in SETTINGS:
        choices = ", ".join(name.replace(", ", "+") for name in SETTINGS)
        raise argparse.ArgumentTypeError(f"{flags.quoted(text)} is not a setting; give one of {choices}")
    return name


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = flags.Parser("python -m benchmarks.step", __doc__)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="device")
    add("--backbone", choices=sorted(DEPTHS), default="resnet50", help="backbone")
    add("--variant", choices=VARIANTS, default="ccnet", help="variant of the network")
    add("--batch-size", type=flags.batch, default=2, help="pictures of a step")
    add("--input-size", type=flags.size, default=(257, 257), metavar="H,W", help="crop of a step")
    add("--picture", type=flags.size, default=(513, 513), metavar="H,W", help="picture to predict")
    add("--tile", type=flags.size, metavar="H,W", help="size of tiles (default: no prediction by tiles)")
    add("--tile-batch", type=flags.batch, default=1, help="number of tiles in a batch")
    add(
        "--settings",
        nargs="+",
        type=setting_argument,
        metavar="SETTING",
        help="precisions and memory formats, such as float32 bf16+channels_last (default: all of the device)",
    )
    add("--compile", action="store_true", help="also measure each setting compiled with torch.compile")
    add("--fused", nargs="+", choices=MODES, default=["auto"], help="modes of the fused operators")
    add("--recompute", action="store_true", help="also measure each step with train.py --recompute")
    add("--cuda-graph", action="store_true", help="also measure each setting with --cuda-graph")
    add(
        "--attention",
        choices=("ours", "bmm"),
        default="ours",
        help="our operator, or matrix products in PyTorch (benchmarks/attention_peers.py)",
    )
    add("--measure", nargs="+", choices=GROUPS, default=GROUPS, help="what to measure (default: all)")
    add(
        "--profile",
        nargs="+",
        type=setting_argument,
        metavar="SETTING",
        help="settings to measure by part (default: the first and the last of --settings)",
    )
    add("--peer-site", metavar="DIR", help="folder of benchmarks/get_peers.sh (default: no mmsegmentation)")
    add("--rounds", type=flags.positive_int, default=5, help="turns of each contender")
    add("--out", metavar="FILE.json", help="JSON file to write the results to, updated after each group")
    add("--plot", metavar="FILE.png", help="file to write a bar chart of the results to")
    add(
        "--peak-of",
        metavar="NAME",
        help="only print the peaks of this contender's memory in bytes; --measure memory uses this",
    )
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the arguments of the command line; exit with status 2 if they do not fit together."""
    parser = get_parser()
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: no GPU found; give cpu")
    if args.device == "cpu" and args.cuda_graph:
        parser.error("argument --cuda-graph: needs a GPU; omit it")
    if "on" in args.fused and args.device not in fused.DEVICE_TYPES:
        parser.error("argument --fused: the fused operators are not built; give off")
    possible = [name for name, one in SETTINGS.items() if args.device == "cuda" or one.amp != "fp16"]
    args.settings = args.settings or possible
    args.profile = args.profile or [args.settings[0], args.settings[-1]]
    for flag, names in (("--settings", args.settings), ("--profile", args.profile)):
        if not set(names) <= set(possible):
            parser.error(f"argument {flag}: fp16 needs a GPU; use bf16")
    if args.peer_site and args.variant != "mmseg":
        parser.error("argument --peer-site: mmsegmentation's CCNet is another variant; add --variant mmseg")
    for flag, path in (("--out", args.out), ("--plot", args.plot)):
        if path:
            check_output_file(flag, path)
    return args


def words(args: argparse.Namespace) -> str:
    """Describe what is measured."""
    tiles = f" and by tiles of {args.tile[0]}x{args.tile[1]}, {args.tile_batch} at once" if args.tile else ""
    attention = ", attention by matrix products in PyTorch" if args.attention == "bmm" else ""
    return (
        f"CCNet with {args.backbone}, R=2, variant {args.variant}{attention}; step: {args.batch_size} crops "
        f"of {args.input_size[0]}x{args.input_size[1]}; prediction: one picture of "
        f"{args.picture[0]}x{args.picture[1]}, whole{tiles}"
    )


def plot(report: dict[str, Any], path: str) -> None:
    """Draw a bar chart of the results."""
    panels = []
    for title, found in report.get("parts", {}).items():
        stacks = {
            name: {part: 1e3 * one["parts"].get(part, 0.0) for part in parts.PARTS}
            for name, one in found.items()
            if "parts" in one
        }
        panels.append(bars.Panel(f"{title} by part, ms", stacks))
    for title in ("step", "prediction", "prediction by tiles"):
        times = {
            name: {"time": 1e3 * one["seconds"]["median"]}
            for name, one in report.get(title, {}).items()
            if "seconds" in one
        }
        panels.append(bars.Panel(f"{title}, ms", times))
    peaks = {
        name: {"memory": one["bytes"] / 1e6}
        for name, one in report.get("memory", {}).items()
        if "bytes" in one
    }
    panels.append(bars.Panel("peak memory of a step, MB", peaks))
    about = report["machine"]
    machine_line = f"{about['name']}, PyTorch {about['torch']}; shorter is better"
    bars.draw(path, [*report["setting"].split("; "), machine_line], panels)


def bmm_of_projection(projection: Tensor, query_channels: int, residual: Tensor, gamma: Tensor) -> Tensor:
    """Compute `cc_attention.ops.joint_attention` in plain PyTorch."""
    sizes = [query_channels] * 2 + [projection.shape[1] - 2 * query_channels]
    attention = bmm_attention(*projection.split(sizes, 1))
    return torch.addcmul(residual, gamma.to(attention.dtype), attention)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark. Return the exit status."""
    args = parse(argv)
    device = torch.device(args.device)
    torch.backends.cudnn.benchmark = True  # as in train.py
    if args.attention == "bmm":
        cc_attention.module.joint_attention = bmm_of_projection
    if args.peak_of:
        makes = steps(args, device)
        if args.peak_of not in makes:
            raise UsageError(f"--peak-of {args.peak_of}: is not one of {', '.join(makes)}")
        print(json.dumps(peaks(makes[args.peak_of](), device)))
        return 0
    given = sys.argv[1:] if argv is None else argv
    # The folder of the peers says something about the machine, and nothing about the results.
    site = args.peer_site
    command = [argument.replace(site, "DIR") if site else argument for argument in given]
    report: dict[str, Any] = {
        "machine": machine(device.type),
        "commit": commit(),
        "command": shlex.join(["python", "-m", "benchmarks.step", *command]),
        "setting": words(args),
        "batch_size": args.batch_size,
        "peers": {MMSEG: check_peer(args), "torchvision": check_torchvision()},
    }
    print(report["setting"], flush=True)
    for name, found in report["peers"].items():
        if "skipped" in found:
            print(f"{name} is not measured: {found['skipped']}", flush=True)

    def finished(group: str, result: dict[str, Any]) -> None:
        report[group] = result
        if args.out:
            write_file(args.out, json.dumps(report, indent=2) + "\n")

    if "step" in args.measure:
        print("step:", flush=True)
        finished("step", measure_times(steps(args, device), device, args.rounds))
    if "prediction" in args.measure:
        print("prediction:", flush=True)
        finished("prediction", measure_times(predictions(args, device), device, args.rounds))
        if args.tile:
            print("prediction by tiles:", flush=True)
            tiles = predictions(args, device, args.tile)
            finished("prediction by tiles", measure_times(tiles, device, args.rounds))
    if "parts" in args.measure:
        ends = ("", ", fused", ", unfused")
        chosen = [f"{one}{suffix}" for one in args.profile for suffix in ends]
        chosen += [f"{MMSEG}, {one}" for one in args.profile]
        profiles = {}
        for title, makes in (("step", steps(args, device)), ("prediction", predictions(args, device))):
            print(f"{title} by part:", flush=True)
            profiles[title] = measure_parts({n: make for n, make in makes.items() if n in chosen}, device)
            finished("parts", profiles)
    if "memory" in args.measure:
        print("peak memory of a step:", flush=True)
        finished("memory", measure_memory(args, list(steps(args, device))))
    if args.plot:
        plot(report, args.plot)
    return int("wrong" in report["peers"][MMSEG].get("skipped", ""))


if __name__ == "__main__":
    end(main)

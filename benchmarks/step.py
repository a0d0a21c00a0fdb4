"""Measure train.py's own step and a prediction, in several precisions and memory formats, on a CPU or a GPU.

    python -m benchmarks.step [--device cuda] [--backbone resnet50] [--batch-size 2] [--input-size 257,257]

Steps are those of engine.training.step.Stepper: forward pass, loss of both heads, backward pass, check of the
gradients, update. A prediction is the forward pass of one picture of --picture pixels and the resizing of its
logits; "as trained" is the network with separate batch norm and auxiliary head. torchvision's FCN and
DeepLabV3 with the same backbone are measured for scale. The contenders take turns. The ratio is the time of
the first contender of a group divided by the time of this one.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dataset.labels import NUM_CLASSES
from engine.acceleration import accelerate
from engine.data.transfer import Batch
from engine.inference import predict_whole
from engine.runtime.distributed import World
from engine.training.step import Stepper
from loss import CriterionDSN
from networks import Seg_Model, fold_batch_norm
from networks.variants import DEPTHS
from tools.common import end
from utils import args as flags
from utils import timing
from utils.environment import machine
from utils.files import check_output_file, write_file

#: Precision and channels_last of the contenders, by name.
SETTINGS: dict[str, tuple[str | None, bool]] = {
    "float32": (None, False),
    "float32, channels_last": (None, True),
    "bf16": ("bf16", False),
    "bf16, channels_last": ("bf16", True),
}
#: Networks of torchvision, by the part of the name before the backbone.
PEERS = {"FCN": "fcn", "DeepLabV3": "deeplabv3"}


def make_network(backbone: str, device: torch.device) -> Seg_Model:
    """Return a network with random weights."""
    torch.manual_seed(0)
    model = Seg_Model(NUM_CLASSES, backbone=backbone)
    with torch.no_grad():
        model.head.cca.gamma.fill_(0.5)  # gamma starts at 0, and zeros are faster
    return model.to(device)


def steps(args: argparse.Namespace, device: torch.device) -> dict[str, timing.Run]:
    """Return a function for each training step."""
    height, width = args.input_size
    images = torch.randn(args.batch_size, 3, height, width, device=device) * 50
    labels = torch.randint(0, NUM_CLASSES, (args.batch_size, height, width), device=device)

    def make(amp: str | None, channels_last: bool) -> timing.Run:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        model = make_network(args.backbone, device).train()
        model.to(memory_format=layout)  # type: ignore[call-overload]
        optimizer = torch.optim.SGD(model.parameters(), 1e-4, 0.9, weight_decay=1e-4)
        stepper = Stepper(model, CriterionDSN().to(device), optimizer, World(0, 1, device), amp, 1, 0)
        batch = Batch(images.contiguous(memory_format=layout), labels, [])
        numbers = iter(range(1, 10**9))
        return lambda: stepper.step(next(numbers), batch)

    return {name: make(*setting) for name, setting in SETTINGS.items()}


def predictions(args: argparse.Namespace, device: torch.device) -> dict[str, timing.Run]:
    """Return a function for each way to predict a picture."""
    image = torch.randn(1, 3, *args.picture, device=device) * 50

    def make(network: Callable[[Tensor], Any]) -> timing.Run:
        def run() -> Tensor:
            with torch.inference_mode():
                return predict_whole(network, image)

        return run

    as_trained = make_network(args.backbone, device).eval()
    runs = {"as trained, float32": make(as_trained)}
    for name, (amp, channels_last) in SETTINGS.items():
        folded = fold_batch_norm(as_trained)
        runs[name] = make(accelerate(folded, device, amp, channels_last, compiled=False))
    return runs | {name: make(network) for name, network in peers(args.backbone, device).items()}


def peers(backbone: str, device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return networks of torchvision, in float32; empty without torchvision."""
    try:
        from torchvision.models import segmentation
    except (ImportError, RuntimeError):
        return {}

    def make(part: str) -> Callable[[Tensor], Tensor]:
        build = getattr(segmentation, f"{part}_{backbone}")
        network: nn.Module = build(weights=None, weights_backbone=None, num_classes=NUM_CLASSES)
        network.to(device).eval()
        return lambda images: network(images)["out"]

    return {f"torchvision's {name}, float32": make(part) for name, part in PEERS.items()}


def measured(runs: Mapping[str, timing.Run], device: torch.device, rounds: int) -> dict[str, Any]:
    """Measure contenders in turns, print a table, and return the results."""
    times, failures = timing.interleaved(runs, device.type, rounds)
    first = next(iter(runs))
    base = statistics.median(times[first]) if first in times else float("nan")
    result: dict[str, Any] = {}
    for name in runs:
        if name in failures:
            result[name] = {"error": failures[name]}
            print(f"  {name:32}  {failures[name]}", flush=True)
            continue
        median = statistics.median(times[name])
        result[name] = {"seconds": timing.quartiles(times[name]), "ratio": base / median}
        print(f"  {name:32}  {median:8.4f} s  {base / median:5.2f} x", flush=True)
    return result


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = flags.Parser(prog="python -m benchmarks.step", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="device (default: %(default)s)")
    add("--backbone", choices=sorted(DEPTHS), default="resnet50", help="backbone (default: %(default)s)")
    add("--batch-size", type=flags.batch, default=2, help="pictures of a step (default: %(default)s)")
    add("--input-size", type=flags.size, default=(257, 257), metavar="H,W", help="crop (default: 257,257)")
    add(
        "--picture",
        type=flags.size,
        default=(513, 513),
        metavar="H,W",
        help="picture to predict (default: 513,513)",
    )
    add("--rounds", type=flags.positive_int, default=5, help="turns of each contender (default: %(default)s)")
    add("--out", metavar="FILE", help="JSON file to write the results to")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    args = get_parser().parse_args(argv)
    if args.out:
        check_output_file("--out", args.out)
    device = torch.device(args.device)
    report: dict[str, Any] = {
        "machine": machine(device.type),
        "setting": f"CCNet with {args.backbone}, R=2; step: {args.batch_size} crops of "
        f"{args.input_size[0]}x{args.input_size[1]}; prediction: one picture of "
        f"{args.picture[0]}x{args.picture[1]}, whole",
    }
    print(report["setting"], flush=True)
    for name, make in (("step", steps), ("prediction", predictions)):
        print(f"{name}:", flush=True)
        report[name] = measured(make(args, device), device, args.rounds)
    if args.out:
        write_file(args.out, json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    end(main)

"""Measure the overhead of an evaluation over its forward passes.

    python -m benchmarks.evaluation [--device cuda] [--size 1024x2048] [--tile 769,769] [--out JSON]

Generated street scenes with labels and instances are evaluated as by evaluate.py: decoding in workers, tiles
in batches, summed class scores, the four official scores, and a colored PNG of each prediction. Alternately,
the same forward passes run alone, on tensors of the same sizes that are already on the device. The exit
status is 1 if the evaluation takes more than 10 % longer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dataset import CSDataSet, mini
from dataset.labels import LABELS, NUM_CLASSES
from dataset.layout import instances_of
from engine.data.loader import Loading
from engine.evaluation.evaluate import More, evaluate
from engine.evaluation.metrics import CityscapesEvaluation
from engine.inference import predict_classes
from engine.runtime.distributed import World
from networks import Seg_Model
from networks.variants import DEPTHS
from tools.common import end
from utils import args as flags
from utils import timing
from utils.drawing.palette import make_palette, save_indexed_png
from utils.environment import machine
from utils.files import check_output_file, write_file

#: Number of different pictures.
SCENES = 3
#: Maximum ratio of the time of an evaluation to that of its forward passes.
BAR = 1.10


class Recorded:
    """A network that records the sizes of its inputs."""

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self.sizes: list[torch.Size] = []

    def __call__(self, images: Tensor) -> Sequence[Tensor]:
        """Call the network."""
        self.sizes.append(images.shape)
        return self.model(images)


def write_pictures(folder: Path, number: int, size: tuple[int, int]) -> CSDataSet:
    """Write a data set of `number` pictures: SCENES different ones, linked under several names.

    A large picture takes seconds to draw.
    """
    mini.write(folder, 1, min(number, SCENES), size, seed=0)
    pairs = CSDataSet(str(folder), split="val").pairs
    for index in range(len(pairs), number):
        pair = pairs[index % len(pairs)]
        for file in (pair.image, pair.label, instances_of(pair.label)):
            os.link(folder / file, folder / file.replace(pair.name, f"{pair.name}{index:04d}"))
    return CSDataSet(str(folder), split="val", crop_size=None)


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that a call takes, including its work on the device."""
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def measured(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Return the seconds of evaluations and of their forward passes."""
    device = torch.device(args.device)
    data = write_pictures(Path(folder) / "data", args.pictures, args.size)
    torch.manual_seed(0)
    model = Seg_Model(NUM_CLASSES, recurrence=2, backbone=args.backbone).to(device).eval()
    recorded = Recorded(model)
    palette = make_palette(data.labels.colors())
    os.makedirs(os.path.join(folder, "outputs"))

    def evaluation() -> None:
        recorded.sizes.clear()
        evaluate(
            lambda images: predict_classes(
                recorded, images, [1.0], False, args.tile, NUM_CLASSES, args.tile_batch
            ),
            data,
            World(0, 1, device),
            Loading(workers=args.num_workers),
            more=More(CityscapesEvaluation(LABELS)),
            keep=lambda name, prediction: save_indexed_png(
                os.path.join(folder, "outputs", f"{name}.png"), prediction, palette
            ),
        )

    @torch.inference_mode()
    def forward_passes() -> None:
        for size in recorded.sizes:
            model(inputs[size])

    evaluation()  # warms up, and records the sizes
    inputs = {size: torch.randn(size, device=device) for size in set(recorded.sizes)}
    forward_passes()
    times: dict[str, list[float]] = {"forward passes": [], "evaluation": []}
    for _ in range(args.rounds):
        times["forward passes"].append(seconds_of(forward_passes, device))
        times["evaluation"].append(seconds_of(evaluation, device))
        print("  ".join(f"{name} {several[-1]:.2f} s" for name, several in times.items()), flush=True)
    median = {name: statistics.median(several) for name, several in times.items()}
    return {
        "machine": machine(device.type),
        "setting": f"{args.pictures} pictures of {args.size[0]}x{args.size[1]}, CCNet on {args.backbone}, "
        f"tiles of {args.tile[0]}x{args.tile[1]}, {args.tile_batch} at once, {args.num_workers} workers",
        "seconds": {name: timing.quartiles(several) | {"all": several} for name, several in times.items()},
        "ratio": median["evaluation"] / median["forward passes"],
        "bar": BAR,
    }


def size(text: str) -> tuple[int, int]:
    """Parse HxW."""
    height, width = text.split("x")
    return int(height), int(width)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark. Return the exit status."""
    parser = flags.Parser(prog="python -m benchmarks.evaluation", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="device of the network (default: %(default)s)",
    )
    add(
        "--backbone",
        choices=sorted(DEPTHS),
        default="resnet101",
        help="backbone of the network (default: %(default)s)",
    )
    add("--pictures", type=flags.positive_int, default=6, help="number of pictures (default: %(default)s)")
    add(
        "--size",
        type=size,
        default="512x1024",
        metavar="HxW",
        help="size of the pictures (default: %(default)s)",
    )
    add(
        "--tile",
        type=flags.size,
        default="385,385",
        metavar="H,W",
        help="size of the tiles (default: %(default)s)",
    )
    add("--tile-batch", type=flags.batch, default=1, help="number of tiles in a batch (default: %(default)s)")
    add(
        "--num-workers",
        type=flags.workers,
        default=1,
        help="number of processes that read pictures (default: %(default)s)",
    )
    add(
        "--rounds",
        type=flags.positive_int,
        default=3,
        help="number of measurements of both (default: %(default)s)",
    )
    add("--out", metavar="FILE", help="JSON file to write the results to")
    args = parser.parse_args(argv)
    if args.out:
        check_output_file("--out", args.out)
    with tempfile.TemporaryDirectory() as folder:
        report = measured(args, folder)
    if args.out:
        write_file(args.out, json.dumps(report, indent=2) + "\n")
    print(f"{report['setting']}: {report['ratio']:.3f} times the forward passes alone (limit {BAR})")
    return int(report["ratio"] > BAR)


if __name__ == "__main__":
    end(main)

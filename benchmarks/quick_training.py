"""Training of a small network, which takes minutes on a CPU, with the loader, losses and step of train.py."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from dataset import CSDataSet, mini
from engine.data.loader import Loading, train_batches
from engine.evaluation.evaluate import evaluate
from engine.evaluation.metrics import mean_iou
from engine.inference import predict_classes
from engine.runtime.distributed import World
from engine.training.optimizer import make_optimizer
from engine.training.schedule import poly_lr, set_learning_rate, warm_up
from engine.training.step import Criterion, StepOptions, Stepper
from networks import Network
from networks.heads.parts import convolution_norm
from utils import args as flags
from utils.files import check_output_file, write_file

#: Channels of layer3 and layer4 of the backbone, and of the attention.
CHANNELS, WIDTH = (32, 64), 64
#: Settings of the training.
BATCH, LEARNING_RATE, WARMUP = 8, 4e-3, 20
WORLD = World(0, 1, torch.device("cpu"))


class SmallNetwork(Network):
    """A network of the papers on a backbone of five convolutions with output stride 8.

    Args:
        head: class of the main head (networks/heads/).
        num_classes: number of classes.
        consistency: channels of the features for the category-consistent loss; 0 without this loss.
    """

    channels = CHANNELS

    def __init__(self, head: Callable[..., nn.Module], num_classes: int, consistency: int = 0):
        nn.Module.__init__(self)
        sizes = (3, 16, 24, *CHANNELS)
        layers = [convolution_norm(few, many, 3, "torch", "relu") for few, many in pairwise(sizes)]
        for layer in layers[:3]:
            layer[0].stride = (2, 2)  # type: ignore[assignment]
        self.until_layer3 = nn.Sequential(*layers[:3])
        self.layer4 = nn.Sequential(layers[3], convolution_norm(CHANNELS[1], CHANNELS[1], 3, "torch", "relu"))
        self.add_heads(head, num_classes, 0.1, "torch", dsn_channels=WIDTH, channels=WIDTH)
        if consistency:
            self.add_consistency(consistency)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features [N, 32, H, W] and [N, 64, H, W] of images [N, 3, h, w]."""
        x = self.until_layer3(images / 64)
        return x, self.layer4(x)


def train(model: SmallNetwork, criterion: Criterion, data: CSDataSet, seed: int, steps: int) -> SmallNetwork:
    """Train a network on the crops of a data set, and return it in evaluation mode."""
    optimizer = make_optimizer("adamw", model.train(), LEARNING_RATE, 0.9, 1e-2, False)
    stepper = Stepper(model, criterion, optimizer, WORLD, StepOptions(seed=seed))
    for step, batch in enumerate(train_batches(data, seed, range(steps), WORLD, Loading(BATCH)), 1):
        if isinstance(batch, Exception):
            raise batch
        rate = poly_lr(LEARNING_RATE, step - 1, steps, 0.9) * warm_up(step - 1, WARMUP)
        set_learning_rate(optimizer, rate)
        stepper.step(step, batch)
    return model.eval()


def score(model: SmallNetwork, data: CSDataSet) -> float:
    """Return the mean IoU on a data set in percent, with each picture predicted whole."""
    result = evaluate(lambda images: predict_classes(model, images, [1.0], False), data, WORLD, Loading(1))
    return 100 * mean_iou(result.confusion)


def get_parser(name: str, doc: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """Return the parser of a benchmark that trains on the generated data set.

    Args:
        name: module of the benchmark.
        doc: its docstring.
        **defaults: defaults of seeds, train and size.
    """
    parser = flags.Parser(f"python -m {name}", doc)
    add = parser.add_argument
    add("--seeds", type=flags.number(int, 1, 100), help="number of seeds")
    add("--steps", type=flags.positive_int, default=600, help="training steps of each run")
    add("--train", type=flags.number(int, 1, 9999), help="number of training pictures")
    add("--val", type=flags.number(int, 1, 9999), default=48, help="number of validation pictures")
    add("--size", type=flags.size, metavar="H,W", help="size of the pictures")
    add("--data", metavar="DIR", help="folder of the generated data set, kept; by default a temporary one")
    add("--out", metavar="FILE", help="JSON file to write")
    parser.set_defaults(**defaults)
    return parser


def report(
    args: argparse.Namespace,
    measured: Callable[[argparse.Namespace, str], dict[str, Any]],
    page: Callable[[dict[str, Any]], str],
    with_frames: bool = False,
) -> dict[str, Any]:
    """Generate the data set, measure, print the page, and write the result to --out; return the result.

    Args:
        args: flags of `get_parser`.
        measured: function that returns the result for the flags and the folder of the data set.
        page: function that formats the result as text.
        with_frames: whether the data set has the frames around each picture (`mini.write`).

    Raises:
        UsageError: --out can't be written.
    """
    if args.out:
        check_output_file("--out", args.out, [])
    with tempfile.TemporaryDirectory() as temporary:
        root = args.data or os.path.join(temporary, "data")
        mini.write(root, args.train, args.val, args.size, 0, with_frames=with_frames)
        result = measured(args, root)
    print(page(result))
    if args.out:
        write_file(args.out, json.dumps(result, indent=2) + "\n")
    return result

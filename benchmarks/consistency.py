"""Measure what the category-consistent loss is worth: RCCA with and without it on the generated data set.

    python -m benchmarks.consistency [--seeds 5] [--steps 600] [--train 120] [--val 48] [--size 128,256]
        [--out FILE.json]

The data set is that of `python -m dataset.mini`, with the 19 classes of Cityscapes. Both arms train the head
of --model ccnet (R=2) from the same random weights, with the loader, the loss and the step of train.py, on a
backbone of five small convolutions in place of a ResNet, so that a run takes minutes on a CPU. Scores are
mean IoU in percent on the validation pictures, each predicted whole.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from typing import Any

import torch

from benchmarks.quick_training import BATCH, LEARNING_RATE, SmallNetwork, get_parser, report, score, train
from dataset import CSDataSet
from loss import CategoryConsistentLoss, CriterionDSN, WithConsistency
from networks.heads import RCCAHead
from tools.common import end
from utils.environment import machine

#: The arms, and their number of channels of the features for the loss; 0 without it.
ARMS = {"without": 0, "with": 16}


def data_set(root: str, split: str, size: tuple[int, int]) -> CSDataSet:
    """Return the data set of a split; the crops for training are squares."""
    is_train = split == "train"
    crop = (size[0], size[0]) if is_train else None
    return CSDataSet(root, crop_size=crop, scale=is_train, mirror=is_train, split=split)


def trained(root: str, arm: str, seed: int, steps: int, size: tuple[int, int]) -> SmallNetwork:
    """Train the network of an arm. Both arms of a seed start from the same weights and see the same crops."""
    data = data_set(root, "train", size)
    torch.manual_seed(seed)
    model = SmallNetwork(RCCAHead, data.num_classes, ARMS[arm])
    criterion: CriterionDSN | WithConsistency = CriterionDSN()
    if ARMS[arm]:
        consistency = CategoryConsistentLoss(num_classes=data.num_classes)
        criterion = WithConsistency(CriterionDSN(), consistency)
    return train(model, criterion, data, seed, steps)


def measured(args: argparse.Namespace, root: str) -> dict[str, Any]:
    """Return the scores of both arms for all seeds."""
    scores: dict[str, list[float]] = {arm: [] for arm in ARMS}
    begin = time.monotonic()
    for seed in range(args.seeds):
        for arm, found in scores.items():
            model = trained(root, arm, seed, args.steps, args.size)
            found.append(score(model, data_set(root, "val", args.size)))
            minutes = (time.monotonic() - begin) / 60
            print(f"seed {seed}  {arm}: mean IoU {found[-1]:.1f} %  ({minutes:.1f} min)", flush=True)
    gains = [after - before for before, after in zip(scores["without"], scores["with"], strict=True)]
    return {
        "machine": machine("cpu"),
        "setting": {name: getattr(args, name) for name in ("seeds", "steps", "train", "val", "size")}
        | {"batch": BATCH, "learning_rate": LEARNING_RATE, "recurrence": 2, "channels": ARMS["with"]},
        "mean_iou": {arm: _summary(values) for arm, values in scores.items()},
        "gain": _summary(gains),
        "minutes": (time.monotonic() - begin) / 60,
    }


def _summary(values: list[float]) -> dict[str, Any]:
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return {
        "mean": statistics.mean(values),
        "standard_deviation": None if math.isnan(deviation) else deviation,
        "all": values,
    }


def page(result: dict[str, Any]) -> str:
    """Format the result as text."""
    rows = {**result["mean_iou"], "gain": result["gain"]}
    lines = []
    for name, found in rows.items():
        deviation = found["standard_deviation"]
        spread = "" if deviation is None else f" ± {deviation:.2f}"
        lines.append(
            f"{name:<8} {found['mean']:6.2f}{spread}  ({', '.join(f'{each:.1f}' for each in found['all'])})"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = get_parser("benchmarks.consistency", __doc__, seeds=5, train=120, size=(128, 256))
    report(parser.parse_args(argv), measured, page)


if __name__ == "__main__":
    end(main)

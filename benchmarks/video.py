"""Measure what the frames around a picture are worth: 3-D criss-cross attention on generated clips.

    python -m benchmarks.video [--seeds 3] [--steps 600] [--train 240] [--val 48] [--size 64,128]
        [--out FILE.json]

The data set is that of `python -m dataset.mini --video`: noise hides most of each labeled frame, and the
frames before and after it show the scene. Classes are the seven categories of Cityscapes. Each arm trains the
head of --model ccnet3d from random weights, with the loader, the loss and the step of train.py, on a backbone
of five small convolutions in place of a ResNet, so that a run takes minutes on a CPU:

- "T=1": the labeled frame alone;
- "T=3": the labeled frame, the frame before and the frame after it;
- "T=3, repeated": as T=3, but both neighbors are the labeled frame itself, in training and evaluation.

"T=3, evaluated repeated" evaluates the networks of T=3 on repeated frames. Scores are mean IoU in percent on
the validation pictures, each predicted whole.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from benchmarks.quick_training import BATCH, LEARNING_RATE, SmallNetwork, get_parser, report, score, train
from dataset import CSDataSet
from dataset.clips import Clip
from dataset.labels import IGNORE, LABELS, ClassTable
from loss import CriterionDSN
from networks.heads import RCCA3dHead
from tools.common import end
from utils.environment import machine

#: The arms, and whether the neighbors are repeated in training.
ARMS = {"T=1": (1, False), "T=3": (3, False), "T=3, repeated": (3, True)}
#: Minimum gain of T=3, in percent of mean IoU.
BAR = 5.0


def categories() -> ClassTable:
    """Return the class table whose classes are the categories of Cityscapes."""
    names = list(dict.fromkeys(label.category for label in LABELS if label.train_id != IGNORE))
    return ClassTable(
        [
            label._replace(train_id=names.index(label.category) if label.category in names else IGNORE)
            for label in LABELS
        ]
    )


def data_set(root: str, split: str, clip: int, repeated: bool, size: tuple[int, int]) -> CSDataSet:
    """Return the data set of an arm; the crops for training are squares."""
    train = split == "train"
    crop = (size[0], size[0]) if train else None
    found = CSDataSet(
        root, crop_size=crop, scale=False, mirror=train, split=split, table=categories(), clip=clip
    )
    if repeated:
        found.clips = [Clip((pair.image,) * clip, 0) for pair in found.pairs]
    return found


def trained(root: str, arm: str, seed: int, steps: int, size: tuple[int, int]) -> SmallNetwork:
    """Train the network of an arm."""
    data = data_set(root, "train", *ARMS[arm], size)
    torch.manual_seed(seed)
    return train(SmallNetwork(RCCA3dHead, data.num_classes), CriterionDSN(), data, seed, steps)


def measured(args: argparse.Namespace, root: str) -> dict[str, Any]:
    """Return the scores of all arms and seeds."""
    scores: dict[str, list[float]] = {}
    begin = time.monotonic()

    def note(name: str, seed: int, value: float, model: SmallNetwork) -> None:
        scores.setdefault(name, []).append(value)
        about = f"gamma {model.head.cca.gamma.item():.2f}, {(time.monotonic() - begin) / 60:.1f} min"
        print(f"seed {seed}  {name}: mean IoU {value:.1f} %  ({about})", flush=True)

    for seed in range(args.seeds):
        for arm, (clip, repeated) in ARMS.items():
            model = trained(root, arm, seed, args.steps, args.size)
            note(arm, seed, score(model, data_set(root, "val", clip, repeated, args.size)), model)
            if arm == "T=3":
                also = score(model, data_set(root, "val", clip, True, args.size))
                note(f"{arm}, evaluated repeated", seed, also, model)
    means = {name: statistics.mean(values) for name, values in scores.items()}
    gains = [three - one for one, three in zip(scores["T=1"], scores["T=3"], strict=True)]
    return {
        "machine": machine("cpu"),
        "setting": {name: getattr(args, name) for name in ("seeds", "steps", "train", "val", "size")}
        | {
            "batch": BATCH,
            "learning_rate": LEARNING_RATE,
            "recurrence": 3,
            "classes": len(categories().classes),
        },
        "mean_iou": {name: {"mean": means[name], "all": values} for name, values in scores.items()},
        "gain": {"mean": statistics.mean(gains), "all": gains},
        "gain_repeated": means["T=3, repeated"] - means["T=1"],
        "bar": BAR,
        "minutes": (time.monotonic() - begin) / 60,
    }


def page(result: dict[str, Any]) -> str:
    """Format the result as text."""
    lines = [
        f"{name:<26} {values['mean']:5.1f} %  ({', '.join(f'{each:.1f}' for each in values['all'])})"
        for name, values in result["mean_iou"].items()
    ]
    gain, control = result["gain"], result["gain_repeated"]
    lines.append(
        f"T=3 over T=1: {gain['mean']:+.1f} (smallest {min(gain['all']):+.1f}); repeated: {control:+.1f}"
    )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the command. Return 1 if T=3 gains less than the bar or the control gains as much, 0 otherwise."""
    parser = get_parser("benchmarks.video", __doc__, seeds=3, train=240, size=(64, 128))
    result = report(parser.parse_args(argv), measured, page, with_frames=True)
    return int(not result["gain"]["mean"] >= BAR or result["gain_repeated"] >= result["gain"]["mean"] / 2)


if __name__ == "__main__":
    end(main)

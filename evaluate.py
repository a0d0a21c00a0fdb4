"""Evaluate CCNet: mean IoU, the official Cityscapes scores, and a picture of every prediction.

    python evaluate.py --data-dir CS --restore-from snapshots/CS_scenes_60000.pth --gpu 0 --recurrence 2

Writes result.txt and outputs/ beside the checkpoint. See --help for all flags.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys

import torch

from dataset import CSDataSet, DataError
from dataset.labels import CLASS_NAMES, LABELS, NUM_CLASSES, TRAIN_LABELS
from engine import distributed
from engine.evaluation import Result, evaluate
from engine.inference import predict_multiscale
from engine.metrics import CityscapesEvaluation, format_table, iou_per_class, mean_iou
from networks import MODELS, CheckpointError, load_weights, match_weights
from networks.resnet import DEPTHS
from utils import args as flags
from utils.files import check_writable, replacing
from utils.palette import make_palette, save_indexed_png

#: What ends the command with exit status 2.
INPUT_ERRORS = (flags.UsageError, DataError, CheckpointError)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Evaluate CCNet.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add(
        "--data-dir",
        required=True,
        help="data set in the Cityscapes layout, or what --data-list is relative to",
    )
    add("--data-list", help="file of 'image<TAB>label' lines; without it the layout's val split")
    add("--num-classes", type=flags.classes, default=NUM_CLASSES, help="number of train ids")
    add("--ignore-label", type=flags.label, default=255, help="train id of void pixels")
    add("--model", choices=sorted(MODELS), default="ccnet", help="network")
    add("--backbone", choices=sorted(DEPTHS), default="resnet101", help="backbone")
    add("--recurrence", type=flags.count, default=2, help="how often the attention is applied")
    add("--restore-from", metavar="FILE", help="checkpoint; random weights without it")
    add("--input-size", type=flags.size, default=(769, 769), metavar="H,W", help="tile")
    add(
        "--whole",
        type=flags.boolean,
        nargs="?",
        const=True,
        default=False,
        help="whole pictures instead of tiles",
    )
    add(
        "--scales",
        type=flags.numbers,
        default=[1.0],
        metavar="S,S",
        help="average the predictions at these scales",
    )
    add("--flip", action="store_true", help="average with the prediction of the mirrored picture")
    add(
        "--batch-size",
        type=flags.positive_int,
        default=1,
        help="pictures of a size at once, for each process",
    )
    add("--num-workers", type=flags.count, default=2, help="processes that read pictures, for each process")
    add("--output-dir", help="where result.txt and outputs/ go; without it beside the checkpoint")
    add("--gpu", metavar="IDS", help="such as 0,1,2,3, or cpu; without it every visible GPU, or the CPU")
    add("--nproc", type=flags.positive_int, metavar="N", help="run N processes on the CPU")
    # torch.distributed.launch passes it; the environment says the same.
    add("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def main() -> int:
    args = get_parser().parse_args()
    if args.output_dir is None:
        args.output_dir = os.path.dirname(args.restore_from) if args.restore_from else "snapshots"
    devices = distributed.choose_devices(args.gpu, args.nproc)
    return distributed.run(
        devices, check=lambda: check(args), body=lambda world: run(args, world), agreed=INPUT_ERRORS
    )


def check(args: argparse.Namespace) -> None:
    """Everything that can be known before the first picture; also makes the folder for the predictions.

    Raises:
        flags.UsageError, DataError, CheckpointError: one line that says which flag or file is wrong.
    """
    with torch.device("meta"):
        model = make_model(args)
    if args.restore_from:
        print(match_weights(model, args.restore_from, complete=True)[0], flush=True)
    else:
        print("no --restore-from: evaluating random weights", flush=True)
    dataset = make_dataset(args)
    print(dataset.check(instances=wants_official_scores(args, dataset)), flush=True)
    check_writable("--output-dir", os.path.join(args.output_dir, "outputs"))
    check_writable("--output-dir", args.output_dir or ".")
    if os.path.isdir(os.path.join(args.output_dir, "result.txt")):
        raise flags.UsageError(
            f"--output-dir {args.output_dir}: result.txt is a folder there; name another folder"
        )


def make_dataset(args: argparse.Namespace) -> CSDataSet:
    return CSDataSet(
        args.data_dir,
        args.data_list,
        crop_size=None,
        scale=False,
        mirror=False,
        ignore_label=args.ignore_label,
        num_classes=args.num_classes,
        split="val",
    )


def wants_official_scores(args: argparse.Namespace, dataset: CSDataSet) -> bool:
    """Whether the data set has what the official scores need: Cityscapes' classes, label and instance ids."""
    return args.num_classes == NUM_CLASSES and dataset.has_instances()


def make_model(args: argparse.Namespace) -> torch.nn.Module:
    return MODELS[args.model](args.num_classes, recurrence=args.recurrence, backbone=args.backbone)


def run(args: argparse.Namespace, world: distributed.World) -> None:
    """Evaluate one process's share of the pictures; rank 0 prints and writes the result."""
    torch.manual_seed(0)  # the same random weights on all processes, where there is no checkpoint
    model = make_model(args)
    if args.restore_from:
        load_weights(model, args.restore_from, complete=True)
    model.to(world.device).eval()
    dataset = make_dataset(args)
    palette = make_palette([label.color for label in TRAIN_LABELS])
    outputs = os.path.join(args.output_dir, "outputs")
    result = evaluate(
        lambda images: predict_multiscale(
            model, images, args.scales, args.flip, None if args.whole else args.input_size, args.num_classes
        ),
        dataset,
        DataError,
        world,
        args.num_classes,
        args.ignore_label,
        official=CityscapesEvaluation(LABELS) if wants_official_scores(args, dataset) else None,
        batch_size=args.batch_size,
        workers=args.num_workers,
        keep=lambda name, prediction: save_indexed_png(
            os.path.join(outputs, f"{name}.png"), prediction, palette
        ),
    )
    if world.is_main:
        report(args, result)


def report(args: argparse.Namespace, result: Result) -> None:
    """Print the table of classes and write result.txt."""
    iou = iou_per_class(result.confusion).tolist()
    names = (
        list(CLASS_NAMES)
        if args.num_classes == NUM_CLASSES
        else [f"class {k}" for k in range(args.num_classes)]
    )
    scores = {"meanIU": mean_iou(result.confusion), "IU_array": iou}
    instance_iou = None
    if result.official is not None:
        scores.update(result.official)
        instance_iou = [result.official["classInstScores"][name] for name in names]
    print(format_table(names, iou, instance_iou))
    for name in ("averageScoreCategories", "averageScoreInstCategories"):
        if scores.get(name) is not None:
            print(f"{name} {scores[name]:.4f}")
    scores["confusion"] = result.confusion.tolist()
    path = os.path.join(args.output_dir, "result.txt")
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        # nan is no JSON: what has no score is null.
        json.dump({name: _without_nan(value) for name, value in scores.items()}, file, allow_nan=False)
    print(f"mean IoU {scores['meanIU']:.4f}, written to {path}")


def _without_nan(value):
    if isinstance(value, list):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value


if __name__ == "__main__":
    sys.exit(flags.exit_status(main, INPUT_ERRORS))

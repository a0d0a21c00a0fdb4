"""Measure the time of the scores of a picture, and of the intervals of an evaluation.

    python -m benchmarks.scores [--size 1024x2048] [--pictures 500] [--out JSON]

One thread scores a generated street scene and a shifted copy of its label as the prediction. The times of
the boundary scores and of the counts of the calibration are compared with that of the confusion matrix, which
every evaluation computes. The intervals are computed once in an evaluation, from random counts of all
pictures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import torch

from benchmarks.evaluation import size
from dataset import CSDataSet, mini
from dataset.labels import NUM_CLASSES
from engine.evaluation.bootstrap import Ratios, compare, intervals
from engine.evaluation.boundary import count_boundary
from engine.evaluation.calibration import count_confidence
from engine.evaluation.metrics import confusion_matrix
from tools.common import end
from utils import args as flags
from utils import timing
from utils.environment import machine
from utils.files import check_output_file, write_file

BASE = "confusion matrix"


def scene(extent: tuple[int, int]) -> np.ndarray:
    """Return the label of a generated street scene, uint8 [h, w]."""
    with tempfile.TemporaryDirectory() as folder:
        mini.write(folder, 1, 1, extent, seed=0)
        label = CSDataSet(folder, split="val", crop_size=None).picture(0, instances=False).label
    assert label is not None
    return label


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of each score of a picture, and of the intervals."""
    label = scene(args.size)
    prediction = np.roll(np.where(label == 255, 0, label), (args.size[0] // 200, args.size[0] // 200), (0, 1))
    rng = np.random.default_rng(0)
    confidence = rng.random(label.shape, np.float32)
    true, predicted = torch.from_numpy(label), torch.from_numpy(prediction)
    right = rng.integers(0, 10**5, (args.pictures, NUM_CLASSES))
    ratios = Ratios(right, right + rng.integers(0, 10**5, right.shape))
    runs: dict[str, Callable[[], object]] = {
        BASE: lambda: confusion_matrix(true, predicted, NUM_CLASSES),
        "boundary scores": lambda: count_boundary(label, prediction, NUM_CLASSES),
        "calibration": lambda: count_confidence(label, prediction, confidence),
        "intervals": lambda: intervals(ratios),
        "comparison": lambda: compare(ratios, Ratios(right // 2, ratios.denominator)),
    }
    before = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    try:
        times, failures = timing.interleaved(runs, "cpu", args.rounds)
    finally:
        torch.set_num_threads(before[0])
        cv2.setNumThreads(before[1])
    assert not failures, failures
    return {
        "machine": machine("cpu"),
        "setting": f"one picture of {args.size[0]}x{args.size[1]}, {NUM_CLASSES} classes, one thread; "
        f"intervals of {args.pictures} pictures",
        "seconds": {name: timing.quartiles(several) for name, several in times.items()},
        "ratio": {
            name: statistics.median(several) / statistics.median(times[BASE])
            for name, several in times.items()
        },
    }


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = flags.Parser(prog="python -m benchmarks.scores", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add(
        "--size",
        type=size,
        default="1024x2048",
        metavar="HxW",
        help="size of the picture (default: %(default)s)",
    )
    add(
        "--pictures",
        type=flags.positive_int,
        default=500,
        metavar="N",
        help="number of pictures of the intervals (default: %(default)s)",
    )
    add(
        "--rounds",
        type=flags.positive_int,
        default=5,
        metavar="N",
        help="number of measurements (default: %(default)s)",
    )
    add("--out", metavar="FILE", help="JSON file to write the results to")
    args = parser.parse_args(argv)
    if args.out:
        check_output_file("--out", args.out)
    report = measured(args)
    if args.out:
        write_file(args.out, json.dumps(report, indent=2) + "\n")
    print(report["setting"])
    for name, several in report["seconds"].items():
        ratio = report["ratio"][name]
        print(f"{name:<18}  {1e3 * several['median']:8.1f} ms  {ratio:6.2f} times the {BASE}")


if __name__ == "__main__":
    end(main)

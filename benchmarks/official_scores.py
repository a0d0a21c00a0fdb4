"""Compare the scores of an evaluation with those of cityscapesscripts on the same predictions.

    python -m benchmarks.official_scores --data-dir CS --run FOLDER [--split val] [--out JSON]

FOLDER holds result.txt and outputs/ of evaluate.py. Prints the four averages, and the largest difference over
all classes, categories and averages. The exit status is 1 if it is above 1e-9.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

from dataset import CSDataSet, DataError
from dataset.labels import CITYSCAPES
from tools.common import end
from utils import args as flags
from utils import run_files
from utils.files import check_output_file, write_file

#: Scores that both write under the same names; the first four are averages.
KEYS = [
    "averageScoreClasses",
    "averageScoreInstClasses",
    "averageScoreCategories",
    "averageScoreInstCategories",
    "classScores",
    "classInstScores",
    "categoryScores",
    "categoryInstScores",
]
BAR = 1e-9


@contextlib.contextmanager
def _patched() -> Iterator[Any]:
    """Yield the module of the official evaluation, patched to run silently and with this NumPy.

    Raises:
        ImportError: cityscapesscripts is not installed.
    """
    named = ("CITYSCAPES_DATASET", "CITYSCAPES_RESULTS", "CITYSCAPES_EXPORT_DIR")  # read at import
    with mock.patch.dict(os.environ):
        for variable in named:
            os.environ.pop(variable, None)
        module = importlib.import_module("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")

    def in1d(a: Any, b: Any, invert: bool = False) -> np.ndarray:
        return np.isin(np.ravel(a), b, invert=invert)

    settings = {"evalInstLevelScore": True, "quiet": True, "JSONOutput": False}
    with contextlib.ExitStack() as held:
        # NumPy 2.4 removed in1d, which cityscapesscripts 2.3.0 calls.
        held.enter_context(mock.patch.object(np, "in1d", in1d, create=True))
        for name, value in settings.items():
            held.enter_context(mock.patch.object(module.args, name, value))
        yield module


def official_scores(truths: Sequence[str], predictions: Sequence[str]) -> dict[str, Any]:
    """Return the result of the official evaluation for pictures of label ids.

    Args:
        truths: files *_gtFine_labelIds.png, with *_gtFine_instanceIds.png in the same folder.
        predictions: their predictions, pictures with one channel.

    Raises:
        ImportError: cityscapesscripts is not installed.
        ValueError: cityscapesscripts rejects the pictures.
    """
    with _patched() as module:
        try:
            return module.evaluateImgLists(list(predictions), list(truths), module.args)
        except SystemExit as error:  # cityscapesscripts reports all errors this way
            raise ValueError("the official evaluation rejects the pictures; see its message above") from error


def largest_difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> float:
    """Return the largest difference over all scores; infinity if a score or class is missing in one."""
    largest = 0.0
    for key in KEYS:
        pair = [value if isinstance(value, Mapping) else {key: value} for value in (ours[key], theirs[key])]
        if pair[0].keys() != pair[1].keys():
            return math.inf
        for name, value in pair[0].items():
            one, other = (math.nan if score is None else score for score in (value, pair[1][name]))
            if math.isnan(one) and math.isnan(other):
                continue
            difference = abs(one - other)
            largest = max(largest, math.inf if math.isnan(difference) else difference)
    return largest


def compare(data_dir: str, run: str, split: str) -> dict[str, Any]:
    """Return the averages of both evaluations, and the largest difference of their scores.

    Args:
        data_dir: data set in the layout of Cityscapes.
        run: folder with result.txt and outputs/.
        split: the evaluated split.

    Raises:
        DataError: the data set is missing, or has no instances.
    """
    data = CSDataSet(data_dir, split=split)
    if not data.has_instances():
        raise DataError(
            f"--data-dir {data_dir}: its labels have no *_instanceIds.png; name a data set with instances"
        )
    ours = run_files.read_result(run)
    if ours is None:
        raise DataError(f"{run}: has no {run_files.RESULT}; run evaluate.py to write it")
    if any(key not in ours for key in KEYS):
        raise DataError(f"{run}/result.txt: has no official scores; evaluate a data set with instances")
    with tempfile.TemporaryDirectory() as folder:
        predictions = []
        for pair in data.pairs:
            with Image.open(Path(run) / "outputs" / f"{pair.name}.png") as picture:
                label_ids = CITYSCAPES.label_ids()[np.asarray(picture)]
            predictions.append(str(Path(folder) / f"{pair.name}.png"))
            Image.fromarray(label_ids).save(predictions[-1])
        theirs = official_scores([data.path(pair.label) for pair in data.pairs], predictions)
    return {
        "pictures": len(data),
        "ours": {key: ours[key] for key in KEYS[:4]},
        "official": {key: theirs[key] for key in KEYS[:4]},
        "largest_difference": largest_difference(ours, theirs),
        "bar": BAR,
    }


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark. Return the exit status."""
    parser = flags.Parser(
        prog="python -m benchmarks.official_scores", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--data-dir", required=True, help="data set in the layout of Cityscapes")
    parser.add_argument("--run", required=True, help="folder with result.txt and outputs/")
    parser.add_argument("--split", default="val", help="evaluated split (default: val)")
    parser.add_argument("--out", metavar="FILE", help="JSON file to write the comparison to")
    args = parser.parse_args(argv)
    if args.out:
        check_output_file("--out", args.out)
    try:
        report = compare(args.data_dir, args.run, args.split)
    except (DataError, OSError, ValueError, ImportError) as error:
        parser.error(str(error))
    for key in KEYS[:4]:
        print(f"{key:<28} {report['ours'][key]}  official {report['official'][key]}")
    difference = report["largest_difference"]
    print(f"{report['pictures']} pictures, largest difference {difference:.1e} (limit {BAR})")
    if args.out:
        write_file(args.out, json.dumps(report, indent=2) + "\n")
    return int(not difference <= BAR)


if __name__ == "__main__":
    end(main)

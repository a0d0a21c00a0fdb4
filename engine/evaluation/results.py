"""Result files of an evaluation: scores as JSON and as text, scores of each picture, and drawings."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engine.evaluation import bootstrap
from engine.evaluation.bootstrap import LEVEL, RESAMPLES, Interval
from engine.evaluation.calibration import as_json
from engine.evaluation.evaluate import Result
from engine.evaluation.metrics import format_confusion, format_table, iou_per_class, mean_iou
from engine.evaluation.pictures import (
    BOUNDARY_F,
    BOUNDARY_IOU,
    CATEGORY_INSTANCE_IOU,
    CATEGORY_IOU,
    INSTANCE_IOU,
    PICTURES,
    Pictures,
)
from utils import run_files
from utils.drawing.heat_map import draw_heat_map
from utils.drawing.reliability import draw_reliability
from utils.files import replacing, write_file

#: Names of the files: JSON (as in the original CCNet repository, with more entries), text, and pictures.
#: RELIABILITY is written only with the calibration.
RESULT, SCORES, CONFUSION, RELIABILITY = run_files.RESULT, "scores.txt", "confusion.png", "reliability.png"
FILES = RESULT, SCORES, CONFUSION, PICTURES, RELIABILITY
#: Entries of result.txt for the mean and the classes of a boundary score, and title of its column.
BOUNDARY = {
    BOUNDARY_IOU: (*run_files.BOUNDARY_SCORES[0], "BIoU"),
    BOUNDARY_F: (*run_files.BOUNDARY_SCORES[1], "BF"),
}
#: Entries of result.txt for averages that are no score of the classes above.
AVERAGES = {
    INSTANCE_IOU: "averageScoreInstClasses",
    CATEGORY_IOU: "averageScoreCategories",
    CATEGORY_INSTANCE_IOU: "averageScoreInstCategories",
}


def write(
    folder: str,
    result: Result,
    names: Sequence[str],
    arguments: Mapping[str, Any],
    labels: Sequence[Any] | None = None,
) -> str:
    """Write the result files (FILES). Without a calibration, that of an earlier evaluation is removed.

    Args:
        folder: folder of the files.
        result: result of the evaluation.
        names: names of the K classes.
        arguments: options of the evaluation, written to the JSON file.
        labels: rows of the class table, written to the JSON file; None for the classes of Cityscapes.

    Returns:
        Text to print: the scores of the classes and the averages.

    Raises:
        OSError: a file can't be written.
    """
    iou = iou_per_class(result.confusion).tolist()
    scores: dict[str, Any] = {"meanIU": mean_iou(result.confusion), "IU_array": iou}
    instance_iou = None
    if result.official is not None:
        scores.update(result.official)
        of_instances = result.official.get("classInstScores")
        instance_iou = [of_instances[name] for name in names] if of_instances is not None else None
    columns = {}
    for name, (mean, classes, title) in BOUNDARY.items():
        if name in result.pictures.others:
            *scores[classes], scores[mean] = result.pictures.others[name].scores().tolist()
            columns[title] = scores[classes]
    intervals = intervals_of(result.pictures, names)
    of_iou = [*intervals["IU_array"], intervals["meanIU"]]
    lines = [format_table(names, iou, instance_iou, of_iou, columns)]
    for name in ("averageScoreCategories", "averageScoreInstCategories"):
        if scores.get(name) is not None:
            lines.append(f"{name} {scores[name]:.4f}")
    if result.calibration is not None:
        scores["calibration"] = as_json(result.calibration)
        error = scores["calibration"]["expectedCalibrationError"]
        lines += [] if error is None else [f"expected calibration error {error:.4f}"]
    scores |= {"intervals": intervals}
    scores |= {"classes": list(names), "confusion": result.confusion.tolist(), "arguments": dict(arguments)}
    scores |= {} if labels is None else {"labels": list(labels)}
    # JSON has no nan: a missing score is null.
    content = json.dumps({name: _without_nan(value) for name, value in scores.items()}, allow_nan=False)
    result.pictures.write(os.path.join(folder, PICTURES))
    confusion = format_confusion(names, result.confusion)
    write_file(os.path.join(folder, SCORES), "\n".join([*lines, "", confusion, ""]))
    with replacing(os.path.join(folder, CONFUSION)) as temporary:
        draw_heat_map(names, result.confusion.numpy()).save(temporary, format="PNG")
    _write_reliability(os.path.join(folder, RELIABILITY), result.calibration)
    path = os.path.join(folder, RESULT)
    write_file(path, content)
    said = f"mean IoU {scores['meanIU']:.4f}, written to {path}"
    if intervals["meanIU"] is not None:
        low, high = intervals["meanIU"]
        said += f" ({100 * LEVEL:.0f} % interval {low:.4f} to {high:.4f})"
    return "\n".join([*lines, said])


def intervals_of(pictures: Pictures, names: Sequence[str]) -> dict[str, Any]:
    """Return the entry "intervals" of result.txt: the intervals under the names of the scores."""

    def of(ratios: bootstrap.Ratios) -> tuple[list[Interval], Interval]:
        *classes, mean = bootstrap.intervals(ratios)
        return classes, mean

    found: dict[str, Any] = {"level": LEVEL, "resamples": RESAMPLES, "pictures": len(pictures.names)}
    found["IU_array"], found["meanIU"] = of(pictures.iou())
    for name, (mean, classes, _) in BOUNDARY.items():
        if name in pictures.others:
            found[classes], found[mean] = of(pictures.others[name])
    for name, average in AVERAGES.items():
        if name in pictures.others:
            of_classes, found[average] = of(pictures.others[name])
            if name == INSTANCE_IOU:
                found["classInstScores"] = dict(zip(names, of_classes, strict=True))
    return found


def _write_reliability(path: str, calibration: np.ndarray | None) -> None:
    if calibration is None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        return
    with replacing(path) as temporary:
        draw_reliability(*calibration).save(temporary, format="PNG")


def _without_nan(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value

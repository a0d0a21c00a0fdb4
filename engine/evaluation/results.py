"""Result files of an evaluation: scores as JSON and as text, and the confusion matrix as a picture."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from engine.evaluation.evaluate import Result
from engine.evaluation.metrics import format_confusion, format_table, iou_per_class, mean_iou
from utils import run_files
from utils.drawing.heat_map import draw_heat_map
from utils.files import replacing, write_file

#: Names of the files: JSON (as in the original CCNet repository, with more entries), text, and picture.
FILES = RESULT, SCORES, CONFUSION = run_files.RESULT, "scores.txt", "confusion.png"


def write(
    folder: str,
    result: Result,
    names: Sequence[str],
    arguments: Mapping[str, Any],
    labels: Sequence[Any] | None = None,
) -> str:
    """Write the result files (FILES).

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
    lines = [format_table(names, iou, instance_iou)]
    for name in ("averageScoreCategories", "averageScoreInstCategories"):
        if scores.get(name) is not None:
            lines.append(f"{name} {scores[name]:.4f}")
    scores |= {"classes": list(names), "confusion": result.confusion.tolist(), "arguments": dict(arguments)}
    scores |= {} if labels is None else {"labels": list(labels)}
    # JSON has no nan: a missing score is null.
    content = json.dumps({name: _without_nan(value) for name, value in scores.items()}, allow_nan=False)
    write_file(os.path.join(folder, RESULT), content)
    confusion = format_confusion(names, result.confusion)
    write_file(os.path.join(folder, SCORES), "\n".join([*lines, "", confusion, ""]))
    with replacing(os.path.join(folder, CONFUSION)) as temporary:
        draw_heat_map(names, result.confusion.numpy()).save(temporary, format="PNG")
    path = os.path.join(folder, RESULT)
    return "\n".join([*lines, f"mean IoU {scores['meanIU']:.4f}, written to {path}"])


def _without_nan(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value

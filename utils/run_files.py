"""Reading of the files that a run writes. Every value is checked, since a file may be damaged or foreign.

args.json (ARGUMENTS) holds all flags of a run. The recipe, which the states hold, is the part of the flags
that affects the final weights (engine/options.py).
"""

from __future__ import annotations

import json
import os
from typing import Any

from utils.errors import UsageError
from utils.files import read_input

#: Files with the flags of a training run, the machines that it ran on, its log, and the scores of an
#: evaluation.
ARGUMENTS, ENVIRONMENT, LOG, RESULT = "args.json", "environment.json", "log.jsonl", "result.txt"
#: File with the class table of a run whose flags do not give one.
CLASSES = "classes.tsv"
#: Maximum nesting depth of lists and objects; our files have three levels.
DEEPEST = 16
#: Maximum absolute value of a number: above the range of float32, but its double is still finite.
LARGEST = 1e39
OFFICIAL_SCORES = (
    "averageScoreClasses",
    "averageScoreInstClasses",
    "averageScoreCategories",
    "averageScoreInstCategories",
)
#: Entries of result.txt for the boundary scores: mean, and scores of the classes.
BOUNDARY_SCORES = (("meanBoundaryIU", "boundaryIU_array"), ("meanBoundaryF", "boundaryF_array"))
#: Entries of "calibration" in result.txt that hold a number for each bin.
CALIBRATION = ("pixels", "correct", "confidence")
#: Entries of "arguments" in result.txt: types of the value, and bounds of a number.
NOTED: dict[str, tuple[tuple[type, ...], tuple[int, int] | None]] = {
    "data_dir": ((str,), None),
    "data_list": ((str, type(None)), None),
    "split": ((str,), None),
    "classes": ((str, type(None)), None),
    "num_classes": ((int,), (1, 255)),
    "ignore_label": ((int,), (0, 255)),
    "restore_from": ((str, type(None)), None),
    "recurrence": ((int, type(None)), (0, 100)),
}


def parse(content: bytes | str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: the content is not JSON, has a number that is not finite, or is nested deeper than
            DEEPEST.
    """
    try:
        whole = json.loads(content)
    except RecursionError:
        raise ValueError(f"nested deeper than {DEEPEST} levels") from None
    level, depth = [whole], 0
    while level:
        if depth > DEEPEST:
            raise ValueError(f"nested deeper than {DEEPEST} levels")
        if any(isinstance(value, float) and not abs(value) < float("inf") for value in level):
            raise ValueError("a number that is not finite")
        inner = (value.values() if isinstance(value, dict) else value for value in level if _holds(value))
        level, depth = [value for values in inner for value in values], depth + 1
    return whole


def _holds(value: Any) -> bool:
    return isinstance(value, (dict, list))


def is_number(value: Any, low: float = -LARGEST, high: float = LARGEST) -> bool:
    """Return whether a JSON value is a number from `low` to `high`."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def is_score(value: Any) -> bool:
    """Return whether a JSON value is a score: a number from 0 to 1, or None if nothing was scored."""
    return value is None or is_number(value, 0, 1)


def _is_interval(value: Any) -> bool:
    """Return whether a JSON value is an interval of scores, or None."""
    if value is None:
        return True
    return isinstance(value, list) and len(value) == 2 and all(is_number(each, 0, 1) for each in value)


def _is_text(value: Any) -> bool:
    """Return whether a JSON value is text that can be part of a file name."""
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        return False
    return True


def _damaged(path: str, what: str) -> UsageError:
    return UsageError(f"{path}: {what}; fix or delete the file")


def read(path: str, kind: type) -> Any:
    """Return the content of a JSON file; None if the file does not exist.

    Raises:
        UsageError: the file is unreadable, or its content is not JSON of type `kind`.
    """
    try:
        content = parse(read_input(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise _damaged(path, f"can't be read ({reason})") from error
    if not isinstance(content, kind):
        raise _damaged(path, f"holds a {type(content).__name__}, not a {kind.__name__}")
    return content


def read_arguments(folder: str) -> dict[str, Any]:
    """Return the flags of a run by name; empty if its folder has no args.json."""
    return read(os.path.join(folder, ARGUMENTS), dict) or {}


def read_environment(folder: str) -> list[dict[str, Any]]:
    """Return the environment of each start of a run; empty if its folder has no environment.json."""
    path = os.path.join(folder, ENVIRONMENT)
    starts = read(path, list) or []
    if not all(isinstance(start, dict) for start in starts):
        raise _damaged(path, "holds values that are not objects")
    return starts


def entry(line: bytes | str) -> dict[str, Any] | None:
    """Parse a line of log.jsonl; return None if it has no valid step (from 1), loss and learning rate."""
    try:
        found = parse(line)
    except ValueError:
        return None
    if not isinstance(found, dict):
        return None
    step = found.get("step")
    if not (isinstance(step, int) and is_number(step, 1, 2**63 - 1)):
        return None
    return found if all(is_number(found.get(name)) for name in ("loss", "lr")) else None


def read_log(folder: str) -> tuple[list[dict[str, Any]], int]:
    """Return the entries of log.jsonl and the number of invalid lines.

    A last line without a line break comes from a killed run and does not count as invalid.

    Raises:
        UsageError: the file is unreadable.
    """
    path = os.path.join(folder, LOG)
    try:
        *lines, unfinished = read_input(path).split(b"\n")
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise _damaged(path, f"can't be read ({error.strerror})") from error
    entries = [entry(line) for line in lines if line.strip()]
    found = [each for each in (*entries, entry(unfinished)) if each is not None]
    return found, entries.count(None)


def read_result(folder: str) -> dict[str, Any] | None:
    """Return the content of result.txt; None if the folder has none.

    meanIU, the official scores, the K values of IU_array and the values of classInstScores are scores from 0
    to 1, or None. classes holds K names. Entries that the original's evaluation does not write may be
    missing. If they are there, the boundary scores and the entries of intervals are like those above, and
    calibration has the numbers of its bins.

    Raises:
        UsageError: the file is unreadable or has an invalid value.
    """
    path = os.path.join(folder, RESULT)
    result = read(path, dict)
    if result is None:
        return None
    scores = result.setdefault("IU_array", [])
    if not (isinstance(scores, list) and all(map(is_score, scores))):
        raise _damaged(path, "IU_array is not a list of scores from 0 to 1")
    names = result.setdefault("classes", [f"class {number}" for number in range(len(scores))])
    if not (isinstance(names, list) and all(map(_is_text, names))):
        raise _damaged(path, "classes is not a list of names")
    if scores and len(names) != len(scores):
        raise _damaged(path, f"IU_array has {len(scores)} scores for {len(names)} classes")
    of_instances = result.setdefault("classInstScores", {})
    if not (isinstance(of_instances, dict) and all(map(is_score, of_instances.values()))):
        raise _damaged(path, "classInstScores has values that are not scores from 0 to 1")
    if "meanIU" not in result:
        raise _damaged(path, "has no meanIU")
    for name in ("meanIU", *OFFICIAL_SCORES):
        if not is_score(result.get(name)):
            raise _damaged(path, f"{name} is not a score from 0 to 1")
    for mean, of_classes in BOUNDARY_SCORES:
        values = result.get(of_classes, [])
        if not (isinstance(values, list) and all(map(is_score, [result.get(mean), *values]))):
            raise _damaged(path, f"{mean} and {of_classes} are not scores from 0 to 1")
        if of_classes in result and len(values) != len(names):
            raise _damaged(path, f"{of_classes} has {len(values)} scores for {len(names)} classes")
    if not _are_intervals(result.setdefault("intervals", {}), len(names)):
        raise _damaged(path, "intervals are not pairs of scores from 0 to 1")
    if not _is_calibration(result.get("calibration")):
        raise _damaged(path, "calibration is not a score and the numbers of bins")
    return result


def _are_intervals(found: Any, number: int) -> bool:
    """Return whether a JSON value is the entry intervals of a result of `number` classes."""
    if not isinstance(found, dict):
        return False
    for name in ("meanIU", *OFFICIAL_SCORES, *(mean for mean, _ in BOUNDARY_SCORES)):
        if not _is_interval(found.get(name)):
            return False
    for name in ("IU_array", *(of_classes for _, of_classes in BOUNDARY_SCORES)):
        values = found.get(name, [None] * number)
        if not (isinstance(values, list) and len(values) == number and all(map(_is_interval, values))):
            return False
    of_instances = found.get("classInstScores", {})
    return isinstance(of_instances, dict) and all(map(_is_interval, of_instances.values()))


def _is_calibration(found: Any) -> bool:
    """Return whether a JSON value is the entry calibration of a result, or None."""
    if found is None:
        return True
    if not isinstance(found, dict) or not is_score(found.get("expectedCalibrationError")):
        return False
    bins = [each for name in CALIBRATION if isinstance(each := found.get(name), list)]
    if len(bins) < len(CALIBRATION) or not all(is_number(value, 0) for each in bins for value in each):
        return False
    # The correct pixels of a bin, and the sum of their confidences, are at most its pixels.
    pixels = bins[0]
    return 0 < len(pixels) <= 100 and all(
        len(each) == len(pixels)
        and all(value <= count * (1 + 1e-9) for value, count in zip(each, pixels, strict=True))
        for each in bins
    )


def arguments_of(folder: str, result: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of an evaluation, as stored in its `result`.

    Raises:
        UsageError: an argument is missing or invalid.
    """
    found = result.get("arguments")
    found = found if isinstance(found, dict) else {}
    for name, (kinds, bounds) in NOTED.items():
        value = found.get(name)
        right = name in found and isinstance(value, kinds) and (not isinstance(value, str) or _is_text(value))
        if bounds is not None and value is not None:
            right = right and is_number(value, *bounds)
        if not right:
            raise UsageError(
                f"{os.path.join(folder, RESULT)}: does not say what was evaluated ({name}); "
                "run evaluate.py again"
            )
    return found

"""The files that a run leaves, read with every value checked: they may be damaged, or of another program."""

from __future__ import annotations

import json
import os
from typing import Any

from utils.errors import UsageError
from utils.files import read_input

#: The flags of a training run, the machines that it ran on, its log; the scores of an evaluation.
RECIPE, ENVIRONMENT, LOG, RESULT = "args.json", "environment.json", "log.jsonl", "result.txt"
#: Levels of lists and objects within each other; the files have three.
DEEPEST = 16
#: Beyond float32, in which losses are computed; twice it is finite.
LARGEST = 1e39
OFFICIAL_SCORES = (
    "averageScoreClasses",
    "averageScoreInstClasses",
    "averageScoreCategories",
    "averageScoreInstCategories",
)
#: What result.txt notes of an evaluation: name, types, and the bounds of a number.
ARGUMENTS: dict[str, tuple[tuple[type, ...], tuple[int, int] | None]] = {
    "data_dir": ((str,), None),
    "data_list": ((str, type(None)), None),
    "split": ((str,), None),
    "classes": ((str, type(None)), None),
    "num_classes": ((int,), (1, 255)),
    "ignore_label": ((int,), (0, 255)),
    "restore_from": ((str, type(None)), None),
    "recurrence": ((int,), (0, 100)),
}


def parse(content: bytes | str) -> Any:
    """Return what JSON holds.

    Raises:
        ValueError: no JSON, a number that is not finite, or nested deeper than DEEPEST.
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
    """Return whether `value`, from JSON, is a number from `low` to `high`."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def is_score(value: Any) -> bool:
    """Return whether `value`, from JSON, is a share, or None where there was nothing to score."""
    return value is None or is_number(value, 0, 1)


def _is_text(value: Any) -> bool:
    """Return whether `value`, from JSON, is text, and text that the name of a file can have."""
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        return False
    return True


def _damaged(path: str, what: str) -> UsageError:
    return UsageError(f"{path}: {what}; repair it, or take it away")


def read(path: str, kind: type) -> Any:
    """Return the content of a JSON file; None where there is none.

    Raises:
        UsageError: unreadable, no JSON, or another type than `kind`.
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


def read_recipe(folder: str) -> dict[str, Any]:
    """Return the flags of a run by name; empty where its folder has none."""
    return read(os.path.join(folder, RECIPE), dict) or {}


def read_environment(folder: str) -> list[dict[str, Any]]:
    """Return what each start of a run ran on; empty where its folder does not say it."""
    path = os.path.join(folder, ENVIRONMENT)
    starts = read(path, list) or []
    if not all(isinstance(start, dict) for start in starts):
        raise _damaged(path, "holds other things than objects")
    return starts


def entry(line: bytes | str) -> dict[str, Any] | None:
    """Return what a line of log.jsonl holds; None where it has no step from 1, loss or learning rate."""
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
    """Return the entries of log.jsonl, and how many of its lines are none.

    A last line without its end is that of a killed run and not counted.

    Raises:
        UsageError: unreadable.
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
    """Return the scores of an evaluation; None where the folder has none.

    meanIU and the official scores are shares or None, as are the K values of IU_array and those of
    classInstScores; classes are K names. What the original's evaluation does not write may be missing.

    Raises:
        UsageError: unreadable, or a value that can't be one.
    """
    path = os.path.join(folder, RESULT)
    result = read(path, dict)
    if result is None:
        return None
    scores = result.setdefault("IU_array", [])
    if not (isinstance(scores, list) and all(map(is_score, scores))):
        raise _damaged(path, "IU_array is no list of scores from 0 to 1")
    names = result.setdefault("classes", [f"class {number}" for number in range(len(scores))])
    if not (isinstance(names, list) and all(map(_is_text, names))):
        raise _damaged(path, "classes is no list of names")
    if scores and len(names) != len(scores):
        raise _damaged(path, f"IU_array has {len(scores)} scores for {len(names)} classes")
    of_instances = result.setdefault("classInstScores", {})
    if not (isinstance(of_instances, dict) and all(map(is_score, of_instances.values()))):
        raise _damaged(path, "classInstScores has other things than scores from 0 to 1")
    if "meanIU" not in result:
        raise _damaged(path, "has no meanIU")
    for name in ("meanIU", *OFFICIAL_SCORES):
        if not is_score(result.get(name)):
            raise _damaged(path, f"{name} is no score from 0 to 1")
    return result


def arguments_of(folder: str, result: dict[str, Any]) -> dict[str, Any]:
    """Return what was evaluated and how, as `result` notes it.

    Raises:
        UsageError: it is not noted, or can't be so.
    """
    found = result.get("arguments")
    found = found if isinstance(found, dict) else {}
    for name, (kinds, bounds) in ARGUMENTS.items():
        value = found.get(name)
        right = name in found and isinstance(value, kinds) and (not isinstance(value, str) or _is_text(value))
        if bounds is not None:
            right = right and is_number(value, *bounds)
        if not right:
            raise UsageError(
                f"{os.path.join(folder, RESULT)}: does not say what was evaluated ({name}); "
                "run evaluate.py again"
            )
    return found

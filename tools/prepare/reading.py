"""Checked reading of annotation files, whose every value may be wrong."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

import numpy as np

from dataset.layout import files_below
from dataset.pictures import LONGEST_SIDE, MOST_PIXELS
from tools.prepare.classes import in_files
from tools.prepare.source import Problems
from utils.errors import DataError
from utils.files import read_input
from utils.progress import Progress

T = TypeVar("T")
#: Largest absolute coordinate in pixels; pictures have up to 2^20 pixels per side.
FARTHEST = 2.0**22


def annotation_files(source: str, ending: str) -> list[str]:
    """Return the files of a source with an ending such as .json: itself, or those below the folder."""
    if not os.path.isdir(source):
        return [source]
    return [
        os.path.join(source, inner, file)
        for inner, file in files_below(source, "")[0]
        if file.lower().endswith(ending)
    ]


def folder_of(source: str) -> str:
    """Return the folder of a source: itself, or that of the file."""
    return source if os.path.isdir(source) else os.path.dirname(source) or os.curdir


def read_file(path: str) -> bytes:
    """Return the content of an annotation file.

    Raises:
        DataError: the file can't be read.
    """
    try:
        return read_input(path)
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror or error}); check the file") from error


def read_json(path: str) -> Any:
    """Return the content of a JSON file.

    Raises:
        DataError: the file can't be read, is not JSON, or has a number that is not finite.
    """
    content = read_file(path)
    try:
        return json.loads(content, parse_constant=_not_finite)
    except RecursionError:
        why = "nested too deeply"
    except ValueError as error:
        why = str(error)
    raise DataError(f"{path}: not valid JSON ({why}); export or copy it again")


def _not_finite(name: str) -> NoReturn:
    raise ValueError(f"it has the number {name}")


def numbers(values: object) -> np.ndarray | None:
    """Return a JSON list of coordinates as float64 [n]; None if a value is not a number or is too large."""
    if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
        return None
    if not all(abs(value) <= FARTHEST for value in values):  # false for nan too
        return None
    return np.array(values, np.float64)


def parse_number(text: str | None) -> float:
    """Return a number from a text; nan if it is none, or too large for a coordinate."""
    try:
        value = float(text or "")
    except ValueError:
        return math.nan
    return value if abs(value) <= FARTHEST else math.nan


def as_dicts(values: object) -> list[dict[str, Any]] | None:
    """Return a JSON list of objects; None if it is not one."""
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        return None
    return values


def as_size(height: object, width: object) -> tuple[int, int] | None:
    """Return the size of a picture in an annotation file; None if a side is no whole number, or too large."""
    sides = [
        int(side)
        for side in (height, width)
        if isinstance(side, (int, float)) and not isinstance(side, bool)
        if 0 < side <= LONGEST_SIDE and side == int(side)
    ]
    return (sides[0], sides[1]) if len(sides) == 2 and sides[0] * sides[1] <= MOST_PIXELS else None


def by_x(size: Sequence[int]) -> str:
    """Write a size (height, width) as WIDTHxHEIGHT."""
    return f"{size[1]}x{size[0]}"


class Tally:
    """Shapes that are drawn only in part, or not at all, by the files that they are in."""

    def __init__(self) -> None:
        self.clipped: list[str] = []
        self.tiny: list[str] = []

    def add(self, lies: str | None, file: str, outside: str, problems: list[str]) -> None:
        """Count a shape that is not simply inside of its picture.

        Args:
            lies: None for inside, "clipped", "tiny" (has no pixel) or "outside".
            file: annotation file of the shape.
            outside: beginning of the line about a shape that is outside: the shape and its picture.
            problems: receives this line.
        """
        if lies == "outside":
            problems.append(f"{outside}; move or delete it")
        elif lies:
            (self.tiny if lies == "tiny" else self.clipped).append(file)

    def notes(self) -> list[str]:
        """Return lines about them."""
        notes = []
        for files, what in (
            (self.clipped, "partly outside of the picture, and clipped"),
            (self.tiny, "smaller than a pixel, and left out"),
        ):
            if files:
                notes.append(f"{count(files, 'shape')} {what}; the first is in {files[0]}{in_files(files)}")
        return notes


def progressing(paths: Sequence[str]) -> Iterator[str]:
    """Yield files, and report the progress if they are several."""
    progress = Progress(len(paths), "file")
    for number, path in enumerate(paths, 1):
        yield path
        if len(paths) > 1:
            progress.show(number)


def parse_all(paths: Sequence[str], parse: Callable[[str], T], problems: list[str]) -> Iterator[T]:
    """Yield what `parse` returns for each file; `problems` receives the lines of those that are invalid."""
    for path in progressing(paths):
        try:
            content = parse(path)
        except Problems as error:
            problems += error.lines
        except DataError as error:
            problems.append(str(error))
        else:
            yield content


def number_of(items: Sequence[object], noun: str) -> str:
    """Write a number of things: "1 shape" or "2 shapes"."""
    return f"1 {noun}" if len(items) == 1 else f"{len(items)} {noun}s"


def count(items: Sequence[object], noun: str) -> str:
    """Write a number of things with a verb: "1 shape is" or "2 shapes are"."""
    return f"{number_of(items, noun)} {'is' if len(items) == 1 else 'are'}"

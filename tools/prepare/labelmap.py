"""The file labelmap.txt of VOC folders that CVAT and datumaro export: a name and a color for each class."""

from __future__ import annotations

import re

from dataset.label_values import BACKGROUND
from dataset.labels import IGNORE, MOST_TEXT, ClassTable, Color, Label
from tools.prepare.classes import cleaned, is_background, is_void, problems_of
from tools.prepare.source import Class, Problems
from utils.errors import DataError
from utils.files import read_text

#: Color by which Pascal VOC paints void pixels.
VOID_COLOR = (224, 224, 192)


def read_labelmap(path: str) -> ClassTable:
    """Return the class table of a labelmap.txt.

    A line is `name:r,g,b:parts:actions`; parts and actions are not used, and a line that starts with # is a
    comment. The number of the line, from 0, is the id of the class.

    Raises:
        DataError: the file is unreadable. Problems has a line for each line that is invalid.
    """
    text = read_text(path, "list of classes", "export it again", MOST_TEXT)
    problems: list[str] = []
    labels: list[Label] = []
    number = 0
    for line, content in enumerate(re.split(r"\r\n|\r|\n", text), 1):
        if not content.strip() or content.startswith("#"):
            continue
        cells = content.split(":")
        name, color = cleaned(cells[0]), _color(cells[1] if len(cells) > 1 else "")
        if not name or color is None:
            problems.append(
                f"{path}:{line}: {content[:80]!r} is not 'name:r,g,b:parts:actions'; correct the line"
            )
            continue
        if first := next((label for label in labels if label.color == color or label.name == name), None):
            problems.append(f"{path}:{line}: {name} has the name or color of {first.name}; give it its own")
        name = BACKGROUND if is_background(name) else name
        train_id = IGNORE if is_void(name) else number
        labels.append(Label(name, len(labels), train_id, "", False, color))
        number += train_id != IGNORE
    if not problems:
        problems = problems_of(path, [Class(label.name) for label in labels if label.train_id != IGNORE])
    if problems:
        raise Problems(path, problems)
    if all(label.color != VOID_COLOR for label in labels):
        labels.append(Label("void", -1, IGNORE, "", False, VOID_COLOR))
    try:
        return ClassTable(labels)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error


def _color(text: str) -> Color | None:
    """Return the color of `r,g,b`; None if it is none."""
    channels = text.split(",")
    if len(channels) != 3 or not all(re.fullmatch(r"\s*[0-9]{1,3}\s*", channel) for channel in channels):
        return None
    red, green, blue = map(int, channels)
    return (red, green, blue) if max(red, green, blue) <= 255 else None

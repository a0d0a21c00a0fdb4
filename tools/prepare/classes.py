"""Classes of a source: names, order and train ids, from the source itself or from --classes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from dataset.classes import read_names
from dataset.label_values import BACKGROUND, BACKGROUNDS, VOIDS
from dataset.labels import IGNORE, LONGEST_NAME, MOST_ROWS, MOST_TEXT, read_table
from tools.prepare.source import Class, Wanted
from utils.errors import DataError, UsageError
from utils.files import open_input

#: Largest number of classes in a class table that has a row for void.
MOST_WITH_VOID = MOST_ROWS - 1


def is_background(name: str) -> bool:
    """Return whether a label means the background."""
    return name.lower() in BACKGROUNDS


def is_void(name: str) -> bool:
    """Return whether a label means void."""
    return name.lower() in VOIDS


def cleaned(name: str) -> str:
    """Return a name as a class table can hold it: each run of spaces, tabs and line breaks is one space."""
    return " ".join(name.replace("\0", " ").split())


class Numbering(NamedTuple):
    """Classes in the order of their train ids, and the train id of each label."""

    classes: tuple[Class, ...]
    train_ids: Mapping[str, int]
    fill: int  # train id of the pixels that no shape covers
    origin: str

    def train_id(self, label: str) -> int | None:
        """Return the train id of a label, 255 for void; None if it is unknown."""
        label = cleaned(label)
        if label in self.train_ids:
            return self.train_ids[label]
        if is_void(label):
            return IGNORE
        return _background_of(self.classes) if is_background(label) else None

    def drawn(self, label: str) -> int:
        """Return the train id of a label; 255 if it is unknown, which is a problem that ends the command."""
        train_id = self.train_id(label)
        return IGNORE if train_id is None else train_id

    def problems(self, used: Iterable[tuple[str, str]]) -> list[str]:
        """Return a line for each label that has no class.

        Args:
            used: the label and the file of each shape.
        """
        unknown: dict[str, list[str]] = {}
        for label, file in used:
            if self.train_id(label) is None:
                unknown.setdefault(label, []).append(file)
        return [
            f"{files[0]}: label {label!r} is unknown, it is not in {self.origin}"
            f"{in_files(files)}; correct the label or add it there"
            for label, files in unknown.items()
        ]


def in_files(files: Sequence[str]) -> str:
    """Say in how many files something is, if they are several."""
    number = len(set(files))
    return f" (in {number} files)" if number > 1 else ""


def number_classes(labels: Iterable[Class], wanted: Wanted) -> Numbering:
    """Give train ids to the classes of --classes, or else to the background and the labels of a source.

    Without --classes, the background is class 0. With --unlabeled void, there is none unless a label means
    it.

    Args:
        labels: the labels of the source with their colors, in the order in which classes get train ids.
        wanted: the flags.

    Raises:
        UsageError: the class table of --classes has no background.
    """
    if wanted.names is not None:
        classes = tuple(map(Class, wanted.names))
        train_ids = dict(wanted.train_ids or {name: number for number, name in enumerate(wanted.names)})
    else:
        found: dict[str, Class] = {}
        for label in labels:
            name = cleaned(label.name)
            name = BACKGROUND if is_background(name) else name
            if not is_void(name):
                found.setdefault(name, Class(name, label.color))
        background = found.pop(BACKGROUND, None if wanted.unlabeled_void else Class(BACKGROUND))
        classes = (*filter(None, [background]), *found.values())
        train_ids = {each.name: number for number, each in enumerate(classes)}
    background_id = _background_of(classes)
    if background_id is None and wanted.table is not None and not wanted.unlabeled_void:
        raise UsageError(
            f"{wanted.origin}: has no class named background, for the pixels that no shape covers; add its "
            "row, or give --unlabeled void"
        )
    fill = IGNORE if wanted.unlabeled_void or background_id is None else background_id
    return Numbering(classes, train_ids, fill, wanted.origin)


def _background_of(classes: Sequence[Class]) -> int | None:
    return next((number for number, each in enumerate(classes) if is_background(each.name)), None)


def problems_of(source: str, classes: Sequence[Class]) -> list[str]:
    """Return lines about classes that can't be trained or written to a class table."""
    problems = [
        f"{source}: label {each.name[:20]!r}... has {len(each.name)} characters; give at most {LONGEST_NAME}"
        for each in classes
        if len(each.name) > LONGEST_NAME
    ]
    if any(not each.name for each in classes):
        problems.append(f"{source}: a label has an empty name; name it")
    if len(classes) > MOST_WITH_VOID:
        problems.append(
            f"{source}: has {len(classes)} classes, but {MOST_WITH_VOID} are the most; give --classes a "
            "table that unites some"
        )
    if len(classes) < 2:
        names = ", ".join(each.name for each in classes) or "none"
        problems.append(
            f"{source}: has fewer than two classes ({names}), so nothing can be learned; label more, or omit "
            "--unlabeled void, so that the background is a class"
        )
    return problems


def similar_names(classes: Sequence[Class]) -> list[str]:
    """Return a line for each pair of classes whose names differ only in case."""
    first: dict[str, str] = {}
    return [
        f"labels {first[each.name.lower()]!r} and {each.name!r} are two classes; give them one name if they "
        "are the same"
        for each in classes
        if first.setdefault(each.name.lower(), each.name) != each.name
    ]


def read_classes(path: str, unlabeled_void: bool, flag: str = "--classes ") -> tuple[Wanted, list[Class]]:
    """Read the classes of a class table, or of a text file with one name in each line.

    If a text file has no background, it becomes class 0, unless `unlabeled_void`. In a class table it must
    be a row, unless the source has label pictures.

    Args:
        path: the file.
        unlabeled_void: whether pixels that no shape covers are void.
        flag: the flag that names the file, for error messages.

    Returns:
        What the flags ask for, with `names`, `train_ids`, `origin` and `ids` or `table`; and the classes with
        their colors.

    Raises:
        DataError: the file is unreadable or invalid.
    """
    wanted = Wanted(unlabeled_void=unlabeled_void, origin=f"{flag}{path}")
    if _is_table(path):
        table = read_table(path)
        classes = [Class(label.name, label.color) for label in table.classes]
        wanted = wanted._replace(table=table)
        train_ids = {cleaned(label.name): label.train_id for label in table.labels}
    else:
        ids = read_names(path)
        wanted = wanted._replace(ids=tuple(ids))
        found = [name for name in ids if not is_void(name)]
        if BACKGROUND not in found and not unlabeled_void:
            found.insert(0, BACKGROUND)
        classes = [Class(name) for name in found]
        train_ids = {name: number for number, name in enumerate(found)}
    if problems := problems_of(f"{flag}{path}", classes):
        raise DataError(problems[0])
    names = [each.name for each in classes]
    return wanted._replace(names=tuple(names), train_ids=train_ids), classes


def _is_table(path: str) -> bool:
    """Return whether a file is a class table rather than a list of names; False if it can't be read."""
    try:
        with open_input(path) as file:
            return path.endswith(".tsv") or b"\t" in file.readline(MOST_TEXT)
    except OSError:
        return False


def names_beside(source: str) -> str | None:
    """Return labelme's list of labels in a folder, or None."""
    path = os.path.join(source, "labels.txt")
    return path if os.path.isfile(path) else None

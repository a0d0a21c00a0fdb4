"""The classes of a data set, from flags, or from the files and the labels of a folder pair."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from dataset import folder_pair, recognition
from dataset.label_values import BACKGROUND, BACKGROUNDS, MOST_CLASSES, Values, listed, scan, table_of
from dataset.labels import (
    CITYSCAPES,
    IGNORE,
    LONGEST_NAME,
    MOST_TEXT,
    ClassTable,
    choose_table,
    format_table,
    table_of_rows,
)
from dataset.layout import LABEL_IDS
from utils.errors import DataError, UsageError
from utils.files import read_text
from utils.run_files import CLASSES as TABLE

#: Files with the class names of a folder pair in the order of their ids; its class table is TABLE.
NAMES = ("classes.txt", "labels.txt")
CLASS_FILES = (TABLE, *NAMES)
#: labelme's name of void pixels; its line is not counted if it is the first.
VOID = "__ignore__"


class Classes(NamedTuple):
    """The classes of a command."""

    table: ClassTable | None  # None for the classes of Cityscapes, or for train ids
    number: int
    notes: list[str]  # lines about where the classes are from, if no flag tells them
    own: str | None = None  # the table as text, if no flag gives it: a run of train.py keeps it

    def check_run_folder(self, folder: str, root: str) -> None:
        """Check that a run in `folder` does not replace the class table of the data set in `root`.

        Raises:
            UsageError: both are the same folder.
        """
        if self.own is not None and os.path.realpath(folder) == os.path.realpath(root):
            raise UsageError(
                f"--snapshot-dir {folder}: is also --data-dir, whose class table the run would replace; name "
                "another folder"
            )


def read_names(path: str) -> list[str]:
    """Return the class names of a text file: one name a line, in the order of the ids from 0.

    labelme's first line __ignore__ is left out, since it has no id, and _background_ becomes "background".

    Raises:
        DataError: the file is unreadable, a line is empty or too long, or a name is there twice.
    """
    text = read_text(path, "list of class names", "fix or remove it", MOST_TEXT)
    lines = [" ".join(line.split()) for line in re.split(r"\r\n|\r|\n", text.rstrip())]
    if lines[0] == VOID:
        lines = lines[1:]
    names = [BACKGROUND if line.lower() in BACKGROUNDS else line for line in lines]
    for number, name in enumerate(names):
        if not 0 < len(name) <= LONGEST_NAME:
            raise DataError(
                f"{path}: the name of id {number} has {len(name)} characters; write one name a line, of 1 to "
                f"{LONGEST_NAME} characters"
            )
        if name in names[:number]:
            raise DataError(f"{path}: names {name!r} twice; give each id a name of its own")
    if len(names) > MOST_CLASSES:
        raise DataError(f"{path}: has {len(names)} names; give at most {MOST_CLASSES}")
    return names


def classes_of(root: str, skip: bool = False) -> Classes:
    """Return the classes of a folder pair.

    They are those of classes.tsv if it exists. Otherwise all labels for training and validation are read
    (see `table_of`), and classes.txt or labels.txt names their ids. Labels named *_labelIds.png have the
    classes of Cityscapes.

    Args:
        root: the data directory.
        skip: whether to skip labels that can't be used, for a command that reports them otherwise.

    Raises:
        DataError: a file can't be used, or the values do not tell the classes.
    """
    path = os.path.join(root, TABLE)
    if os.path.lexists(path):
        table, number = choose_table(path, None)
        assert table is not None
        return Classes(table, number, [f"{root}: {number} classes by {TABLE}: {listed(table.names)}"])
    found = folder_pair.find(root) if skip else folder_pair.checked(root)
    files = [os.path.join(root, pair.label) for side in ("train", "val") for pair in found.sides[side]]
    if files and all(file.endswith(LABEL_IDS) for file in files):
        number = len(CITYSCAPES.classes)
        return Classes(None, number, [f"{root}: labels named *{LABEL_IDS} have the classes of Cityscapes"])
    paths = (os.path.join(root, name) for name in NAMES)
    names = next(((path, read_names(path)) for path in paths if os.path.lexists(path)), None)
    problems: list[str] | None = [] if skip else None
    values = scan(files, problems)
    if problems and not (values.ids or values.colors):
        raise DataError(problems[0])
    table = table_of(root, values, names)
    return Classes(table, len(table.classes), [_say(root, values, table, names and names[0])])


def _say(root: str, values: Values, table: ClassTable, file: str | None) -> str:
    """Return the line about the values of labels and the classes that they were taken for."""
    names = table.names if file else [name.removeprefix("class ") for name in table.names]
    line = f"{root}: the labels hold {values.listed()}: classes {listed(names)}"
    if void := [str(label.id) for label in table.labels if label.train_id == IGNORE]:
        line += f"; {listed(void)} {'is' if len(void) == 1 else 'are'} void"
    how = f"named by {os.path.basename(file)}" if file else "give --classes a table to name them"
    return f"{line} ({how})"


def choose_classes(
    root: str,
    data_list: str | None,
    path: str | None,
    num_classes: int | None,
    dataset: str | None = None,
    skip: bool = False,
) -> Classes:
    """Return the classes that the flags give, or else those of the data set.

    Args:
        root: value of --data-dir.
        data_list: value of --data-list; with a list, only the file classes.tsv of a folder pair is used.
        path: value of --classes.
        num_classes: value of --num-classes.
        dataset: value of --dataset.
        skip: see `classes_of`.

    Raises:
        DataError, UsageError: see `choose_table`, `classes_of` and `recognition.recognize`.
    """
    place = recognition.recognize(root, dataset, data_list is not None)
    pair = place.is_pair
    if path is None and place.data and place.data.table:
        table, number = choose_table(place.data.table_path, num_classes)
        note = f"{root}: the {number} classes of {place.data.title}"
        found = Classes(table, number, [note])
    elif path is None and pair and os.path.lexists(os.path.join(root, TABLE)):
        table, number = choose_table(os.path.join(root, TABLE), num_classes)  # with a list too
        found = Classes(table, number, [f"{root}: {number} classes by {TABLE}"])
    elif path is None and num_classes is None and data_list is None and pair:
        found = classes_of(root, skip)
    else:
        return Classes(*choose_table(path, num_classes), [])
    return found._replace(own=format_table(found.table)) if found.table else found


def classes_of_checkpoint(
    checkpoint: str, rows: Sequence[Any] | None, path: str | None, number: int | None
) -> ClassTable | None:
    """Return the class table of a network; None for the classes of Cityscapes, or for train ids.

    Args:
        checkpoint: path of the checkpoint, for messages.
        rows: rows of the class table that the checkpoint itself has, used before `path`; None if it has none.
        path: path of a class table, or None.
        number: number of classes of the network; None if it is that of the table.

    Raises:
        DataError: the table is invalid, or has another number of classes.
    """
    if rows is None and path is None:
        return None
    table = choose_table(path, None)[0] if rows is None else table_of_rows(checkpoint, rows)
    known = len((table or CITYSCAPES).classes)
    if number not in (None, known):
        where = f"--classes {path}:" if rows is None else f"{checkpoint}: its class table"
        raise DataError(
            f"{where} has {known} classes, but the network of {checkpoint} has {number}; give the table that "
            "it was trained with as --classes"
        )
    return table

"""The meaning of values in label pictures: the class table of Cityscapes, or that of another data set.

A class table maps the ids in label pictures to train ids, the class indices that the network is trained with.
It has a row for each label. Rows with the same train id are one class, with the name, color and id of the
first of them. Rows with train id 255 are void: their pixels are neither trained nor scored.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import cv2
import numpy as np

from dataset.layout import LABEL_IDS, LABEL_TRAIN_IDS
from dataset.pictures import Encoded, decode_label, is_gray, no_label
from utils.drawing.palette import make_palette
from utils.errors import DataError
from utils.files import read_text

IGNORE = 255
#: Red, green and blue, 0 to 255.
Color = tuple[int, int, int]


def color_keys(pixels: np.ndarray) -> np.ndarray:
    """Return R * 65536 + G * 256 + B of colors uint8 [h, w, 3], as int32 [h, w]."""
    red, green, blue = (channel.astype(np.int32) for channel in cv2.split(pixels))
    return red << 16 | green << 8 | blue


def key_of(color: Color) -> int:
    """Return R * 65536 + G * 256 + B of a color."""
    return color[0] << 16 | color[1] << 8 | color[2]


def color_of(key: int) -> Color:
    """Return the color of a key of `color_keys`."""
    return key >> 16, key >> 8 & 255, key & 255


def color_text(color: Sequence[int]) -> str:
    """Return a color as R,G,B."""
    return ",".join(map(str, color))


class Label(NamedTuple):
    """One row of a class table."""

    name: str
    id: int  # value in the label pictures; -1 if the label is identified only by its color
    train_id: int  # 255 for void
    category: str
    has_instances: bool
    color: Color
    mirror: int | None = None  # train id in a mirrored picture, as left parts become right; None for the same


LABELS = (
    Label("unlabeled", 0, 255, "void", False, (0, 0, 0)),
    Label("ego vehicle", 1, 255, "void", False, (0, 0, 0)),
    Label("rectification border", 2, 255, "void", False, (0, 0, 0)),
    Label("out of roi", 3, 255, "void", False, (0, 0, 0)),
    Label("static", 4, 255, "void", False, (0, 0, 0)),
    Label("dynamic", 5, 255, "void", False, (111, 74, 0)),
    Label("ground", 6, 255, "void", False, (81, 0, 81)),
    Label("road", 7, 0, "flat", False, (128, 64, 128)),
    Label("sidewalk", 8, 1, "flat", False, (244, 35, 232)),
    Label("parking", 9, 255, "flat", False, (250, 170, 160)),
    Label("rail track", 10, 255, "flat", False, (230, 150, 140)),
    Label("building", 11, 2, "construction", False, (70, 70, 70)),
    Label("wall", 12, 3, "construction", False, (102, 102, 156)),
    Label("fence", 13, 4, "construction", False, (190, 153, 153)),
    Label("guard rail", 14, 255, "construction", False, (180, 165, 180)),
    Label("bridge", 15, 255, "construction", False, (150, 100, 100)),
    Label("tunnel", 16, 255, "construction", False, (150, 120, 90)),
    Label("pole", 17, 5, "object", False, (153, 153, 153)),
    Label("polegroup", 18, 255, "object", False, (153, 153, 153)),
    Label("traffic light", 19, 6, "object", False, (250, 170, 30)),
    Label("traffic sign", 20, 7, "object", False, (220, 220, 0)),
    Label("vegetation", 21, 8, "nature", False, (107, 142, 35)),
    Label("terrain", 22, 9, "nature", False, (152, 251, 152)),
    Label("sky", 23, 10, "sky", False, (70, 130, 180)),
    Label("person", 24, 11, "human", True, (220, 20, 60)),
    Label("rider", 25, 12, "human", True, (255, 0, 0)),
    Label("car", 26, 13, "vehicle", True, (0, 0, 142)),
    Label("truck", 27, 14, "vehicle", True, (0, 0, 70)),
    Label("bus", 28, 15, "vehicle", True, (0, 60, 100)),
    Label("caravan", 29, 255, "vehicle", True, (0, 0, 90)),
    Label("trailer", 30, 255, "vehicle", True, (0, 0, 110)),
    Label("train", 31, 16, "vehicle", True, (0, 80, 100)),
    Label("motorcycle", 32, 17, "vehicle", True, (0, 0, 230)),
    Label("bicycle", 33, 18, "vehicle", True, (119, 11, 32)),
)


class ClassTable:
    """A class table and its lookup tables.

    Args:
        labels: the rows.

    Attributes:
        classes: the K classes: the first row of each train id, ordered by train id.
        names: names of the classes.
        colors: RGB colors of the classes.
        mirrored: train id of each class in a mirrored picture; None if all stay the same.

    Raises:
        ValueError: there are no classes, train ids have gaps, two rows have the same id, or the mirrors of
            two classes are not each other.
    """

    def __init__(self, labels: Sequence[Label]):
        self.labels = tuple(labels)
        first: dict[int, Label] = {}
        for label in self.labels:
            first.setdefault(label.train_id, label)
        first.pop(IGNORE, None)
        if sorted(first) != list(range(len(first))) or not first:
            raise ValueError(
                f"train ids are {sorted(first)}; number the classes 0, 1, 2, ... and give void {IGNORE}"
            )
        ids = [label.id for label in self.labels if label.id >= 0]
        twice = next((value for value in ids if ids.count(value) > 1), None)
        if twice is not None:
            raise ValueError(f"id {twice} is in two rows; give each id once")
        self.classes = tuple(first[train_id] for train_id in range(len(first)))
        self.names = tuple(label.name for label in self.classes)
        self.colors = tuple(label.color for label in self.classes)
        same = tuple(range(len(first)))
        mirrors = (first[k].mirror for k in same)
        mirrored = tuple(k if mirror is None else mirror for k, mirror in zip(same, mirrors, strict=True))
        for k, other in enumerate(mirrored):
            if other not in same or mirrored[other] != k:
                raise ValueError(
                    f"{self.names[k]} has the mirror {other}, but the class {other} does not have the mirror "
                    f"{k}; give both or none"
                )
        self.mirrored = None if mirrored == same else mirrored

    def train_ids(self, ignore_label: int = IGNORE) -> np.ndarray:
        """Return the lookup table int16 [256] from label id to train id, with -1 for unknown ids.

        255 is void unless a row has this id: unlabeled pixels are often stored as 255, for example
        the license plates of Cityscapes (id -1 in eight bits).
        """
        table = np.full(256, -1, dtype=np.int16)
        table[255] = ignore_label
        for label in self.labels:
            if label.id >= 0:
                table[label.id] = ignore_label if label.train_id == IGNORE else label.train_id
        return table

    def row_of_color(self) -> np.ndarray:
        """Return the lookup table uint8 [2**24] from R * 65536 + G * 256 + B to row number; 255 if unknown.

        Raises:
            ValueError: two classes have the same color.
        """
        table = np.full(1 << 24, 255, dtype=np.uint8)
        for number, label in enumerate(self.labels):
            key = key_of(label.color)
            before = table[key]
            if before == 255:
                table[key] = number
            elif self.labels[before].train_id != label.train_id:
                raise ValueError(f"{self.labels[before].name} and {label.name} have the same color")
        return table

    def mirror_lookup(self, ignore_label: int = IGNORE) -> np.ndarray | None:
        """Return the lookup table uint8 [256] from train id to that in a mirrored picture; None if the same.

        Void stays void, also if `ignore_label` is a class.
        """
        if self.mirrored is None:
            return None
        table = np.arange(256, dtype=np.uint8)
        for k, other in enumerate(self.mirrored):
            if ignore_label not in (k, other):
                table[k] = other
        return table

    def label_ids(self) -> np.ndarray:
        """Return the id of each class in label pictures, uint8 [K]; the train ids if a class has no id."""
        ids = [label.id for label in self.classes]
        return np.array(ids if min(ids) >= 0 else range(len(ids)), dtype=np.uint8)


CITYSCAPES = ClassTable(LABELS)
NUM_CLASSES = len(CITYSCAPES.classes)


def _zeros() -> np.ndarray:
    return np.zeros(256, np.int64)


@dataclass
class Counts:
    """Number of pixels with each train id, and with each value (not for color labels), as int64 [256]."""

    train_ids: np.ndarray = field(default_factory=_zeros)
    values: np.ndarray = field(default_factory=_zeros)

    def add(self, other: Counts) -> None:
        """Add other counts in place."""
        self.train_ids += other.train_ids
        self.values += other.values


def occurring(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the values that occur in an integer array [h, w], and their counts."""
    if pixels.dtype != np.uint8:
        return np.unique(pixels, return_counts=True)
    counts = _zeros()
    # OpenCV counts in float32, so count at most 2^24 pixels at a time.
    rows = max(1, 2**24 // pixels.shape[1])
    for start in range(0, len(pixels), rows):
        part = cv2.calcHist([pixels[start : start + rows]], [0], None, [256], [0, 256])
        counts += part.ravel().astype(np.int64)
    present = np.flatnonzero(counts)
    return present, counts[present]


#: Maximum number of classes named in one line.
MOST_NAMES = 8


class LabelReader:
    """A reader that converts label files to train ids.

    Args:
        table: class table; None uses the table of Cityscapes for files named `*_labelIds.png`, and takes the
            values of other files as train ids.
        ignore_label: train id of void pixels.
        num_classes: number of classes; None for that of the table.
    """

    def __init__(
        self, table: ClassTable | None = None, ignore_label: int = IGNORE, num_classes: int | None = None
    ):
        self.table = table
        self.ignore_label = ignore_label
        known = table or CITYSCAPES
        self.num_classes = len(known.classes) if num_classes is None else num_classes
        self._by_id = self._checked(known.train_ids(ignore_label))
        self._unchanged = self._checked(np.arange(256, dtype=np.int16))
        self._row_of_color: np.ndarray | None = None

    def _checked(self, train_ids: np.ndarray) -> np.ndarray:
        """Return a lookup table with -1 for all values that are neither a class nor void."""
        known = (train_ids < self.num_classes) | (train_ids == self.ignore_label)
        return np.where(known, train_ids, -1)

    def names(self) -> list[str]:
        """Return the class names."""
        names = (self.table or CITYSCAPES).names
        if len(names) == self.num_classes:
            return list(names)
        return [f"class {number}" for number in range(self.num_classes)]

    def colors(self) -> list[tuple[int, int, int]]:
        """Return the RGB colors of the classes, for as many as the table has."""
        return list((self.table or CITYSCAPES).colors[: self.num_classes])

    def label_ids(self) -> np.ndarray:
        """Return the id of each class in pictures of label ids, uint8 [K]."""
        known = (self.table or CITYSCAPES).label_ids()
        return known if len(known) == self.num_classes else np.arange(self.num_classes, dtype=np.uint8)

    def mirrored(self) -> tuple[int, ...] | None:
        """Return the train id of each class in a mirrored picture; None if all stay the same."""
        return None if self.table is None else self.table.mirrored

    def mirror_lookup(self) -> np.ndarray | None:
        """Return the lookup table of `ClassTable.mirror_lookup`."""
        return None if self.table is None else self.table.mirror_lookup(self.ignore_label)

    def is_cityscapes(self) -> bool:
        """Return whether the classes are the 19 of the Cityscapes benchmark."""
        return self.table is None and self.num_classes == NUM_CLASSES

    def may_be_colors(self, path: str) -> bool:
        """Return whether a label file may be a color picture."""
        return self.table is not None and not path.endswith((LABEL_IDS, LABEL_TRAIN_IDS))

    def read(self, encoded: Encoded, rows: int | None = None) -> np.ndarray:
        """Return the train ids of a label file, uint8 [h, w].

        Args:
            encoded: the label file.
            rows: number of rows to decode and check, from the top; None for all.

        Raises:
            DataError: the file is damaged, not a label, or has a value that is neither a class nor void.
        """
        return self.train_ids(encoded.path, decode_label(encoded, rows))

    def count(self, encoded: Encoded) -> Counts:
        """Return the counts of train ids and values in a label file; see `read` for the errors."""
        path, values = encoded.path, decode_label(encoded)
        counts = Counts()
        if values.ndim == 3:
            present, pixels = occurring(self.train_ids(path, values))
            counts.train_ids[present] = pixels
        else:
            present, pixels = occurring(values)
            np.add.at(counts.train_ids, self._look_up(path, present)[present], pixels)
            counts.values[present] = pixels
        return counts

    def train_ids(self, path: str, values: np.ndarray) -> np.ndarray:
        """Convert a decoded label to train ids, uint8 [h, w].

        Args:
            path: the label file.
            values: its content, from `decode_label`.
        """
        if values.ndim == 3:
            if not self.may_be_colors(path):
                raise no_label(path, "RGB", is_gray(values), colors=False)
            return self._of_colors(path, values)
        look_up = self._look_up(path, occurring(values)[0])
        return cv2.LUT(values.astype(np.uint8, copy=False), look_up.astype(np.uint8))

    def _look_up(self, path: str, present: np.ndarray) -> np.ndarray:
        """Return the lookup table int16 [256] of a file; raise DataError for unknown values in `present`."""
        as_they_are = path.endswith(LABEL_TRAIN_IDS) or (self.table is None and not path.endswith(LABEL_IDS))
        train_ids = self._unchanged if as_they_are else self._by_id
        for value in present.tolist():
            if not 0 <= value < 256 or train_ids[value] < 0:
                what = f"{'train' if as_they_are else 'label'} id {value}"
                raise self._unknown(path, what, value == 255 and not path.endswith(LABEL_TRAIN_IDS))
        return train_ids

    def notes(self, counts: Counts) -> list[str]:
        """Return lines about unusual labels of a data set, such as classes that never occur."""
        notes = []
        if self.ignore_label < self.num_classes:
            notes.append(
                f"class {self._named(self.ignore_label)} is void (--ignore-label {self.ignore_label}), so it "
                "is neither trained nor scored"
            )
        absent = [
            self._named(number)
            for number in range(self.num_classes)
            if not counts.train_ids[number] and number != self.ignore_label
        ]
        if absent:
            more = f" and {len(absent) - MOST_NAMES} more" if len(absent) > MOST_NAMES else ""
            classes, occur = ("class", "occurs") if len(absent) == 1 else ("classes", "occur")
            notes.append(f"{classes} {', '.join(absent[:MOST_NAMES])}{more} {occur} in no label")
        by_value = self._unchanged if self.table is None else self._by_id
        if absent and set(np.flatnonzero(counts.values)) == {0, 255} and by_value[255] == self.ignore_label:
            notes.append(
                "the labels hold only 0 and 255, and 255 is void; if 255 is a class, give --classes a table "
                "with a row for id 255 (docs/own_data.md)"
            )
        return notes

    def _named(self, number: int) -> str:
        """Return the number of a class, with its name if it has one."""
        name = self.names()[number]
        return str(number) if name == f"class {number}" else f"{number} ({name})"

    def _of_colors(self, path: str, colors: np.ndarray) -> np.ndarray:
        """Convert colors, uint8 [h, w, 3] RGB, to train ids uint8 [h, w]."""
        assert self.table is not None
        if self._row_of_color is None:
            try:
                self._row_of_color = self.table.row_of_color()
            except ValueError as error:
                raise DataError(
                    f"--classes: {error}, but {path} is a color picture; give each its own"
                ) from error
        rows = self._row_of_color[color_keys(colors)]
        train_ids = np.full(256, -1, np.int16)
        train_ids[: len(self.table.labels)] = [label.train_id for label in self.table.labels]
        train_ids[train_ids == IGNORE] = self.ignore_label
        train_ids = self._checked(train_ids)
        unknown = train_ids[rows] < 0
        if unknown.any():
            if is_gray(colors):
                raise no_label(path, "RGB", gray=True)
            raise self._unknown(path, f"color {color_text(colors[unknown][0].tolist())}")
        return cv2.LUT(rows, train_ids.astype(np.uint8))

    def _unknown(self, path: str, what: str, is_white: bool = False) -> DataError:
        flag = "--classes" if self.table else "--num-classes"
        advice = (
            "give 255 a row in the table of --classes (docs/own_data.md)" if is_white else "fix the label"
        )
        return DataError(
            f"{path}: {what} is not one of the {self.num_classes} classes or void; {advice}, or check "
            f"{flag} and --ignore-label"
        )


#: The columns of a class table file, and the one that it may have too.
COLUMNS = ("name", "id", "train_id", "color")
MIRROR = "mirror"
#: Maximum bytes of the file, and characters of a name.
MOST_TEXT, LONGEST_NAME = 2**20, 200
#: Maximum number of rows: row numbers have eight bits, and 255 means no row.
MOST_ROWS = 255


def read_table(path: str) -> ClassTable:
    """Read a class table from a text file with tab-separated columns.

    The first line names the columns name, id, train_id and color, in any order. Further columns are ignored,
    and so are empty lines and lines that start with #. id is the value in the label pictures (0 to 255, or -
    for color pictures), train_id is the number of the class (0, 1, 2, ..., or 255 for void), and color is
    R,G,B. A column mirror may have the train id that the class has in a mirrored picture, if it is another.

    Raises:
        DataError: the table is unreadable or invalid; the message names the file and the line.
    """
    text = read_text(path, "class table", "check --classes", MOST_TEXT)
    lines = enumerate(re.split(r"\r\n|\r|\n", text), 1)
    rows = [(number, line.split("\t")) for number, line in lines if line.strip() and line[0] != "#"]
    header = [name.strip() for name in rows[0][1]] if rows else []
    if missing := [name for name in COLUMNS if name not in header]:
        raise DataError(
            f"{path}: the first line has no column {', '.join(missing)}; name the tab-separated columns "
            f"{', '.join(COLUMNS)}"
        )
    labels = []
    for number, cells in rows[1:]:
        if len(cells) != len(header):
            raise DataError(
                f"{path}:{number}: has {len(cells)} columns, the first line {len(header)}; separate them "
                "with tabs"
            )
        row = {name: cell.strip() for name, cell in zip(header, cells, strict=True)}
        try:
            labels.append(_row(row))
        except ValueError as error:
            raise DataError(f"{path}:{number}: {error}") from error
    try:
        if len(labels) > MOST_ROWS:
            raise ValueError(f"has {len(labels)} rows; give at most {MOST_ROWS}")
        return ClassTable(labels)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error


def format_table(table: ClassTable) -> str:
    """Return the text of a class table file, which `read_table` reads.

    The name is the last column, so that the columns align and a name may start with #.

    Raises:
        ValueError: a name is empty, too long or holds a NUL character.
    """
    has_mirrors = table.mirrored is not None
    lines = ["id\ttrain_id\tcolor" + has_mirrors * f"\t{MIRROR}" + "\tname"]
    for label in table.labels:
        name = " ".join(label.name.split())  # tabs and line breaks would end the cell
        if not 0 < len(name) <= LONGEST_NAME or "\0" in name:
            raise ValueError(
                f"the class name {name[:40]!r} can't be written; give one of 1 to {LONGEST_NAME} characters"
            )
        number = "-" if label.id < 0 else str(label.id)
        mirror = f"\t{'-' if label.mirror is None else label.mirror}" if has_mirrors else ""
        lines.append(f"{number}\t{label.train_id}\t{color_text(label.color)}{mirror}\t{name}")
    return "\n".join(lines) + "\n"


def choose_table(path: str | None, num_classes: int | None) -> tuple[ClassTable | None, int]:
    """Return the class table of --classes, or None, and the number of classes.

    Args:
        path: value of --classes.
        num_classes: value of --num-classes.

    Raises:
        DataError: the table is invalid (see `read_table`) or has another number of classes, or there is only
            one class.
    """
    if path is None:
        if num_classes == 1:
            raise DataError(
                "--num-classes 1: one class has probability 1 everywhere, so nothing can be learned; count "
                "the background as a class too and give 2"
            )
        return None, NUM_CLASSES if num_classes is None else num_classes
    table = read_table(path)
    if len(table.classes) == 1:
        raise DataError(
            f"{path}: has one class, whose probability is 1 everywhere, so nothing can be learned; give the "
            "background its own train_id, 0 or 1"
        )
    if num_classes not in (None, len(table.classes)):
        raise DataError(
            f"--num-classes {num_classes}: {path} has {len(table.classes)} classes; omit --num-classes"
        )
    return table, len(table.classes)


def rows_of_table(table: ClassTable | None) -> list[dict[str, Any]]:
    """Return the rows of a class table as JSON values; None is the table of Cityscapes."""
    return [
        {"name": label.name, "id": label.id, "train_id": label.train_id, "color": list(label.color)}
        | ({} if label.mirror is None else {MIRROR: label.mirror})
        for label in (table or CITYSCAPES).labels
    ]


def table_of_rows(path: str, rows: Sequence[Any]) -> ClassTable | None:
    """Return the class table of a checkpoint; None if its classes are those of Cityscapes.

    Args:
        path: the checkpoint, for the error message.
        rows: the rows, from `rows_of_table` or from another program. Their color and mirror may be None.

    Raises:
        DataError: a row or the table is invalid.
    """
    labels = []
    colors = make_palette([])
    try:
        if not isinstance(rows, (list, tuple)):
            raise ValueError("not a list of rows")
        if len(rows) > MOST_ROWS:
            raise ValueError(f"has {len(rows)} rows, more than {MOST_ROWS}")
        for number, row in enumerate(rows):
            cells = {name: row.get(name) if isinstance(row, dict) else None for name in COLUMNS}
            if cells["color"] is None:
                cells["color"] = colors[3 * number : 3 * number + 3]
            if not isinstance(cells["name"], str) or not isinstance(cells["color"], list):
                raise ValueError(f"row {number} is not a label")
            text = {name: str(cell) for name, cell in cells.items()}
            text["color"] = ",".join(map(str, cells["color"]))
            if row.get(MIRROR) is not None:
                text[MIRROR] = str(row[MIRROR])
            labels.append(_row({**text, "id": "-" if cells["id"] == -1 else text["id"]}))
        table = ClassTable(labels)
    except ValueError as error:
        raise DataError(
            f"{path}: its class table is invalid ({error}); give another with --classes"
        ) from error
    cityscapes = table.names == CITYSCAPES.names and table.colors == CITYSCAPES.colors
    numbered = [label.id for label in table.labels] == list(range(NUM_CLASSES))
    same = [label[:3] for label in table.labels] == [label[:3] for label in LABELS]
    return None if cityscapes and (numbered or same) else table


def _row(row: dict[str, str]) -> Label:
    if not row["name"]:
        raise ValueError("has no name; give one")
    if len(row["name"]) > LONGEST_NAME:
        raise ValueError(f"has a name of {len(row['name'])} characters; give at most {LONGEST_NAME}")
    return Label(
        row["name"],
        -1 if row["id"] in ("", "-") else _byte("id", row["id"]),
        _byte("train_id", row["train_id"]),
        "",
        False,
        _color(row["color"]),
        None if row.get(MIRROR, "") in ("", "-") else _byte(MIRROR, row[MIRROR]),
    )


def _byte(column: str, text: str) -> int:
    if not re.fullmatch(r"\d{1,3}", text) or int(text) > 255:
        raise ValueError(f"{column} {text!r} is not a whole number from 0 to 255")
    return int(text)


def _color(text: str) -> Color:
    channels = text.split(",")
    if len(channels) != 3:
        raise ValueError(f"color {text!r} is not R,G,B; give three numbers such as 128,64,128")
    red, green, blue = (_byte("color", channel.strip()) for channel in channels)
    return red, green, blue

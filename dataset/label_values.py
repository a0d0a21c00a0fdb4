"""The values that occur in label pictures, and the class table that they tell."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from dataset.labels import (
    IGNORE,
    MOST_NAMES,
    MOST_ROWS,
    ClassTable,
    Color,
    Label,
    color_keys,
    color_of,
    color_text,
    occurring,
)
from dataset.layout import LABEL_TRAIN_IDS
from dataset.pictures import Encoded, decode_label, load, no_label
from utils.drawing.palette import make_palette
from utils.errors import DataError
from utils.run_files import CLASSES

#: Name of the class of 0 in labels of 0 and 255, and of black.
BACKGROUND = "background"
#: Names of the background and of void, in any case. Those with underscores are labelme's.
BACKGROUNDS, VOIDS = ("_background_", BACKGROUND), ("__ignore__", "ignore", "void")
#: Maximum number of classes: labels have 8 bits, and 255 is void.
MOST_CLASSES = 255
#: Labels with 0, 255 and at least this number of ids, some of them close to 255, are masks with soft edges.
SOFT, CLOSE = 16, 240
BLACK, WHITE = (0, 0, 0), (255, 255, 255)


@dataclass
class Values:
    """The values that occur in label pictures, each with the first file that has it.

    Attributes:
        ids: values of pictures with one channel.
        colors: values of color pictures, as R * 65536 + G * 256 + B.
        palette: RGB colors of the first palette picture; None if there is none.
        used: color of each id that occurs in palette pictures, except 255 (void), and the first file with it.
        clash: a line about an id that has different colors in two palettes; None if there is none.
    """

    ids: dict[int, str] = field(default_factory=dict)
    colors: dict[int, str] = field(default_factory=dict)
    palette: list[Color] | None = None
    used: dict[int, tuple[Color, str]] = field(default_factory=dict)
    clash: str | None = None

    def add(self, other: Values) -> None:
        """Add the values of other pictures in place."""
        for values, more in ((self.ids, other.ids), (self.colors, other.colors)):
            for value, path in more.items():
                values.setdefault(value, path)
        self.palette = self.palette or other.palette
        self.clash = self.clash or other.clash
        for value, (color, path) in other.used.items():
            known, first = self.used.setdefault(value, (color, path))
            if known != color and self.clash is None:
                self.clash = (
                    f"{path}: the palette has {color_text(color)} for the index {value}, but that of {first} "
                    f"has {color_text(known)}; save the labels as RGB, or give a table of the ids if the "
                    "colors mean nothing (docs/own_data.md)"
                )

    def without(self, others: Values) -> Values:
        """Return the ids and colors that do not occur in other pictures."""
        ids, colors = (
            {value: path for value, path in own.items() if value not in known}
            for own, known in ((self.ids, others.ids), (self.colors, others.colors))
        )
        return Values(ids, colors)

    def listed(self) -> str:
        """Return the ids, or the number of colors, as text."""
        ids = f"ids {listed([str(value) for value in sorted(self.ids)])}" if self.ids else ""
        return " and ".join(filter(None, [ids, f"{len(self.colors)} colors" if self.colors else ""]))

    def is_gray(self) -> bool:
        """Return whether there are color pictures, and all their colors are gray."""
        return bool(self.colors) and all(color % 0x10101 == 0 for color in self.colors)


def values_of(encoded: Encoded, decode: Callable[[Encoded], np.ndarray] = decode_label) -> Values:
    """Return the values that occur in a label picture.

    Raises:
        DataError: the file is damaged or not a label, or it has more colors or larger ids than a label.
    """
    path, pixels = encoded.path, decode(encoded)
    if pixels.ndim == 3:
        keys = color_keys(pixels).ravel()
        # Neighbors are mostly equal, so only changes are sorted.
        present = np.unique(keys[np.flatnonzero(np.diff(keys, prepend=-1))]).tolist()
        if len(present) > MOST_CLASSES:
            raise _not_a_label(path, f"holds {len(present)} colors")
        return Values(colors=dict.fromkeys(present, path))
    ids = occurring(pixels)[0].tolist()
    if wrong := [value for value in ids if not 0 <= value <= 255]:
        raise DataError(f"{path}: holds the id {wrong[0]}; number the classes 0 to {MOST_CLASSES - 1}")
    palette = palette_of(encoded)
    known = palette or []
    used = {value: (known[value], path) for value in ids if value < len(known) and value != IGNORE}
    if all(len(set(color)) == 1 for color in known):
        # Grays are spread by the number of indices of a file, from 0 on.
        used = {value: color for value, color in used.items() if value == 0}
    return Values(dict.fromkeys(ids, path), palette=palette, used=used)


def palette_of(encoded: Encoded) -> list[Color] | None:
    """Return the RGB colors of a palette picture by index; None for other pictures."""
    if encoded.header.mode != "P":
        return None
    with Image.open(io.BytesIO(encoded.content)) as picture:
        flat = picture.getpalette() or []
    return [(flat[k], flat[k + 1], flat[k + 2]) for k in range(0, len(flat), 3)]


def _not_a_label(path: str, what: str) -> DataError:
    return DataError(
        f"{path}: {what}; probably it was saved as JPEG, or has soft edges by antialiasing or resizing; "
        "export it again with one value for each class"
    )


def scan(
    paths: Iterable[str],
    problems: list[str] | None = None,
    decode: Callable[[Encoded], np.ndarray] = decode_label,
) -> Values:
    """Return the values that occur in label files.

    Args:
        paths: the files.
        problems: list that gets a line for each file that can't be used; None to raise the first.
        decode: decoder of the files.

    Raises:
        DataError: a file can't be used (see `values_of`), and `problems` is None.
    """
    found = Values()

    def look(path: str) -> Values | DataError:
        try:
            return values_of(load(path), decode)
        except DataError as error:
            return error

    with ThreadPoolExecutor(8) as pool:
        for looked in pool.map(look, paths):
            if isinstance(looked, Values):
                found.add(looked)
            elif problems is not None:
                problems.append(str(looked))
            else:
                pool.shutdown(cancel_futures=True)
                raise looked
    return found


def table_of(source: str, values: Values, names: tuple[str, Sequence[str]] | None = None) -> ClassTable:
    """Return the class table for the values of labels.

    Args:
        source: folder of the labels, for messages.
        values: the values that occur.
        names: file of the class names by id, and the names; None to name the classes after their values.

    Raises:
        DataError: the values do not tell at least two classes, or the names do not fit.
    """
    if values.ids and values.colors:
        raise DataError(
            f"{next(iter(values.ids.values()))}: holds ids, but {next(iter(values.colors.values()))} holds "
            "colors; save all labels alike"
        )
    if values.is_gray():
        raise no_label(next(iter(values.colors.values())), "RGB", gray=True)
    labels = _of_colors(values, names) if values.colors else _of_ids(values, names)
    if len(labels) > MOST_CLASSES:
        raise _not_a_label(
            list(values.colors.values())[-1], f"holds {len(labels)} colors together with the others"
        )
    if len({label.train_id for label in labels} - {IGNORE}) < 2:
        if names:
            raise DataError(
                f"{names[0]}: names fewer than two classes, so nothing can be learned; name the "
                "background too"
            )
        only = listed([*map(str, sorted(values.ids)), *map(color_text, map(color_of, sorted(values.colors)))])
        raise DataError(
            f"{source}: the labels hold only {only}, so there are no two classes to tell apart; label a "
            "second class, or the background"
        )
    return ClassTable(labels)


def _of_colors(values: Values, names: tuple[str, Sequence[str]] | None) -> list[Label]:
    path = next(iter(values.colors.values()))
    if names:
        raise DataError(
            f"{names[0]}: names the classes of ids, but {path} holds colors; write a table of the colors to "
            f"{CLASSES} (docs/own_data.md)"
        )
    colors = map(color_of, sorted(values.colors))  # black is the first
    return [
        Label(BACKGROUND if color == BLACK else f"color {color_text(color)}", -1, number, "", False, color)
        for number, color in enumerate(colors)
    ]


def _of_ids(values: Values, names: tuple[str, Sequence[str]] | None) -> list[Label]:
    present = sorted(values.ids)
    file, given = names or ("", ())
    train_ids = all(path.endswith(LABEL_TRAIN_IDS) for path in values.ids.values())
    if present == [0, IGNORE] and not train_ids and (not names or len(given) == 2):
        no, yes = given or (BACKGROUND, "object")
        return [Label(no, 0, 0, "", False, BLACK), Label(yes, IGNORE, 1, "", False, WHITE)]
    if len(present) > SOFT and {0, IGNORE} <= set(present) and present[-2] >= CLOSE and not names:
        raise _not_a_label(values.ids[present[-2]], f"holds {len(present)} ids together with the others")
    if values.clash and not train_ids:
        raise DataError(values.clash)
    ids = [value for value in present if value != IGNORE]
    if names:
        if ids and ids[-1] >= len(given):
            raise DataError(
                f"{file}: has {len(given)} names, of the ids from 0, but {values.ids[ids[-1]]} holds the id "
                f"{ids[-1]}; name every id, the background too"
            )
        ids = list(range(len(given)))
    elif train_ids:
        ids = list(range(max(ids, default=-1) + 1))
    flat = make_palette([BLACK])
    colors = [(flat[k], flat[k + 1], flat[k + 2]) for k in range(0, len(flat), 3)]
    palette = dict(enumerate(values.palette or []))
    palette |= {value: color for value, (color, _) in values.used.items()}
    if set(ids) <= palette.keys():
        used = {palette[value] for value in ids}
        # A palette of grays says no more than the ids.
        if len(used) == len(ids) and any(len(set(color)) > 1 for color in used):
            colors = [palette.get(value, color) for value, color in enumerate(colors)]
    labels = []
    number = 0
    for value in ids:
        name = given[value] if names else f"class {value}"
        is_void = name.lower() in VOIDS
        labels.append(Label(name, value, IGNORE if is_void else number, "", False, colors[value]))
        number += not is_void
    if IGNORE in present and len(labels) < MOST_ROWS:  # 255 is void without a row too
        labels.append(Label("void", IGNORE, IGNORE, "", False, BLACK))
    return labels


def listed(words: Sequence[str]) -> str:
    """Return words as an enumeration, shortened after MOST_NAMES."""
    if len(words) > MOST_NAMES:
        return f"{', '.join(words[: MOST_NAMES - 1])}, ... and {words[-1]} ({len(words)} in all)"
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))

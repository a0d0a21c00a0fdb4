"""Label pictures of other programs: exact decoding, and the train ids of their values."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from PIL import Image

from dataset.label_values import BACKGROUND, Color, Values, color_keys, color_of, palette_of
from dataset.labels import IGNORE, ClassTable, Label
from dataset.pictures import Encoded, check_label, decode_label, load
from tools.prepare.classes import Numbering, is_background
from tools.prepare.source import Class, Wanted
from utils.errors import DataError
from utils.silence import silence

#: Modes in Pillow of pictures with transparency, which the loader refuses.
TRANSPARENT = ("LA", "PA", "RGBA")
#: Train id of a color that two classes have.
AMBIGUOUS = -2


class Decoder:
    """A decoder of label pictures, which also reads what the loader refuses but what holds exact values.

    Gray pictures and colors with an opaque alpha channel are read without it.

    Args:
        ids: id of each color, R * 65536 + G * 256 + B, if palette pictures are to be read by the colors of
            their palettes; None to read their indices.
        origin: file that the ids are from, for error messages.
    """

    def __init__(self, ids: Mapping[int, int] | None = None, origin: str = ""):
        self.ids = ids
        self.origin = origin

    def __call__(self, encoded: Encoded) -> np.ndarray:
        """Return ids, integers [h, w], or colors, uint8 [h, w, 3] RGB.

        Raises:
            DataError: the file may not hold exact values, or has transparent pixels or an unknown color.
        """
        if encoded.header.mode in TRANSPARENT:
            return _opaque(encoded)
        label = decode_label(encoded)
        if self.ids is None or encoded.header.mode != "P":
            return label
        look_up = np.arange(256)
        for value in np.unique(label).tolist():
            # In palette pictures, 255 is void whatever its color is.
            if value != IGNORE:
                look_up[value] = self._id_of(encoded, value)
        return look_up[label]

    def _id_of(self, encoded: Encoded, index: int) -> int:
        """Return the id of an index of a palette picture."""
        assert self.ids is not None
        palette = palette_of(encoded) or []
        color = palette[index] if index < len(palette) else None
        found = None if color is None else self.ids.get(key_of(color))
        if found is None:
            what = "no color" if color is None else f"the color {text_of(color)}"
            raise DataError(
                f"{encoded.path}: its palette has {what} for the index {index}, which is not in "
                f"{self.origin}; add the color there"
            )
        return found


def _opaque(encoded: Encoded) -> np.ndarray:
    """Decode a label that has an alpha channel, without it."""
    path, header = encoded.path, encoded.header
    check_label(path, header)
    if header.depth > 8:
        raise DataError(f"{path}: has an alpha channel and {header.depth} bits per channel; save it with 8")
    try:
        with silence, Image.open(io.BytesIO(encoded.content)) as picture:
            pixels = np.array(picture if header.mode != "PA" else picture.convert("RGBA"))
    except Exception as error:  # Pillow's decoders raise all kinds of errors for damaged files
        raise DataError(f"{path}: not a readable picture; copy it again") from error
    if (pixels[..., -1] != 255).any():
        raise DataError(
            f"{path}: has transparent pixels, whose class is unknown; save it without transparency"
        )
    return pixels[..., 0] if header.mode == "LA" else pixels[..., :3]


def key_of(color: Color) -> int:
    """Return R * 65536 + G * 256 + B of a color."""
    return color[0] << 16 | color[1] << 8 | color[2]


def text_of(color: Color) -> str:
    """Return a color as R,G,B."""
    return ",".join(map(str, color))


def without_gray_colors(values: Values, table: ClassTable | None) -> tuple[Values, bool]:
    """Take gray colors for ids, if all colors are gray and the class table does not have them.

    Returns:
        The values, and whether gray color pictures hold ids.
    """
    known = {key_of(label.color) for label in table.labels} if table else set()
    if not values.is_gray() or values.colors.keys() <= known:
        return values, False
    ids = {color_of(key)[0]: path for key, path in values.colors.items()}
    return Values(values.ids | ids, palette=values.palette), True


class Meaning(NamedTuple):
    """Train ids of the values in the label pictures of a source."""

    by_id: np.ndarray  # int16 [256], -1 for unknown ids
    by_color: dict[int, int]  # train id by color
    decoder: Decoder
    is_gray: bool  # whether gray color pictures hold ids

    def read(self, path: str) -> np.ndarray:
        """Return the train ids of a label picture, uint8 [h, w].

        Raises:
            DataError: the file has changed since it was checked.
        """
        pixels = self.decoder(load(path))
        if pixels.ndim == 3 and self.is_gray:
            pixels = pixels[..., 0]
        if pixels.ndim == 2:
            train_ids = self.by_id[np.clip(pixels, 0, IGNORE)]
        else:
            keys, places = np.unique(color_keys(pixels), return_inverse=True)
            found = [self.by_color.get(key, -1) for key in keys.tolist()]
            train_ids = np.array(found, np.int16)[places].reshape(pixels.shape[:2])
        if (train_ids < 0).any():
            raise DataError(f"{path}: has changed while it was read; run the command again")
        return train_ids.astype(np.uint8)


def number_rows(
    table: ClassTable, is_named: bool, wanted: Wanted
) -> tuple[tuple[Class, ...], dict[Label, int | None], str | None]:
    """Give train ids to the rows of the class table of a source, as the flags want them.

    Args:
        table: the classes of the source.
        is_named: whether the names are from the source and not from --classes, which then orders them.
        wanted: the flags. --unlabeled void makes the background void; later classes move up.

    Returns:
        The classes, the train id of each row (None for a row that --classes does not have), and a problem.
    """
    classes = tuple(Class(label.name, label.color) for label in table.classes)
    train_ids: dict[Label, int | None] = {label: label.train_id for label in table.labels}
    is_void_already = False
    if is_named and wanted.names is not None:
        colors = {each.name: each.color for each in classes}
        classes = tuple(Class(name, colors.get(name)) for name in wanted.names)
        order = dict(wanted.train_ids or {name: number for number, name in enumerate(wanted.names)})
        numbering = Numbering(classes, order, IGNORE, wanted.origin)
        for label in table.labels:
            found = IGNORE if label.train_id == IGNORE else numbering.train_id(label.name)
            if found is None and wanted.unlabeled_void and is_background(label.name):
                found, is_void_already = IGNORE, True
            train_ids[label] = found
    if not wanted.unlabeled_void or is_void_already:
        return classes, train_ids, None
    background = next((number for number, each in enumerate(classes) if is_background(each.name)), None)
    if background is None:
        # A class table of a flag says itself what is void.
        problem = f"--unlabeled void: the labels have no class {BACKGROUND}"
        problem += f", and id 0 is {classes[0].name}; omit the flag, or name the classes with --classes"
        return classes, train_ids, None if wanted.table else problem
    for label, number in train_ids.items():
        if number == background:
            train_ids[label] = IGNORE
        elif number is not None and background < number < IGNORE:
            train_ids[label] = number - 1
    return classes[:background] + classes[background + 1 :], train_ids, None


def look_up_tables(
    table: ClassTable, train_ids: Mapping[Label, int | None]
) -> tuple[np.ndarray, dict[int, int]]:
    """Return the train ids by id, int16 [256] with -1 for unknown ones, and by color or AMBIGUOUS."""
    by_id = np.full(256, -1, np.int16)
    by_id[IGNORE] = IGNORE
    by_color: dict[int, int] = {}
    for label in table.labels:
        number = train_ids[label]
        if label.id >= 0:
            by_id[label.id] = -1 if number is None else number
        if number is not None and by_color.setdefault(key_of(label.color), number) != number:
            by_color[key_of(label.color)] = AMBIGUOUS
    return by_id, by_color


def unknown_values(values: Values, by_id: np.ndarray, by_color: Mapping[int, int], origin: str) -> list[str]:
    """Return a line for each value of the labels that has no class."""
    problems = [
        f"{path}: holds the id {value}, which is not in {origin}; correct the label or add the id there"
        for value, path in sorted(values.ids.items())
        if by_id[value] < 0
    ]
    problems += [
        f"{path}: holds the color {text_of(color_of(key))}, which is not in {origin}; correct the label or "
        "add the color there"
        for key, path in sorted(values.colors.items())
        if key not in by_color
    ]
    problems += [
        f"{path}: holds the color {text_of(color_of(key))}, which two classes have in {origin}; give each "
        "its own"
        for key, path in sorted(values.colors.items())
        if by_color.get(key) == AMBIGUOUS
    ]
    return problems

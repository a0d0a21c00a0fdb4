"""Pictures that an annotation file lists, as in COCO and CVAT: their shapes, files, and label pictures."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np

from dataset.split import sides_in
from tools.prepare.classes import number_classes
from tools.prepare.pictures import Finder, examine
from tools.prepare.reading import Tally, by_x, count, folder_of, number_of
from tools.prepare.source import Class, Found, Problems, Scene, Wanted, own_split
from utils.errors import DataError


class Shape(Protocol):
    """A shape with a label."""

    @property
    def label(self) -> str:
        """Return the name of its class."""

    @property
    def where(self) -> str:
        """Return its kind and number in the file, for messages."""

    def draw(self, label: np.ndarray, value: int) -> None:
        """Set the pixels of the shape in `label`, uint8 [h, w]."""

    def lies(self, size: tuple[int, int]) -> str | None:
        """Return how the shape lies in its picture: None for inside, or "clipped", "tiny" or "outside"."""


class Listed(NamedTuple):
    """A picture as an annotation file has it."""

    file: str  # the annotation file
    name: str  # path of the picture
    size: tuple[int, int]  # height and width
    shapes: list[Shape]  # in the order of drawing
    told: str = ""  # path whose folders name the part of the split that the annotations tell

    @property
    def part(self) -> str | None:
        """Return train, val or test; None if the annotations do not tell one."""
        sides = sides_in(self.told)
        return next(iter(sides)) if len(sides) == 1 else None


def draw_picture(size: tuple[int, int], drawn: Sequence[tuple[int, Shape]], fill: int) -> np.ndarray:
    """Return the train ids of a picture, uint8 [h, w].

    Args:
        size: height and width.
        drawn: train ids and shapes, in the order of drawing.
        fill: train id of the other pixels.
    """
    label = np.full(size, fill, np.uint8)
    for train_id, shape in drawn:
        shape.draw(label, train_id)
    return label


def find_all(
    source: str,
    wanted: Wanted,
    labels: Iterable[Class],
    pictures: Sequence[Listed],
    problems: list[str],
    what: str,
) -> Found:
    """Find the pictures of annotation files, and check their sizes and shapes.

    Args:
        source: file or folder of the annotations.
        wanted: the flags.
        labels: the labels in the order in which classes get train ids.
        pictures: the pictures of all files.
        problems: problems found before, which are raised with those found here.
        what: shapes in the words of the format, for messages.

    Raises:
        Problems: a picture is missing, unreadable, listed twice or of another size, or a label is unknown.
    """
    problems = list(problems)
    numbering = number_classes(labels, wanted)
    problems += numbering.problems(
        (shape.label, picture.file) for picture in pictures for shape in picture.shapes
    )
    finder = Finder(folder_of(source), wanted.pictures)
    tally = Tally()
    scenes: list[Scene] = []
    used: set[str] = set()
    both: list[str] = []
    for picture in pictures:
        try:
            path, name, upright = _find(picture, finder, both)
        except DataError as error:
            problems.append(str(error))
            continue
        if (file := os.path.realpath(path)) in used:
            problems.append(
                f"{picture.file}: lists {picture.name} ({path}) a second time; remove one of the two"
            )
        used.add(file)
        _check_shapes(picture, tally, problems)
        drawn = [(numbering.drawn(shape.label), shape) for shape in picture.shapes]
        draw = partial(draw_picture, picture.size, drawn, numbering.fill)
        scenes.append(Scene(name, path, picture.size, draw, upright))
    if not pictures and not problems:
        problems.append(f"{source}: lists no picture; name a source of this format")
    if not problems and not any(picture.shapes for picture in pictures):
        problems.append(f"{source}: no {what} in {number_of(pictures, 'picture')}; label them first")
    if problems:
        raise Problems(source, problems)
    notes = [*finder.notes(), *tally.notes()]
    if both:
        notes.append(
            f"{count(both, 'picture')} turned or mirrored by an orientation tag, and of the same size "
            "both ways; their labels are taken for those of the upright picture, which annotation "
            f"programs show; if they are for the stored picture, remove the tag; the first is {both[0]}"
        )
    if empty := [picture.name for picture in pictures if not picture.shapes]:
        notes.append(f"{count(empty, 'picture')} without {what}, and background; the first is {empty[0]}")
    scenes = own_split(scenes, notes, [picture.told for picture in pictures])
    return Found(numbering.classes, scenes, notes)


def _find(picture: Listed, finder: Finder, both: list[str]) -> tuple[str, str, bool]:
    """Return the file of a picture, its name, and whether its labels belong to the upright picture.

    `both` receives a file with an orientation tag that has the same size as stored and upright.

    Raises:
        DataError: it is missing, unreadable or of another size.
    """
    folder = os.path.dirname(picture.file) or os.curdir
    try:
        path = finder.find(picture.name, folder, picture.part)
    except DataError as error:
        raise DataError(f"{picture.file}: {error}") from error
    if path is None:
        raise DataError(
            f"{picture.file}: its picture {picture.name} is missing; copy it next to the file, or give "
            "--images its folder"
        )
    examined = examine(path)
    # The size tells whether the labels belong to the stored or to the upright picture. If both have this
    # size, they belong to the upright one, which annotation programs show.
    if picture.size not in (examined.upright, examined.stored):
        raise DataError(
            f"{picture.file}: says that {picture.name} has {by_x(picture.size)} pixels, but {path} has "
            f"{by_x(examined.upright)}; use files that belong together"
        )
    if examined.fits_both:
        both.append(path)
    name = finder.name_of(path, os.path.relpath(folder, finder.source))
    return path, name, picture.size == examined.upright


def _check_shapes(picture: Listed, tally: Tally, problems: list[str]) -> None:
    """Check how shapes lie in their picture. Its file has the declared size, which could else be huge."""
    for shape in picture.shapes:
        where = f"{picture.file}: {shape.where} ({shape.label})"
        outside = f"{where} is outside of {picture.name} ({by_x(picture.size)} pixels)"
        tally.add(shape.lies(picture.size), picture.file, outside, problems)

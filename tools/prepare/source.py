"""The interface of the readers of tools.prepare: flags in, classes and scenes of a labeled source out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dataset.labels import ClassTable
from dataset.split import TRAIN, VAL, sides_of
from utils.errors import DataError


class Wanted(NamedTuple):
    """The flags that a reader needs."""

    pictures: str | None = None  # folder of the pictures; None to look for it
    names: tuple[str, ...] | None = None  # class names in the order of their train ids; None for the source's
    ids: tuple[str, ...] | None = None  # lines of --classes if it is a list of names, for ids from 0
    unlabeled_void: bool = False  # whether pixels that no shape covers are void instead of background
    train_ids: Mapping[str, int] | None = None  # train id of each label in --classes, 255 for void
    origin: str = "--classes"  # flag or file that `names` come from, for error messages
    table: ClassTable | None = None  # --classes, if it has ids and colors; the values of label pictures


class Class(NamedTuple):
    """A class of a source."""

    name: str
    color: tuple[int, int, int] | None = None  # RGB; None if the source has none


class Scene(NamedTuple):
    """A picture with its labels, which are drawn when they are needed."""

    name: str  # path of the picture relative to its folder, without its ending; the results keep it
    picture: str  # picture file
    size: tuple[int, int]  # height and width of the label picture
    draw: Callable[[], np.ndarray]  # returns the train ids, uint8 [h, w], 255 for void
    upright: bool = False  # whether the labels belong to the picture turned by its orientation tag
    content: Callable[[], bytes] | None = None  # returns the picture, if an annotation file holds it
    part: str | None = None  # train, val or test, if the source has a split of its own


class Found(NamedTuple):
    """A source that was read and checked."""

    classes: tuple[Class, ...]  # in the order of their train ids
    scenes: list[Scene]
    notes: list[str]  # lines about what was recognized and what is left out


def own_split(scenes: Sequence[Scene], notes: list[str], told: Sequence[str] | None = None) -> list[Scene]:
    """Return the scenes with the parts of the split that folders name.

    Args:
        scenes: the scenes.
        notes: receives a line if folders name parts but do not divide the pictures.
        told: for each scene, a path whose folders are looked at before those of the scenes' names.
    """
    names = [scene.name for scene in scenes]
    parts: list[str | None] = [None] * len(names)
    for paths in (told or names, names):
        found, note = sides_of(paths, names)
        parts = [part or other for part, other in zip(parts, found, strict=True)]
        if note:
            notes.append(note)
        if note or {TRAIN, VAL} <= {*parts}:
            break
    return [scene._replace(part=part) for scene, part in zip(scenes, parts, strict=True)]


class Problems(DataError):
    """All problems of a source that can't be prepared.

    Args:
        source: file or folder that was read.
        lines: the problems, at least one; each line names the file, what is wrong and what to do.
    """

    def __init__(self, source: str, lines: Sequence[str]):
        first = lines[0]
        super().__init__(
            first if len(lines) == 1 else f"{source}: {len(lines)} problems, the first is {first}"
        )
        self.lines = list(lines)

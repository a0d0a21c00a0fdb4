"""Picture files of a source: where they are, their sizes, and the orientation tags of cameras."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from dataset.layout import files_below
from dataset.pictures import TURNED, check_picture, read_header, read_orientation
from tools.prepare.reading import by_x, count
from tools.prepare.source import Scene
from tools.sources import PICTURES
from utils.errors import DataError


class Picture(NamedTuple):
    """A picture file, from its header."""

    path: str
    stored: tuple[int, int]  # height and width as stored
    orientation: int  # 1 to 8, as in Exif; 1 is upright

    @property
    def upright(self) -> tuple[int, int]:
        """Return the height and width as viewers show the picture."""
        height, width = self.stored
        return (width, height) if self.orientation in TURNED else (height, width)


def examine(path: str) -> Picture:
    """Check that training can read a picture, and return its size and orientation.

    Raises:
        DataError: the file is missing, not a picture, truncated, or of a format that is not supported.
    """
    header = read_header(path)
    check_picture(path, header)
    orientation = read_orientation(path)
    if header.format == "TIFF" and orientation != 1:  # about which decoders disagree
        raise DataError(f"{path}: is a TIFF picture that is stored turned or mirrored; save it as PNG")
    return Picture(path, (header.height, header.width), orientation)


def turned_upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """Return a picture [h, w, 3] as viewers show it.

    Args:
        image: the pixels as stored.
        orientation: the tag, 1 to 8.
    """
    if orientation in TURNED:
        image = image.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


class Listed(NamedTuple):
    """A picture as an annotation file has it."""

    file: str  # the annotation file
    name: str  # path of the picture
    size: tuple[int, int]  # height and width
    draw: Callable[[], np.ndarray]  # see Scene


class Finder:
    """A search for the pictures that an annotation file names.

    Args:
        source: folder of the source.
        pictures: folder of --images; None to search in the source.
    """

    def __init__(self, source: str, pictures: str | None):
        self.source = source
        self.pictures = pictures
        self._by_name: dict[str, list[str]] | None = None

    @property
    def root(self) -> str:
        """Return the folder in which pictures are searched."""
        return self.pictures or self.source

    def find(self, name: str, folder: str) -> str | None:
        """Return the file of a picture; None if there is none.

        It is looked for next to the annotation file, in folders called images, in that of --images, and then
        anywhere below these by the end of its path.

        Args:
            name: path of the picture in the annotation file; backslashes separate folders too.
            folder: folder of the annotation file.

        Raises:
            DataError: several files fit.
        """
        name = name.replace("\\", "/")
        if not name.strip("/."):
            return None
        beside = [folder, os.path.join(folder, "images"), os.path.join(os.path.dirname(folder), "images")]
        for place in (*([self.pictures] if self.pictures else []), *beside):
            path = os.path.normpath(os.path.join(place, name))
            if os.path.isfile(path):
                return path
        return self._below(name)

    def _below(self, name: str) -> str | None:
        if self._by_name is None:
            self._by_name = defaultdict(list)
            for path in self.all():
                file = os.path.basename(path)
                self._by_name[file].append(path)
                self._by_name[os.path.splitext(file)[0]].append(path)  # frames of videos have no ending
        # The folders of an absolute path are those of another machine.
        is_absolute = name.startswith("/") or name[1:2] == ":"
        parts = [part for part in name.split("/") if part not in ("", ".", "..")]
        if is_absolute or not parts:
            parts = parts[-1:]
        found = []
        for path in self._by_name.get(parts[-1], ()) if parts else ():
            if path.split(os.sep)[-len(parts) : -1] == parts[:-1]:
                found.append(path)
        if len(found) > 1:
            raise DataError(f"{name} may be {found[0]} or {found[1]}; give --images the right folder")
        return found[0] if found else None

    def all(self) -> list[str]:
        """Return all picture files in the folder of --images, or else in the source."""
        root = self.root
        return [
            os.path.join(root, inner, file)
            for inner, file in files_below(root, "")[0]
            if file.lower().endswith(PICTURES)
        ]

    def name_of(self, picture: str, folder: str = "") -> str:
        """Return the name of a scene: the path of its picture without ending, below the folder of pictures.

        Args:
            picture: the file.
            folder: folder, relative to that of the source, for a picture outside of it.
        """
        for root in filter(None, (self.pictures, self.source)):
            relative = os.path.relpath(picture, root)
            if relative.split(os.sep)[0] != os.pardir:
                stem = os.path.splitext(relative)[0]
                return stem.removeprefix("images" + os.sep) or stem
        return os.path.normpath(os.path.join(folder, os.path.splitext(os.path.basename(picture))[0]))

    def scenes(self, pictures: Iterable[Listed], problems: list[str], notes: list[str]) -> list[Scene]:
        """Find pictures that COCO or CVAT list, and compare their sizes.

        Args:
            pictures: the pictures.
            problems: receives a line for each that is missing, unreadable, listed twice or of another size.
            notes: receives a line about those whose size fits both as stored and upright.
        """
        both: list[str] = []
        scenes: list[Scene] = []
        used: set[str] = set()
        for picture in pictures:
            try:
                scene = self._scene(picture, both)
            except DataError as error:
                problems.append(str(error))
                continue
            if (file := os.path.realpath(scene.picture)) in used:
                problems.append(
                    f"{picture.file}: lists {picture.name} ({scene.picture}) a second time; remove one "
                    "of the two"
                )
            used.add(file)
            scenes.append(scene)
        if both:
            notes.append(
                f"{count(both, 'picture')} turned or mirrored by an orientation tag, and of the same size "
                "both ways; their labels are taken for those of the upright picture, which annotation "
                f"programs show; if they are for the stored picture, remove the tag; the first is {both[0]}"
            )
        return scenes

    def _scene(self, picture: Listed, both: list[str]) -> Scene:
        """Return the scene of a picture; `both` receives a file of the same size as stored and upright."""
        folder = os.path.dirname(picture.file) or os.curdir
        try:
            path = self.find(picture.name, folder)
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
        if examined.orientation != 1 and examined.upright == examined.stored:
            both.append(path)
        name = self.name_of(path, os.path.relpath(folder, self.source))
        return Scene(name, path, picture.size, picture.draw, upright=picture.size == examined.upright)

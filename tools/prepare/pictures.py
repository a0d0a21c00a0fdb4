"""Picture files of a source: where they are, their sizes, and the orientation tags of cameras."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from typing import NamedTuple

from dataset.layout import files_below
from dataset.pictures import ENDINGS, TURNED, check_picture, read_header, read_orientation
from dataset.split import sides_in
from tools.prepare.reading import count
from tools.sources import first_names
from utils.errors import DataError

#: Words in the names of folders that hold label pictures: whole ones, ends and a start.
LABEL_WORDS = ("gt", "gtcoarse", "gtfine", "groundtruth", "truth")
LABEL_ENDS = ("annot", "annotation", "annotations", "label", "labels", "mask", "masks")
LABEL_START = "segmentation"


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

    @property
    def fits_both(self) -> bool:
        """Return whether the picture has an orientation tag but the same size as stored and upright."""
        return self.orientation != 1 and self.stored == self.upright


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


class Finder:
    """A search for the pictures that annotation files name.

    A path in an annotation file may lead anywhere. It is followed only below SOURCE and --images; of other
    paths, the last part counts.

    Args:
        source: folder of the source.
        pictures: folder of --images; None to search in the source.
    """

    def __init__(self, source: str, pictures: str | None):
        self.source = source
        self.pictures = pictures
        self._by_name: dict[str, list[str]] | None = None
        self._found: list[str] = []  # pictures that were found by their names
        self._neighbors: list[str] = []  # pictures next to the source

    @property
    def root(self) -> str:
        """Return the folder in which pictures are searched."""
        return self.pictures or self.source

    def find(self, name: str, folder: str, part: str | None = None) -> str | None:
        """Return the file of a picture; None if there is none.

        It is looked for next to the annotation file, in folders called images, in that of --images, and then
        anywhere below these by the end of its path, except in folders of labels.

        Args:
            name: path of the picture in the annotation file; backslashes separate folders too.
            folder: folder of the annotation file.
            part: train, val or test, if the annotation file tells; of several files that fit, the one in a
                folder of this name is taken.

        Raises:
            DataError: several files fit.
        """
        name = name.replace("\\", "/")
        if not name.strip("/."):
            return None
        beside = [folder, os.path.join(folder, "images"), os.path.join(os.path.dirname(folder), "images")]
        for place in (*([self.pictures] if self.pictures else []), *beside):
            if path := self.path_in(place, name):
                return path
        if found := self._below(name, part):
            self._found.append(found)
        return found

    def path_in(self, place: str, name: str, neighbors: bool = False) -> str | None:
        """Return the file that a path from an annotation file names; None if there is none.

        Args:
            place: folder that the path is relative to.
            name: the path, with slashes.
            neighbors: whether it may lead to the folders next to the source: labelme's imagePath is often
                ../pictures/1.jpg.
        """
        path = os.path.normpath(os.path.join(place, name))
        if _leads_out(name):
            roots = [os.path.abspath(root) for root in (self.source, self.pictures) if root]
            if not any(_is_below(path, root) for root in roots):
                parent = os.path.dirname(roots[0])
                is_neighbor = neighbors and not _is_absolute(name) and parent != os.path.dirname(parent)
                if not is_neighbor or not _is_below(path, parent):
                    path = os.path.join(place, _last(name))
                elif os.path.isfile(path):
                    self._neighbors.append(path)
        return path if os.path.isfile(path) else None

    def _below(self, name: str, part: str | None) -> str | None:
        if self._by_name is None:
            self._by_name = defaultdict(list)
            for path in self.all():
                file = os.path.basename(path)
                self._by_name[file].append(path)
                self._by_name[os.path.splitext(file)[0]].append(path)  # frames of videos have no ending
        paths = found = self._by_name.get(_last(name), [])
        # The folders of an absolute path are those of another machine.
        if not _is_absolute(name):
            inner = [each for each in name.split("/")[:-1] if each not in ("", ".", "..")]
            found = [path for path in paths if not inner or path.split(os.sep)[-len(inner) - 1 : -1] == inner]
            found = found or (paths if _leads_out(name) else [])
        if len(found) > 1 and part is not None:
            fitting = [path for path in found if sides_in(os.path.relpath(path, self.root)) == {part}]
            found = fitting if len(fitting) == 1 else found
        if len(found) > 1:
            raise DataError(f"{name} may be {found[0]} or {found[1]}; give --images the right folder")
        return found[0] if found else None

    def all(self) -> list[str]:
        """Return the picture files in the folder of --images, or else in the source, without labels."""
        root = self.root
        return [
            os.path.join(root, inner, file)
            for inner, file in files_below(root, "")[0]
            if file.lower().endswith(ENDINGS) and not any(map(holds_labels, inner.split(os.sep)))
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

    def notes(self) -> list[str]:
        """Return lines about pictures that are not where they are expected."""
        notes = []
        if self._found:
            folders = first_names(sorted({os.path.dirname(path) for path in self._found}))
            notes.append(
                f"{count(self._found, 'picture')} not where the annotations say, and taken by name from "
                f"{folders}"
            )
        if self._neighbors:
            first = self._neighbors[0]
            notes.append(
                f"{count(self._neighbors, 'picture')} outside of {self.source}; the first is {first}"
            )
        return notes


def _is_absolute(path: str) -> bool:
    return path.startswith("/") or path[1:2] == ":"


def _leads_out(path: str) -> bool:
    """Return whether a path with slashes may lead out of its folder."""
    return _is_absolute(path) or ".." in path.split("/")


def _last(path: str) -> str:
    """Return the last part of a path with slashes, without a drive letter."""
    return re.split("[/:]", path)[-1] if _is_absolute(path) else path.rsplit("/", 1)[-1]


def _is_below(path: str, folder: str) -> bool:
    return os.path.commonpath([os.path.abspath(path), folder]) == folder


def holds_labels(folder: str) -> bool:
    """Return whether a folder has the name of one with label pictures, such as train_masks."""
    words = re.findall("[a-z]+", folder.lower())
    return any(
        word in LABEL_WORDS or word.endswith(LABEL_ENDS) or word.startswith(LABEL_START) for word in words
    )

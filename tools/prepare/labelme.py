"""Reader of labelme: a JSON file of shapes next to each picture.

Later shapes cover earlier ones, as in labelme.
"""

from __future__ import annotations

import base64
import os
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dataset.pictures import ENDINGS, Encoded, check_content, check_picture
from tools.prepare.classes import (
    Numbering,
    cleaned,
    names_beside,
    number_classes,
    read_classes,
)
from tools.prepare.labelme_shapes import Shape, draw_shape, parse_shape, reach
from tools.prepare.pictures import Finder, examine
from tools.prepare.reading import (
    Tally,
    annotation_files,
    as_dicts,
    as_size,
    by_x,
    count,
    folder_of,
    parse_all,
    read_json,
)
from tools.prepare.source import Class, Found, Problems, Scene, Wanted, own_split
from utils.errors import DataError


class Page(NamedTuple):
    """An annotation file."""

    path: str
    picture: str  # imagePath
    size: tuple[int, int] | None  # imageHeight and imageWidth
    shapes: list[Shape]
    has_picture: bool  # whether it holds the picture itself


def draw_page(size: tuple[int, int], shapes: list[Shape], numbering: Numbering) -> np.ndarray:
    """Return the train ids of a picture, uint8 [h, w]."""
    image = Image.new("L", size[::-1], numbering.fill)
    for shape in shapes:
        draw_shape(image, shape, numbering.drawn(shape.label))
    return np.array(image)


def read_labelme(source: str, wanted: Wanted) -> Found:
    """Read labelme's JSON files: a file, or all of a folder and its subfolders.

    Raises:
        Problems: a file is invalid, a picture is missing, or a label is unknown.
    """
    problems: list[str] = []
    notes: list[str] = []
    if wanted.names is None and (beside := names_beside(source)):
        try:
            wanted = read_classes(beside, wanted.unlabeled_void, "")[0]._replace(pictures=wanted.pictures)
        except DataError as error:
            problems.append(str(error))
    pages = _read_pages(source, problems, notes)
    labels = {cleaned(shape.label) for page in pages for shape in page.shapes}
    numbering = number_classes(map(Class, sorted(labels)), wanted)
    problems += numbering.problems((shape.label, page.path) for page in pages for shape in page.shapes)
    finder = Finder(folder_of(source), wanted.pictures)
    tally = Tally()
    scenes: list[Scene] = []
    used: dict[str, str] = {}
    for page in pages:
        try:
            scene = _scene(page, finder, numbering)
        except DataError as error:
            problems.append(str(error))
            continue
        if scene.content is None and used.setdefault(os.path.realpath(scene.picture), page.path) != page.path:
            problems.append(
                f"{page.path}: has the same picture as {used[os.path.realpath(scene.picture)]}, "
                f"{scene.picture}; remove one of the two"
            )
        for number, shape in enumerate(page.shapes, 1):
            try:
                lies = reach(shape, scene.size)
            except ValueError as error:
                problems.append(f"{_where(page.path, number, shape.label)}: {error}")
                continue
            where = _where(page.path, number, shape.label)
            tally.add(
                lies, page.path, f"{where}: is outside of its picture ({by_x(scene.size)} pixels)", problems
            )
        scenes.append(scene)
    if problems:
        raise Problems(source, problems)
    if empty := [page.path for page in pages if not page.shapes]:
        notes.append(f"{count(empty, 'picture')} without shapes, the first is {empty[0]}")
    unlabeled = [path for path in finder.all() if os.path.realpath(path) not in used]
    unlabeled = [path for path in unlabeled if not os.path.isfile(os.path.splitext(path)[0] + ".json")]
    if unlabeled:
        notes.append(
            f"{count(unlabeled, 'picture')} without a JSON file, and left out; the first is {unlabeled[0]}"
        )
    notes += [*finder.notes(), *tally.notes()]
    scenes = own_split(scenes, notes, [os.path.relpath(page.path, finder.source) for page in pages])
    return Found(numbering.classes, scenes, notes)


def _read_pages(source: str, problems: list[str], notes: list[str]) -> list[Page]:
    others: list[str] = []

    def parse(path: str) -> Page | None:
        content = read_json(path)
        if isinstance(content, dict) and "shapes" in content:
            return _page(path, content)
        others.append(path)
        return None

    pages = [*filter(None, parse_all(annotation_files(source, ".json"), parse, problems))]
    if others:
        notes.append(f"{count(others, 'JSON file')} not of labelme, and left out; the first is {others[0]}")
    if not problems and not any(page.shapes for page in pages):
        problems.append(f"{source}: no shape in {len(pages)} labelme files; label the pictures first")
    return pages


def _page(path: str, content: dict[str, Any]) -> Page:
    """Return the checked content of an annotation file.

    Raises:
        DataError: a value is invalid. Problems has a line for each invalid shape.
    """
    picture, embedded = content.get("imagePath"), content.get("imageData")
    listed = as_dicts(content["shapes"])
    if listed is None:
        raise DataError(f"{path}: shapes is not a list of objects; save the file with labelme again")
    if not isinstance(picture, str) or not isinstance(embedded, (str, type(None))):
        raise DataError(f"{path}: imagePath or imageData is not text; save the file with labelme again")
    height, width = content.get("imageHeight"), content.get("imageWidth")
    size = as_size(height, width)
    if size is None and (height, width) != (None, None):
        raise DataError(
            f"{path}: imageHeight and imageWidth are not whole numbers above 0; save the file with "
            "labelme again"
        )
    shapes, problems = [], []
    for number, each in enumerate(listed, 1):
        try:
            shapes.append(parse_shape(each))
        except ValueError as error:
            problems.append(f"{_where(path, number, each.get('label'))}: {error}")
    if problems:
        raise Problems(path, problems)
    return Page(path, picture, size, shapes, bool(embedded))


def _where(path: str, number: int, label: object) -> str:
    return f"{path}: shape {number}" + (f" ({label})" if isinstance(label, str) and label else "")


def _scene(page: Page, finder: Finder, numbering: Numbering) -> Scene:
    """Find the picture of an annotation file, and compare its size."""
    folder, file = os.path.split(page.path)
    picture = _find(page, finder)
    inner = os.path.relpath(folder or os.curdir, finder.source)
    if picture is not None:
        examined = examine(picture)
        size, name = examined.upright, finder.name_of(picture, inner)
    elif page.has_picture:
        picture = page.path
        encoded = embedded_picture(page.path)
        size = encoded.height, encoded.width
        name = os.path.normpath(os.path.join(inner, os.path.splitext(file)[0]))
    else:
        raise DataError(
            f"{page.path}: its picture {page.picture} is missing; copy it next to the file, or give --images "
            "its folder"
        )
    if page.size not in (None, size):
        raise DataError(
            f"{page.path}: is for a picture of {by_x(page.size or size)} pixels, but {picture} has "
            f"{by_x(size)}; use files that belong together"
        )
    draw = partial(draw_page, size, page.shapes, numbering)
    if picture == page.path:
        return Scene(name, picture, size, draw, content=lambda: embedded_picture(page.path).content)
    return Scene(name, picture, size, draw, upright=True)


def _find(page: Page, finder: Finder) -> str | None:
    """Return the picture of an annotation file: that of imagePath, or else one with the name of the file."""
    name = page.picture.replace("\\", "/")
    if name.strip("/."):
        for place in (os.path.dirname(page.path), *filter(None, [finder.pictures])):
            for each in (name, os.path.basename(name)):
                if path := finder.path_in(place, each, neighbors=True):
                    return path
    stem = os.path.splitext(page.path)[0]
    endings = (each for ending in ENDINGS for each in (ending, ending.upper()))
    return next((stem + ending for ending in endings if os.path.isfile(stem + ending)), None)


def embedded_picture(path: str) -> Encoded:
    """Return the picture that an annotation file holds.

    Raises:
        DataError: it is damaged.
    """
    try:
        encoded = check_content(path, base64.b64decode(read_json(path)["imageData"]))
        check_picture(path, encoded.header)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: neither is its picture next to it, nor is imageData one; copy the picture there"
        ) from error
    return encoded

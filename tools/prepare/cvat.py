"""Reader of CVAT: XML files of the export "CVAT for images 1.1".

Shapes are drawn in the order of their z_order, as CVAT's own export of masks draws them: polygons and boxes
by pycocotools, ellipses by OpenCV. Polylines, points, cuboids and skeletons have no area and are left out.
"""

from __future__ import annotations

from functools import partial

from tools.prepare.classes import Numbering, number_classes
from tools.prepare.cvat_file import Picture, draw_picture, parse_file
from tools.prepare.pictures import Finder, Listed
from tools.prepare.reading import Tally, annotation_files, count, folder_of, progressing
from tools.prepare.source import Class, Found, Problems, Wanted, own_split
from utils.errors import DataError


def read_cvat(source: str, wanted: Wanted) -> Found:
    """Read CVAT's XML files: a file, or all of a folder and its subfolders.

    Raises:
        Problems: a file is invalid, a picture is missing, or a label is unknown.
    """
    problems: list[str] = []
    notes: list[str] = []
    tally = Tally()
    labels: list[Class] = []
    pictures: list[Picture] = []
    left_out = 0
    for path in progressing(annotation_files(source, ".xml")):
        try:
            content = parse_file(path, tally)
        except Problems as error:
            problems += error.lines
        except DataError as error:
            problems.append(str(error))
        else:
            labels += content.labels
            pictures += content.pictures
            left_out += content.left_out
    numbering = number_classes(labels, wanted)
    problems += numbering.problems(
        (shape.label, picture.file) for picture in pictures for shape in picture.shapes
    )
    finder = Finder(folder_of(source), wanted.pictures)
    scenes = finder.scenes([_listed(picture, numbering) for picture in pictures], problems, notes)
    if not problems and not any(picture.shapes for picture in pictures):
        problems.append(
            f"{source}: no shape with an area in {len(pictures)} pictures of CVAT; label them first"
        )
    if problems:
        raise Problems(source, problems)
    notes += tally.notes()
    if left_out:
        notes.append(f"{left_out} polylines, points, cuboids or skeletons have no area, and are left out")
    if empty := [picture.name for picture in pictures if not picture.shapes]:
        notes.append(f"{count(empty, 'picture')} without shapes, and background; the first is {empty[0]}")
    parts = own_split(scenes, notes, [f"{picture.subset}/" for picture in pictures])
    return Found(numbering.classes, scenes, notes, parts)


def _listed(picture: Picture, numbering: Numbering) -> Listed:
    drawn = [(numbering.drawn(shape.label), shape) for shape in picture.shapes]
    draw = partial(draw_picture, picture.size, drawn, numbering.fill)
    return Listed(picture.file, picture.name, picture.size, draw)

"""Reader of CVAT: XML files of the export "CVAT for images 1.1".

Shapes are drawn in the order of their z_order, as CVAT's own export of masks draws them: polygons and boxes
by pycocotools, ellipses by OpenCV. Polylines, points, cuboids and skeletons have no area and are left out.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial

from dataset.labels import IGNORE
from tools.prepare.classes import Numbering, number_classes, problems_of, similar_names
from tools.prepare.coco_file import PARTS
from tools.prepare.cvat_file import Picture, draw_picture, parse_file
from tools.prepare.pictures import Finder, Listed
from tools.prepare.reading import Tally, annotation_files, count, folder_of
from tools.prepare.source import Class, Found, Problems, Wanted, own_split
from utils.errors import DataError
from utils.progress import Progress


def read_cvat(source: str, wanted: Wanted) -> Found:
    """Read CVAT's XML files: a file, or all of a folder and its subfolders.

    Raises:
        Problems: a file is invalid, a picture is missing, or a label is unknown.
    """
    problems: list[str] = []
    tally = Tally()
    labels: list[Class] = []
    files: dict[str, list[str]] = defaultdict(list)  # by label
    pictures: list[Picture] = []
    left_out = 0
    paths = annotation_files(source, ".xml")
    progress = Progress(len(paths), "file")
    for number, path in enumerate(paths, 1):
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
            for picture in content.pictures:
                for shape in picture.shapes:
                    files[shape.label].append(path)
        progress.show(number)
    numbering = number_classes(labels, wanted)
    problems += numbering.problems(files)
    listed = [_listed(picture, numbering) for picture in pictures]
    scenes = Finder(folder_of(source), wanted.pictures).scenes(listed, problems)
    if not problems and not any(picture.shapes for picture in pictures):
        problems.append(f"{source}: no shape in {len(pictures)} pictures; label the pictures first")
    if not problems:
        problems = problems_of(source, numbering.classes)
    if problems:
        raise Problems(source, problems)
    notes = [*tally.notes(), *similar_names(numbering.classes)]
    if left_out:
        notes.append(
            f"{left_out} polylines, points, cuboids or skeletons are left out, since they have no area"
        )
    if empty := [picture.name for picture in pictures if not picture.shapes]:
        notes.append(f"{count(empty, 'picture')} without shapes, and background; the first is {empty[0]}")
    subsets = [PARTS.get(picture.subset.lower()) for picture in pictures]
    return Found(numbering.classes, scenes, notes, own_split(scenes, subsets))


def _listed(picture: Picture, numbering: Numbering) -> Listed:
    train_ids = [numbering.train_id(shape.label) for shape in picture.shapes]
    drawn = [
        (IGNORE if number is None else number, shape)  # an unknown label is a problem that ends the command
        for number, shape in zip(train_ids, picture.shapes, strict=True)
    ]
    draw = partial(draw_picture, picture.size, drawn, numbering.fill)
    return Listed(picture.file, picture.name, picture.size, draw)

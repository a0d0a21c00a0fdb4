"""Reader of COCO: JSON files with images, categories and annotations.

Later annotations cover earlier ones. The polygons of an annotation are united, so only RLE can have holes. An
RLE of a crowd is drawn like any other. Pictures without annotations are background.
"""

from __future__ import annotations

import os
from functools import partial

from tools.prepare.classes import Numbering, number_classes
from tools.prepare.coco_file import Picture, draw_picture, parse_file, told_by
from tools.prepare.pictures import Finder, Listed
from tools.prepare.reading import Tally, annotation_files, count, folder_of, progressing, read_json
from tools.prepare.source import Class, Found, Problems, Wanted, own_split
from utils.errors import DataError


def read_coco(source: str, wanted: Wanted) -> Found:
    """Read COCO's JSON files: a file, or all of a folder.

    Raises:
        Problems: a file is invalid, a picture is missing, or a label is unknown.
    """
    problems: list[str] = []
    notes: list[str] = []
    tally = Tally()
    labels: dict[str, None] = {}
    pictures: list[Picture] = []
    others: list[str] = []
    for path in progressing(_files(source, notes)):
        try:
            content = read_json(path)
            if not isinstance(content, dict) or not {"images", "annotations"} & content.keys():
                others.append(path)
                continue
            own, found = parse_file(path, content, tally)
        except Problems as error:
            problems += error.lines
        except DataError as error:
            problems.append(str(error))
        else:
            labels |= dict.fromkeys(own)
            pictures += found
    numbering = number_classes(map(Class, labels), wanted)
    problems += numbering.problems(
        (region.label, picture.file) for picture in pictures for region in picture.regions
    )
    finder = Finder(folder_of(source), wanted.pictures)
    scenes = finder.scenes([_listed(picture, numbering) for picture in pictures], problems, notes)
    if not problems and not any(picture.regions for picture in pictures):
        problems.append(
            f"{source}: no annotation in {len(pictures)} pictures of COCO files; label them first"
        )
    if problems:
        raise Problems(source, problems)
    if others:
        notes.append(f"{count(others, 'JSON file')} not of COCO, and left out; the first is {others[0]}")
    if empty := [picture.name for picture in pictures if not picture.regions]:
        notes.append(
            f"{count(empty, 'picture')} without annotations, and background; the first is {empty[0]}"
        )
    root = folder_of(source)
    told = [told_by(os.path.relpath(picture.file, root)) for picture in pictures]
    parts = own_split(scenes, notes, told)
    return Found(numbering.classes, scenes, [*notes, *tally.notes()], parts)


def _files(source: str, notes: list[str]) -> list[str]:
    """Return the JSON files of a source; only instances_*, if there are such files."""
    paths = annotation_files(source, ".json")
    # COCO's own archive also has captions and keypoints of the same pictures.
    instances = [path for path in paths if os.path.basename(path).startswith("instances_")]
    others = [path for path in paths if path not in instances]
    if instances and others:
        notes.append(
            f"{count(others, 'JSON file')} not named instances_*, and left out; the first is {others[0]}"
        )
    return instances or paths


def _listed(picture: Picture, numbering: Numbering) -> Listed:
    drawn = [(numbering.drawn(region.label), region) for region in picture.regions]
    draw = partial(draw_picture, picture.size, drawn, numbering.fill)
    return Listed(picture.file, picture.name, picture.size, draw)

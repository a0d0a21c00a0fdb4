"""Reader of COCO: JSON files with images, categories and annotations.

Later annotations cover earlier ones. The polygons of an annotation are united, so only RLE can have holes. An
RLE of a crowd is drawn like any other. Pictures without annotations are background.
"""

from __future__ import annotations

import os
from collections import defaultdict
from functools import partial
from typing import Any

from dataset.labels import IGNORE
from tools.prepare.classes import Numbering, number_classes, problems_of, similar_names
from tools.prepare.coco_file import Picture, draw_picture, parse_file, part_of
from tools.prepare.pictures import Finder, Listed
from tools.prepare.reading import Tally, annotation_files, count, folder_of, read_json
from tools.prepare.source import Class, Found, Problems, Wanted
from utils.errors import DataError
from utils.progress import Progress


def read_coco(source: str, wanted: Wanted) -> Found:
    """Read COCO's JSON files: a file, or all of a folder.

    Raises:
        Problems: a file is invalid, a picture is missing, or a label is unknown.
    """
    problems: list[str] = []
    notes: list[str] = []
    contents = _read_files(source, problems, notes)
    tally = Tally()
    labels: dict[str, None] = {}
    pictures: list[Picture] = []
    for path in list(contents):
        try:
            own, found = parse_file(path, contents.pop(path), tally)
        except Problems as error:
            problems += error.lines
        except DataError as error:
            problems.append(str(error))
        else:
            labels |= dict.fromkeys(own)
            pictures += found
    numbering = number_classes(map(Class, labels), wanted)
    files: dict[str, list[str]] = defaultdict(list)  # by label
    for picture in pictures:
        for region in picture.regions:
            files[region.label].append(picture.file)
    problems += numbering.problems(files)
    finder = Finder(folder_of(source), wanted.pictures)
    listed = [_listed(picture, numbering) for picture in pictures]
    scenes = finder.scenes(listed, problems)
    if not problems and not any(picture.regions for picture in pictures):
        problems.append(f"{source}: no annotation in {len(pictures)} pictures; label the pictures first")
    if not problems:
        problems = problems_of(source, numbering.classes)
    if problems:
        raise Problems(source, problems)
    if empty := [picture.name for picture in pictures if not picture.regions]:
        notes.append(
            f"{count(empty, 'picture')} without annotations, and background; the first is {empty[0]}"
        )
    notes += [*tally.notes(), *similar_names(numbering.classes)]
    parts = own_split(scenes, [part_of(picture.file) for picture in pictures])
    return Found(numbering.classes, scenes, notes, parts)


def _listed(picture: Picture, numbering: Numbering) -> Listed:
    train_ids = [numbering.train_id(region.label) for region in picture.regions]
    drawn = [
        (IGNORE if number is None else number, region)  # an unknown label is a problem that ends the command
        for number, region in zip(train_ids, picture.regions, strict=True)
    ]
    return Listed(
        picture.file, picture.name, picture.size, partial(draw_picture, picture.size, drawn, numbering.fill)
    )


def _read_files(source: str, problems: list[str], notes: list[str]) -> dict[str, dict[str, Any]]:
    """Return the contents of the files with images by path."""
    paths = annotation_files(source, ".json")
    # COCO's own archive has captions and keypoints of the same pictures.
    if instances := [path for path in paths if os.path.basename(path).startswith("instances_")]:
        if others := [path for path in paths if path not in instances]:
            notes.append(
                f"{count(others, 'JSON file')} not named instances_*, and left out; the first is {others[0]}"
            )
        paths = instances
    progress = Progress(len(paths), "file")
    found, others = {}, []
    for number, path in enumerate(paths, 1):
        try:
            content = read_json(path)
            if isinstance(content, dict) and {"images", "annotations"} & content.keys():
                found[path] = content
            else:
                others.append(path)
        except DataError as error:
            problems.append(str(error))
        progress.show(number)
    if others:
        notes.append(f"{count(others, 'JSON file')} not of COCO, and left out; the first is {others[0]}")
    return found

"""Reader of COCO: JSON files with images, categories and annotations.

Later annotations cover earlier ones. The polygons of an annotation are united, so only RLE can have holes. An
RLE of a crowd is drawn like any other. Pictures without annotations are background.
"""

from __future__ import annotations

import os

from tools.prepare.coco_file import Content, parse_file, told_by
from tools.prepare.listed import Listed, find_all
from tools.prepare.reading import annotation_files, count, folder_of, parse_all, read_json
from tools.prepare.source import Class, Found, Wanted


def read_coco(source: str, wanted: Wanted) -> Found:
    """Read COCO's JSON files: a file, or all of a folder.

    Raises:
        Problems: a file is invalid, a picture is missing, or a label is unknown.
    """
    problems: list[str] = []
    notes: list[str] = []
    labels: dict[str, None] = {}
    headings: dict[str, str] = {}
    pictures: list[Listed] = []
    others: list[str] = []

    def parse(path: str) -> Content | None:
        content = read_json(path)
        if isinstance(content, dict) and {"images", "annotations"} & content.keys():
            return parse_file(path, content)
        others.append(path)
        return None

    for content in filter(None, parse_all(_files(source, notes), parse, problems)):
        labels |= dict.fromkeys(content.labels)
        if content.heading is not None:
            headings.setdefault(content.heading, content.path)
        told = told_by(os.path.relpath(content.path, folder_of(source)))
        pictures += [picture._replace(told=told) for picture in content.pictures]
    used = {shape.label for picture in pictures for shape in picture.shapes}
    for name, path in headings.items():
        if name not in used:
            del labels[name]
            notes.append(
                f"{path}: category {name} is left out, since it is the supercategory of all others and has "
                "no annotations"
            )
    if others:
        notes.append(f"{count(others, 'JSON file')} not of COCO, and left out; the first is {others[0]}")
    found = find_all(source, wanted, map(Class, labels), pictures, problems, "annotations")
    return found._replace(notes=[*notes, *found.notes])


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

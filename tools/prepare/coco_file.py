"""The content of a COCO file: pictures with their annotations, checked."""

from __future__ import annotations

import os
import re
from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from tools.prepare import regions
from tools.prepare.classes import cleaned
from tools.prepare.reading import Tally, as_dicts, as_size, by_x, numbers
from tools.prepare.source import Problems
from utils.errors import DataError


class Region(NamedTuple):
    """An annotation: polygons, or the run lengths of a mask, column by column."""

    label: str
    polygons: list[np.ndarray]  # float64 [n, 2] each
    counts: str | np.ndarray | None  # compressed text, or int64 [n]; None for polygons


class Picture(NamedTuple):
    """A picture with its annotations."""

    file: str  # the COCO file
    name: str  # file_name
    size: tuple[int, int]
    regions: list[Region]


def mask_of(counts: str | np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the pixels of a mask, bool [h, w]; see `regions.decode_runs` for the errors."""
    runs = regions.parse_counts(counts) if isinstance(counts, str) else counts.tolist()
    return regions.decode_runs(runs, size[0] * size[1]).reshape(size[::-1]).T


def draw_picture(size: tuple[int, int], drawn: list[tuple[int, Region]], fill: int) -> np.ndarray:
    """Return the train ids of a picture, uint8 [h, w].

    Args:
        size: height and width.
        drawn: train ids and regions, in the order of drawing.
        fill: train id of the other pixels.
    """
    label = np.full(size, fill, np.uint8)
    for train_id, region in drawn:
        if region.counts is None:
            regions.fill_polygons(label, region.polygons, train_id)
        else:
            label[mask_of(region.counts, size)] = train_id
    return label


def parse_file(path: str, content: dict[str, Any], tally: Tally) -> tuple[list[str], list[Picture]]:
    """Return the labels of a COCO file in the order of their ids, and its pictures.

    Args:
        path: the file.
        content: its content.
        tally: receives the shapes that are clipped or have no pixel.

    Raises:
        DataError: the file has no pictures, annotations or categories.
        Problems: some of them are invalid.
    """
    problems: list[str] = []
    categories = _categories(path, content, problems)
    pictures: dict[object, Picture] = {}
    for number, each in enumerate(_listed(path, content, "images"), 1):
        key, name = each.get("id"), each.get("file_name")
        size = as_size(each.get("height"), each.get("width"))
        if type(key) not in (int, str) or not isinstance(name, str) or size is None:
            problems.append(
                f"{path}: image {number} has no valid id, file_name, height or width; export the file again"
            )
        elif key in pictures:
            problems.append(
                f"{path}: image id {key} is that of {pictures[key].name} and of {name}; give each its own"
            )
        else:
            pictures[key] = Picture(path, name, size, [])
    boxes: list[object] = []
    used: Counter[str] = Counter()
    for number, each in enumerate(_listed(path, content, "annotations"), 1):
        where = f"{path}: annotation {each.get('id', f'number {number}')}"
        key, category, segmentation = each.get("image_id"), each.get("category_id"), each.get("segmentation")
        if type(category) is not int or category not in categories:
            problems.append(
                f"{where} has the unknown category_id {category!r}; add the category or correct it"
            )
        elif type(key) not in (int, str) or key not in pictures:
            problems.append(
                f"{where} has the image_id {key!r}, which no image has; add the image or remove it"
            )
        elif segmentation in (None, []):
            boxes.append(each.get("id", number))
        else:
            label, size = categories[category], pictures[key].size
            try:
                region = _region(label, segmentation, size)
                lies = _lies(region, size)
            except ValueError as error:
                problems.append(f"{where} ({label}) {error}")
                continue
            used[label] += 1
            if lies == "outside":
                problems.append(
                    f"{where} ({label}) is outside of {pictures[key].name} ({by_x(size)} pixels); move "
                    "or delete it"
                )
            elif lies:
                tally.add(lies, path)
            pictures[key].regions.append(region)
    if boxes:
        problems.append(
            f"{path}: {len(boxes)} annotations have no segmentation, the first has id {boxes[0]}; boxes and "
            "keypoints alone are no labels of pixels, so export polygons or masks"
        )
    if problems:
        raise Problems(path, problems)
    return _without_heading(content, categories, used), list(pictures.values())


def _listed(path: str, content: dict[str, Any], name: str) -> list[dict[str, Any]]:
    found = as_dicts(content.get(name))
    if found is None:
        raise DataError(f"{path}: {name} is not a list of objects; export the file again as COCO")
    return found


def _categories(path: str, content: dict[str, Any], problems: list[str]) -> dict[int, str]:
    """Return the names of the categories by id."""
    found: dict[int, str] = {}
    for number, each in enumerate(_listed(path, content, "categories"), 1):
        key, name = each.get("id"), each.get("name")
        if type(key) is not int or not isinstance(name, str) or not cleaned(name):
            problems.append(f"{path}: category {number} has no whole number as id, or no name; correct it")
        elif key in found:
            problems.append(
                f"{path}: category id {key} is that of {found[key]} and of {name}; give each its own"
            )
        else:
            found[key] = cleaned(name)
    return found


def _without_heading(content: dict[str, Any], categories: dict[int, str], used: Counter[str]) -> list[str]:
    """Return the labels in the order of their ids, without Roboflow's heading.

    Roboflow adds a category of the name that the others have as supercategory. No annotation has it.
    """
    headings = {
        each.get("supercategory") for each in content["categories"] if _is_text(each, "supercategory")
    }
    return [
        categories[key]
        for key in sorted(categories)
        if used[categories[key]] or categories[key] not in headings
    ]


def _is_text(content: dict[str, Any], name: str) -> bool:
    return isinstance(content.get(name), str) and content.get(name) != content.get("name")


def _region(label: str, segmentation: object, size: tuple[int, int]) -> Region:
    """Return a checked annotation.

    Raises:
        ValueError: what is wrong, and what to do.
    """
    if isinstance(segmentation, list):
        polygons = []
        for part in segmentation:
            xy = numbers(part)
            if xy is None or len(xy) % 2:
                raise ValueError(
                    "has a polygon that is not a list of finite numbers x, y, x, y, ...; draw it again"
                )
            polygons.append(xy.reshape(-1, 2))
            if problem := regions.polygon_problem(polygons[-1]):
                raise ValueError(problem)
        return Region(label, polygons, None)
    if not isinstance(segmentation, dict):
        raise ValueError("has a segmentation that is neither polygons nor RLE; export it again")
    counts, listed = segmentation.get("counts"), segmentation.get("size")
    own = as_size(*listed) if isinstance(listed, list) and len(listed) == 2 else None
    if own != size:
        what = by_x(own) if own else "no valid size"
        raise ValueError(f"has an RLE of {what}, but its picture has {by_x(size)} pixels; export it again")
    if isinstance(counts, list) and all(type(run) is int and 0 <= run < 2**40 for run in counts):
        return Region(label, [], np.array(counts, np.int64))
    if not isinstance(counts, str):
        raise ValueError("has RLE counts that are neither text nor whole numbers from 0; export it again")
    return Region(label, [], counts)


def _lies(region: Region, size: tuple[int, int]) -> str | None:
    """Return how an annotation lies in its picture: None for inside, or "clipped", "tiny" or "outside".

    Raises:
        ValueError: the mask can't be decoded; what is wrong and what to do.
    """
    if region.counts is None:
        lies = regions.where_in(np.concatenate(region.polygons), size)
        return lies if lies == "outside" or regions.covers(region.polygons, size) else "tiny"
    try:
        runs = (
            regions.parse_counts(region.counts) if isinstance(region.counts, str) else region.counts.tolist()
        )
        regions.check_runs(runs, size[0] * size[1])
    except ValueError as error:
        raise ValueError(f"has a damaged mask: {error}; export it again") from None
    return None if any(runs[1::2]) else "tiny"


def told_by(path: str) -> str:
    """Return a path whose folders name what the folders and the name of a COCO file tell of a split.

    The words of the name become folders: d/instances_train2017.json gives d/instances/train2017/.
    """
    folder, name = os.path.split(path)
    return os.path.join(folder, *re.findall("[A-Za-z]+[0-9]*", os.path.splitext(name)[0]), "")

"""The content of a COCO file: pictures with their annotations, checked."""

from __future__ import annotations

import os
import re
from typing import Any, NamedTuple

import numpy as np

from tools.prepare import regions
from tools.prepare.classes import cleaned
from tools.prepare.listed import Listed
from tools.prepare.reading import as_dicts, as_size, by_x, numbers
from tools.prepare.source import Problems
from utils.errors import DataError


class Region(NamedTuple):
    """An annotation: polygons, or the run lengths of a mask, column by column."""

    label: str
    where: str
    polygons: list[np.ndarray]  # float64 [n, 2] each
    counts: str | np.ndarray | None  # compressed text, or int64 [n]; None for polygons
    is_empty: bool = False  # whether a mask has no pixel

    def runs(self) -> list[int]:
        """Return the run lengths of a mask; see `regions.parse_counts` for the errors."""
        assert self.counts is not None
        return regions.parse_counts(self.counts) if isinstance(self.counts, str) else self.counts.tolist()

    def draw(self, label: np.ndarray, value: int) -> None:
        """Set the pixels of the annotation in `label`, uint8 [h, w]."""
        if self.counts is None:
            regions.fill_polygons(label, self.polygons, value)
        else:
            label.T[regions.decode_runs(self.runs(), label.size).reshape(label.shape[::-1])] = value

    def lies(self, size: tuple[int, int]) -> str | None:
        """Return how the annotation lies in its picture; see listed.Shape."""
        if self.counts is not None:
            return "tiny" if self.is_empty else None
        lies = regions.where_in(np.concatenate(self.polygons), size)
        return lies if lies == "outside" or regions.covers(self.polygons, size) else "tiny"


class Content(NamedTuple):
    """The content of a file."""

    path: str
    labels: list[str]  # in the order of their ids
    heading: str | None  # category that all others have as supercategory: Roboflow adds one
    pictures: list[Listed]


def parse_file(path: str, content: dict[str, Any]) -> Content:
    """Return the content of a COCO file, checked.

    Args:
        path: the file.
        content: its content.

    Raises:
        DataError: the file has no pictures, annotations or categories.
        Problems: some of them are invalid.
    """
    problems: list[str] = []
    categories = _categories(path, content, problems)
    pictures: dict[object, Listed] = {}
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
            pictures[key] = Listed(path, name, size, [])
    boxes: list[object] = []
    for number, each in enumerate(_listed(path, content, "annotations"), 1):
        kind = f"annotation {each.get('id', f'number {number}')}"
        where = f"{path}: {kind}"
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
                region = _region(Region(label, kind, [], None), segmentation, size)
            except ValueError as error:
                problems.append(f"{where} ({label}) {error}")
                continue
            pictures[key].shapes.append(region)
    if boxes:
        problems.append(
            f"{path}: {len(boxes)} annotations have no segmentation, the first has id {boxes[0]}; boxes and "
            "keypoints alone are no labels of pixels, so export polygons or masks"
        )
    if problems:
        raise Problems(path, problems)
    names = [categories[key] for key in sorted(categories)]
    return Content(path, names, _heading(content["categories"], names), list(pictures.values()))


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


def _heading(categories: list[dict[str, Any]], names: list[str]) -> str | None:
    """Return the category that all others have as supercategory; None if there is none."""
    for name in names if len(names) > 1 else ():
        others = [each for each in categories if cleaned(each["name"]) != name]
        if others and all(_supercategory(each) == name for each in others):
            return name
    return None


def _supercategory(category: dict[str, Any]) -> str | None:
    name = category.get("supercategory")
    return cleaned(name) if isinstance(name, str) else None


def _region(region: Region, segmentation: object, size: tuple[int, int]) -> Region:
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
        return region._replace(polygons=polygons)
    if not isinstance(segmentation, dict):
        raise ValueError("has a segmentation that is neither polygons nor RLE; export it again")
    counts, listed = segmentation.get("counts"), segmentation.get("size")
    own = as_size(*listed) if isinstance(listed, list) and len(listed) == 2 else None
    if own != size:
        what = by_x(own) if own else "no valid size"
        raise ValueError(f"has an RLE of {what}, but its picture has {by_x(size)} pixels; export it again")
    if isinstance(counts, list) and all(type(run) is int and 0 <= run < 2**40 for run in counts):
        region = region._replace(counts=np.array(counts, np.int64))
    elif isinstance(counts, str):
        region = region._replace(counts=counts)
    else:
        raise ValueError("has RLE counts that are neither text nor whole numbers from 0; export it again")
    try:
        runs = region.runs()
        regions.check_runs(runs, size[0] * size[1])
    except ValueError as error:
        raise ValueError(f"has a damaged mask: {error}; export it again") from None
    return region._replace(is_empty=not any(runs[1::2]))


def told_by(path: str) -> str:
    """Return a path whose folders name what the folders and the name of a COCO file tell of a split.

    The words of the name become folders: d/instances_train2017.json gives d/instances/train2017/.
    """
    folder, name = os.path.split(path)
    return os.path.join(folder, *re.findall("[A-Za-z]+[0-9]*", os.path.splitext(name)[0]), "")

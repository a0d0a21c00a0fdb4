"""The content of a "CVAT for images 1.1" file: pictures with their shapes, checked."""

from __future__ import annotations

import math
import re
from typing import NamedTuple, NoReturn
from xml.etree import ElementTree
from xml.parsers import expat

import cv2
import numpy as np

from tools.prepare import regions
from tools.prepare.classes import cleaned
from tools.prepare.listed import Listed
from tools.prepare.reading import as_size, by_x, parse_number, read_file
from tools.prepare.source import Class, Problems
from utils.errors import DataError

#: Shapes that cover an area, and those that CVAT's own export of masks leaves out too.
AREAS, LEFT_OUT = ("polygon", "box", "ellipse", "mask"), ("polyline", "points", "cuboid", "skeleton")
#: Types of labels whose shapes are left out.
LEFT_OUT_TYPES = (*LEFT_OUT, "tag")


class Shape(NamedTuple):
    """A shape with an area."""

    label: str
    where: str
    z_order: int
    polygon: np.ndarray | None = None  # float64 [n, 2]
    ellipse: tuple[float, ...] | None = None  # center x, y, radii x, y, and rotation in degrees
    runs: np.ndarray | None = None  # int64, run lengths of a mask, row by row
    box: tuple[int, int, int, int] = (0, 0, 0, 0)  # left, top, width and height of a mask

    def draw(self, label: np.ndarray, value: int) -> None:
        """Set the pixels of the shape in `label`, uint8 [h, w]."""
        if self.polygon is not None:
            regions.fill_polygons(label, [self.polygon], value)
        elif self.ellipse is not None:
            x, y, radius_x, radius_y, rotation = self.ellipse
            center, radii = (round(x), round(y)), (round(radius_x), round(radius_y))
            cv2.ellipse(label, center, radii, rotation, 0, 360, value, thickness=-1)
        else:
            mask = self.mask()
            left, top = self.box[:2]
            low = max(0, -top), max(0, -left)
            view = label[max(0, top) :, max(0, left) :][: len(mask) - low[0], : mask.shape[1] - low[1]]
            view[mask[low[0] :, low[1] :][: view.shape[0], : view.shape[1]]] = value

    def mask(self) -> np.ndarray:
        """Return the pixels of a mask, bool [height, width]."""
        assert self.runs is not None
        width, height = self.box[2:]
        return regions.decode_runs(self.runs.tolist(), width * height).reshape(height, width)

    def lies(self, size: tuple[int, int]) -> str | None:
        """Return how the shape lies in its picture; see listed.Shape."""
        if self.polygon is not None:
            lies = regions.where_in(self.polygon, size)
            return lies if lies == "outside" or regions.covers([self.polygon], size) else "tiny"
        if self.ellipse is not None:
            x, y, *radii, _ = self.ellipse
            points = np.array([(x, y)]) + max(radii) * np.array([(-1, -1), (1, 1)])
        else:
            assert self.runs is not None
            bounds = regions.bounds_of_runs(self.runs, self.box[2])
            if bounds is None:
                return "tiny"
            points = bounds + self.box[:2]
        lies = regions.where_in(points, size)
        if lies is None:
            return None
        label = np.zeros(size, np.uint8)
        self.draw(label, 1)
        return lies if label.any() else "outside"


class Content(NamedTuple):
    """The content of a file."""

    labels: list[Class]  # in the order of the file
    pictures: list[Listed]
    left_out: int  # number of shapes without an area


def parse_xml(path: str) -> ElementTree.Element:
    """Return the root of an XML file.

    Raises:
        DataError: the file can't be read or is not XML, or has a DTD, whose entities could expand endlessly.
    """
    content = read_file(path)
    builder = ElementTree.TreeBuilder()
    parser = expat.ParserCreate()
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = _refuse
    try:
        parser.Parse(content, True)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except (expat.ExpatError, ValueError, LookupError) as error:
        raise DataError(f"{path}: not valid XML ({error}); export or copy it again") from error
    return builder.close()


def _refuse(*_: object) -> NoReturn:
    raise DataError("has a document type declaration, which CVAT does not write; remove it")


def parse_file(path: str) -> Content:
    """Return the content of a CVAT file.

    Raises:
        DataError: the file is not one of CVAT for images.
        Problems: some of its pictures or shapes are invalid.
    """
    root = parse_xml(path)
    if root.tag != "annotations":
        raise DataError(
            f"{path}: is not a file of CVAT, its root is <{root.tag}>; export as 'CVAT for images 1.1'"
        )
    if root.find("track") is not None:
        raise DataError(f"{path}: has tracks of a video; export the task as 'CVAT for images 1.1' instead")
    problems: list[str] = []
    labels, others = _labels(root)
    names = {label.name for label in labels}
    pictures: list[Listed] = []
    left_out = 0
    for number, image in enumerate(root.iterfind("image"), 1):
        name, size = image.get("name") or "", _size(image)
        if not name or size is None:
            problems.append(f"{path}: image {number} has no name, width or height; export the file again")
            continue
        shapes: list[Shape] = []
        counted = 0
        for element in image:
            left_out += element.tag in LEFT_OUT
            if element.tag not in AREAS:
                continue
            counted += 1
            try:
                shape = _shape(element, f"{element.tag} {counted}", size)
                if names and shape.label not in names | others:
                    raise ValueError("has a label that is not in <labels>; correct it or add it there")
            except ValueError as error:
                problems.append(f"{path}: {name}: {element.tag} {counted} ({element.get('label')}) {error}")
                continue
            shapes.append(shape)
        shapes.sort(key=lambda shape: shape.z_order)
        pictures.append(Listed(path, name, size, [*shapes], f"{image.get('subset', '')}/"))
    if problems:
        raise Problems(path, problems)
    used = {shape.label for picture in pictures for shape in picture.shapes} - names
    return Content([*labels, *map(Class, sorted(used))], pictures, left_out)


def _labels(root: ElementTree.Element) -> tuple[list[Class], set[str]]:
    """Return the labels of areas in the order of the file, and the names of the others."""
    found: dict[str, Class] = {}
    others: set[str] = set()
    for label in root.iterfind("meta//labels/label"):
        name = cleaned(label.findtext("name") or "")
        color = re.fullmatch("#([0-9a-fA-F]{6})", label.findtext("color") or "")
        is_part = label.find("parent") is not None  # a point of a skeleton
        if not name or is_part or label.findtext("type") in LEFT_OUT_TYPES:
            others.add(name)
        else:
            red, green, blue = bytes.fromhex(color[1]) if color else (0, 0, 0)
            found.setdefault(name, Class(name, (red, green, blue) if color else None))
    return list(found.values()), others


def _size(image: ElementTree.Element) -> tuple[int, int] | None:
    sides = [image.get(side) or "" for side in ("height", "width")]
    if not all(re.fullmatch("[0-9]{1,9}", side) for side in sides):
        return None
    return as_size(*map(int, sides))


def _numbers(element: ElementTree.Element, names: str) -> list[float]:
    values = [parse_number(element.get(name)) for name in names.split()]
    if not all(map(math.isfinite, values)):
        raise ValueError(f"has no finite numbers {', '.join(names.split())}; draw it again")
    return values


def _shape(element: ElementTree.Element, where: str, size: tuple[int, int]) -> Shape:
    """Return a checked shape.

    Raises:
        ValueError: what is wrong, and what to do.
    """
    label, order = cleaned(element.get("label") or ""), element.get("z_order", "0")
    if not label:
        raise ValueError("has no label; name its class in CVAT")
    if not re.fullmatch("-?[0-9]{1,9}", order):
        raise ValueError(f"has the z_order {order!r}; give a whole number")
    shape = Shape(label, where, int(order))
    if element.tag == "mask":
        return _mask(element, shape, size)
    rotation = parse_number(element.get("rotation", "0"))
    if not math.isfinite(rotation):
        raise ValueError("has a rotation that is not a finite number; draw it again")
    if element.tag == "ellipse":
        values = _numbers(element, "cx cy rx ry")
        if min(values[2:]) < 0:
            raise ValueError("has a negative radius; draw it again")
        return shape._replace(ellipse=(*values, rotation))
    if element.tag == "box":
        left, top, right, bottom = _numbers(element, "xtl ytl xbr ybr")
        corners = np.array([(left, top), (right, top), (right, bottom), (left, bottom)])
        return shape._replace(polygon=_rotated(corners, rotation))
    points = [point.split(",") for point in (element.get("points") or "").split(";")]
    polygon = np.array([[parse_number(text) for text in (*point, "")[:2]] for point in points])
    if not np.isfinite(polygon).all() or any(len(point) != 2 for point in points):
        raise ValueError("has points that are not pairs of finite numbers; draw it again")
    if problem := regions.polygon_problem(polygon):
        raise ValueError(problem)
    return shape._replace(polygon=polygon)


def _rotated(corners: np.ndarray, degrees: float) -> np.ndarray:
    """Rotate corners, float64 [4, 2], clockwise around their center."""
    if degrees == 0:
        return corners
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    center = (corners[0] + corners[2]) / 2
    return center + (corners - center) @ np.array([[cosine, sine], [-sine, cosine]])


def _mask(element: ElementTree.Element, shape: Shape, size: tuple[int, int]) -> Shape:
    box = _numbers(element, "left top width height")
    if any(value != int(value) for value in box):
        raise ValueError("is a mask whose left, top, width or height is not a whole number; export it again")
    left, top, width, height = map(int, box)
    if not (0 < width <= size[1] and 0 < height <= size[0]):
        raise ValueError(
            f"is a mask of {width}x{height} pixels in a picture of {by_x(size)}; export it again"
        )
    texts = (element.get("rle") or "").split(",")
    if not all(re.fullmatch(" *[0-9]{1,12} *", text) for text in texts):
        raise ValueError("is a mask whose rle is not a list of whole numbers; export it again")
    runs = [int(text) for text in texts]
    try:
        regions.check_runs(runs, width * height)
    except ValueError as error:
        raise ValueError(f"is a damaged mask: {error}; export it again") from None
    return shape._replace(runs=np.array(runs, np.int64), box=(left, top, width, height))

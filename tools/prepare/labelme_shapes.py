"""Shapes of labelme: their checks, and drawing with labelme's rules.

Shapes are drawn with Pillow, as labelme does (shapes_to_label). Lines are 10 pixels wide, and points have a
radius of 5 pixels.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from dataset.pictures import LABEL_MODES, check_content
from tools.prepare.classes import cleaned
from tools.prepare.reading import by_x, numbers
from tools.prepare.regions import outline_problem
from utils.errors import DataError
from utils.silence import silence

#: Smallest and largest number of points of each kind of shape.
POINTS: dict[str, tuple[int, float]] = {
    "polygon": (3, math.inf),
    "rectangle": (2, 2),
    "oriented_rectangle": (4, 4),
    "circle": (2, 2),
    "line": (2, 2),
    "linestrip": (2, math.inf),
    "point": (1, 1),
    "mask": (2, 2),
}
#: Width of lines and radius of points, in pixels.
LINE_WIDTH, POINT_RADIUS = 10, 5
#: Largest radius of a circle in pixels; Pillow draws much larger ones in minutes.
LARGEST_RADIUS = 2**17
NO_MASK = "is a mask without a readable PNG; draw it again"


class Shape(NamedTuple):
    """A shape of a picture."""

    label: str
    kind: str
    points: list[tuple[float, float]]
    mask: bytes | None  # PNG with the pixels of a mask

    def corner(self) -> tuple[int, int]:
        """Return the column and row of the upper left pixel of a mask."""
        return int(self.points[0][0]), int(self.points[0][1])


def draw_shape(image: Image.Image, shape: Shape, value: int) -> None:
    """Draw a shape into a picture of mode L, with labelme's rules."""
    draw = ImageDraw.Draw(image)
    points = shape.points
    if shape.kind == "mask":
        image.paste(value, shape.corner(), Image.fromarray(_pixels(shape)))
    elif shape.kind in ("line", "linestrip"):
        draw.line(points, fill=value, width=LINE_WIDTH)
    elif shape.kind in ("circle", "point"):
        (x, y), other = points[0], points[-1]
        radius = POINT_RADIUS if shape.kind == "point" else math.hypot(x - other[0], y - other[1])
        draw.ellipse(((x - radius, y - radius), (x + radius, y + radius)), fill=value)
    elif shape.kind == "rectangle":
        xs, ys = zip(*points, strict=True)
        draw.rectangle(((min(xs), min(ys)), (max(xs), max(ys))), fill=value)
    else:
        draw.polygon(points, fill=value, outline=value)


def _pixels(shape: Shape) -> np.ndarray:
    """Return the pixels of a mask, uint8 [h, w], 0 or 255."""
    assert shape.mask is not None
    with silence, Image.open(io.BytesIO(shape.mask)) as picture:
        return (np.asarray(picture) != 0).astype(np.uint8) * 255


def parse_shape(content: dict[str, Any]) -> Shape:
    """Return a checked shape.

    Raises:
        ValueError: what is wrong, and what to do.
    """
    label, kind, listed = content.get("label"), content.get("shape_type"), content.get("points")
    if not isinstance(label, str) or not cleaned(label):
        raise ValueError("has no label; name its class in labelme")
    kind = "polygon" if kind is None else kind  # files of labelme before version 3
    if not isinstance(kind, str) or kind not in POINTS:
        raise ValueError(f"has the shape_type {kind!r}; use one of {', '.join(POINTS)}")
    points = []
    for point in listed if isinstance(listed, list) else [None]:
        xy = numbers(point)
        if xy is None or len(xy) != 2:
            raise ValueError("has points that are not pairs of finite numbers; draw it again")
        points.append((float(xy[0]), float(xy[1])))
    least, most = POINTS[kind]
    if not least <= len(points) <= most:
        should = f"{least} or more" if most > least else least
        raise ValueError(
            f"is a {kind} of {len(points)} points, which should be {should}; draw it again or delete it"
        )
    if problem := outline_problem(np.array(points)):
        raise ValueError(problem)
    if kind == "circle" and math.dist(*points) > LARGEST_RADIUS:
        raise ValueError(
            f"is a circle with a radius above {LARGEST_RADIUS} pixels; draw it again or delete it"
        )
    shape = Shape(label, kind, points, None)
    return shape if kind != "mask" else shape._replace(mask=_mask(content.get("mask"), points))


def _mask(text: object, points: list[tuple[float, float]]) -> bytes:
    """Return the PNG of a mask, whose header was checked; `reach` checks its pixels."""
    (left, top), (right, bottom) = ((int(x), int(y)) for x, y in points)
    try:
        content = base64.b64decode(text if isinstance(text, str) else "", validate=True)
        encoded = check_content("mask", content)
    except (binascii.Error, DataError, ValueError):
        raise ValueError(NO_MASK) from None
    if encoded.header.format != "PNG":
        raise ValueError(NO_MASK)
    size = bottom - top + 1, right - left + 1
    if (encoded.height, encoded.width) != size:
        raise ValueError(
            f"is a mask of {encoded.width}x{encoded.height} pixels, but its points enclose {by_x(size)}; "
            "draw it again"
        )
    if encoded.header.mode not in LABEL_MODES:
        raise ValueError("is a mask with several channels; draw it again")
    return content


def reach(shape: Shape, size: tuple[int, int]) -> str | None:
    """Return how a shape lies in its picture: None for inside, or "clipped", "tiny" (no pixel) or "outside".

    Args:
        shape: the shape.
        size: height and width of the picture.

    Raises:
        ValueError: a mask is larger than the picture or can't be decoded; what is wrong, and what to do.
    """
    height, width = size
    margin: float = {"line": LINE_WIDTH, "linestrip": LINE_WIDTH, "point": POINT_RADIUS}.get(shape.kind, 0)
    points = np.array(shape.points)
    if shape.kind == "circle":
        margin, points = math.dist(*shape.points), points[:1]
    low, high = points.min(0) - margin, points.max(0) + margin
    if shape.kind == "mask":
        return _reach_of_mask(shape, size)
    if (low >= 0).all() and (high <= (width - 1, height - 1)).all():
        return None
    image = Image.new("L", (width, height))
    draw_shape(image, shape, 1)
    if image.getbbox() is None:
        return "outside"
    # labelme's points reach up to the full width and height.
    return None if (low >= 0).all() and (high <= (width, height)).all() else "clipped"


def _reach_of_mask(shape: Shape, size: tuple[int, int]) -> str | None:
    """Return how a mask lies in its picture; see `reach`."""
    assert shape.mask is not None
    mask = check_content("mask", shape.mask)
    # A small file may hold a huge mask, so it is not decoded before this check.
    if mask.height > size[0] or mask.width > size[1]:
        raise ValueError(
            f"is a mask of {mask.width}x{mask.height} pixels in a picture of {by_x(size)}; draw it again"
        )
    try:
        pixels = _pixels(shape)
    except Exception:  # Pillow's decoders raise all kinds of errors for damaged files
        raise ValueError(NO_MASK) from None
    left, top = shape.corner()
    inside = pixels[max(0, -top) : max(0, size[0] - top), max(0, -left) : max(0, size[1] - left)]
    if not inside.any():
        return "outside" if pixels.any() else "tiny"
    return None if inside.shape == pixels.shape else "clipped"

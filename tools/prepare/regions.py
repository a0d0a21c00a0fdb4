"""Polygons and run-length encoded masks (RLE) of COCO and CVAT, as pixels.

Polygons are drawn by pycocotools. Its decoder of RLE reads beyond the end of damaged text, so masks are
decoded here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from utils.errors import UsageError

#: Longest outline that is drawn, in pixels: pycocotools needs 100 bytes for each.
LONGEST_OUTLINE = 2.0**22
#: Largest number of points: Pillow looks at all of them for each row of a picture.
MOST_POINTS = 100_000


@cache
def _pycocotools() -> Any:
    """Return the module pycocotools.mask.

    Raises:
        UsageError: it is not installed.
    """
    try:
        from pycocotools import mask
    except ImportError as error:
        raise UsageError(
            "polygons of COCO and CVAT need the pycocotools package; install it with pip install pycocotools"
        ) from error
    return mask


def polygon_problem(points: np.ndarray) -> str | None:
    """Return what is wrong with a polygon, float64 [n, 2] x and y, or None."""
    if len(points) < 3:
        return f"is a polygon of {len(points)} points, which should be 3 or more; draw it again or delete it"
    return outline_problem(points)


def outline_problem(points: np.ndarray) -> str | None:
    """Return why a shape, float64 [n, 2] x and y, would take too long to draw, or None."""
    if len(points) > MOST_POINTS:
        return f"has {len(points)} points, more than {MOST_POINTS}; simplify it"
    edges = np.abs(points - np.roll(points, 1, 0)).max(1)
    if edges.sum() > LONGEST_OUTLINE:
        return "has an outline longer than 4 million pixels; draw it again or delete it"
    return None


def covers(polygons: Sequence[np.ndarray], size: tuple[int, int]) -> bool:
    """Return whether polygons cover a pixel of a picture of (height, width) `size`."""
    rles = _pycocotools().frPyObjects([polygon.ravel().tolist() for polygon in polygons], *size)
    return bool(_pycocotools().area(rles).any())


def fill_polygons(label: np.ndarray, polygons: Sequence[np.ndarray], value: int) -> None:
    """Set the pixels in the union of polygons, as pycocotools has them.

    Args:
        label: uint8 [h, w], changed in place.
        polygons: float64 [n, 2] each, x and y of the corners.
        value: new value of the pixels.
    """
    mask = _pycocotools()
    rles = mask.frPyObjects([polygon.ravel().tolist() for polygon in polygons], *label.shape)
    label[mask.decode(mask.merge(rles)) > 0] = value


def where_in(points: np.ndarray, size: tuple[int, int]) -> str | None:
    """Return how a bounding box lies in a picture: None for inside, "clipped" for partly, or "outside".

    Args:
        points: float64 [n, 2], x and y.
        size: height and width of the picture.
    """
    low, high, end = points.min(0), points.max(0), (size[1], size[0])
    if (high < 0).any() or (low > end).any():
        return "outside"
    return None if (low >= 0).all() and (high <= end).all() else "clipped"


def parse_counts(text: str) -> list[int]:
    """Return the run lengths of a compressed RLE of COCO.

    Each number is written in characters of six bits, from code 48 on, lowest bits first: five bits of the
    number, and one that says whether more follow. From the fourth on, a number is the difference from the
    second last one.

    Raises:
        ValueError: the text is not such an RLE.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 40:
            raise ValueError(f"{character!r} does not occur in compressed RLE")
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("it is cut off")
    return counts


def check_runs(counts: Sequence[int], length: int) -> None:
    """Raise ValueError if run lengths are not whole numbers from 0 with the sum `length`."""
    if any(type(run) is not int or run < 0 for run in counts):
        raise ValueError("it has runs that are not whole numbers from 0")
    if sum(counts) != length:
        raise ValueError(f"its runs have {sum(counts)} pixels in total instead of {length}")


def decode_runs(counts: Sequence[int], length: int) -> np.ndarray:
    """Return the pixels of run lengths, bool [length]; the first run is of pixels that are not in the mask.

    Raises:
        ValueError: see `check_runs`.
    """
    check_runs(counts, length)
    return np.repeat(np.arange(len(counts)) % 2 == 1, np.array(counts, np.int64))


def bounds_of_runs(counts: np.ndarray, width: int) -> np.ndarray | None:
    """Return the bounding box of run lengths, [[left, top], [right, bottom]], without decoding them.

    Args:
        counts: int64 [n], row by row, as in `decode_runs`.
        width: length of a row.

    Returns:
        int64 [2, 2], where right and bottom are exclusive; None if no pixel is in the mask.
    """
    ends = np.cumsum(counts)
    inside = (np.arange(len(counts)) % 2 == 1) & (counts > 0)
    first, last = (ends - counts)[inside], ends[inside] - 1
    if not len(first):
        return None
    left, right = (first % width).min(), (last % width).max()
    if (first // width != last // width).any():  # such a run has pixels at both ends of a row
        left, right = 0, width - 1
    return np.array([(left, first[0] // width), (right + 1, last[-1] // width + 1)])

"""Random scale, crop and mirror with the original's numerics (original: dataset/datasets.py)."""

from __future__ import annotations

import math
from typing import NamedTuple

import cv2
import numpy as np

#: The 15 factors 0.7, 0.8, ... 2.1, drawn with equal probability.
SCALES = tuple(0.7 + step / 10.0 for step in range(15))


class Augmentation(NamedTuple):
    """What happens to a sample: resize by `scale`, cut the crop at (top, left) of the result, then mirror."""

    scale: float  # a multiple of 0.1
    top: int
    left: int
    mirror: bool


class Content(NamedTuple):
    """Where in a crop the picture is: rows 0 to `bottom`, columns `left` to `right`; the rest is padding."""

    bottom: int
    left: int
    right: int


def scaled_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """(height, width) that OpenCV gives a picture resized by the factor `scale`."""
    # OpenCV rounds halves to the even neighbor, as numpy does.
    return int(np.rint(size[0] * scale)), int(np.rint(size[1] * scale))


def draw(
    rng: np.random.Generator, size: tuple[int, int], crop: tuple[int, int], scale: bool, mirror: bool
) -> Augmentation:
    """Draw the augmentation of one sample of (height, width) `size`.

    Every call draws the same number of random values, whatever the flags and sizes.
    """
    factor_draw, top_draw, left_draw, mirror_draw = rng.random(4)
    factor = SCALES[int(factor_draw * len(SCALES))] if scale else 1.0
    height, width = scaled_size(size, factor)
    top = int(top_draw * (max(height - crop[0], 0) + 1))
    left = int(left_draw * (max(width - crop[1], 0) + 1))
    return Augmentation(factor, top, left, mirror and mirror_draw < 0.5)


class _Span(NamedTuple):
    """One axis of a crop: lines `first` to `last` of the resized picture, of `begin` to `end` of the picture.

    Resized by itself, what is between `begin` and `end` begins at line `origin` of the resized picture.
    """

    first: int
    last: int
    begin: int
    end: int
    origin: int


def _span(size: int, crop: int, scale: float, first: int) -> _Span:
    last = min(first + crop, int(np.rint(size * scale)))
    # n lines of the picture become k of the resized one, exactly: where both begin at such a place, they meet
    # the same fractions of lines.
    tenths = round(scale * 10)
    k, n = tenths // math.gcd(tenths, 10), 10 // math.gcd(tenths, 10)
    # One period earlier: the first line needs the one before it.
    period = max(first // k - 1, 0)
    end = min(math.ceil(last / scale) + 1, size)
    return _Span(first, last, period * n, end, period * k)


def rows_needed(size: tuple[int, int], crop: tuple[int, int], augmentation: Augmentation) -> int:
    """How many rows, from the top, of a picture of (height, width) `size` a sample is made of."""
    return _span(size[0], crop[0], augmentation.scale, augmentation.top).end


def apply(
    image: np.ndarray,
    label: np.ndarray,
    size: tuple[int, int],
    crop: tuple[int, int],
    augmentation: Augmentation,
    ignore_label: int,
) -> tuple[np.ndarray, np.ndarray, Content]:
    """Augment one picture and its label.

    Only what the crop shows is resized. The labels are those that a resize of the whole gives; the picture is
    at most one gray level off, here and there: OpenCV rounds positions to float32, far from the corner more.

    Args:
        image: uint8 [h, w, 3]; rows below those of `rows_needed` are not looked at, and may be missing.
        label: uint8 [h, w], likewise.
        size: (height, width) of the whole picture.
        crop: (height, width) of the result; smaller pictures are padded at the bottom and right.
        ignore_label: what the padding of the label is filled with.

    Returns:
        image uint8 [*crop, 3], label uint8 [*crop], both contiguous, and where the padding is not.
    """
    scale, top, left, mirror = augmentation
    rows, columns = (_span(*axis) for axis in zip(size, crop, (scale, scale), (top, left), strict=True))
    image = image[rows.begin : rows.end, columns.begin : columns.end]
    if scale == 1.0:
        image = image[top - rows.begin :, left - columns.begin :]
        label = label[top : rows.last, left : columns.last]
    else:
        image = _resize(image, scale, rows, columns)
        label = label.take(_nearest(size[0], scale, rows), 0).take(_nearest(size[1], scale, columns), 1)
    image = image[: rows.last - top, : columns.last - left]
    height, width = label.shape
    if (height, width) != crop:
        padding = (0, crop[0] - height, 0, crop[1] - width, cv2.BORDER_CONSTANT)
        image = cv2.copyMakeBorder(image, *padding, value=(0, 0, 0))
        label = cv2.copyMakeBorder(label, *padding, value=(ignore_label,))
    content = Content(height, 0, width)
    if mirror:
        image, label = cv2.flip(image, 1), cv2.flip(label, 1)
        content = Content(height, crop[1] - width, crop[1])
    # What is left as it came may be a cache's, which is read-only.
    return np.require(image, None, ["C", "W"]), np.require(label, None, ["C", "W"]), content


def _resize(window: np.ndarray, scale: float, rows: _Span, columns: _Span) -> np.ndarray:
    """The resized picture from (rows.first, columns.first) on."""
    needed = rows.last - rows.origin, columns.last - columns.origin
    missing = [max(n - got, 0) for n, got in zip(needed, scaled_size(window.shape[:2], scale), strict=True)]
    if any(missing):
        # The size of the whole was rounded up, that of the window down. OpenCV repeats the last line.
        window = cv2.copyMakeBorder(window, 0, missing[0], 0, missing[1], cv2.BORDER_REPLICATE)
    # By factor, not by size: OpenCV then steps by exactly 1 / scale, whatever the rounding of the size.
    resized = cv2.resize(window, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
    return resized[rows.first - rows.origin :, columns.first - columns.origin :]


def _nearest(size: int, scale: float, span: _Span) -> np.ndarray:
    """Which lines of the picture OpenCV's INTER_NEAREST takes for those of the crop."""
    lines = np.floor(np.arange(span.first, span.last) * (1.0 / scale)).astype(np.intp)
    return np.minimum(lines, size - 1)


def subtract_mean(image: np.ndarray, mean: np.ndarray, content: Content | None = None) -> np.ndarray:
    """uint8 [h, w, 3] -> float32 [3, h, w] minus `mean` [3]; 0 outside of `content`."""
    planes = np.ascontiguousarray(image.transpose(2, 0, 1)).astype(np.float32)
    planes -= np.asarray(mean)[:, None, None]
    if content is not None:
        planes[:, content.bottom :] = 0
        planes[:, :, : content.left] = 0
        planes[:, :, content.right :] = 0
    return planes

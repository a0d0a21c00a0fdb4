"""Random scale, crop and mirror, with the numerics of the original.

Source: dataset/datasets.py of the original.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import cv2
import numpy as np

#: The 15 scale factors 0.7, 0.8, ..., 2.1, drawn with equal probability.
SCALES = tuple(0.7 + step / 10.0 for step in range(15))


class Augmentation(NamedTuple):
    """The augmentation of a sample: resize by `scale`, crop at (top, left), then mirror."""

    scale: float  # a multiple of 0.1
    top: int
    left: int
    mirror: bool


class Content(NamedTuple):
    """The area of a crop that shows the picture: `[:bottom, left:right]`. The rest is padding."""

    bottom: int
    left: int
    right: int


def scaled_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """Return the (height, width) of a picture that OpenCV resizes by the factor `scale`."""
    # OpenCV rounds halves to even, like numpy.
    return int(np.rint(size[0] * scale)), int(np.rint(size[1] * scale))


def draw(
    rng: np.random.Generator, size: tuple[int, int], crop: tuple[int, int], scale: bool, mirror: bool
) -> Augmentation:
    """Draw the augmentation of a sample.

    Every call draws the same number of random values, for all arguments.

    Args:
        rng: random generator.
        size: (height, width) of the picture.
        crop: (height, width) of the crop.
        scale: whether to scale randomly.
        mirror: whether to mirror randomly.
    """
    factor_draw, top_draw, left_draw, mirror_draw = rng.random(4)
    factor = SCALES[int(factor_draw * len(SCALES))] if scale else 1.0
    height, width = scaled_size(size, factor)
    top = int(top_draw * (max(height - crop[0], 0) + 1))
    left = int(left_draw * (max(width - crop[1], 0) + 1))
    return Augmentation(factor, top, left, mirror and mirror_draw < 0.5)


class _Span(NamedTuple):
    """One axis of a crop. "Lines" are rows or columns.

    Lines `first` to `last` of the resized picture are made from lines `begin` to `end` of the picture. If
    these are resized by themselves, the result starts at line `origin` of the resized picture.
    """

    first: int
    last: int
    begin: int
    end: int
    origin: int


def _span(size: int, crop: int, scale: float, first: int) -> _Span:
    last = min(first + crop, int(np.rint(size * scale)))
    # Exactly n lines of the picture become k lines of the resized picture. Windows that start at a multiple
    # of this period are interpolated with the same fractions as the whole picture.
    tenths = round(scale * 10)
    k, n = tenths // math.gcd(tenths, 10), 10 // math.gcd(tenths, 10)
    # Start one period earlier, since the first line also needs the line before it.
    period = max(first // k - 1, 0)
    end = min(math.ceil(last / scale) + 1, size)
    return _Span(first, last, period * n, end, period * k)


def rows_needed(size: tuple[int, int], crop: tuple[int, int], augmentation: Augmentation) -> int:
    """Return the number of rows, from the top of a picture, that are needed for a sample.

    Args:
        size: (height, width) of the picture.
        crop: (height, width) of the crop.
        augmentation: augmentation of the sample.
    """
    return _span(size[0], crop[0], augmentation.scale, augmentation.top).end


def apply(
    image: np.ndarray,
    label: np.ndarray,
    size: tuple[int, int],
    crop: tuple[int, int],
    augmentation: Augmentation,
    ignore_label: int,
) -> tuple[np.ndarray, np.ndarray, Content]:
    """Augment a picture and its label.

    Only the visible part of the picture is resized. The label equals the crop of the whole resized label.
    Values of the image may differ by one gray level, because OpenCV rounds positions to float32, with larger
    errors far from the corner.

    Args:
        image: uint8 [h, w, 3]; only the first `rows_needed` rows are used, and others may be missing.
        label: uint8 [h, w], like image.
        size: (height, width) of the whole picture.
        crop: (height, width) of the result; smaller pictures are padded at the bottom and right.
        augmentation: augmentation to apply.
        ignore_label: value of the padding in the label.

    Returns:
        Image uint8 [*crop, 3] and label uint8 [*crop], both contiguous, and the area without padding.
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
    # Copy arrays that are read-only, because they may be views of the cache.
    return np.require(image, None, ["C", "W"]), np.require(label, None, ["C", "W"]), content


def _resize(window: np.ndarray, scale: float, rows: _Span, columns: _Span) -> np.ndarray:
    """Resize a window of the picture; return the result from (rows.first, columns.first) on."""
    needed = rows.last - rows.origin, columns.last - columns.origin
    missing = [max(n - got, 0) for n, got in zip(needed, scaled_size(window.shape[:2], scale), strict=True)]
    if any(missing):
        # The size of the whole was rounded up, but that of the window down. Repeat the last line, like
        # OpenCV.
        window = cv2.copyMakeBorder(window, 0, missing[0], 0, missing[1], cv2.BORDER_REPLICATE)
    # Resize by factor, not by size, so that OpenCV steps by exactly 1 / scale even if the size is rounded.
    resized = cv2.resize(window, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
    return resized[rows.first - rows.origin :, columns.first - columns.origin :]


def _nearest(size: int, scale: float, span: _Span) -> np.ndarray:
    """Return the line of the picture that OpenCV's INTER_NEAREST takes for each line of the crop."""
    lines = np.floor(np.arange(span.first, span.last) * (1.0 / scale)).astype(np.intp)
    return np.minimum(lines, size - 1)


def subtract_mean(image: np.ndarray, mean: np.ndarray, content: Content | None = None) -> np.ndarray:
    """Subtract the mean and move the channels first.

    Args:
        image: uint8 [h, w, 3].
        mean: [3].
        content: area of the picture; the result is 0 outside of it.

    Returns:
        float32 [3, h, w].
    """
    planes = np.ascontiguousarray(image.transpose(2, 0, 1)).astype(np.float32)
    planes -= np.asarray(mean)[:, None, None]
    if content is not None:
        planes[:, content.bottom :] = 0
        planes[:, :, : content.left] = 0
        planes[:, :, content.right :] = 0
    return planes

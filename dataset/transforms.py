"""Random scale, crop and mirror, with the numerics of the original.

Source: dataset/datasets.py of the original.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from dataset import photometric as colors
from dataset.photometric import Distortion

#: Smallest and largest scale factor of the original.
SCALE_RANGE = (0.7, 2.1)


def factors_between(low: float, high: float) -> tuple[float, ...]:
    """Return the scale factors low, low + 0.1, ..., high."""
    return tuple(low + step / 10.0 for step in range(round(10 * (high - low)) + 1))


#: The 15 scale factors 0.7, 0.8, ..., 2.1, drawn with equal probability.
SCALES = factors_between(*SCALE_RANGE)


def factor_of(size: tuple[int, int], short_side: int, long_side: int | None) -> float:
    """Return the factor by which the short side of a picture becomes `short_side`.

    Args:
        size: (height, width) of the picture.
        short_side: wanted length.
        long_side: maximum length of the long side, for which the factor is smaller; None for no limit.

    Source: TrainDataset of CSAIL's semantic-segmentation-pytorch, the published code of ADE20K.
    """
    factor = short_side / min(size)
    return factor if long_side is None else min(factor, long_side / max(size))


class Scaling(NamedTuple):
    """Random scaling: by one of the factors or, if there are short sides, to one of them."""

    factors: tuple[float, ...] = SCALES
    short_sides: tuple[int, ...] = ()
    long_side: int | None = None  # maximum length of the long side; see `factor_of`

    def choose(self, drawn: float, size: tuple[int, int]) -> float:
        """Return the scale factor of a picture.

        Args:
            drawn: random number in [0, 1).
            size: (height, width) of the picture.
        """
        if self.short_sides:
            side = self.short_sides[int(drawn * len(self.short_sides))]
            return factor_of(size, side, self.long_side)
        return self.factors[int(drawn * len(self.factors))]


def choose_scaling(
    random_scale: bool,
    scale_range: tuple[float, float],
    short_sides: Sequence[int] | None,
    long_side: int | None,
) -> Scaling | bool:
    """Return the scaling that the flags of the same names ask for; False for none."""
    if short_sides:
        return Scaling((), tuple(short_sides), long_side)
    return random_scale and Scaling(factors_between(*scale_range))


class Augmentation(NamedTuple):
    """The augmentation of a sample: resize by `scale`, crop at (top, left), mirror, then distort colors."""

    scale: float
    top: int
    left: int
    mirror: bool
    distortion: Distortion | None = None


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
    rng: np.random.Generator,
    size: tuple[int, int],
    crop: tuple[int, int],
    scale: bool | Scaling,
    mirror: bool,
    photometric: bool = False,
) -> Augmentation:
    """Draw the augmentation of a sample.

    Every call draws the same number of random values, and further ones at the end for `photometric`.

    Args:
        rng: random generator.
        size: (height, width) of the picture.
        crop: (height, width) of the crop.
        scale: how to scale randomly; True for the factors of the original, False for not at all.
        mirror: whether to mirror randomly.
        photometric: whether to distort colors randomly.
    """
    factor_draw, top_draw, left_draw, mirror_draw = rng.random(4)
    scaling = Scaling() if scale is True else scale
    factor = scaling.choose(factor_draw, size) if scaling else 1.0
    height, width = scaled_size(size, factor)
    top = int(top_draw * (max(height - crop[0], 0) + 1))
    left = int(left_draw * (max(width - crop[1], 0) + 1))
    distortion = colors.draw(rng) if photometric else None
    return Augmentation(factor, top, left, mirror and mirror_draw < 0.5, distortion)


def is_tenths(scale: float) -> bool:
    """Return whether a scale factor is a multiple of 0.1, up to rounding."""
    return abs(10 * scale - round(10 * scale)) < 1e-9


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
    end = min(math.ceil(last / scale) + 1, size)
    if not is_tenths(scale):
        return _Span(first, last, 0, end, 0)
    # Exactly n lines of the picture become k lines of the resized picture. Windows that start at a multiple
    # of this period are interpolated with the same fractions as the whole picture.
    tenths = round(scale * 10)
    k, n = tenths // math.gcd(tenths, 10), 10 // math.gcd(tenths, 10)
    # Start one period earlier, since the first line also needs the line before it.
    period = max(first // k - 1, 0)
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
    mirrored: np.ndarray | None = None,
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
        mirrored: lookup table uint8 [256] from a label to that in a mirrored picture, in which left and right
            parts are exchanged; None if labels stay the same.

    Returns:
        Image uint8 [*crop, 3] and label uint8 [*crop], both contiguous, and the area without padding.
    """
    scale, top, left, mirror, distortion = augmentation
    rows, columns = (_span(*axis) for axis in zip(size, crop, (scale, scale), (top, left), strict=True))
    image = image[rows.begin : rows.end, columns.begin : columns.end]
    if scale == 1.0:
        image = image[top - rows.begin :, left - columns.begin :]
        label = label[top : rows.last, left : columns.last]
    else:
        image = _resize(image, scale, rows, columns)
        label = label.take(_nearest(size[0], scale, rows), 0).take(_nearest(size[1], scale, columns), 1)
    image = image[: rows.last - top, : columns.last - left]
    if distortion is not None:
        image = colors.apply(np.ascontiguousarray(image), distortion)
    height, width = label.shape
    if (height, width) != crop:
        padding = (0, crop[0] - height, 0, crop[1] - width, cv2.BORDER_CONSTANT)
        image = cv2.copyMakeBorder(image, *padding, value=(0, 0, 0))
        label = cv2.copyMakeBorder(label, *padding, value=(ignore_label,))
    content = Content(height, 0, width)
    if mirror:
        image, label = cv2.flip(image, 1), cv2.flip(label, 1)
        if mirrored is not None:
            label = cv2.LUT(label, mirrored)
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

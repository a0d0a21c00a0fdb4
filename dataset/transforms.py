"""Random scale, crop and mirror with the original's numerics (original: dataset/datasets.py)."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

#: The 15 factors 0.7, 0.8, ... 2.1, drawn with equal probability.
SCALES = tuple(0.7 + step / 10.0 for step in range(15))


class Augmentation(NamedTuple):
    """What happens to a sample: resize by `scale`, cut the crop at (top, left) of the result, then mirror."""

    scale: float
    top: int
    left: int
    mirror: bool


def scaled_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """(height, width) that OpenCV gives a picture resized by the factor `scale`."""
    # OpenCV rounds halves to the even neighbour, as numpy does.
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


def mean_table(mean: np.ndarray) -> np.ndarray:
    """float32 [3, 256]: value minus mean for every channel and grey level (rounded once)."""
    return (np.arange(256)[None, :] - np.asarray(mean, np.float64)[:, None]).astype(np.float32)


def subtract_mean(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    """uint8 [h, w, 3] -> float32 [3, h, w] minus the mean of `mean_table`."""
    return np.stack([table[channel][image[:, :, channel]] for channel in range(3)])


def apply(
    image: np.ndarray,
    label: np.ndarray,
    crop: tuple[int, int],
    augmentation: Augmentation,
    table: np.ndarray,
    ignore_label: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Augment one picture and its label.

    Args:
        image: uint8 [h, w, 3].
        label: integer [h, w].
        crop: (height, width) of the result; smaller pictures are padded at the bottom and right.
        table: `mean_table` of the mean to subtract.
        ignore_label: what the padding of the label is filled with (the image's is 0, after the mean).

    Returns:
        image float32 [3, *crop], label [*crop] of the input's type.
    """
    scale, top, left, mirror = augmentation
    if scale != 1.0:
        # By factor, not by size: OpenCV then steps by exactly 1 / scale, whatever the rounding of the size.
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
        label = cv2.resize(label, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST)
    window = np.s_[top : top + crop[0], left : left + crop[1]]
    image, label = image[window], label[window]
    cropped = np.zeros((3, *crop), np.float32)
    cropped[:, : image.shape[0], : image.shape[1]] = subtract_mean(image, table)
    labelled = np.full(crop, ignore_label, label.dtype)
    labelled[: label.shape[0], : label.shape[1]] = label
    if mirror:
        cropped, labelled = cropped[:, :, ::-1].copy(), labelled[:, ::-1].copy()
    return cropped, labelled

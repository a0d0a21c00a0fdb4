"""Photometric distortion: random brightness, contrast, saturation and hue.

Source: Liu et al., SSD: Single Shot MultiBox Detector, arXiv 1512.02325, section 2.2 and its published code;
the ranges are those of mmsegmentation's PhotoMetricDistortion, with which transformers are trained.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

#: Each of the four changes happens with this probability.
PROBABILITY = 0.5
#: Largest amount that is added to all values.
BRIGHTNESS = 32.0
#: Smallest and largest factor of contrast and of saturation.
FACTORS = (0.5, 1.5)
#: Largest rotation of the hue, in steps of 2 degrees.
HUE = 18
HUES = 180  # in OpenCV's 8-bit HSV

#: Number of random values of a distortion.
DRAWS = 9


class Distortion(NamedTuple):
    """The changes of a picture, in this order; contrast is changed last if `contrast_last` is set."""

    brightness: float = 0.0  # added to each value
    contrast: float = 1.0  # factor of each value
    saturation: float = 1.0  # factor of the saturation
    hue: int = 0  # added to the hue, in steps of 2 degrees
    contrast_last: bool = False


def draw(rng: np.random.Generator) -> Distortion:
    """Draw a distortion. Every call draws the same number of random values."""
    happens = rng.random(4) < PROBABILITY
    last, *amounts = rng.random(DRAWS - 4).tolist()
    low, high = FACTORS
    brightness, contrast, saturation = amounts[:3]
    return Distortion(
        BRIGHTNESS * (2 * brightness - 1) if happens[0] else 0.0,
        low + (high - low) * contrast if happens[1] else 1.0,
        low + (high - low) * saturation if happens[2] else 1.0,
        int(amounts[3] * (2 * HUE + 1)) - HUE if happens[3] else 0,
        bool(last < PROBABILITY),
    )


def apply(image: np.ndarray, distortion: Distortion) -> np.ndarray:
    """Distort a picture. Values are rounded and limited to 0 ... 255 after each change.

    Args:
        image: uint8 [h, w, 3], BGR.
        distortion: changes to apply.

    Returns:
        uint8 [h, w, 3].
    """
    brightness, contrast, saturation, hue, contrast_last = distortion
    values = _linear(np.arange(256), 1.0, brightness)
    if not contrast_last:
        values = _linear(values, contrast, 0.0)
    image = cv2.LUT(image, values)
    if saturation != 1.0 or hue:
        levels = np.arange(256)
        tables = [(levels + hue) % HUES, _linear(levels, saturation, 0.0), levels]
        lookup = np.stack(tables, axis=1).astype(np.uint8)[None]  # [1, 256, 3]
        image = cv2.cvtColor(cv2.LUT(cv2.cvtColor(image, cv2.COLOR_BGR2HSV), lookup), cv2.COLOR_HSV2BGR)
    if contrast_last:
        image = cv2.LUT(image, _linear(np.arange(256), contrast, 0.0))
    return image


def _linear(values: np.ndarray, factor: float, offset: float) -> np.ndarray:
    return (values * factor + offset).round().clip(0, 255).astype(np.uint8)

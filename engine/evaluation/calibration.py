"""Calibration: whether the network is as often right as its confidence says.

The confidence of a pixel is the largest softmax probability. The pixels are put into BINS bins of equal width
by their confidence. The expected calibration error is the mean over the pixels of |accuracy - mean
confidence| of their bin.

Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017, section 2.
"""

from __future__ import annotations

from typing import Any

import numpy as np

#: Number of bins. Bin m, from 1, holds confidences above (m - 1) / BINS up to m / BINS.
BINS = 15


def count_confidence(
    label: np.ndarray, prediction: np.ndarray, confidence: np.ndarray, ignore_label: int = 255
) -> np.ndarray:
    """Return number of pixels, number of right pixels, and sum of confidences of each bin, float64 [3, BINS].

    Args:
        label: classes or `ignore_label`, [h, w]; ignored pixels are not counted.
        prediction: classes, [h, w].
        confidence: probability of the predicted class, from 0 to 1, [h, w].
        ignore_label: label of void pixels.
    """
    valid = label != ignore_label
    probability = confidence[valid].astype(np.float64)
    edges = np.linspace(0, 1, BINS + 1)[1:-1]
    bins = np.searchsorted(edges, probability, side="left")
    weights = (None, (label == prediction)[valid], probability)
    return np.stack([np.bincount(bins, weight, BINS) for weight in weights]).astype(np.float64)


def calibration_error(counts: np.ndarray) -> float | None:
    """Return the expected calibration error of counts, [3, BINS]; None if no pixel was counted."""
    pixels, right, confidence = counts
    return float(np.abs(right - confidence).sum() / pixels.sum()) if pixels.sum() else None


def as_json(counts: np.ndarray) -> dict[str, Any]:
    """Return the entry of result.txt for the counts of `count_confidence`, [3, BINS]."""
    pixels, right, confidence = counts
    return {
        "expectedCalibrationError": calibration_error(counts),
        "pixels": [int(each) for each in pixels],
        "correct": [int(each) for each in right],
        "confidence": confidence.tolist(),
    }

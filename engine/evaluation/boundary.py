"""Boundary IoU and boundary F score: how well the outlines of the classes are predicted.

Both scores compare two maps, label and prediction, in the valid pixels, those whose label is not the ignored
one. What is predicted in other pixels affects neither score, and a prediction that equals the label in all
valid pixels has the best score.

**Boundary IoU.** The boundary region of a class consists of its pixels that have a pixel of another class, or
the outside of the picture, at a distance of at most d. The distance is the larger one of the distances in x
and y, and d is 2 % of the diagonal of the picture. The score of a class is the intersection over the union of
its regions in label and prediction, where both are sums over all pictures. Void pixels are of no other class:
next to them there is a boundary only if a valid pixel of another class is at most d away. So neither map has
a boundary along a void area as such.

**Boundary F.** A boundary pixel of a class is one that has a pixel of another class among its eight
neighbors; here the border of the picture is no boundary. Precision is the share of the predicted boundary
pixels that have a boundary pixel of the label, of the same class, at a Euclidean distance of at most t, which
is 0.75 % of the diagonal. Recall is the same with label and prediction exchanged. F = 2 * precision * recall
/ (precision + recall) is computed for each picture and class, and is 0 if only one of the maps has boundary
pixels of the class. The score of a class is the mean over the pictures in which one of the maps has some.
Boundary pixels at most t away from a void pixel are left out of precision and recall, because the true
boundary may lie in the void area.

Source: Cheng et al., Boundary IoU, CVPR 2021, and its code (for d and for the border of the picture); Csurka
et al., What is a good evaluation measure for semantic segmentation?, BMVC 2013 (for t and one F per picture).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import cv2
import numpy as np

#: d of the boundary IoU and t of the boundary F score, as shares of the diagonal.
IOU_SHARE, F_SHARE = 0.02, 0.0075


class BoundaryCounts(NamedTuple):
    """Boundary scores of one picture.

    Attributes:
        intersection: pixels in both boundary regions of each class, int64 [K].
        union: pixels in one of them or both, int64 [K].
        f: boundary F of each class, float64 [K]; 0 if the class has no boundary pixels.
        scored: whether the class has boundary pixels in label or prediction, bool [K].
    """

    intersection: np.ndarray
    union: np.ndarray
    f: np.ndarray
    scored: np.ndarray


def count_boundary(
    label: np.ndarray,
    prediction: np.ndarray,
    num_classes: int,
    ignore_label: int = 255,
    distance: int | None = None,
    tolerance: float | None = None,
) -> BoundaryCounts:
    """Return the boundary scores of a picture (see the docstring of the module).

    Args:
        label: classes or `ignore_label`, uint8 [h, w].
        prediction: classes 0..K-1, uint8 [h, w].
        num_classes: number of classes, K.
        ignore_label: label of void pixels.
        distance: d in pixels, at least 1; None for 2 % of the diagonal, rounded, as in the published code.
        tolerance: t in pixels; None for 0.75 % of the diagonal.
    """
    diagonal = math.hypot(*label.shape)
    valid = label != ignore_label
    reach = max(1, round(IOU_SHARE * diagonal)) if distance is None else distance
    t = F_SHARE * diagonal if tolerance is None else tolerance
    border = _border(label.shape, reach)
    regions = [_differs_within(classes, valid, reach) | border & valid for classes in (label, prediction)]

    def pixels(where: np.ndarray, classes: np.ndarray) -> np.ndarray:
        return np.bincount(classes[where], minlength=num_classes)[:num_classes].astype(np.int64)

    intersection = pixels(regions[0] & regions[1] & (label == prediction), label)
    union = pixels(regions[0], label) + pixels(regions[1], prediction) - intersection

    edges = [_differs_within(classes, valid, 1) for classes in (label, prediction)]
    known = np.ones_like(valid) if valid.all() else _distances(~valid) > t
    f, scored = np.zeros(num_classes), np.zeros(num_classes, bool)
    present = [
        pixels(edge & known, classes) for edge, classes in zip(edges, (label, prediction), strict=True)
    ]
    for index in np.flatnonzero(present[0] + present[1]):
        scored[index] = True
        if not (present[0][index] and present[1][index]):
            continue
        of_class = [
            edge & (classes == index) for edge, classes in zip(edges, (label, prediction), strict=True)
        ]
        window = _window(of_class[0] | of_class[1])
        true, predicted, inner = of_class[0][window], of_class[1][window], known[window]
        shares = [
            (_distances(other)[mine & inner] <= t).mean()
            for mine, other in ((predicted, true), (true, predicted))
        ]
        f[index] = 2 * shares[0] * shares[1] / sum(shares) if sum(shares) else 0.0
    return BoundaryCounts(intersection, union, f, scored)


def _border(size: tuple[int, ...], reach: int) -> np.ndarray:
    """Return which pixels are at most `reach` away from the outside of the picture, bool [h, w]."""
    border = np.ones(size, bool)
    border[reach:-reach, reach:-reach] = False
    return border


def _differs_within(classes: np.ndarray, valid: np.ndarray, reach: int) -> np.ndarray:
    """Return which valid pixels have a valid pixel of another class within a square, bool [h, w].

    The square reaches `reach` pixels to each side. It holds another class if the smallest or the largest
    class in it differs from that of the pixel, so the cost does not depend on the number of classes.
    """
    kernel = np.ones((2 * reach + 1,) * 2, np.uint8)
    # OpenCV leaves the outside of the picture out of minimum and maximum.
    smallest = cv2.erode(np.where(valid, classes, 255).astype(np.uint8), kernel)
    largest = cv2.dilate(np.where(valid, classes, 0).astype(np.uint8), kernel)
    return valid & ((smallest != classes) | (largest != classes))


def _distances(pixels: np.ndarray) -> np.ndarray:
    """Return the Euclidean distance of each pixel to the nearest one of `pixels`, float32 [h, w]."""
    return cv2.distanceTransform((~pixels).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)


def _window(pixels: np.ndarray) -> tuple[slice, slice]:
    """Return the rows and columns of the smallest window that holds all `pixels`."""
    rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)

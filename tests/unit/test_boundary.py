"""Boundary IoU and boundary F score: brute force, the published procedure, and cases computed by hand."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest

from engine.evaluation.boundary import count_boundary


def brute_force(label, prediction, num_classes, ignore, distance, tolerance):
    """Compute both scores by the definitions in the docstring of the module, with loops over pixels."""
    height, width = label.shape
    valid = [(y, x) for y in range(height) for x in range(width) if label[y, x] != ignore]
    void = [(y, x) for y in range(height) for x in range(width) if label[y, x] == ignore]

    def region(classes, index):
        found = set()
        for y, x in valid:
            if classes[y, x] != index:
                continue
            outside = min(y, x, height - 1 - y, width - 1 - x) < distance
            others = (max(abs(y - a), abs(x - b)) for a, b in valid if classes[a, b] != index)
            if outside or min(others, default=math.inf) <= distance:
                found.add((y, x))
        return found

    def edge(classes, index):
        return [
            (y, x)
            for y, x in valid
            if classes[y, x] == index
            and any(max(abs(y - a), abs(x - b)) == 1 and classes[a, b] != index for a, b in valid)
        ]

    def near(pixel, pixels):
        return any(math.dist(pixel, other) <= tolerance for other in pixels)

    intersection, union, f, scored = [], [], [], []
    for index in range(num_classes):
        regions = [region(classes, index) for classes in (label, prediction)]
        intersection.append(len(regions[0] & regions[1]))
        union.append(len(regions[0] | regions[1]))
        edges = [edge(classes, index) for classes in (label, prediction)]
        known = [[pixel for pixel in pixels if not near(pixel, void)] for pixels in edges]
        scored.append(bool(known[0] or known[1]))
        if not (known[0] and known[1]):
            f.append(0.0)
            continue
        recall = np.mean([near(pixel, edges[1]) for pixel in known[0]])
        precision = np.mean([near(pixel, edges[0]) for pixel in known[1]])
        f.append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
    return intersection, union, f, scored


@pytest.mark.parametrize("ignore", [255, 3, 0])
@pytest.mark.parametrize("distance, tolerance", [(1, 1.0), (2, 1.5), (3, 2.5), (40, 0.5)])
def test_equals_brute_force(ignore, distance, tolerance):
    rng = np.random.default_rng(distance)
    for size in ((13, 17), (16, 9), (1, 5)):
        coarse = rng.integers(0, 5, (size[0] // 4 + 1, size[1] // 4 + 1)).astype(np.uint8)
        label = np.kron(coarse, np.ones((4, 4), np.uint8))[: size[0], : size[1]]
        prediction = np.roll(label, 1, 1)
        prediction[rng.random(size) < 0.1] = 1
        prediction[prediction == 4] = 2
        label[label == 4] = ignore
        found = count_boundary(label, prediction, 4, ignore, distance, tolerance)
        expected = brute_force(label, prediction, 4, ignore, distance, tolerance)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-12)


def published_region(mask, share=0.02):
    """Return the boundary region as the code of the authors computes it: the mask without its erosion."""
    height, width = mask.shape
    iterations = max(1, round(share * math.sqrt(height**2 + width**2)))
    padded = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    eroded = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=iterations)
    return mask - eroded[1:-1, 1:-1]


def test_boundary_iou_equals_the_published_procedure():
    rng = np.random.default_rng(0)
    label = cv2.resize(
        rng.integers(0, 3, (6, 8), dtype=np.uint8), (160, 120), interpolation=cv2.INTER_NEAREST
    )
    prediction = np.roll(label, (3, -2), (0, 1))
    found = count_boundary(label, prediction, 3)
    for index in range(3):
        regions = [published_region((classes == index).astype(np.uint8)) for classes in (label, prediction)]
        assert found.intersection[index] == (regions[0] & regions[1]).sum()
        assert found.union[index] == (regions[0] | regions[1]).sum()


def square(left, top=10, side=20, size=(64, 80)):
    picture = np.zeros(size, np.uint8)
    picture[top : top + side, left : left + side] = 1
    return picture


def test_identical_maps_are_perfect():
    label = square(10)
    label[:, 60:] = 255
    prediction = np.where(label == 255, 1, label)
    found = count_boundary(label, prediction, 2)
    assert (found.intersection == found.union).all() and (found.union > 0).all()
    assert found.f.tolist() == [1.0, 1.0] and found.scored.all()


def test_shifted_square():
    """One column to the right: of two rings of 76 pixels, the two horizontal sides share 19 pixels each."""
    found = count_boundary(square(10), square(11), 2, distance=1, tolerance=0.5)
    assert (found.intersection[1], found.union[1]) == (38, 2 * 76 - 38)
    # With a tolerance below one pixel, 38 of 76 boundary pixels match in both directions.
    assert found.f[1] == 0.5
    assert count_boundary(square(10), square(11), 2, tolerance=1).f[1] == 1
    # Three columns to the right, tolerance 1: the sides of 20 + 2 * 17 pixels of the ring match, those
    # within one pixel of the other ring: 2 * 17 in the rows, one more at each end.
    shifted = count_boundary(square(10), square(13), 2, tolerance=1)
    ring = [(y, x) for y in range(10, 30) for x in range(10, 30) if y in (10, 29) or x in (10, 29)]
    other = [(y, x + 3) for y, x in ring]
    share = np.mean([min(math.dist(a, b) for b in other) <= 1 for a in ring])
    assert shifted.f[1] == pytest.approx(share)


def test_void_pixels_neither_reward_nor_punish():
    rng = np.random.default_rng(0)
    label = square(10)
    label[5:35, 26:40] = 255  # over the right side of the square
    prediction = square(12)
    found = count_boundary(label, prediction, 2)
    for _ in range(3):
        other = np.where(label == 255, rng.integers(0, 2, label.shape), prediction).astype(np.uint8)
        for one, again in zip(found, count_boundary(label, other, 2), strict=True):
            assert np.array_equal(one, again)
    # A picture of one class with void pixels has no boundary, wherever the void is.
    plain = np.zeros((64, 80), np.uint8)
    plain[20:30, 20:30] = 255
    found = count_boundary(plain, np.zeros_like(plain), 2)
    assert not found.scored.any() and found.union[1] == 0
    frame = 2 * round(0.02 * math.hypot(64, 80))
    assert found.union[0] == 64 * 80 - (64 - frame) * (80 - frame)  # the border of the picture alone


def test_only_one_map_has_the_class():
    found = count_boundary(square(10), np.zeros((64, 80), np.uint8), 3)
    assert found.f.tolist() == [0, 0, 0] and found.scored.tolist() == [True, True, False]
    assert found.intersection[1] == 0 < found.union[1] and found.union[2] == 0


def test_all_void():
    found = count_boundary(np.full((8, 9), 255, np.uint8), np.zeros((8, 9), np.uint8), 2)
    assert not found.union.any() and not found.scored.any()

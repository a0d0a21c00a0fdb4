"""Expected calibration error: torchmetrics, the definition in loops, and the confidences of the network."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.evaluation.calibration import BINS, as_json, calibration_error, count_confidence
from engine.inference import predict_classes, predict_confidence, predict_multiscale
from utils.drawing.reliability import draw_reliability


def random_pixels(seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(1, 7, 40, 50, generator=generator, dtype=torch.float64)
    label = torch.randint(0, 7, (40, 50), generator=generator)
    label[torch.rand(40, 50, generator=generator) < 0.3] = logits[0].argmax(0)[0, 0]
    label[torch.rand(40, 50, generator=generator) < 0.2] = 255
    return logits.softmax(1), label.to(torch.uint8)


def counted(probabilities, label):
    confidence, prediction = probabilities[0].max(0)
    return count_confidence(label.numpy(), prediction.numpy().astype(np.uint8), confidence.numpy())


def test_equals_torchmetrics():
    metrics = pytest.importorskip("torchmetrics.functional.classification")
    for seed in range(3):
        probabilities, label = random_pixels(seed)
        valid = label != 255
        of_pixels = probabilities[0].permute(1, 2, 0)[valid]
        theirs = metrics.multiclass_calibration_error(
            of_pixels, label[valid].long(), num_classes=7, n_bins=15, norm="l1"
        )
        assert calibration_error(counted(probabilities, label)) == pytest.approx(float(theirs), rel=1e-6)


def test_equals_the_definition():
    probabilities, label = random_pixels()
    confidence, prediction = (part.flatten().tolist() for part in probabilities[0].max(0))
    bins = [[] for _ in range(BINS)]
    for sure, predicted, true in zip(confidence, prediction, label.flatten().tolist(), strict=True):
        if true != 255:
            (place,) = [m for m in range(1, BINS + 1) if (m - 1) / BINS < sure <= m / BINS]
            bins[place - 1].append((predicted == true, sure))
    number = sum(map(len, bins))
    error = sum(
        len(pixels)
        / number
        * abs(np.mean([right for right, _ in pixels]) - np.mean([sure for _, sure in pixels]))
        for pixels in bins
        if pixels
    )
    counts = counted(probabilities, label)
    assert calibration_error(counts) == pytest.approx(error, rel=1e-12)
    assert counts[0].tolist() == [len(pixels) for pixels in bins]
    # Counts of parts of the pixels add up.
    parts = [counted(probabilities[..., rows, :], label[rows]) for rows in (slice(13), slice(13, None))]
    np.testing.assert_allclose(sum(parts), counts)
    assert as_json(counts)["pixels"] == [len(pixels) for pixels in bins]


def test_certain_pixels_are_in_the_last_bin_and_void_ones_in_none():
    label = np.array([[0, 1, 255]], np.uint8)
    counts = count_confidence(label, np.zeros((1, 3), np.uint8), np.array([[1.0, 1.0, 0.5]]))
    assert counts[:, -1].tolist() == [2, 1, 2] and counts[:, :-1].sum() == 0
    assert calibration_error(counts) == 0.5
    edges = np.array([[2 / 15, np.nextafter(2 / 15, 1), 0.0]])
    counts = count_confidence(np.zeros((1, 3), np.uint8), np.zeros((1, 3), np.uint8), edges)
    assert counts[0, :3].tolist() == [1, 1, 1]  # the upper edge belongs to a bin
    nothing = count_confidence(np.full((1, 3), 255, np.uint8), np.zeros((1, 3), np.uint8), np.ones((1, 3)))
    assert calibration_error(nothing) is None and as_json(nothing)["expectedCalibrationError"] is None


def network(images):
    """Return logits at half the size that depend on place and color."""
    small = torch.nn.functional.avg_pool2d(images, 2, ceil_mode=True) / 20
    return torch.cat([small, small.flip(1) * 0.7, small[:, :1] - 1], 1)


@pytest.mark.parametrize(
    "scales, flip, tile", [([1.0], False, None), ([0.5, 1.0], True, (17, 21)), ([1.0], False, (40, 60))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_confidence_is_the_softmax_of_the_averaged_logits(scales, flip, tile, dtype):
    images = 100 * torch.randn(2, 3, 33, 47, generator=torch.Generator().manual_seed(0), dtype=dtype)
    classes, confidence = predict_confidence(network, images, scales, flip, tile, 7, 2)
    logits = predict_multiscale(network, images, scales, flip, tile, 7, 2)
    expected, best = logits.softmax(1).max(1)
    torch.testing.assert_close(confidence, expected)
    assert torch.equal(classes, best.to(torch.uint8))
    assert (classes == predict_classes(network, images, scales, flip, tile, 7, 2)).float().mean() > 0.999


def test_infinite_logits_have_no_confidence():
    def overflowing(images):
        return network(images).masked_fill(images[:, :1, ::2, ::2] > 0, float("inf"))

    images = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert predict_confidence(overflowing, images, [1.0], False)[1].isnan().any()


def test_the_plot_shows_accuracy_and_confidence():
    pixels, correct = [0] * 14 + [100], [0] * 14 + [50]
    picture = np.asarray(draw_reliability(pixels, correct, [0] * 14 + [97.0]), int)
    blue = (picture == (31, 111, 180)).all(-1)
    columns, rows = np.flatnonzero(blue.any(0)), np.flatnonzero(blue.any(1))
    # The bar of the last bin is a 15th of the width, and half as high as the plot.
    assert 24 <= len(columns) <= 30 and 210 <= len(rows) <= 226
    assert draw_reliability([0] * 15, [0] * 15, [0] * 15).size == (picture.shape[1], picture.shape[0])

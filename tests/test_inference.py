"""Prediction by tiles, whole and at several scales, against the original's algorithm where that is right."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from engine.inference import predict_multiscale, predict_sliding, predict_whole, tile_offsets

CLASSES = 4


class Model(torch.nn.Module):
    """A network whose logits depend on the whole of its input, at 1/8 of its size."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(CLASSES, 3, 9, 9, generator=generator, dtype=torch.float64) / 40
        self.sizes = []

    def forward(self, image):
        self.sizes.append(tuple(image.shape))
        logits = F.conv2d(image.double(), self.weight, stride=8, padding=4)
        return [(logits + logits.mean((2, 3), keepdim=True)).to(image.dtype), None]


def sliding_by_the_original(model, image, tile):
    """One image [3, h, w], as the original's loop goes: accumulate tiles in numpy, divide by the visits."""
    _, height, width = image.shape
    stride = int(math.ceil(tile[0] * (1 - 1 / 3)))
    rows = int(math.ceil((height - tile[0]) / stride) + 1)
    columns = int(math.ceil((width - tile[1]) / stride) + 1)
    total, visits = np.zeros((CLASSES, height, width)), np.zeros((height, width))
    for row in range(rows):
        for column in range(columns):
            bottom, right = min(row * stride + tile[0], height), min(column * stride + tile[1], width)
            top, left = max(bottom - tile[0], 0), max(right - tile[1], 0)
            piece = torch.zeros(1, 3, *tile, dtype=image.dtype)
            piece[0, :, : bottom - top, : right - left] = image[:, top:bottom, left:right]
            logits = F.interpolate(model(piece)[0], size=tile, mode="bilinear", align_corners=True)[0].numpy()
            total[:, top:bottom, left:right] += logits[:, : bottom - top, : right - left]
            visits[top:bottom, left:right] += 1
    return torch.from_numpy(total / visits)


@pytest.mark.parametrize(
    "size, tile", [((60, 130), (33, 33)), ((33, 90), (33, 47)), ((50, 41), (65, 33)), ((70, 65), (65, 65))]
)
def test_sliding_equals_the_original_for_each_image_of_a_batch(size, tile):
    model, images = Model(), torch.randn(3, 3, *size, dtype=torch.float64)
    result = predict_sliding(model, images, tile, CLASSES)
    for image, logits in zip(images, result, strict=True):
        torch.testing.assert_close(logits, sliding_by_the_original(model, image, tile))


def test_tiles_of_the_published_evaluation():
    stride = math.ceil(769 * (1 - 1 / 3))
    assert stride == 513
    assert tile_offsets(1024, 769, stride) == [0, 255]
    assert tile_offsets(2048, 769, stride) == [0, 513, 1026, 1279]
    # In floating point 129 * (1 - 1/3) is a little more than 86.
    assert math.ceil(129 * (1 - 1 / 3)) == 87


@pytest.mark.parametrize("size", [(8, 8), (20, 100), (100, 20), (256, 33)])
def test_small_pictures_have_one_tile_and_finite_logits(size):
    logits = predict_sliding(Model(), torch.randn(1, 3, *size), (65, 65), CLASSES)
    assert logits.shape == (1, CLASSES, *size) and logits.isfinite().all()


def test_narrow_tiles_leave_no_gap():
    logits = predict_sliding(Model(), torch.randn(1, 3, 90, 200), (90, 33), CLASSES)
    assert logits.isfinite().all()


def test_one_tile_of_the_picture_is_the_whole():
    model, image = Model(), torch.randn(2, 3, 57, 65)
    torch.testing.assert_close(predict_sliding(model, image, (57, 65), CLASSES), predict_whole(model, image))


def test_whole_upsamples_with_aligned_corners():
    model, image = Model(), torch.randn(2, 3, 57, 65, dtype=torch.float64)
    expected = F.interpolate(model(image)[0], size=(57, 65), mode="bilinear", align_corners=True)
    torch.testing.assert_close(predict_whole(model, image), expected)
    assert predict_whole(model, image.bfloat16()).dtype == torch.float32


def test_multiscale_averages_predictions_of_the_pictures_size():
    model, image = Model(), torch.randn(1, 3, 64, 96, dtype=torch.float64)
    scales, expected = (0.75, 1.0, 1.25), 0
    for scale in scales:
        size = (round(64 * scale), round(96 * scale))
        scaled = F.interpolate(image, size=size, mode="bilinear", align_corners=True)
        logits = (predict_whole(model, scaled) + predict_whole(model, scaled.flip(3)).flip(3)) / 2
        expected = expected + F.interpolate(logits, size=(64, 96), mode="bilinear", align_corners=True) / 3
    torch.testing.assert_close(predict_multiscale(model, image, scales, True), expected)


def test_flip_of_a_flipped_picture_gives_the_flipped_logits():
    model, image = Model(), torch.randn(2, 3, 64, 96, dtype=torch.float64)
    options = {"tile_size": (49, 49), "num_classes": CLASSES}
    plain = predict_multiscale(model, image, [0.5, 1.0], True, **options)
    flipped = predict_multiscale(model, image.flip(3), [0.5, 1.0], True, **options)
    torch.testing.assert_close(flipped, plain.flip(3))
    assert not torch.allclose(plain, predict_multiscale(model, image, [0.5, 1.0], False, **options))


def test_one_scale_without_flip_is_the_plain_prediction():
    model, image = Model(), torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(predict_multiscale(model, image, [1.0], False), predict_whole(model, image))


@pytest.mark.parametrize("options", [{"scales": []}, {"scales": [1.0], "tile_size": (33, 33)}])
def test_wrong_arguments(options):
    with pytest.raises(ValueError):
        predict_multiscale(Model(), torch.randn(1, 3, 64, 64), flip=False, **options)

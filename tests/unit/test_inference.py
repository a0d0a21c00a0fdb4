"""Prediction by tiles, whole and at several scales, against the algorithm of the original."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.inference import (
    _picture,
    _resized,
    predict_classes,
    predict_multiscale,
    predict_sliding,
    predict_whole,
    tile_offsets,
)

CLASSES = 4


class Model(torch.nn.Module):
    """A network whose logits depend on its whole input, at 1/8 of the size."""

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
    """Predict one image [3, h, w] as the original: sum tiles in numpy, divide by the number of visits."""
    _, height, width = image.shape
    stride = math.ceil(tile[0] * (1 - 1 / 3))
    rows = math.ceil((height - tile[0]) / stride) + 1
    columns = math.ceil((width - tile[1]) / stride) + 1
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


@pytest.mark.parametrize("size", [(130, 60), (60, 130)])
def test_flip_is_the_prediction_of_the_mirrored_picture(size):
    # Tiles of a mirrored picture are not the mirrored tiles, because the last one of each axis is shifted.
    model, image, tile = Model(), torch.randn(1, 3, *size), (33, 33)
    mirrored = predict_sliding(model, image.flip(3), tile, CLASSES).flip(3)
    expected = (predict_sliding(model, image, tile, CLASSES) + mirrored) / 2
    assert torch.equal(predict_multiscale(model, image, [1.0], True, tile, CLASSES), expected)


def test_one_scale_without_flip_is_the_plain_prediction():
    model, image = Model(), torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(predict_multiscale(model, image, [1.0], False), predict_whole(model, image))


@pytest.mark.parametrize(
    "name, options",
    [
        ("scales", {"scales": []}),
        ("num_classes", {"scales": [1.0], "tile_size": (33, 33)}),
        ("tile_batch", {"scales": [1.0], "tile_size": (33, 33), "num_classes": CLASSES, "tile_batch": 0}),
    ],
)
@pytest.mark.parametrize("predict", [predict_multiscale, predict_classes])
def test_wrong_arguments(predict, name, options):
    with pytest.raises(ValueError, match=f"^{name}: .*$"):
        predict(Model(), torch.randn(1, 3, 64, 64), flip=False, **options)


@pytest.mark.parametrize("size", [(150, 40), (40, 151), (20, 27), (1, 90), (90, 1), (300, 35)])
@pytest.mark.parametrize("scales, flip", [((1.0,), False), ((1.0,), True), ((0.5, 1.0, 1.75), True)])
@pytest.mark.parametrize("tile, tile_batch", [(None, 1), ((33, 41), 1), ((33, 41), 3), ((33, 41), 100)])
def test_classes_are_the_greatest_of_the_logits(size, scales, flip, tile, tile_batch):
    model, images = Model(), torch.randn(2, 3, *size)
    options = {"tile_size": tile, "num_classes": CLASSES, "tile_batch": tile_batch}
    with torch.inference_mode():
        classes = predict_classes(model, images, scales, flip, **options)
        logits = predict_multiscale(model, images, scales, flip, **options)
    assert classes.dtype == torch.uint8 and logits.shape == (2, CLASSES, *size)
    assert torch.equal(classes.long(), logits.argmax(1))


def test_of_equal_logits_the_lowest_class_wins():
    classes = predict_classes(
        lambda image: image.new_zeros(len(image), CLASSES, 5, 5), torch.ones(1, 3, 9, 9), [1.0], True
    )
    assert not classes.any()


@pytest.mark.parametrize("size", [(60, 130), (130, 60)])
def test_tiles_are_summed_row_by_row_on_either_axis(size):
    """One tile is much larger than the others, so another order of the sum would give other bits."""
    model, image, tile = Model(), torch.randn(1, 3, *size), (33, 33)
    image[..., 20:30, 20:30] *= 1e6
    total, visits = torch.zeros(1, CLASSES, *size), torch.zeros(*size)
    for top in tile_offsets(size[0], 33, 23):
        for left in tile_offsets(size[1], 33, 23):
            window = (..., slice(top, top + 33), slice(left, left + 33))
            total[window] += predict_whole(model, image[window])
            visits[window] += 1
    assert torch.equal(predict_sliding(model, image, tile, CLASSES), total / visits)


@pytest.mark.parametrize("size", [(60, 130), (130, 60), (20, 20)])
@pytest.mark.parametrize("tile_batch", [1, 4, 7, 100])
@pytest.mark.parametrize("flip", [False, True])
def test_every_tile_goes_through_the_network_once_in_full_batches(size, tile_batch, flip):
    model, images, tile = Model(), torch.randn(3, 3, *size, dtype=torch.float64), (33, 33)
    scales = (1.0, 1.5) if flip else (1.0,)
    alone = predict_multiscale(model, images, scales, flip, tile, CLASSES)
    model.sizes.clear()
    together = predict_multiscale(model, images, scales, flip, tile, CLASSES, tile_batch)
    torch.testing.assert_close(together, alone)

    expected = []
    for scale in scales:
        tiles = 3 * math.prod(len(tile_offsets(round(side * scale), 33, 23)) for side in size)
        calls = [min(tile_batch, tiles - done) for done in range(0, tiles, tile_batch)]
        expected += (1 + flip) * calls
    assert sorted(shape[0] for shape in model.sizes) == sorted(expected)
    assert {shape[1:] for shape in model.sizes} == {(3, *tile)}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("axis", [2, 3])
@pytest.mark.parametrize("size", [(9, 14), (1, 6), (7, 1), (1, 1), (30, 23)])
@pytest.mark.parametrize("target", [(9, 14), (40, 33), (4, 5), (1, 50), (50, 1), (30, 2), (9, 20)])
def test_resizing_by_bands_is_resizing(size, target, axis, dtype, tolerance):
    x = torch.randn(2, 3, *size, dtype=dtype)
    lines = _resized(_picture(x, axis), target)
    bands = [lines.read(start, min(start + 7, lines.length)) for start in range(0, lines.length, 7)]
    expected = F.interpolate(x, size=target, mode="bilinear", align_corners=True)
    torch.testing.assert_close(torch.cat(bands, axis), expected, rtol=0, atol=tolerance)


def test_sums_are_precise():
    image = torch.randn(1, 3, 60, 80)
    for dtype, expected in [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
    ]:
        for tile in (None, (33, 33)):
            logits = predict_multiscale(Model(), image.to(dtype), [0.5, 1.0], True, tile, CLASSES)
            assert logits.dtype == expected


class Memory(TorchDispatchMode):
    """Measures the largest number of bytes that tensors made in this context hold at once."""

    def __init__(self, *known):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.held, self.bytes, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                self.held[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.bytes += storage.nbytes()
        # The count includes tensors freed or seen twice since the last call, so it is never too small.
        if self.bytes > self.peak:
            self.held = {key: held for key, held in self.held.items() if not held[0].expired()}
            self.bytes = sum(size for _, size in self.held.values())
            self.peak = max(self.peak, self.bytes)
        return result


@pytest.mark.parametrize("size", [(64, 6000), (6000, 64)])
@pytest.mark.parametrize(
    "scales, flip", [((1.0,), False), pytest.param((0.5, 1.0), True, marks=pytest.mark.slow)]
)
def test_classes_of_a_long_picture_take_the_memory_of_a_band(size, scales, flip):
    weight, image = torch.randn(19, 3, 1, 1), torch.randn(1, 3, *size)
    tiles = {"tile_size": (33, 33), "num_classes": 19, "tile_batch": 2}

    def model(image):
        return F.conv2d(image, weight, stride=8)

    def peak(predict, **options):
        with torch.inference_mode(), Memory(image, weight) as memory:
            predict(model, image, scales, flip, **options)
        return memory.peak

    band, all_logits, classes = 4 * 19 * 33 * 64, 4 * 19 * 64 * 6000, 64 * 6000
    assert peak(predict_classes, **tiles) < 2 * classes + 6 * band
    assert peak(predict_multiscale, **tiles) > all_logits > 10 * (2 * classes + 6 * band)
    # Whole-image prediction holds the outputs of the network, and bands are higher.
    assert peak(predict_classes) < all_logits / 2

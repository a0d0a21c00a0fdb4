"""Photometric distortion against its definition, pixel by pixel."""

from __future__ import annotations

import colorsys
from pathlib import Path

import numpy as np
import pytest
from conftest import write_pair

from dataset import CSDataSet, photometric, transforms
from dataset.photometric import Distortion


def picture(height: int = 12, width: int = 17) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def by_pixels(image: np.ndarray, distortion: Distortion) -> np.ndarray:
    """Distort in floating point, without rounding in between."""
    values = image / 255
    values = (values + distortion.brightness / 255).clip(0, 1)
    if not distortion.contrast_last:
        values = (values * distortion.contrast).clip(0, 1)
    for row in values:
        for pixel in row:
            h, s, v = colorsys.rgb_to_hsv(*pixel[::-1])
            s = min(s * distortion.saturation, 1)
            pixel[::-1] = colorsys.hsv_to_rgb((h + distortion.hue / 180) % 1, s, v)
    if distortion.contrast_last:
        values = (values * distortion.contrast).clip(0, 1)
    return values * 255


@pytest.mark.parametrize(
    "distortion",
    [
        Distortion(brightness=25.0),
        Distortion(brightness=-31.0, contrast=1.4),
        Distortion(contrast=0.6, saturation=1.3),
        Distortion(saturation=0.5),
        Distortion(hue=17),
        Distortion(hue=-18, saturation=1.5),
        Distortion(10.0, 1.5, 0.7, 9, contrast_last=True),
    ],
)
def test_equal_to_the_definition(distortion: Distortion) -> None:
    image = picture()
    found, exact = photometric.apply(image, distortion), by_pixels(image, distortion)
    error = np.abs(found - exact)
    # 8-bit hues are steps of 2 degrees: up to 1/60 of the difference of the channels, and further rounding.
    assert error.max() < 12 and error.mean() < 1.6
    if not (distortion.hue or distortion.saturation != 1):
        assert error.max() < 2
    assert np.abs(image - exact).mean() > 5


def test_nothing_happens_without_changes() -> None:
    assert np.array_equal(photometric.apply(picture(), Distortion()), picture())


def test_contrast_before_and_after_differ() -> None:
    image = picture()
    first, last = (
        photometric.apply(image, Distortion(0.0, 1.5, 0.5, 0, contrast_last))
        for contrast_last in (False, True)
    )
    assert not np.array_equal(first, last)


def test_probabilities_and_ranges() -> None:
    rng = np.random.default_rng(1)
    drawn = [photometric.draw(rng) for _ in range(4000)]
    neutral = Distortion()
    for name in Distortion._fields:
        changed = np.mean([getattr(each, name) != getattr(neutral, name) for each in drawn])
        assert changed == pytest.approx(0.5, abs=0.04), name
    ends = {
        name: [f([getattr(each, name) for each in drawn]) for f in (min, max)] for name in Distortion._fields
    }
    assert ends["hue"] == [-18, 18]
    assert ends["brightness"] == pytest.approx([-32, 32], abs=0.2)
    assert ends["contrast"] == pytest.approx([0.5, 1.5], abs=0.01)
    assert ends["saturation"] == pytest.approx([0.5, 1.5], abs=0.01)


def test_samples_are_a_function_of_seed_and_number_and_keep_their_place(tmp_path: Path) -> None:
    write_pair(tmp_path, "train", 0, (40, 56))
    plain = CSDataSet(str(tmp_path), crop_size=(33, 49), scale=True, mirror=True)
    distorted = CSDataSet(str(tmp_path), crop_size=(33, 49), scale=True, mirror=True, photometric=True)
    differ = 0
    for seed in range(12):
        one, two, three = (
            data.sample(0, np.random.default_rng(seed)) for data in (distorted, distorted, plain)
        )
        assert np.array_equal(one.image, two.image)
        # Scale, crop, mirror and label are those without distortion, and padding stays black.
        assert np.array_equal(one.label, three.label) and one.content == three.content
        assert one.augmentation._replace(distortion=None) == three.augmentation
        bottom, left, right = one.content
        assert not one.image[bottom:].any() and not one.image[:, :left].any()
        expected = three.image.copy()
        expected[:bottom, left:right] = photometric.apply(
            np.ascontiguousarray(three.image[:bottom, left:right]), one.augmentation.distortion
        )
        error = np.abs(one.image.astype(int) - expected)  # OpenCV rounds hues by the place in a vector
        assert error.max() < 8 and error.mean() < 0.5
        differ += not np.array_equal(one.image, three.image)
    assert differ > 6


def test_the_number_of_draws_is_constant() -> None:
    one, two = np.random.default_rng(0), np.random.default_rng(0)
    transforms.draw(one, (40, 56), (33, 33), True, True, photometric=True)
    two.random(4 + photometric.DRAWS)
    assert one.random() == two.random()

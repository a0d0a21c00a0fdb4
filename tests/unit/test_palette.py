"""Palettes and palette pictures."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset.labels import CITYSCAPES
from utils.drawing.palette import make_palette, save_indexed_png
from utils.files import replacing

COLORS = [label.color for label in CITYSCAPES.classes]


def as_colors(palette):
    return [tuple(palette[i : i + 3]) for i in range(0, len(palette), 3)]


def test_palette_holds_the_given_colors_then_distinct_ones_then_black():
    palette = make_palette(COLORS)
    assert len(palette) == 768
    assert all(type(value) is int and 0 <= value <= 255 for value in palette)
    colors = as_colors(palette)
    assert colors[:19] == COLORS
    assert len(set(colors)) == 256
    assert colors[255] == (0, 0, 0)
    assert make_palette(COLORS) == palette


def test_neighboring_generated_colors_look_different():
    colors = np.array(as_colors(make_palette(COLORS))[19:60])
    assert np.abs(np.diff(colors, axis=0)).max(axis=1).min() >= 32


@pytest.mark.parametrize("count", [0, 255])
def test_palette_of_the_fewest_and_the_most_colors(count):
    colors = [(0, i, 7) for i in range(count)]
    palette = as_colors(make_palette(colors))
    assert palette[:count] == colors
    assert len(set(palette)) == 256


@pytest.mark.parametrize("colors", [[(0, 0, 0)] * 256, [(0, 0, 256)], [(0, -1, 0)], [(0, 0)]])
def test_palette_rejects(colors):
    with pytest.raises(ValueError, match=r"color"):
        make_palette(colors)


def test_saved_picture_keeps_indices_and_colors(tmp_path):
    indices = np.random.default_rng(0).choice(np.array([*range(19), 255], dtype=np.uint8), (13, 29))
    path = tmp_path / "town_000000_000019.png"
    save_indexed_png(path, indices, make_palette(COLORS))
    with Image.open(path) as picture:
        assert picture.mode == "P"
        np.testing.assert_array_equal(np.array(picture), indices)
        rgb = np.array(picture.convert("RGB"))
    np.testing.assert_array_equal(rgb, np.array([*COLORS, *[(0, 0, 0)] * 237], dtype=np.uint8)[indices])
    assert os.listdir(tmp_path) == [path.name]


def test_saving_replaces_an_older_picture(tmp_path):
    path = str(tmp_path / "a.png")
    for value in (3, 5):
        save_indexed_png(path, np.full((4, 4), value, dtype=np.uint8), make_palette(COLORS))
    with Image.open(path) as picture:
        assert np.unique(np.array(picture)).tolist() == [5]


def test_two_threads_may_write_the_same_picture(tmp_path):
    path = tmp_path / "a.png"
    other = threading.Thread(
        target=save_indexed_png, args=(path, np.zeros((4, 4), dtype=np.uint8), make_palette(COLORS))
    )
    with replacing(path) as temporary:
        Path(temporary).write_bytes(b"the last one stays")
        other.start()
        other.join()
        assert Image.open(path).size == (4, 4)
    assert path.read_bytes() == b"the last one stays" and os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("failing", ["save", "replace"])
def test_failure_leaves_the_older_picture_and_nothing_else(tmp_path, monkeypatch, failing):
    path = tmp_path / "a.png"
    save_indexed_png(path, np.zeros((4, 4), dtype=np.uint8), make_palette(COLORS))
    before = path.read_bytes()

    def half_written(self, file, **_):
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    def not_replaced(source, target):
        raise OSError("disk full")

    if failing == "save":
        monkeypatch.setattr(Image.Image, "save", half_written)
    else:
        monkeypatch.setattr(os, "replace", not_replaced)
    with pytest.raises(OSError, match="disk full"):
        save_indexed_png(path, np.ones((4, 4), dtype=np.uint8), make_palette(COLORS))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("indices", [np.zeros((4, 4), np.int64), np.zeros((4, 4, 3), np.uint8)])
def test_saving_rejects_anything_but_one_byte_a_pixel(tmp_path, indices):
    with pytest.raises(ValueError, match="uint8"):
        save_indexed_png(tmp_path / "a.png", indices, make_palette(COLORS))
    assert os.listdir(tmp_path) == []

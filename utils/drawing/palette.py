"""Pictures of class indices as PNG files with a palette."""

import os
from collections.abc import Sequence
from itertools import count

import numpy as np
from PIL import Image

from utils.files import replacing


def make_palette(colors: Sequence[tuple[int, int, int]]) -> list[int]:
    """Palette of a mode P picture: 768 integers, R G B of index 0, then of index 1, and so on.

    Index i has `colors[i]`; the indices after them have generated colors, the same on each call and
    different from each other and from all given ones; index 255, the ignored pixels, is black.

    Raises:
        ValueError: more than 255 colors, or one that is not three integers in 0..255.
    """
    if len(colors) > 255:
        raise ValueError(
            f"{len(colors)} colors, but a palette has room for 255 beside the black of the ignored pixels"
        )
    for color in colors:
        if len(color) != 3 or not all(0 <= channel <= 255 for channel in color):
            raise ValueError(f"{color} is not an RGB color of three integers in 0..255")
    black = (0, 0, 0)
    table = [(red, green, blue) for red, green, blue in colors]
    taken = {*table, black}
    candidates = map(_generated_color, count(1))
    while len(table) < 255:
        color = next(candidates)
        if color not in taken:
            taken.add(color)
            table.append(color)
    return [int(channel) for color in (*table, black) for channel in color]


def _generated_color(number: int) -> tuple[int, int, int]:
    """Deal the bits of a number out to R, G, B in turn, each channel's highest bit first (as PASCAL VOC).

    Distinct for all numbers below 2**24; small numbers differ in the high bits, which the eye can see.
    """
    channels = [0, 0, 0]
    for bit in range(24):
        channels[bit % 3] |= (number >> bit & 1) << (7 - bit // 3)
    return channels[0], channels[1], channels[2]


def colored(indices: np.ndarray, palette: Sequence[int]) -> np.ndarray:
    """The picture that a palette makes of class indices: [h, w] in 0..255 -> uint8 [h, w, 3] RGB."""
    return np.array(palette, np.uint8).reshape(256, 3)[indices]


def save_indexed_png(path: str | os.PathLike[str], indices: np.ndarray, palette: Sequence[int]) -> None:
    """Write class indices as a mode P PNG file, whole or not at all.

    Args:
        path: the file; its folder exists. A file of that name is replaced.
        indices: uint8 [h, w].
        palette: 768 integers (`make_palette`).

    Raises:
        ValueError: the indices are not uint8 [h, w].
    """
    if indices.dtype != np.uint8 or indices.ndim != 2:
        raise ValueError(f"indices are {indices.dtype} {list(indices.shape)}; uint8 [h, w] expected")
    picture = Image.fromarray(indices)
    picture.putpalette(list(palette))
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")


def save_gray_png(path: str | os.PathLike[str], ids: np.ndarray) -> None:
    """Write ids, uint8 [h, w], as a PNG file of one channel; as `save_indexed_png` does."""
    with replacing(path) as temporary:
        Image.fromarray(ids).save(temporary, format="PNG")

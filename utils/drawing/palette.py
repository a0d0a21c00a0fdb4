"""Palettes, and class indices as PNG files."""

import os
from collections.abc import Sequence
from itertools import count

import numpy as np
from PIL import Image

from utils.files import replacing


def make_palette(colors: Sequence[tuple[int, int, int]]) -> list[int]:
    """Return the palette of a mode P picture: 768 integers, R G B of index 0, then of index 1, and so on.

    Index i has the color `colors[i]`. The following indices have generated colors, which are the same on
    each call and differ from each other and from the given ones. Index 255 (ignored pixels) is black.

    Raises:
        ValueError: more than 255 colors, or a color that is not three integers in 0..255.
    """
    if len(colors) > 255:
        raise ValueError(f"{len(colors)} colors, but a palette holds 255 and the black of the ignored pixels")
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
    """Distribute the bits of a number over R, G, B in turn, highest bits first, as in PASCAL VOC.

    Numbers below 2**24 give distinct colors. Small numbers differ in the high bits, which are visible.
    """
    channels = [0, 0, 0]
    for bit in range(24):
        channels[bit % 3] |= (number >> bit & 1) << (7 - bit // 3)
    return channels[0], channels[1], channels[2]


def contrast(first: Sequence[int], second: Sequence[int]) -> float:
    """Return the contrast ratio of two RGB colors, from 1 to 21, as WCAG 2 defines it."""
    lighter, darker = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def ink_on(background: Sequence[int]) -> tuple[int, int, int]:
    """Return the color of text on a background: black or white, the one with more contrast."""
    black, white = (0, 0, 0), (255, 255, 255)
    return black if contrast(background, black) >= contrast(background, white) else white


def _luminance(color: Sequence[int]) -> float:
    """Return the relative luminance of an sRGB color, from 0 to 1."""
    channels = [channel / 255 for channel in color]
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def colored(indices: np.ndarray, palette: Sequence[int]) -> np.ndarray:
    """Apply a palette to class indices.

    Args:
        indices: integers [h, w] in 0..255.
        palette: 768 integers (`make_palette`).

    Returns:
        uint8 [h, w, 3] RGB.
    """
    return np.array(palette, np.uint8).reshape(256, 3)[indices]


def save_indexed_png(path: str | os.PathLike[str], indices: np.ndarray, palette: Sequence[int]) -> None:
    """Write class indices as a mode P PNG file. The write is atomic.

    Args:
        path: file to write, in an existing folder. An existing file is replaced.
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
    """Write ids, uint8 [h, w], as a PNG file with one channel. The write is atomic."""
    with replacing(path) as temporary:
        Image.fromarray(ids).save(temporary, format="PNG")

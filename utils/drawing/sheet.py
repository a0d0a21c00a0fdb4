"""Predictions to look at: laid over their pictures, and many of them on one sheet."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils.drawing.palette import colored

#: Of a sheet: pictures at most, their width, pairs in a row; the margin and a line of text, in pixels.
MOST, WIDTH, COLUMNS, MARGIN, LINE = 24, 320, 2, 12, 22


def overlay(
    picture: np.ndarray, classes: np.ndarray, palette: Sequence[int], opacity: float = 0.5
) -> np.ndarray:
    """The colors of the classes over a picture.

    Args:
        picture: uint8 [h, w, 3] RGB.
        classes: uint8 [h, w].
        palette: 768 integers (utils.drawing.palette.make_palette).
        opacity: of the colors, 0 to 1.

    Returns:
        uint8 [h, w, 3] RGB.
    """
    colors = colored(classes, palette)
    # In sixteen bits: 255 * 256 fits, and a picture takes a third of the time and memory of floats.
    share = round(256 * opacity)
    mixed = picture * np.uint16(256 - share) + colors * np.uint16(share) + np.uint16(128)
    return np.right_shift(mixed, 8).astype(np.uint8)


class Sheet:
    """Collects pictures with their overlays, evenly over however many there are, and draws them as one.

    Args:
        names: of the K classes.
        palette: see `overlay`.
        most: pictures on the sheet, at most; an even number.
    """

    def __init__(self, names: Sequence[str], palette: Sequence[int], most: int = MOST):
        self.names = names
        self.palette = palette
        self.most = most
        self._step = 1
        self._seen = 0
        self._kept: list[tuple[str, Image.Image, Image.Image]] = []
        self._classes = np.zeros(256, bool)

    def add(self, name: str, picture: np.ndarray, laid_over: np.ndarray, classes: np.ndarray) -> None:
        """The next picture, uint8 [h, w, 3] RGB, its overlay and its classes, uint8 [h, w]."""
        self._classes |= np.bincount(classes.ravel(), minlength=256) > 0
        if self._seen % self._step == 0:
            if len(self._kept) == self.most:
                # Of those so far every second stays, and of those to come as many.
                self._kept = self._kept[::2]
                self._step *= 2
            if self._seen % self._step == 0:
                self._kept.append((name, _thumbnail(picture), _thumbnail(laid_over)))
        self._seen += 1

    def draw(self) -> Image.Image:
        """Picture and overlay side by side, two pairs in a row, under each pair its name; then the legend."""
        font = ImageFont.load_default(size=13)
        columns = min(COLUMNS, max(1, len(self._kept)))
        pair = 2 * WIDTH + 4
        rows = [self._kept[first : first + columns] for first in range(0, len(self._kept), columns)]
        heights = [max(picture.height for _, picture, _ in row) + LINE + MARGIN for row in rows]
        width = MARGIN + columns * (pair + MARGIN)
        legend = draw_legend(
            [(name, number) for number, name in enumerate(self.names) if self._classes[number]],
            self.palette,
            width - 2 * MARGIN,
        )
        sheet = Image.new("RGB", (width, MARGIN + sum(heights) + legend.height + MARGIN), "white")
        draw = ImageDraw.Draw(sheet)
        top = MARGIN
        for row, height in zip(rows, heights, strict=True):
            for column, (name, picture, laid_over) in enumerate(row):
                left = MARGIN + column * (pair + MARGIN)
                sheet.paste(picture, (left, top))
                sheet.paste(laid_over, (left + WIDTH + 4, top))
                draw.text((left, top + height - MARGIN - LINE + 3), _fitted(name, font, pair), "black", font)
            top += height
        sheet.paste(legend, (MARGIN, top))
        return sheet


def draw_legend(classes: Sequence[tuple[str, int]], palette: Sequence[int], width: int) -> Image.Image:
    """Names and colors of (name, index), in lines of `width` pixels."""
    font = ImageFont.load_default(size=13)
    places: list[tuple[int, int]] = []
    left = top = 0
    for name, _ in classes:
        needed = 20 + int(font.getlength(name)) + 16
        if left and left + needed > width:
            left, top = 0, top + LINE
        places.append((left, top))
        left += needed
    legend = Image.new("RGB", (width, top + LINE), "white")
    draw = ImageDraw.Draw(legend)
    for (name, index), (left, top) in zip(classes, places, strict=True):
        color = tuple(palette[3 * index : 3 * index + 3])
        draw.rectangle((left, top + 3, left + 14, top + 17), fill=color, outline="gray")
        draw.text((left + 20, top + 3), name, "black", font)
    return legend


def _thumbnail(picture: np.ndarray) -> Image.Image:
    image = Image.fromarray(picture)
    height = max(1, min(2 * WIDTH, round(picture.shape[0] * WIDTH / picture.shape[1])))
    width = max(1, min(WIDTH, round(picture.shape[1] * height / picture.shape[0])))
    return image.resize((width, height), Image.Resampling.BOX if image.width > WIDTH else None)


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The end of a name, which tells pictures of a folder apart, where there is no room for all of it."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength("..." + text) > width:
        text = text[1:]
    return "..." + text

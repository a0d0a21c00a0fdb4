"""Predictions laid over their pictures, and contact sheets of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils.drawing.palette import colored

#: Maximum number of pictures on a sheet, and pairs (picture and overlay) in a row.
MOST, COLUMNS = 24, 2
#: Sizes in pixels: width of a picture, margin, line of text, height of letters.
WIDTH, MARGIN, LINE, TEXT = 320, 12, 26, 16
#: Width of a color in the legend, with the space after it.
SWATCH = 24


def overlay(
    picture: np.ndarray, classes: np.ndarray, palette: Sequence[int], opacity: float = 0.5
) -> np.ndarray:
    """Blend the colors of the classes into a picture. Where a class is black, the picture stays as it is.

    Black is the usual color of a background. Blended, it would only darken the picture, so that colors of the
    picture could be taken for those of classes.

    Args:
        picture: uint8 [h, w, 3] RGB.
        classes: uint8 [h, w].
        palette: 768 integers (utils.drawing.palette.make_palette).
        opacity: opacity of the colors, from 0 to 1.

    Returns:
        uint8 [h, w, 3] RGB.
    """
    colors = colored(classes, palette)
    # 255 * 256 fits into 16 bits, which take a third of the time and memory of floats.
    share = round(256 * opacity)
    mixed = picture * np.uint16(256 - share) + colors * np.uint16(share) + np.uint16(128)
    laid_over = np.right_shift(mixed, 8).astype(np.uint8)
    is_black = np.equal(np.array(palette).reshape(256, 3).max(1), 0)
    return np.where(is_black[classes][..., None], picture, laid_over)


class Sheet:
    """A contact sheet: up to `most` pictures, evenly spaced among those added, with their overlays.

    Args:
        names: names of the K classes.
        palette: 768 integers, as for `overlay`.
        most: maximum number of pictures on the sheet; an even number.
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
        """Add a picture.

        Args:
            name: caption.
            picture: uint8 [h, w, 3] RGB.
            laid_over: its overlay, uint8 [h, w, 3] RGB.
            classes: uint8 [h, w].
        """
        self._classes |= np.bincount(classes.ravel(), minlength=256) > 0
        if self._seen % self._step == 0:
            if len(self._kept) == self.most:
                # Keep every second picture so far, and add the next ones at that rate.
                self._kept = self._kept[::2]
                self._step *= 2
            if self._seen % self._step == 0:
                self._kept.append((name, _thumbnail(picture), _thumbnail(laid_over)))
        self._seen += 1

    @property
    def shown(self) -> str:
        """Say how many of the added pictures are on the sheet: "all 3" or "12 of 40"."""
        kept = len(self._kept)
        return f"all {kept}" if kept == self._seen else f"{kept} of {self._seen}"

    def draw(self) -> Image.Image:
        """Draw picture and overlay side by side, two pairs in a row, with names, and the legend below."""
        font = ImageFont.load_default(size=TEXT)
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
                sheet.paste(laid_over, (left + picture.width + 4, top))
                draw.text((left, top + picture.height + 3), _fitted(name, font, pair), "black", font)
            top += height
        sheet.paste(legend, (MARGIN, top))
        return sheet


def draw_legend(classes: Sequence[tuple[str, int]], palette: Sequence[int], width: int) -> Image.Image:
    """Draw the names and colors of classes, in lines of `width` pixels.

    Args:
        classes: (name, index) of each class.
        palette: 768 integers, as for `overlay`.
        width: width of the legend in pixels.
    """
    font = ImageFont.load_default(size=TEXT)
    places: list[tuple[int, int]] = []
    left = top = 0
    classes = [(_fitted(name, font, width - SWATCH), index) for name, index in classes]
    for name, _ in classes:
        needed = SWATCH + int(font.getlength(name)) + 18
        if left and left + needed > width:
            left, top = 0, top + LINE
        places.append((left, top))
        left += needed
    legend = Image.new("RGB", (width, top + LINE), "white")
    draw = ImageDraw.Draw(legend)
    for (name, index), (left, top) in zip(classes, places, strict=True):
        color = tuple(palette[3 * index : 3 * index + 3])
        draw.rectangle((left, top + 4, left + 16, top + 20), fill=color, outline="gray")
        draw.text((left + SWATCH, top + 3), name, "black", font)
    return legend


def _thumbnail(picture: np.ndarray) -> Image.Image:
    image = Image.fromarray(picture)
    height = max(1, min(2 * WIDTH, round(picture.shape[0] * WIDTH / picture.shape[1])))
    width = max(1, min(WIDTH, round(picture.shape[1] * height / picture.shape[0])))
    return image.resize((width, height), Image.Resampling.BOX if image.width > WIDTH else None)


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Shorten a text to `width` pixels; its end stays, which differs between files of a folder."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength("..." + text) > width:
        text = text[1:]
    return "..." + text

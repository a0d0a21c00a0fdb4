"""A confusion matrix as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils.drawing.palette import ink_on

#: Width of a cell in pixels: maximum, minimum, and minimum for a number in it.
CELL, SMALLEST_CELL, NUMBERED_CELL = 44, 12, 22
#: Longest side of the matrix in pixels; cells shrink beyond it.
EXTENT = 3300
MARGIN = 16
#: Maximum number of letters of a class name.
LONGEST_NAME = 60
#: Number of classes from which on the names are repeated on the right and at the bottom.
REPEATED_NAMES = 40
#: Colors of 0 (white) and of 1 (dark blue), and of the rows without pixels.
LOW, HIGH = np.array((255, 255, 255)), np.array((8, 48, 107))
GRAY, EDGE = (205, 205, 205), (228, 228, 228)
#: Shares below it have no number.
SMALLEST_SHARE = 0.005


class _Layout(NamedTuple):
    """Sizes in pixels, and fonts."""

    cell: int
    left: int
    top: int
    label_width: int
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont
    digits: ImageFont.FreeTypeFont | ImageFont.ImageFont


def draw_heat_map(names: Sequence[str], confusion: np.ndarray) -> Image.Image:
    """Draw a confusion matrix with the percentages of each true class in its row.

    Rows of classes that occur in no label are gray.

    Args:
        names: names of the K classes.
        confusion: [K, K] numbers of pixels, rows = ground truth.
    """
    number = len(names)
    names = [name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 3]}..." for name in names]
    totals = confusion.sum(1, keepdims=True)
    shares = confusion / np.maximum(totals, 1)
    lines = [
        "Row: true class. Column: predicted class.",
        "Number: percent of the row, if 0.5 or more.",
    ]
    if not totals.all():
        lines.append("Gray row: the class occurs in no label.")

    cell = max(SMALLEST_CELL, min(CELL, EXTENT // number))
    font = ImageFont.load_default(size=max(10, min(16, cell - 6)))
    text = ImageFont.load_default(size=15)
    label_width = int(max(font.getlength(name) for name in names)) + 10
    heading = MARGIN + 22 * len(lines) + 8
    digits = ImageFont.load_default(size=max(10, min(16, round(0.5 * cell))))
    layout = _Layout(cell, MARGIN + label_width, heading + label_width, label_width, font, digits)
    repeated = label_width if number >= REPEATED_NAMES else 0
    width = max(
        layout.left + number * cell + repeated, MARGIN + int(max(text.getlength(line) for line in lines))
    )
    picture = Image.new("RGB", (width + MARGIN, layout.top + number * cell + repeated + MARGIN), "white")
    draw = ImageDraw.Draw(picture)
    for index, line in enumerate(lines):
        draw.text((MARGIN, MARGIN + 22 * index), line, "black", text)
    for row, name in enumerate(names):
        _draw_names(picture, row, name, number, layout)
        _draw_row(draw, layout, row, shares[row] if totals[row, 0] else None, number)
    return picture


def _draw_names(picture: Image.Image, row: int, name: str, number: int, layout: _Layout) -> None:
    """Write the name of a class at its row and, turned by a quarter, at its column."""
    cell, left, top, label_width, font, _ = layout
    draw = ImageDraw.Draw(picture)
    middle = top + row * cell + cell // 2
    strip = Image.new("RGB", (label_width, cell), "white")
    ImageDraw.Draw(strip).text((6, cell // 2), name, "black", font, anchor="lm")
    draw.text((left - 6, middle), name, "black", font, anchor="rm")
    picture.paste(strip.rotate(90, expand=True), (left + row * cell, top - label_width))
    if number >= REPEATED_NAMES:
        right, bottom = left + number * cell, top + number * cell
        draw.text((right + 6, middle), name, "black", font, anchor="lm")
        strip = Image.new("RGB", (label_width, cell), "white")
        ImageDraw.Draw(strip).text((label_width - 6, cell // 2), name, "black", font, anchor="rm")
        picture.paste(strip.rotate(90, expand=True), (left + row * cell, bottom))


def _draw_row(
    draw: ImageDraw.ImageDraw, layout: _Layout, row: int, shares: np.ndarray | None, number: int
) -> None:
    """Draw the cells of a class; `shares` is None for a class without pixels."""
    cell, y = layout.cell, layout.top + row * layout.cell
    for column in range(number):
        x = layout.left + column * cell
        share = 0.0 if shares is None else float(shares[column])
        color = cell_color(share) if shares is not None else GRAY
        draw.rectangle((x, y, x + cell - 1, y + cell - 1), fill=color, outline=EDGE)
        if cell >= NUMBERED_CELL and share >= SMALLEST_SHARE:
            center = x + cell // 2, y + cell // 2
            draw.text(center, f"{100 * share:.0f}", ink_on(color), layout.digits, anchor="mm")


def cell_color(share: float) -> tuple[int, int, int]:
    """Return the color of a share from 0 to 1, on a square-root scale that makes small ones visible."""
    red, green, blue = np.rint(LOW + (HIGH - LOW) * share**0.5).astype(int).tolist()
    return red, green, blue

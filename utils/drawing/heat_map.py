"""A confusion matrix as a picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

#: Pixels of a cell: the most, the least, and the least with a number in it.
CELL, SMALLEST_CELL, NUMBERED_CELL = 40, 6, 26
#: Longest side of the matrix beyond which cells shrink.
EXTENT = 2000
MARGIN = 16
#: Letters of a name that are shown.
LONGEST_NAME = 60
#: White, the color of 0, to dark blue, that of 1.
LOW, HIGH = np.array((255, 255, 255)), np.array((8, 48, 107))


def draw_heat_map(names: Sequence[str], confusion: np.ndarray) -> Image.Image:
    """Draw a confusion matrix: each row a true class, its cells the per cent predicted as each class.

    Rows of classes that occur in no label are gray.

    Args:
        names: of the K classes.
        confusion: [K, K] numbers of pixels, rows = ground truth.
    """
    number = len(names)
    names = [name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 3]}..." for name in names]
    cell = max(SMALLEST_CELL, min(CELL, EXTENT // number))
    font = ImageFont.load_default(size=max(8, min(15, cell - 2)))
    small = ImageFont.load_default(size=13)
    title_font = ImageFont.load_default(size=18)
    label_width = int(max(font.getlength(name) for name in names)) + 10
    title = (
        "Confusion matrix",
        "rows: true class, columns: predicted class; per cent of the true class's pixels",
    )
    top = MARGIN + 56 + label_width
    left = MARGIN + label_width
    width = max(left + number * cell, MARGIN + int(small.getlength(title[1]))) + MARGIN
    picture = Image.new("RGB", (width, top + number * cell + MARGIN), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((MARGIN, MARGIN), title[0], fill="black", font=title_font)
    draw.text((MARGIN, MARGIN + 28), title[1], fill="black", font=small)

    totals = confusion.sum(1, keepdims=True)
    shares = confusion / np.maximum(totals, 1)
    for row, name in enumerate(names):
        y = top + row * cell
        draw.text((left - 6, y + cell // 2), name, fill="black", font=font, anchor="rm")
        _write_upwards(picture, (left + row * cell, top - 6), cell, name, font, label_width)
        for column in range(number):
            x = left + column * cell
            share = shares[row, column]
            # The root shows what is rare too.
            color = np.rint(LOW + (HIGH - LOW) * share**0.5).astype(int)
            fill = tuple(color.tolist()) if totals[row, 0] else (225, 225, 225)
            draw.rectangle((x, y, x + cell - 1, y + cell - 1), fill=fill, outline=(235, 235, 235))
            if cell >= NUMBERED_CELL and share >= 0.005:
                ink = "white" if share > 0.2 else "black"
                draw.text(
                    (x + cell // 2, y + cell // 2), f"{100 * share:.0f}", fill=ink, font=font, anchor="mm"
                )
    return picture


def _write_upwards(
    picture: Image.Image,
    position: tuple[int, int],
    cell: int,
    text: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    length: int,
) -> None:
    """Write `text` turned by a quarter, beginning at the bottom of a column `cell` wide."""
    strip = Image.new("RGB", (length, cell), "white")
    ImageDraw.Draw(strip).text((0, cell // 2), text, fill="black", font=font, anchor="lm")
    picture.paste(strip.rotate(90, expand=True), (position[0], position[1] - length))

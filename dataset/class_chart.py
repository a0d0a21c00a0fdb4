"""A bar chart of the class frequencies of a data set."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dataset.labels import LabelReader

#: Height of a bar, gap between classes, and length of a bar of 100 percent, in pixels.
BAR, GAP, LENGTH = 15, 9, 560
#: Exponent of the smallest percentage on the logarithmic axis.
LOWEST = -3


def _extent(percent: float) -> int:
    return round(LENGTH * max(math.log10(max(percent, 1e-9)) - LOWEST, 0) / (2 - LOWEST))


def draw_chart(splits: Sequence[tuple[str, np.ndarray]], labels: LabelReader) -> bytes:
    """Draw a bar for each class and split, on a logarithmic axis, and return the PNG file.

    Args:
        splits: name and number of pixels of each train id, int64 [256], of each split.
        labels: reader that gives the names and colors of the classes.
    """
    splits = [(name, pixels) for name, pixels in splits if pixels.any()]
    names = labels.names()
    colors = (labels.colors() + [(90, 90, 90)] * len(names))[: len(names)]
    font, title = ImageFont.load_default(size=14), ImageFont.load_default(size=18)
    left = 24 + int(max(font.getlength(name) for name in names))
    top, block = 78, BAR * max(len(splits), 1) + GAP
    height = top + block * len(names) + 40
    picture = Image.new("RGB", (left + LENGTH + 110, height), "white")
    pen = ImageDraw.Draw(picture)
    pen.text((16, 14), "Pixels of each class", fill="black", font=title)
    order = ", then ".join(name for name, _ in splits)
    said = f"percent of the pixels that are not void, logarithmic scale: {order}"
    pen.text((16, 42), said, fill="black", font=font)
    for power in range(LOWEST, 3):
        x = left + _extent(10.0**power)
        pen.line((x, top - 6, x, height - 34), fill=(222, 222, 222))
        pen.text((x, height - 30), f"{10.0**power:g} %", fill=(110, 110, 110), font=font, anchor="ma")
    for train_id, name in enumerate(names):
        y = top + block * train_id
        pen.text((left - 8, y + (block - GAP) // 2), name, fill="black", font=font, anchor="rm")
        for place, (_, pixels) in enumerate(splits):
            share = 100 * float(pixels[train_id]) / max(int(pixels.sum() - pixels[labels.ignore_label]), 1)
            end = left + _extent(share)
            # Later splits are paler.
            red, green, blue = (
                round(channel + (255 - channel) * 0.35 * min(place, 2)) for channel in colors[train_id]
            )
            box = (left, y + BAR * place, end, y + BAR * (place + 1) - 2)
            pen.rectangle(box, fill=(red, green, blue), outline=(120, 120, 120))
            text = f"{share:.3f} %" if share else "none"
            middle = y + BAR * place + BAR // 2 - 1
            pen.text((end + 6, middle), text, fill="black", font=font, anchor="lm")
    content = io.BytesIO()
    picture.save(content, format="PNG")
    return content.getvalue()

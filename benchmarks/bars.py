"""Charts of horizontal bars, each a stack of segments, as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from utils.files import replacing

#: Width of the chart; left edge and longest length of the bars; height of a bar with its gap.
WIDTH, LEFT, LENGTH, BAR = 960, 290, 540, 26
INK, PALE = (30, 30, 30), (222, 222, 222)
#: Colors of the segments of a bar, in the order of the first bar.
COLORS = (
    *("#1f77b4", "#6ea4cd", "#a8c8e2", "#c8d8e8"),
    *("#d1662b", "#969696", "#2c8c4a", "#8a4fb0", "#d69e60", "#6e6e6e", "#cdcdcd"),
)


class Panel(NamedTuple):
    """Bars with a common scale. All have the same segments, whose lengths are given by name."""

    title: str
    bars: Mapping[str, Mapping[str, float]]


def draw(path: str, lines: Sequence[str], panels: Sequence[Panel]) -> None:
    """Write a chart.

    Args:
        path: PNG file.
        lines: text above the bars; the first line is bold.
        panels: groups of bars, one below the other. Those without bars are left out. A panel whose bars have
            several segments gets a legend of those that occur.
    """
    bold, plain = ImageFont.load_default(17), ImageFont.load_default(14)
    panels = [panel for panel in panels if panel.bars]
    legends = [_legend(panel, plain) for panel in panels]
    heights = [
        64 + BAR * len(panel.bars) + 22 * len(rows) for panel, rows in zip(panels, legends, strict=True)
    ]
    top = 16 + 24 * len(lines)
    picture = Image.new("RGB", (WIDTH, top + sum(heights)), "white")
    canvas = ImageDraw.Draw(picture)
    for number, line in enumerate(lines):
        canvas.text((16, 10 + 24 * number), line, INK, plain if number else bold)
    for panel, rows, height in zip(panels, legends, heights, strict=True):
        canvas.text((16, top + 10), panel.title, INK, bold)
        for row, placed in enumerate(rows):
            for x, name, color in placed:
                y = top + 46 + 22 * row
                canvas.rectangle((x, y - 6, x + 12, y + 6), color)
                canvas.text((x + 18, y), name, INK, plain, anchor="lm")
        first = top + 38 + 22 * len(rows)
        scale = LENGTH / max(sum(bar.values()) for bar in panel.bars.values())
        for number, (name, bar) in enumerate(panel.bars.items()):
            middle, at = first + BAR * number + BAR // 2, float(LEFT)
            canvas.text((LEFT - 8, middle), name, INK, plain, anchor="rm")
            for color, value in zip(COLORS, bar.values(), strict=False):
                end = at + scale * value
                if round(end) > round(at):
                    canvas.rectangle((round(at), middle - 9, round(end) - 1, middle + 9), color)
                at = end
            canvas.text((at + 8, middle), f"{sum(bar.values()):.4g}", INK, plain, anchor="lm")
        canvas.line((LEFT, first, LEFT, first + BAR * len(panel.bars)), PALE)
        top += height
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")


def _legend(
    panel: Panel, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> list[list[tuple[float, str, str]]]:
    """Return place, name and color of each segment, in rows; no rows if the bars have one segment."""
    names = list(next(iter(panel.bars.values())))
    if len(names) == 1:
        return []
    rows: list[list[tuple[float, str, str]]] = [[]]
    at = 16.0
    for name, color in zip(names, COLORS, strict=False):
        if not any(bar[name] for bar in panel.bars.values()):
            continue
        length = 18 + font.getlength(name)
        if at + length > WIDTH - 16:
            rows.append([])
            at = 16.0
        rows[-1].append((at, name, color))
        at += length + 20
    return rows

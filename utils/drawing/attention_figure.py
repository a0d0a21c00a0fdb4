"""Attention maps over the picture that they belong to, as in figure 6 of the paper."""

from __future__ import annotations

import math
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

#: Minimum width of a panel, and maximum length of its longer side, in pixels.
WIDTH, LONGEST = 280, 4096
#: Maximum number of pixels of a figure.
MOST_PIXELS = 48_000_000
#: Text and lines are sized for a figure that is shown at most this wide and high.
VIEW_WIDTH, VIEW_HEIGHT = 1200, 900
#: Sizes in a figure shown at that size: text, gap between panels, minimum width for a caption.
TEXT, GAP, CAPTION_WIDTH = 15, 6, 190
#: Aspect ratio (width / height) that the layout of the panels tries to reach.
ASPECT = 2.5


class Panel(NamedTuple):
    """A picture with the marked pixel, and its caption."""

    caption: str
    image: Image.Image


def draw_attention(
    picture: np.ndarray, pixel: tuple[int, int], maps: np.ndarray, class_name: str = ""
) -> Image.Image:
    """Draw a picture with a cross at a pixel, and the attention maps of that pixel over the picture.

    Captions and the cross grow with the figure, so that they remain legible when it is scaled to a screen.
    Panels are placed side by side, or below each other if the picture is very wide.

    Args:
        picture: uint8 [h, w, 3] RGB.
        pixel: (row, column) in the picture.
        maps: float [R, H, W], the weights after each recurrence, aligned with the picture at the corners.
        class_name: name of the pixel's class, shown in the first caption.
    """
    height, width = panel_size(picture.shape[:2], 1 + len(maps))
    columns = _columns(1 + len(maps), width / height)
    rows = math.ceil((1 + len(maps)) / columns)
    view = max(1.0, columns * width / VIEW_WIDTH, rows * height / VIEW_HEIGHT)
    panels = draw_panels(picture, pixel, maps, class_name, view)

    font = ImageFont.load_default(size=round(TEXT * view))
    gap = round(GAP * view)
    cell = max(width, round(CAPTION_WIDTH * view))
    captions = [_wrap(panel.caption, font, cell) for panel in panels]
    line = round(1.3 * TEXT * view)
    caption_height = line * max(map(len, captions)) + round(0.3 * line)
    size = (columns * (cell + gap) - gap, rows * (height + caption_height))
    figure = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(figure)
    for number, (panel, lines) in enumerate(zip(panels, captions, strict=True)):
        left = number % columns * (cell + gap)
        top = number // columns * (height + caption_height)
        figure.paste(panel.image, (left, top))
        for row, text in enumerate(lines):
            draw.text((left, top + height + round(0.15 * line) + row * line), text, "black", font)
    return figure


def draw_panels(
    picture: np.ndarray,
    pixel: tuple[int, int],
    maps: np.ndarray,
    class_name: str = "",
    view: float | None = None,
) -> list[Panel]:
    """Draw the panels of `draw_attention`, each as a picture of its own.

    A map is shown relative to its largest weight, on a square-root scale that makes small weights visible.

    Args:
        picture: uint8 [h, w, 3] RGB.
        pixel: (row, column) in the picture.
        maps: float [R, H, W], the weights after each recurrence.
        class_name: name of the pixel's class, shown in the first caption.
        view: size of the cross, relative to that in a panel 400 pixels wide. By default it is derived from
            the size of the panel.
    """
    height, width = panel_size(picture.shape[:2], 1 + len(maps))
    factor = width / picture.shape[1]
    interpolation = cv2.INTER_NEAREST if factor > 1 else cv2.INTER_AREA
    scaled = cv2.resize(picture, (width, height), interpolation=interpolation)
    center = [
        min(int((at + 0.5) * new / old), new - 1)
        for at, new, old in zip(pixel, (height, width), picture.shape[:2], strict=True)
    ]
    caption = f"pixel: row {pixel[0]}, column {pixel[1]}"
    panels = [(f"{caption} ({class_name})" if class_name else caption, scaled)]
    for recurrence, weights in enumerate(maps, 1):
        laid_over = _laid_over(scaled, np.asarray(weights, np.float32))
        panels.append((f"R = {recurrence}: largest weight {weights.max():.3g}", laid_over))
    if view is None:
        view = max(1.0, width / 400, height / 400)
    return [
        Panel(text, _marked(Image.fromarray(array), center[0], center[1], view)) for text, array in panels
    ]


def panel_size(size: tuple[int, int], number: int) -> tuple[int, int]:
    """Return (height, width) of the panels for a picture of `size` (height, width).

    Small pictures are enlarged by whole numbers. Large ones are reduced.

    Args:
        size: height and width of the picture.
        number: panels in the figure.
    """
    height, width = size
    factor = min(max(1.0, float(-(-WIDTH // width))), max(1.0, LONGEST // max(height, width)))
    factor = min(factor, LONGEST / max(height, width), math.sqrt(MOST_PIXELS / (number * height * width)))
    return max(1, round(height * factor)), max(1, round(width * factor))


def _columns(number: int, aspect: float) -> int:
    """Return the number of panels in a row that brings the figure closest to ASPECT without empty places."""
    full = [columns for columns in range(1, number + 1) if number % columns == 0]
    candidates = full if number <= 4 else range(1, number + 1)
    return min(
        candidates, key=lambda columns: abs(math.log(columns * aspect / -(-number // columns) / ASPECT))
    )


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Split text into lines that fit into `width` pixels, at spaces."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _laid_over(picture: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Color the picture by the weights; where they are small, it shows through in gray."""
    weights = np.nan_to_num(weights)  # a diverged network gives NaN, drawn as 0
    strength = np.sqrt(weights / max(float(weights.max()), 1e-12))
    rows, columns = (
        np.linspace(0, few - 1, many, dtype=np.float32)
        for few, many in zip(weights.shape, picture.shape[:2], strict=True)
    )
    strength = cv2.remap(strength, *np.meshgrid(columns, rows), interpolation=cv2.INTER_LINEAR)[..., None]
    heat = cv2.applyColorMap(np.rint(255 * strength).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]
    gray = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)[..., None].astype(np.float32)
    return np.clip(0.45 * gray * (1 - strength) + heat * (0.25 + 0.75 * strength), 0, 255).astype(np.uint8)


def _marked(image: Image.Image, row: int, column: int, view: float) -> Image.Image:
    """Draw a white cross with a dark edge, visible on any background."""
    draw = ImageDraw.Draw(image)
    arm, line, edge = 10 * view, max(2, round(2 * view)), max(1, round(1.5 * view))
    # Rectangles: thick lines of ImageDraw are off by a pixel.
    for color, extra in (("black", edge), ("white", 0)):
        for across, down in ((arm, line / 2), (line / 2, arm)):
            box = (
                round(column - across - extra),
                round(row - down - extra),
                round(column + across + extra) - 1,
                round(row + down + extra) - 1,
            )
            draw.rectangle(box, fill=color)
    return image

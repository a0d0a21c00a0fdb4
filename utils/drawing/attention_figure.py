"""Attention maps over the picture that they belong to, as in the paper's figure 6."""

from __future__ import annotations

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

#: Width that a panel has at least, its longest side at most, and the height of its caption.
WIDTH, LONGEST, CAPTION = 280, 4096, 24


def draw_attention(picture: np.ndarray, pixel: tuple[int, int], maps: np.ndarray) -> Image.Image:
    """The picture with a cross at the pixel, and beside it each map laid over it.

    A map is shown relative to its largest weight, by the root, so that small weights are seen too.

    Args:
        picture: uint8 [h, w, 3] RGB.
        pixel: (row, column) in it.
        maps: float [R, H, W], the weights after each recurrence, corners aligned with the picture's.
    """
    height, width = picture.shape[:2]
    # Small pictures are enlarged, by whole numbers, and large ones reduced.
    factor = min(max(1.0, float(-(-WIDTH // width))), max(1.0, LONGEST // max(height, width)))
    factor = min(factor, LONGEST / max(height, width))
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    interpolation = cv2.INTER_NEAREST if factor > 1 else cv2.INTER_AREA
    enlarged = cv2.resize(picture, size, interpolation=interpolation) if factor != 1 else picture
    center = [int((at + 0.5) * factor) for at in pixel]
    font = ImageFont.load_default(size=15)

    panels = [("picture", enlarged)]
    for recurrence, weights in enumerate(maps, 1):
        laid_over = _laid_over(enlarged, np.asarray(weights, np.float32))
        panels.append((f"R = {recurrence}: largest weight {weights.max():.3g}", laid_over))
    gap = 6
    figure = Image.new("RGB", (len(panels) * (size[0] + gap) - gap, size[1] + CAPTION), "white")
    for number, (caption, panel) in enumerate(panels):
        left = number * (size[0] + gap)
        image = Image.fromarray(panel)
        _draw_cross(image, center[0], center[1])
        figure.paste(image, (left, 0))
        ImageDraw.Draw(figure).text((left + 2, size[1] + 3), caption, "black", font)
    return figure


def _laid_over(picture: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Bright where the weight is large, the gray picture shining through where it is not."""
    weights = np.nan_to_num(weights)  # NaN, of a network that has diverged, is not shown
    strength = np.sqrt(weights / max(float(weights.max()), 1e-12))
    rows, columns = (
        np.linspace(0, few - 1, many, dtype=np.float32)
        for few, many in zip(weights.shape, picture.shape[:2], strict=True)
    )
    strength = cv2.remap(strength, *np.meshgrid(columns, rows), interpolation=cv2.INTER_LINEAR)[..., None]
    heat = cv2.applyColorMap(np.rint(255 * strength).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]
    gray = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)[..., None].astype(np.float32)
    return np.clip(0.45 * gray * (1 - strength) + heat * (0.25 + 0.75 * strength), 0, 255).astype(np.uint8)


def _draw_cross(image: Image.Image, row: int, column: int) -> None:
    """White with a dark edge, to be seen on any ground."""
    draw = ImageDraw.Draw(image)
    arm = max(6, image.width // 40)
    for color, width in (("black", 5), ("white", 2)):
        draw.line((column - arm, row, column + arm, row), fill=color, width=width)
        draw.line((column, row - arm, column, row + arm), fill=color, width=width)

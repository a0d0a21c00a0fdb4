"""A reliability plot: accuracy over confidence."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

#: Side of the plot and height of the bars below it, in pixels; margins on the left, right, top and bottom.
SIDE, SHARES, LEFT, RIGHT, TOP, BOTTOM = 450, 90, 64, 20, 70, 50
GAP = 44
BLUE, ORANGE, GRAY, LINE = (31, 111, 180), (209, 102, 43), (150, 150, 150), (228, 228, 228)


def draw_reliability(
    pixels: Sequence[float], correct: Sequence[float], confidence: Sequence[float]
) -> Image.Image:
    """Draw the accuracy of each bin of confidence, and below it the share of its pixels.

    A point per bin stands at its mean confidence and its accuracy. Calibrated confidences lie on the
    diagonal; below it, the network is too confident.

    Args:
        pixels: number of pixels of each of M bins of equal width, from confidence 0 to 1.
        correct: number of those that are predicted correctly.
        confidence: sum of their confidences.
    """
    number, total = len(pixels), sum(pixels)
    width = LEFT + SIDE + RIGHT
    picture = Image.new("RGB", (width, TOP + SIDE + GAP + SHARES + BOTTOM), "white")
    draw = ImageDraw.Draw(picture)
    font, small = ImageFont.load_default(size=15), ImageFont.load_default(size=13)
    draw.text((16, 12), "Bar: accuracy of the pixels of a bin of confidence.", "black", font)
    draw.text((16, 32), "Point: their mean confidence. Line: accuracy = confidence.", "black", font)
    base, bottom = TOP + SIDE, TOP + SIDE + GAP + SHARES

    def x_of(value: float) -> float:
        return LEFT + SIDE * value

    for tick in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        draw.line((LEFT, base - SIDE * tick, LEFT + SIDE, base - SIDE * tick), fill=LINE)
        draw.text((LEFT - 8, base - SIDE * tick), f"{tick:.1f}", "black", small, anchor="rm")
        for low in (base, bottom):
            draw.text((x_of(tick), low + 6), f"{tick:.1f}", "black", small, anchor="mt")
    largest = max(pixels, default=0) or 1
    for index, (count, right) in enumerate(zip(pixels, correct, strict=True)):
        left, end = x_of(index / number) + 1, x_of((index + 1) / number) - 1
        if count:
            draw.rectangle((left, base - SIDE * right / count, end, base), fill=BLUE)
            draw.rectangle((left, bottom - SHARES * count / largest, end, bottom), fill=GRAY)
    draw.line((LEFT, base, LEFT + SIDE, TOP), fill="black", width=2)
    for count, right, summed in zip(pixels, correct, confidence, strict=True):
        if count:
            x, y = x_of(summed / count), base - SIDE * right / count
            draw.ellipse((x - 5, y - 5, x + 5, y + 5), fill=ORANGE, outline="white")
    draw.text(
        (LEFT - 8, bottom - SHARES), f"{100 * largest / max(total, 1):.0f} %", "black", small, anchor="rm"
    )
    draw.text((LEFT, bottom - SHARES - 20), "share of the pixels", "black", small)
    draw.text((x_of(0.5), bottom + 28), "confidence", "black", font, anchor="mt")
    return picture

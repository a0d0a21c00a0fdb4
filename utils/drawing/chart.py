"""Curves as SVG, for an HTML page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

#: Size of a drawing and its margins: small, so that text stays legible on the screen of a phone.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 250, 78, 14, 12, 44
#: Height of the legend, and width that is estimated for a letter.
LEGEND, LETTER = 22, 7.2
#: Maximum number of points of a curve; longer curves are averaged.
POINTS = 400
#: Maximum number of ticks of the axes.
X_TICKS, Y_TICKS = 6, 5
COLORS = ("#1f6fb4", "#d1662b", "#2c8c4a", "#8a4fb0")


class _Axes(NamedTuple):
    """Ranges of the axes, and the place of the plot in the drawing."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    top: int

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return the place of a point in the drawing."""
        across = LEFT + (x - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)
        down = self.top + (self.y_high - y) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)
        return round(across, 1), round(down, 1)


def draw_curves(
    curves: Mapping[str, Sequence[tuple[float, float]]], x_title: str = "step", y_title: str = ""
) -> str:
    """Draw curves with axes, and a legend if there are several.

    Args:
        curves: (x, y) of the points of each curve by name, ordered by x. Values that are not finite are left
            out, and so are curves without values.
        x_title: title of the horizontal axis.
        y_title: title of the vertical axis.

    Returns:
        An <svg> element, or an empty string if there is nothing to draw.
    """
    kept = {
        name: _thinned([(x, y) for x, y in points if math.isfinite(y)], POINTS)
        for name, points in curves.items()
    }
    kept = {name: points for name, points in kept.items() if points}
    if not kept:
        return ""
    legend = LEGEND if len(kept) > 1 else 0
    axes = _axes_of([point for points in kept.values() for point in points], TOP + legend)
    label = ", ".join(kept) if legend else y_title or next(iter(kept))
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT + legend}" role="img" aria-label="{escape(label)}">']
    if legend:
        parts += _legend(list(kept))
    parts += _grid(axes)
    bottom = axes.top + HEIGHT - TOP - BOTTOM
    middle = (LEFT + WIDTH - RIGHT) / 2, (axes.top + bottom) / 2
    parts.append(f'<text x="{middle[0]}" y="{bottom + 38}" text-anchor="middle">{escape(x_title)}</text>')
    if y_title:
        parts.append(
            f'<text x="13" y="{middle[1]}" text-anchor="middle" transform="rotate(-90 13 {middle[1]})">'
            f"{escape(y_title)}</text>"
        )
    for number, (name, points) in enumerate(kept.items()):
        parts += _curve(name, points, axes, COLORS[number % len(COLORS)])
    return "".join([*parts, "</svg>"])


def _axes_of(points: Sequence[tuple[float, float]], top: int) -> _Axes:
    """Return axes that hold all points, with a margin above and below."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    y_low, y_high = min(ys), max(ys)
    margin = 0.05 * (y_high - y_low) or abs(y_high) * 0.1 or 1.0
    return _Axes(min(xs), max(max(xs), min(xs) + 1), y_low - margin, y_high + margin, top)


def _legend(names: Sequence[str]) -> list[str]:
    """Draw a line of color and name of each curve."""
    parts, left = [], float(LEFT)
    for number, name in enumerate(names):
        color = COLORS[number % len(COLORS)]
        parts.append(
            f'<line x1="{left:.0f}" x2="{left + 16:.0f}" y1="{TOP}" y2="{TOP}" stroke="{color}" '
            f'stroke-width="3"/><text x="{left + 21:.0f}" y="{TOP + 4}">{escape(name)}</text>'
        )
        left += 38 + LETTER * len(name)
    return parts


def _grid(axes: _Axes) -> list[str]:
    """Draw the horizontal lines and the numbers of both axes."""
    parts = []
    for tick in _ticks(axes.y_low, axes.y_high, Y_TICKS):
        _, y = axes.at(axes.x_low, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{_number(tick)}</text>')
    for tick in _ticks(axes.x_low, axes.x_high, X_TICKS):
        x, y = axes.at(tick, axes.y_low)
        # A number at the right edge would be cut.
        anchor = "end" if x > WIDTH - RIGHT - 8 and len(_number(tick)) > 3 else "middle"
        shift = RIGHT if anchor == "end" else 0
        parts.append(f'<text x="{x + shift}" y="{y + 18}" text-anchor="{anchor}">{_number(tick)}</text>')
    return parts


def _curve(name: str, points: Sequence[tuple[float, float]], axes: _Axes, color: str) -> list[str]:
    """Draw a line, and its points if they are few."""
    places = [axes.at(x, y) for x, y in points]
    path = " ".join(f"{x},{y}" for x, y in places)
    parts = [f'<polyline fill="none" stroke="{color}" stroke-width="1.8" points="{path}"/>']
    if len(places) <= 60:
        for (x, y), (step, value) in zip(places, points, strict=True):
            title = f"<title>{escape(name)}, step {step:g}: {value:.5g}</title>"
            parts.append(f'<circle cx="{x}" cy="{y}" r="2.5" fill="{color}">{title}</circle>')
    return parts


def _number(value: float) -> str:
    """Write the number of a tick: 60000 as 60k."""
    if value and abs(value) >= 10000 and value % 100 == 0 and abs(value) < 1e7:
        return f"{value / 1000:.6g}k"
    return f"{value:.6g}"


def _thinned(points: list[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """Reduce points to at most `most`, each the mean of a run of neighbors at the last step of the run."""
    run = -(-len(points) // most) if points else 1
    groups = [points[first : first + run] for first in range(0, len(points), run)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Return at most `most` + 1 round numbers between two numbers."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]

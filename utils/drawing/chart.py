"""Curves as SVG, to stand within an HTML page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

#: Of the drawing; its edges; at most so many points of a curve, each the mean of its neighbors.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 240, 64, 12, 12, 28
POINTS = 400
COLORS = ("#1f6fb4", "#d1662b", "#2c8c4a", "#8a4fb0")


def draw_curves(curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Lines over steps, with axes and a legend.

    Args:
        curves: of each name its (step, value), in the order of the steps; values that are not finite are left
            out. One without values is not drawn.

    Returns:
        An <svg> element; an empty text where there is nothing to draw.
    """
    kept = {
        name: _thinned([(x, y) for x, y in points if math.isfinite(y)], POINTS)
        for name, points in curves.items()
    }
    kept = {name: points for name, points in kept.items() if points}
    if not kept:
        return ""
    xs = [x for points in kept.values() for x, _ in points]
    ys = [y for points in kept.values() for _, y in points]
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    y_low, y_high = min(ys), max(ys)
    margin = 0.05 * (y_high - y_low) or abs(y_high) * 0.1 or 1.0
    y_low, y_high = y_low - margin, y_high + margin

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        down = TOP + (y_high - y) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        return round(across, 1), round(down, 1)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(", ".join(kept))}">']
    for tick in _ticks(y_low, y_high, 5):
        _, y_at = at(x_low, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_at}" y2="{y_at}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y_at + 4}" text-anchor="end">{tick:.6g}</text>')
    for tick in _ticks(x_low, x_high, 7):
        x_at, _ = at(tick, y_low)
        parts.append(f'<text x="{x_at}" y="{HEIGHT - 8}" text-anchor="middle">{tick:.6g}</text>')
    for number, (name, points) in enumerate(kept.items()):
        color = COLORS[number % len(COLORS)]
        places = [at(x, y) for x, y in points]
        path = " ".join(f"{x},{y}" for x, y in places)
        parts.append(f'<polyline fill="none" stroke="{color}" stroke-width="1.8" points="{path}"/>')
        if len(places) <= 60:
            for (x, y), (step, value) in zip(places, points, strict=True):
                title = f"<title>{escape(name)}, step {step:g}: {value:.5g}</title>"
                parts.append(f'<circle cx="{x}" cy="{y}" r="2.5" fill="{color}">{title}</circle>')
        if len(kept) > 1:
            y_at = TOP + 14 + 18 * number
            parts.append(
                f'<line x1="{WIDTH - 170}" x2="{WIDTH - 150}" y1="{y_at - 4}" y2="{y_at - 4}" '
                f'stroke="{color}" stroke-width="3"/><text x="{WIDTH - 144}" y="{y_at}">{escape(name)}</text>'
            )
    return "".join([*parts, "</svg>"])


def _thinned(points: list[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most so many, each the mean of a run of neighbors; the last step stays."""
    run = -(-len(points) // most) if points else 1
    groups = [points[first : first + run] for first in range(0, len(points), run)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers between two, at most `most` + 1."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]

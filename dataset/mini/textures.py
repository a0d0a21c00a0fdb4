"""Procedural materials of the generated street scenes.

A material is a function `(s, t) -> BGR float32 [3, h, w]` of two coordinate arrays in meters that broadcast
to [h, w]. Per pixel, only sums, products, quotients and table lookups are computed. They are rounded
identically on all machines, unlike sines and exponentials, so the same seed gives the same picture
everywhere.
"""

import colorsys
from collections.abc import Callable

import numpy as np

Color = np.ndarray  # BGR float32 [3, 1, 1], 0..255
Material = Callable[[np.ndarray, np.ndarray], np.ndarray]

_LATTICE = 64  # side of a noise table; the noise repeats after this number of cells


def bgr(blue: float, green: float, red: float) -> Color:
    """Return a color."""
    return np.array([blue, green, red], dtype=np.float32).reshape(3, 1, 1)


def color(rng: np.random.Generator, hue: tuple, saturation: tuple, value: tuple) -> Color:
    """Draw a color from ranges of hue, saturation and value, each in 0..1; the hue wraps around."""
    red, green, blue = colorsys.hsv_to_rgb(
        rng.uniform(*hue) % 1.0, rng.uniform(*saturation), rng.uniform(*value)
    )
    return bgr(blue, green, red) * 255


def anything(rng: np.random.Generator) -> Color:
    """Draw a color of paint or cloth: often gray, black or white, otherwise of any hue."""
    if rng.random() < 0.45:
        return color(rng, (0, 1), (0, 0.12), (0.08, 0.95))
    return color(rng, (0, 1), (0.3, 0.9), (0.25, 0.9))


def mostly(
    rng: np.random.Generator, hue: tuple, saturation: tuple, value: tuple, share: float = 0.75
) -> Color:
    """Draw a color from typical ranges with probability `share`, otherwise with `anything`."""
    return color(rng, hue, saturation, value) if rng.random() < share else anything(rng)


def fraction(x: np.ndarray) -> np.ndarray:
    """Return the fractional part."""
    return x - np.floor(x)


class Noise:
    """Smooth value noise in 0..1 on a random lattice with one cell per unit length."""

    def __init__(self, rng: np.random.Generator):
        self.table = rng.random((_LATTICE, _LATTICE), dtype=np.float32)
        # Wrap around, to get the neighbors of the last row and column.
        wrapped = np.pad(self.table, ((0, 1), (0, 1)), mode="wrap")
        self._corners = [
            np.ascontiguousarray(wrapped[r : r + _LATTICE, c : c + _LATTICE]).ravel()
            for r in (0, 1)
            for c in (0, 1)
        ]

    def __call__(self, s: np.ndarray, t: np.ndarray) -> np.ndarray:
        """Return the noise at (s, t), interpolated smoothly between cells."""
        column, row = np.floor(s), np.floor(t)
        right, below = s - column, t - row
        right, below = right * right * (3 - 2 * right), below * below * (3 - 2 * below)
        index = (row.astype(np.int32) % _LATTICE) * _LATTICE + column.astype(np.int32) % _LATTICE
        upper_left, upper_right, lower_left, lower_right = (corner.take(index) for corner in self._corners)
        upper = upper_left + (upper_right - upper_left) * right
        lower = lower_left + (lower_right - lower_left) * right
        return upper + (lower - upper) * below

    def cell(self, s: np.ndarray, t: np.ndarray) -> np.ndarray:
        """Return the value of the cell that contains (s, t): one value per brick, tile or window."""
        return self.table[np.floor(t).astype(np.int64) % _LATTICE, np.floor(s).astype(np.int64) % _LATTICE]


def _tinted(base: Color, brightness: np.ndarray) -> np.ndarray:
    return base * brightness.astype(np.float32, copy=False)


def _mixed(first: np.ndarray, second: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Interpolate from `first` (weight 0) to `second` (weight 1)."""
    return first + (second - first) * weight.astype(np.float32, copy=False)


def gradient(base: Color, height: float, low: float = 0.75, high: float = 1.15) -> Material:
    """Return a material: plain paint or cloth, lit from above."""

    def material(s, t):
        return _tinted(base, low + (high - low) * np.clip((t + 0 * s) / height, 0, 1))

    return material


def facade(rng: np.random.Generator, base: Color, story: float) -> Material:
    """Return a material: plaster with a grid of framed windows; some mirror the sky, and some are lit."""
    bay, grain = rng.uniform(1.7, 2.8), Noise(rng)
    wide, tall = rng.uniform(0.4, 0.62), rng.uniform(0.45, 0.65)
    glass = (
        color(rng, (0.5, 0.68), (0.05, 0.4), (0.08, 0.35))
        if rng.random() < 0.75
        else color(rng, (0.5, 0.65), (0.05, 0.4), (0.7, 1))
    )
    frame = np.clip(base * (1.45 if rng.random() < 0.6 else 0.55), 10, 245)
    lit, border, bands = rng.uniform(0, 0.25), rng.uniform(0.05, 0.1), rng.random() < 0.4
    lamp = bgr(130, 205, 245)

    def material(s, t):
        across, up = fraction(s / bay), fraction((t - 0.3) / story)
        from_middle_s, from_middle_t = np.abs(across - 0.5) * 2, np.abs(up - 0.5) * 2
        framed = (from_middle_s < wide + 2 * border) & (from_middle_t < tall + 2 * border)
        pane = (from_middle_s < wide) & (from_middle_t < tall) & (from_middle_s > 0.07)
        key = grain.cell(s / bay, (t - 0.3) / story)
        surface = _tinted(base, 0.9 + 0.2 * grain(s * 0.7, t * 0.7))
        if bands:
            surface = _tinted(surface, np.where(up + 0 * s < 0.1, 0.7, 1.0))
        surface = np.where(framed, frame, surface)
        shine = 0.7 + 0.6 * key + 0.4 * (up - 0.5)
        return np.where(pane, np.where(key < lit, lamp, _tinted(glass, shine)), surface)

    return material


def bricks(rng: np.random.Generator, base: Color) -> Material:
    """Return a material: bricks in running bond with joints."""
    length, height, grain = rng.uniform(0.55, 0.85), rng.uniform(0.26, 0.36), Noise(rng)
    joint = np.clip(base * (1.7 if rng.random() < 0.6 else 0.45), 20, 235)

    def material(s, t):
        course = t / height
        along = s / length + 0.5 * (np.floor(course) % 2)
        mortar = (fraction(along) < 0.14) | (fraction(course) < 0.24)
        return np.where(mortar, joint, _tinted(base, 0.65 + 0.6 * grain.cell(along, course + 0 * s)))

    return material


def slabs(rng: np.random.Generator, base: Color) -> Material:
    """Return a material: smooth concrete panels with stains and a wide grid of dark joints."""
    length, height, grain = rng.uniform(1.2, 2.0), rng.uniform(0.7, 1.1), Noise(rng)

    def material(s, t):
        joint = (fraction(s / length) < 0.07) | (fraction(t / height) < 0.12)
        stain = 0.8 + 0.3 * grain(s * 2.5, t * 0.4) + 0.15 * grain.cell(s / length, t / height)
        return _tinted(base, np.where(joint, 0.5, stain))

    return material


def leaves(rng: np.random.Generator, base: Color, size: float) -> Material:
    """Return a material: foliage in clumps of `size` meters with dark gaps and single leaves."""
    clumps, leaf = Noise(rng), Noise(rng)
    warm = np.clip(base * bgr(0.75, 1.1, rng.uniform(0.9, 1.5)), 0, 255)

    def material(s, t):
        clump = clumps(s / size, t / size)
        fine = leaf(s / (0.3 * size), t / (0.3 * size))
        light = 0.25 + 1.0 * clump * (0.35 + 1.0 * fine) + 0.45 * (fine > 0.62)
        return _mixed(_tinted(base, light), _tinted(warm, light), clump)

    return material


def grass(rng: np.random.Generator, base: Color) -> Material:
    """Return a material: grass or bare earth, with short vertical strokes over wide patches."""
    blade, patch = Noise(rng), Noise(rng)
    dry = np.clip(base * bgr(0.8, 0.95, 1.3), 0, 255)

    def material(s, t):
        light = 0.6 + 0.75 * blade(s * 9, t * 2.2)
        return _mixed(_tinted(base, light), _tinted(dry, light), patch(s * 0.4, t * 0.4))

    return material


def asphalt(rng: np.random.Generator, base: Color) -> Material:
    """Return a material: asphalt with fine grain, worn tracks along the road, and a few dark patches."""
    grain, wear = Noise(rng), Noise(rng)

    def material(s, t):
        light = 0.88 + 0.14 * grain(s * 13, t * 9) + 0.2 * (wear(s * 0.8, t * 0.08) - 0.4)
        return _tinted(base, light - 0.12 * (wear(s * 0.5 + 20, t * 0.35) > 0.78))

    return material


def paving(rng: np.random.Generator, base: Color) -> Material:
    """Return a material: square or rectangular paving slabs with dark joints and uneven tones."""
    wide, deep, grain = rng.uniform(0.5, 0.8), rng.uniform(0.6, 1.1), Noise(rng)
    contrast = rng.uniform(0.25, 0.45)
    bond = 0.5 * (rng.random() < 0.5)

    def material(s, t):
        row = t / deep
        column = s / wide + bond * (np.floor(row) % 2)
        joint = (fraction(column) < 0.14) | (fraction(row) < 0.16)
        return _tinted(
            base, np.where(joint, 0.5, 1 - contrast / 2 + contrast * grain.cell(column, row + 0 * s))
        )

    return material


def stripes(base: Color, other: Color, period: float, share: float, upright: bool) -> Material:
    """Return a material: alternating stripes of two colors.

    Args:
        base: first color.
        other: second color.
        period: width of a pair of stripes in meters.
        share: share of `other` in the period.
        upright: whether stripes are vertical, like the ribs of a container, or horizontal, like boards.
    """

    def material(s, t):
        along = fraction((s if upright else t) / period) + 0 * s + 0 * t
        return np.where(along < share, other, base)

    return material


def cloudy(rng: np.random.Generator, zenith: Color, low: Color, cover: float) -> Material:
    """Return a material: sky from `low` at t = 0 to `zenith` at t = 1, with clouds over a share `cover`."""
    cloud = Noise(rng)
    bright = np.clip((zenith + low) / 2 * 0.6 + 90, 0, 255)

    def material(s, t):
        shape = 0.65 * cloud(s * 2, t * 6) + 0.35 * cloud(s * 5, t * 14)
        clear = _mixed(low, zenith, np.clip(t + 0 * s, 0, 1))
        return _mixed(clear, bright, np.clip((shape - 1 + cover) * 4, 0, 1) * 0.8)

    return material
